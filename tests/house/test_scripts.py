"""The scripts for clusters: they parse, they say what they would run in bash, torchrun and Slurm, and `fengshen fit` knows every word of it."""
import os
import re
import shlex
import subprocess

import pytest

from fengshen.cli.fit import make_cli, split_args
from tools import pages

SCRIPTS = sorted((pages.ROOT / "scripts").glob("*.sh"))
WENZHONG = pages.ROOT / "scripts" / "finetune_wenzhong.sh"
SLURM = dict(SLURM_JOB_ID="123456", SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="4")


def dry_run(*words, folder=None, **variables):
    "The words of the command that the script would run."
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    path = os.pathsep.join(filter(None, [str(folder or ""), os.environ["PATH"]]))
    done = subprocess.run(["bash", WENZHONG, *words], capture_output=True, text=True, env=kept | dict(PATH=path, DRY_RUN="1") | variables)
    assert done.returncode == 0, done.stderr
    # bash's %q writes what is not ASCII as $'\346...', which shlex does not read
    return subprocess.run(["bash", "-c", f"printf '%s\\n' {done.stdout}"], capture_output=True, text=True, check=True).stdout.splitlines()


def value(words, flag):
    "What follows a flag."
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_may_be_started(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK), f"chmod +x {path.name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_slurm_lines_stand_apart(path):
    "sbatch reads them only before the first command, and whoever has no Slurm deletes one block."
    lines = path.read_text("utf-8").splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert directives == list(range(directives[0], directives[-1] + 1)) and directives[-1] < first
    without = "\n".join(line for line in lines if not line.startswith("#SBATCH"))
    subprocess.run(["bash", "-n"], input=without, text=True, check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_knows_no_machine(path):
    text = path.read_text("utf-8")
    folders = "|".join(["home", "work", "data", "mnt", "root"])
    assert not re.search(rf"(?<![\w.])/({folders})\b", text) and "CUDA_VISIBLE_DEVICES" not in text


def test_one_gpu_is_one_process():
    words = dry_run()
    assert words[:4] == ["fengshen", "fit", "-c", "wenzhong_qa_offload"]
    assert value(words, "--trainer.devices") == value(words, "--trainer.num_nodes") == "1" and "--data.valid" not in words


def test_several_gpus_start_torchrun():
    words = dry_run(GPUS="8")
    assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node", "8"] and value(words, "--trainer.devices") == "8"


def test_several_machines_meet_at_the_head():
    words = dry_run(NODES="2", GPUS="8", HEAD="node0", PORT="29501")
    assert value(words, "--rdzv_endpoint") == "node0:29501" and value(words, "--nnodes") == value(words, "--trainer.num_nodes") == "2"


def test_slurm_gives_nodes_devices_and_the_meeting_place(tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node7\necho node8\n")
    (tmp_path / "scontrol").chmod(0o755)
    words = dry_run(folder=tmp_path, **SLURM)
    assert words[0] == "srun" and value(words, "--ntasks") == "2" and value(words, "--ntasks-per-node") == "1"
    assert value(words, "--rdzv_endpoint").split(":")[0] == "node7" and value(words, "--nproc_per_node") == value(words, "--trainer.devices") == "4"


def test_words_pass_through_whole_and_come_last():
    words = dry_run("--trainer.max_epochs", "3", "--data.template", "问：{question} 答：{answer}", TRAIN="有 空格.jsonl", VALID="$(x).jsonl")
    assert words[-4:] == ["--trainer.max_epochs", "3", "--data.template", "问：{question} 答：{answer}"]
    assert value(words, "--data.train") == "有 空格.jsonl" and value(words, "--data.valid") == "$(x).jsonl"


@pytest.mark.parametrize("recipe, more", [("wenzhong_qa_offload", ()), ("wenzhong_qa", ("--trainer.strategy", "zero3"))])
def test_fit_knows_every_word(recipe, more, tmp_path):
    words = dry_run(*more, RECIPE=recipe, RUN_DIR=str(tmp_path))[2:]
    cli = make_cli(*split_args(words))
    assert cli.model.path == "IDEA-CCNL/Wenzhong-GPT2-3.5B" and cli.trainer.strategy.zero["stage"] == 3
    assert cli.trainer.strategy.offload_optimizer == (recipe == "wenzhong_qa_offload")


def test_the_header_names_only_what_is_there():
    text = WENZHONG.read_text("utf-8")
    for line in re.findall(r"`(fengshen [^`]+)`", text):
        assert shlex.split(line)[1] in ("fit", "recipes")
    assert {"DRY_RUN", "HEAD", "GPUS", "NODES"} <= set(re.findall(r"\b([A-Z_]+)=", text))
