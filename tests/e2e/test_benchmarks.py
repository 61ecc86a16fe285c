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
    "What a process says last of its error, or that its time was up, and where it was then; a name that nothing has is refused before anything runs."
    late = "not finished in 5 s; it was in <string>:3 wait < <string>:4 <module>"
    for code, timeout, told in (("raise ValueError('out of memory')", 60, "ValueError: out of memory"), ("import time\ndef wait():\n time.sleep(60)\nwait()", 5, late)):
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


@pytest.fixture
def curves(root, monkeypatch):
    "The module behind `python benchmarks/curves.py`."
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("curves")


def test_the_ways_of_a_curve_differ_in_nothing_that_moves_the_loss(curves):
    "Rows and rate of a step, dropout and length of the run are the same whatever fits on the device at once."
    for which, found in curves.SETS.items():
        rows = {way: curves.row_of(which, way) for way in curves.WAYS}
        assert all(row["rows"] * row["accumulate"] == found["rows"] == row["flags"]["global_batch"] for row in rows.values())
        same = ("model.config", "model.optimizer.lr", "model.schedule.warmup_steps", "trainer.max_steps")
        assert len({json.dumps([row["flags"][key] for key in same]) for row in rows.values()}) == 1
        assert set(curves.NO_DROPOUT.items()) <= set(rows["fp8"]["flags"]["model.config"].items())
        words = curves.gpu.words_of(rows["zero3_offload"], "DATA", "RUN", False)
        assert f"--global_batch={found['rows']}" in words and "--trainer.strategy=zero3_offload" in words


def test_the_table_of_curves_says_how_far_each_is_from_plain(curves, tmp_path):
    "Steps before the eleventh do not count; other data, too few steps and a failure are said instead; a failure does not hide an older curve."
    plain = [3.0] * 12
    ways = dict(plain=plain, fast=[9.0] * 10 + [3.03, 3.0], zero2=plain[:5], zero3_offload=plain, fp8=[])
    rows = [dict(name=way, set="110m", steps=len(x), losses=x, tokens=[7] * len(x)) for way, x in ways.items()]
    rows[3]["tokens"] = [7] * 11 + [8]
    rows[4]["error"] = "no | 8 bits"
    rows.append(rows[1] | dict(steps=0, losses=[], tokens=[], error="out of memory"))
    file = tmp_path / "curves.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in curves.table(file).splitlines() if line.startswith("| ")}
    assert cells["fast"][5:7] == ["0.500%", "1.000%"] and cells["plain"][4:7] == ["", "", ""]
    assert "fewer than 11 steps" in cells["zero2"][9] and "other data" in cells["zero3_offload"][9] and "no / 8 bits" in cells["fp8"][9]
    curves.plot(file, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no way fits"):
        curves.chosen(["fp16"])


@pytest.mark.slow
def test_a_curve_at_a_tiny_size(curves, tmp_path):
    "A run's losses, norms and tokens are in its row; 8-bit products are a row that says why there is none on a CPU."
    done = subprocess.run([sys.executable, curves.__file__, "--smoke", "--steps", "3", "--only", "fast", "fp8", "--out", tmp_path / "rows.jsonl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    fast, fp8 = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf8").splitlines())
    assert "error" not in fast and [len(fast[key]) for key in ("losses", "grad_norms", "tokens")] == [3, 3, 3]
    assert fast["tokens"] == [4 * 32] * 3 and all(abs(loss - np.log(4096)) < 0.3 for loss in fast["losses"])
    assert fp8["losses"] == [] and "8 bits" in fp8["error"]


@pytest.fixture
def attention(root, monkeypatch):
    "The module behind `python benchmarks/attention.py`."
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("attention")


def test_a_contender_that_is_wrong_is_not_timed(attention, monkeypatch):
    "One that sees other documents, one without dropout, one whose dropout does not scale; ours is right on each kind of rows."
    found = attention.SHAPES["gpt2_110m"] | attention.TINY | dict(heads=4)
    lengths = np.array([20, 48, 31, 7, 40])
    for kind, name in (("packed", "loop"), ("whole", "loop"), ("padded", "mask_math")):
        shape = found | dict(kind=kind)
        case = attention.Case(shape, lengths)
        assert sum(case.lengths) == 96 * (2 if kind == "padded" else 3) // 3
        rows = [attention.measure(name, shape, case, case.reference(), dropout, 1) for dropout in attention.DROPOUTS]
        assert all("ms" in row and row["error_query"] < 1e-5 for row in rows), rows
    case = attention.Case(found, lengths)
    right, want = attention.loop(case), case.reference()

    def leaking(*qkv, dropout):
        q, k, v = (x.transpose(0, 1) for x in qkv)
        return attention.F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)

    wrong = dict(leaking=leaking, without=lambda *qkv, dropout: right(*qkv, dropout=0.0), unscaled=lambda *qkv, dropout: right(*qkv, dropout=dropout) * (1 - dropout))
    for name, told in dict(leaking="from float32", without="drops nothing", unscaled="scales what it keeps to 0.").items():
        monkeypatch.setitem(attention.CONTENDERS, "loop", lambda case, name=name: wrong[name])
        row = attention.measure("loop", found, case, want, 0.1, 1)
        assert told in row["error"] and "ms" not in row


