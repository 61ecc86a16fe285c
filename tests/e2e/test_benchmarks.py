"""A benchmark is run rarely and on a borrowed machine: it has to run at its first try."""
import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

PLACES = ("ms", "ratio", "attention", "tokens_per_second", "peak_gib", "loss")


@pytest.mark.slow
def test_models_at_a_tiny_size(root, tmp_path):
    "Each configuration gives a row a model, with what it is compared by; an unknown name is refused."
    words = [sys.executable, "benchmarks/models.py", "--smoke", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")]
    done = subprocess.run([*words, "--only", "110m bf16 dropout-0.0", "t5 amp"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf8").splitlines()]
    names = {(r["size"], r["model"]) for r in rows}
    assert {(size, model) for size in ("zhouwenwang-110m", "longformer-110m", "megatron-t5-770m") for model in ("stock", "ours")} <= names
    assert all(field in r for r in rows for field in PLACES), rows
    assert subprocess.run([*words, "--only", "nothing"], cwd=root, capture_output=True).returncode


@pytest.fixture
def gpu(root, monkeypatch):
    "The module behind `python benchmarks/gpu.py`; it starts processes, and loads no torch itself."
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.mark.slow
def test_a_peer_of_the_gpu_table_at_a_tiny_size(gpu, tmp_path):
    "Documents with their borders go through transformers' Trainer in a process of its own, and each of their tokens is counted."
    draw, lengths = np.random.default_rng(0), np.array([20, 64, 31, 7, 40] * 8, np.uint16)
    for name, values in dict(ids=draw.integers(0, 4096, lengths.sum()).astype(np.uint16), lengths=lengths, prompts=lengths // 3).items():
        np.save(tmp_path / f"zh_{name}.npy", values)
    row = gpu.measure("hf_varlen", tmp_path, {}, smoke=True)
    assert "error" not in row and row["attention"] == "by_document"
    assert 0.6 * 128 < row["tokens_per_step"] <= 128 and row["tokens_per_second"] > 0
    assert len(row["losses"]) == 3 and all(abs(loss - np.log(4096)) < 0.3 for loss in row["losses"])


def test_a_configuration_of_the_gpu_table_that_fails_is_a_row(gpu, tmp_path, monkeypatch):
    "What a process says last of its error, or that its time was up; a name that nothing has is refused before anything runs."
    for code, timeout, told in (("raise ValueError('out of memory')", 60, "ValueError: out of memory"), ("import time; time.sleep(60)", 0.1, "not finished in 0.1 s")):
        monkeypatch.setattr(gpu, "command", lambda *args, code=code: [sys.executable, "-c", code])
        row = gpu.measure("hf_packed", tmp_path, {}, timeout=timeout)
        assert row["error"] == told and "tokens_per_second" not in row
    with pytest.raises(SystemExit, match="nothing"):
        gpu.chosen(SimpleNamespace(only=["ours*", "nothing"], group=None))


def test_the_gpu_table_compares_medians_with_the_best_peer(gpu, tmp_path):
    "A row without figures neither enters a median nor beats anyone; a tuned peer is no stock one."
    both = dict(group="g", library="l", states="s")
    rates = dict(ours=[300, 100, 200], stock=[100, 110, 90], slow=[10], code=[160, 150, 170])
    rows = [both | dict(name=name, side="ours" if name == "ours" else "peer", tuned=name == "code", tokens_per_second=rate) for name in rates for rate in rates[name]]
    rows += [both | dict(name=name, side="peer", tuned=False, error="out of memory") for name in ("broken", "stock")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in gpu.table(tmp_path / "rows.jsonl").splitlines() if line.startswith("| ")}
    assert cells["ours"][3:6] == ["200", "1.25", "2.00"]
    assert cells["stock"][3] == "100" and cells["broken"][3] == "out of memory"
