"""A benchmark is run rarely and on a borrowed machine: it has to run at its first try."""
import json
import subprocess
import sys

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