def test_bytes_of_a_step_by_the_ring(root, monkeypatch):
    "What is summed everywhere travels twice, what is gathered or scattered once; lists of tensors count as their sum, the rest of a step apart."
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    volumes = importlib.import_module("volumes")
    row = volumes.row_of("zero1", 4, 1, dict(parameters=100, data=dict(all_reduce=400, all_gather_into_tensor=400), small={}))
    assert row["sent"] == 450 and row["per_parameter"] == 3.0
    meter, asked = volumes.Meter(), []
    backend = type("Backend", (), dict(all_gather=lambda self, out, part: asked.append("gather"), all_reduce=lambda self, tensor: asked.append("reduce")))
    meter.watch(backend)
    tensor = SimpleNamespace(numel=lambda: 4096, element_size=lambda: 2)
    backend().all_reduce(tensor)
    meter.on = True
    backend().all_gather([tensor, tensor], tensor)
    backend().all_reduce(tensor=tensor)
    assert asked == ["reduce", "gather", "reduce"] and dict(meter.data) == dict(all_gather=16384, all_reduce=8192)


@pytest.fixture
def gpu_profile(root, monkeypatch):
    "The module behind `python benchmarks/gpu_profile.py`."
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("gpu_profile")


def test_a_profile_tells_a_late_host_from_a_busy_device(gpu_profile):
    "Two steps of three kernels: one gap of 100 us that the host filled too late by 60 of them; kernels side by side leave none; notes of the profiler are no kernels."
    kernels = [("nvjet_sm90", 0, 1000, 0), ("triton_poi_0", 500, 600, 1), ("update", 1200, 300, 1160), ("rows", 1500, 100, 2)]
    events = [dict(ph="X", cat="gpu_user_annotation", name="Optimizer.step", ts=0, dur=9000), dict(ph="M", name="process")]
    for number, (name, ts, dur, ordered) in enumerate(kernels):
        events += [dict(ph="X", cat="kernel", name=name, ts=ts, dur=dur, args=dict(correlation=number)),
                   dict(ph="X", cat="cuda_runtime", name="cudaLaunchKernel", ts=ordered, dur=5, args=dict(correlation=number))]
    found = gpu_profile.figures(gpu_profile.kernels_of(dict(traceEvents=events), smoke=False))
    assert found["parts"] == dict(matmul=0.5, compiled=0.3, optimizer=0.15, loss=0.05) and found["launches"] == 2
    assert (found["idle_ms"], found["late_ms"]) == (0.05, 0.03)
    assert gpu_profile.calls_of(dict(traceEvents=events)) == [dict(name="cudaLaunchKernel", ms=0.01, times=2.0)]
    assert found["gaps"] == [dict(ms=0.1, late_ms=0.06, before="triton_poi_0", after="update")]


@pytest.mark.slow
def test_a_profile_at_a_tiny_size(gpu_profile, tmp_path):
    "A row of ours is trained and recorded; a peer's name is refused."
    words = [sys.executable, gpu_profile.__file__, "--smoke", "--out", str(tmp_path / "rows.jsonl"), "--only"]
    assert subprocess.run([*words, "gpt2_110m"], capture_output=True).returncode == 0
    row = json.loads((tmp_path / "rows.jsonl").read_text("utf8"))
    assert row["step_ms"] > 0 and row["launches"] > 100 and len(row["kernels"]) == 24, row
    assert "gpt2_110m" in gpu_profile.table(tmp_path / "rows.jsonl")
    assert subprocess.run([*words, "hf_packed"], capture_output=True).returncode == 2
