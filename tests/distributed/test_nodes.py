"""Two machines, played by two torchrun agents on the loopback interface with two processes each; and a disk as memory."""
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from fengshen.training.checkpoint import checkpoints
from tests.invariant.test_resume import settings
from tests.training_runs import QUIET, apart, cli, environment, fit, fit_here, flags, series, tiny_config, weights, weights_apart

pytestmark = pytest.mark.slow


def free_port():
    "A port nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_nodes(run, given, port):
    "Two torchrun agents; the list of their processes."
    train = ["-m", "fengshen.cli.main", "fit", "-c", "demo", *flags(QUIET | {"run_dir": str(run)} | given)]
    agents = []
    for node in range(2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
                    "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test", "--node_rank", str(node)]
        with open(run.parent / f"{run.name}-{node}.log", "a") as log:
            agents.append(subprocess.Popen([*torchrun, *train], cwd=run.parent, env=environment(), stdout=log, stderr=log, start_new_session=True))
    return agents


def family(pid):
    "A process and all below it; torchrun gives its processes sessions of their own."
    below = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(p for child in below for p in family(int(child)))]


def ended(agents, seconds=600):
    "Exit codes, once all have ended."
    return [agent.wait(timeout=seconds) for agent in agents]


GIVEN = {"trainer.strategy": "ddp", "trainer.accelerator": "cpu", "trainer.devices": 2, "trainer.num_nodes": 2, "data.micro_batch": 1, "trainer.accumulate_grad_batches": 1,
         "checkpoint.every_n_steps": 3, "checkpoint.keep": 9, "trainer.max_steps": 10}


@pytest.mark.timeout(1800)
def test_two_machines_are_one(tmp_path):
    "Four processes with one row each make the steps of one process with four rows."
    (tmp_path / "calm").mkdir()
    given = settings(tmp_path, **GIVEN | {"model.config": tiny_config(tmp_path / "calm"), "model.optimizer.eps": 1e-6})
    run = tmp_path / "nodes"
    assert ended(two_nodes(run, given, free_port())) == [0, 0], (tmp_path / "nodes-0.log").read_text()[-3000:]
    one = fit_here(tmp_path / "one", **given | {"trainer.strategy": "auto", "trainer.devices": 1, "trainer.num_nodes": 1, "data.micro_batch": 4})
    assert apart(series(run, "loss"), series(one, "loss")) < 1e-5 and weights_apart(weights(run), weights(one)) < 1e-5


@pytest.mark.timeout(1800)
def test_a_machine_that_dies_ends_the_other_and_the_run_goes_on(tmp_path):
    (tmp_path / "calm").mkdir()
    calm = {"model.config": tiny_config(tmp_path / "calm"), "model.optimizer.eps": 1e-6}
    given = settings(tmp_path, **GIVEN | calm | {"trainer.max_steps": 60})
    straight, run = tmp_path / "straight", tmp_path / "nodes"
    assert ended(two_nodes(straight, given, free_port())) == [0, 0]
    agents = two_nodes(run, given, free_port())
    end = time.monotonic() + 300
    while not checkpoints(run):
        assert time.monotonic() < end and agents[0].poll() is None
        time.sleep(0.01)
    for pid in family(agents[1].pid):
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    assert agents[0].wait(timeout=120) != 0
    assert time.monotonic() - began < 60, "the other machine took more than a minute to notice"
    assert ended(two_nodes(run, given, free_port())) == [0, 0]
    # who is which rank is decided anew at every start, and four numbers are not added in the same order then: equal to rounding, not to the bit
    assert apart(series(run, "loss"), series(straight, "loss")) < 1e-5 and series(run, "tokens") == series(straight, "tokens")


def test_a_launcher_that_does_not_fit_is_named(tmp_path):
    torchrun = dict(TORCHELASTIC_RUN_ID="x", RANK="0", WORLD_SIZE="4", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    done = cli("fit", "-c", "demo", cwd=tmp_path, **torchrun)
    assert done.returncode == 2 and "--trainer.devices 2 --trainer.num_nodes 2" in done.stderr, done.stderr
    done = cli("fit", "-c", "demo", cwd=tmp_path, **torchrun | dict(MASTER_PORT=""))
    assert done.returncode == 2 and "no MASTER_PORT" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def disk(tmp_path):
    "A folder to offload to; skipped where DeepSpeed's file op cannot be had."
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("no libaio: DeepSpeed cannot offload to a disk (apt-get install libaio-dev)")
    (tmp_path / "nvme").mkdir()
    return tmp_path / "nvme"


@pytest.mark.timeout(1800)
def test_a_disk_as_memory_trains_as_one_device(tmp_path, disk):
    "Weights and optimizer states in files: the losses of plain AdamW, an export of the last weights, and no pretended resume."
    steps = {"trainer.max_steps": 12, "model.config": tiny_config(tmp_path, n_embd=128, n_layer=6), "model.optimizer.eps": 1e-6, "data.limit_train": 48, "export": True}
    words = ["fit", "-c", "demo", *flags(QUIET | steps | {"run_dir": str(tmp_path / "run"), "trainer.strategy": "zero3_nvme"})]
    done = cli(*words, cwd=tmp_path, timeout=1200, FENGSHEN_NVME=str(disk))
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(disk.rglob("*.swp")), "nothing was written to the disk"
    run, one = tmp_path / "run", fit(tmp_path / "one", **steps | {"trainer.strategy": "auto"})
    assert apart(series(run, "loss"), series(one, "loss")) < 1e-5
    assert weights_apart(weights(run), weights(one)) < 1e-4  # they moved by up to 0.03, and DeepSpeed's CPU optimizer rounds otherwise than torch's
    (run / "summary.json").unlink()
    again = cli(*words, cwd=tmp_path, FENGSHEN_NVME=str(disk))
    assert again.returncode == 2 and "offloaded to a disk" in again.stderr and "Traceback" not in again.stderr
