"fengshen preprocess under fire: killed, out of room, with several workers, on a Ray cluster: the same bytes, or a message and nothing half-written."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from filelock import FileLock

from fengshen.cli.main import main
from fengshen.data.preprocess import pipeline
from fengshen.data.preprocess.engines import run_processes

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"道可道，非常道。{i % 250}名可名！" * (1 + i % 5) for i in range(400)]  # the last 150 repeat the first


class Characters:
    "What preprocessing asks of a tokenizer, without the seconds that importing transformers takes."

    def __init__(self):
        self.backend_tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate("?|道可非常名，。！0123456789")}, unk_token="?"))
        self.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        self.name_or_path, self.eos_token, self.eos_token_id, self.unk_token_id = "characters", "|", 1, 0
        self.get_vocab = self.backend_tokenizer.get_vocab

    def __len__(self):
        return len(self.get_vocab())


def run(folder, out="out", **words):
    "Preprocess the texts of a folder in small units."
    return pipeline.preprocess(folder / "raw", folder / out, Characters(), **dict(unit_bytes=4000, on_bad_line="skip", dedup=True) | words)


@pytest.fixture
def folder(tmp_path):
    "A folder with raw text in two files, and a bad line."
    (tmp_path / "raw").mkdir()
    lines = [json.dumps(dict(text=text), ensure_ascii=False) for text in TEXTS]
    (tmp_path / "raw/a.jsonl").write_text("\n".join([*lines[:300], '{"text": 1}']), "utf-8")
    (tmp_path / "raw/b.txt").write_text("\n".join(TEXTS[300:]), "utf-8")
    return tmp_path


def contents(folder, out):
    "{name: bytes} of a dataset with its report, in which only its own name may differ."
    paths = [*folder.glob(f"{out}.*"), *(folder / out).glob("[!.]*")]
    return {p.name.replace(out, ""): p.read_bytes().replace(f"/{out}".encode(), b"") for p in paths if p.is_file()}


def child(folder, code, **words):
    "Run `code` and then preprocess in a process of its own."
    script = folder / "child.py"
    script.write_text(f"import sys, os, signal\nsys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\nfrom test_preprocess_cli import *\n"
                      f"if __name__ == '__main__':\n    {code}\n    run(Path({str(folder)!r}), **{words!r})\n")
    return subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)


DIE_IN_UNIT_3 = """
    build_unit = pipeline.build_unit
    def deadly(job, number, advance):
        build_unit(job, number, (lambda *moved: os.kill(os.getpid(), signal.SIGKILL)) if number == 3 else advance)
    pipeline.build_unit = deadly"""


@pytest.mark.parametrize("form", ["mmap", "megatron"])
def test_killed_and_started_again_gives_the_same_bytes(folder, form):
    report = run(folder, "straight", format=form)
    assert child(folder, DIE_IN_UNIT_3, format=form).returncode == -signal.SIGKILL
    assert not (folder / "out/manifest.json").exists() and not (folder / "out.idx").exists() and (folder / "out.work").exists()
    with pytest.raises(ValueError, match="work of another command: min_chars differs"):
        run(folder, format=form, min_chars=5)
    again = run(folder, format=form)
    assert again["counts"] == report["counts"] and contents(folder, "out") == contents(folder, "straight")
    assert not list(folder.glob("*.work"))


def test_two_workers_write_the_same_bytes_as_one(folder):
    assert run(folder, "one")["counts"] == run(folder, "two", workers=2)["counts"]
    assert contents(folder, "one") == contents(folder, "two") and len(contents(folder, "one")) > 10


def test_workers_end_with_their_parent(folder):
    "Nobody goes on writing after a kill, so a restart is not refused."
    run(folder, "straight")
    code = "pipeline.Bar.__call__ = lambda self, *moved: moved[2] and os.kill(os.getpid(), signal.SIGKILL)"
    assert child(folder, code, workers=2).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while (left := subprocess.run(["pgrep", "-f", str(folder / "child.py")], capture_output=True, text=True).stdout) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    run(folder)
    assert contents(folder, "out") == contents(folder, "straight")


def killer(job, number, advance):
    "Be killed, as by the kernel when memory is short."
    os.kill(os.getpid(), signal.SIGKILL)


def failer(job, number, advance):
    "Fail in the second unit; the others work on until they are told."
    if number == 1:
        raise ValueError("unit 1")
    for _ in range(600):
        time.sleep(0.05)
        advance(0, 0, 0)


@pytest.mark.parametrize("function, message", [(killer, "a worker process was killed"), (failer, "unit 1")])
def test_a_worker_that_fails_stops_all(function, message):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        list(run_processes(function, None, range(4), lambda *moved: None))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("form", ["mmap", "megatron"])
def test_a_full_disk_is_said_and_leaves_nothing_half(folder, form):
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    done = child(folder, code, format=form, unit_bytes=20_000)
    assert done.returncode == 1 and "the disk is full" in done.stderr and "run the same command again" in done.stderr
    assert not (folder / "out/manifest.json").exists() and not (folder / "out.idx").exists()
    run(folder, format=form, unit_bytes=20_000)
    run(folder, "straight", format=form, unit_bytes=20_000)
    assert contents(folder, "out") == contents(folder, "straight")


def test_two_at_one_place(folder):
    (folder / "out.work").mkdir()
    with FileLock(folder / "out.work/lock"), pytest.raises(ValueError, match="another process is at work"):
        run(folder)


def test_the_command(folder, capsys):
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"道可非常名，。！"]), "utf-8")
    words = ["preprocess", str(folder / "raw/b.txt"), "--tokenizer", str(folder), "--min_chars", "20", "--dedup"]
    assert main([*words, "--out", str(folder / "out"), "--sentences", "--format", "megatron", "--append_eod", "false"]) == 0
    said = capsys.readouterr().out
    assert "80 of 100 documents kept" in said and "20 shorter than min_chars" in said and "sentences: " in said and "end of a document" not in said
    assert main([*words, "--out", str(folder / "out"), "--append_eod", "false", "--format", "megatron"]) == 2
    assert "fengshen preprocess: " in (error := capsys.readouterr().err) and "sentences differs" in error and "Traceback" not in error
    assert main([*words[:1], str(folder / "raw/c.txt"), *words[2:], "--out", str(folder / "new")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_ray_cluster_writes_the_same_bytes(folder, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'fengshen[ray]'")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        for form in ("mmap", "megatron"):
            run(folder, f"local-{form}", format=form)
            run(folder, f"ray-{form}", format=form, engine="ray")
            assert contents(folder, f"local-{form}") == contents(folder, f"ray-{form}")
        with pytest.raises(ValueError, match="a.jsonl.*line .*--on_bad_line skip"):
            run(folder, "bad", on_bad_line="error", engine="ray")
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "erlangshen_12800"])
def test_real_text_comes_back(tmp_path, shared, name):
    "Published Chinese text in both formats, read back and decoded."
    from fengshen.data.megatron_dataloader import IndexedDataset
    from fengshen.data.mmap_dataloader import MMapIndexDataset
    from fengshen.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(shared / "data/tokenizers" / name)
    raw = shared / "data/corpus/zh_poetry.jsonl.xz"
    reports = [pipeline.preprocess(raw, tmp_path / form, tokenizer, format=form) for form in ("mmap", "megatron")]
    assert reports[0]["counts"] == reports[1]["counts"]
    rows, sequences = MMapIndexDataset([tmp_path / "mmap"]), IndexedDataset(tmp_path / "megatron")
    assert len(rows) == len(sequences) == reports[0]["counts"]["kept"]
    texts = subprocess.run(["xz", "-dc", raw], capture_output=True, check=True).stdout.splitlines()
    for i in np.random.default_rng(0).integers(0, len(rows), 200).tolist():
        ids = sequences[i].tolist()
        assert ids == rows[i]["input_ids"].tolist() and ids[-1] == (tokenizer.eos_token_id or tokenizer.sep_token_id)
        assert ids[:-1] == tokenizer.encode(text := json.loads(texts[i])["text"], add_special_tokens=False)
        assert name != "gpt2" or tokenizer.decode(ids[:-1]) == text
