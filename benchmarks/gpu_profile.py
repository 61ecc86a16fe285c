"""What a training step of a row of `gpu.py` spends its time on, by torch's profiler: milliseconds a part, and when the device had nothing to do.

usage: python benchmarks/gpu_profile.py --data FOLDER --only NAME [NAME ...] [--timeout S] [--out FILE]
       python benchmarks/gpu_profile.py --smoke --only NAME [--out FILE] | --table [--out FILE]

FOLDER is what `benchmarks/gpu_data.py` writes; NAME is one of ours in `benchmarks/gpu.py`, whose settings are taken as they are. Each is a
process of its own: after a warm-up of 8 steps, 4 steps are timed (`step_ms`, from the end of one step on the device to the end of another), then
2 are recorded. `parts` are the device's milliseconds a step by kind of kernel: matmul, attention, loss (with the head's scores), optimizer,
norm (of the gradients), compiled (what the compiler fused), copies, other. `idle_ms` is when no kernel ran, `late_ms` that part of it in
which the next kernel had not been ordered when the one before it ended: the host was late. Recording slows the host down, so that
`late_ms` is an upper bound; `step_ms` less the parts is the truth. `kernels` are the largest ones, `gaps` the longest waits, with the
kernels before and after; `calls` are the driver's calls in which the host spent most of its time, waiting or not. --smoke records
a CPU's operations instead, to know that it works, and writes no file but one that --out names.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import gpu
import gpu_data

HERE = Path(__file__).resolve().parent
WARM, TIMED, RECORDED = 8, 4, 2
PARTS = {
    "attention": r"flash|fmha|sdpa|cudnn::fusion|^(forward|products|of_queries|of_keys|of_bias)$",
    "matmul": r"gemm|nvjet|cutlass|xmma|cublas|splitk",
    "loss": r"^rows$",
    "optimizer": r"^update$|adam",
    "norm": r"lpnorm|normtwoops|norm2",
    "compiled": r"^triton_",
    "copies": r"^mem(cpy|set)",
}


def part_of(name):
    """The part that a kernel belongs to."""
    return next((part for part, words in PARTS.items() if re.search(words, name.lower())), "other")


def kernels_of(trace, smoke):
    """(start, end, name, when it was ordered) of what the device did, in microseconds, in order; a CPU's operations in a smoke run."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    kinds = ("cpu_op",) if smoke else ("kernel", "gpu_memcpy", "gpu_memset")
    number = {id(e): e.get("args", {}).get("correlation") for e in events}
    ordered = {number[id(e)]: e["ts"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")}
    return sorted((e["ts"], e["ts"] + e["dur"], e["name"], ordered.get(number[id(e)], e["ts"])) for e in events if e.get("cat") in kinds)


def calls_of(trace):
    """The calls of the driver that took the host longest."""
    spent, times = Counter(), Counter()
    for event in trace["traceEvents"]:
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and event.get("ph") == "X":
            spent[event["name"]] += event["dur"]
            times[event["name"]] += 1
    return [dict(name=name, ms=each(took), times=round(times[name] / RECORDED, 1)) for name, took in spent.most_common(8)]


def gaps_of(kernels):
    """(microseconds, of which the host was late, the kernel before, the kernel after) of each time without a kernel."""
    found, (_, end, before, _) = [], kernels[0]
    for start, stop, name, ordered in kernels[1:]:
        if start > end:
            found.append((start - end, min(start - end, max(0.0, ordered - end)), before, name))
        if stop > end:
            end, before = stop, name
    return found


def each(microseconds):
    """Milliseconds a step."""
    return round(microseconds / 1e3 / RECORDED, 2)


def figures(kernels):
    """What the kernels of `RECORDED` steps say, a step."""
    parts, largest, times = Counter(), Counter(), Counter()
    for start, end, name, _ in kernels:
        parts[part_of(name)] += end - start
        largest[name] += end - start
        times[name] += 1
    gaps = sorted(gaps_of(kernels), reverse=True)
    waits = [dict(ms=round(gap / 1e3, 3), late_ms=round(late / 1e3, 3), before=a[:60], after=b[:60]) for gap, late, a, b in gaps[:8]]
    return dict(
        parts={part: each(spent) for part, spent in parts.most_common()},
        busy_ms=each(sum(parts.values())),
        idle_ms=each(sum(gap[0] for gap in gaps)),
        late_ms=each(sum(gap[1] for gap in gaps)),
        launches=len(kernels) // RECORDED,
        kernels=[dict(name=name[:100], ms=each(spent), times=times[name] // RECORDED) for name, spent in largest.most_common(24)],
        gaps=waits,
    )


def profiler(out, smoke):
    """A callback that times steps, records some, and writes what it found to a file."""
    import pytorch_lightning as pl
    import torch

    from fengshen.utils.device import device_name, synchronize

    class Profile(pl.Callback):
        started = recorder = None

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx % trainer.accumulate_grad_batches:
                return
            if trainer.global_step == WARM:
                synchronize()
                self.started = time.perf_counter()
            if trainer.global_step == WARM + TIMED:
                synchronize()
                self.step_ms = (time.perf_counter() - self.started) / TIMED * 1e3
                kind = torch.profiler.ProfilerActivity.CPU if smoke else torch.profiler.ProfilerActivity.CUDA
                self.recorder = torch.profiler.profile(activities=[kind])
                self.recorder.__enter__()
            if trainer.global_step == WARM + TIMED + RECORDED and self.recorder is not None:
                synchronize()
                self.recorder.__exit__(None, None, None)
                self.write(trainer)
                self.recorder, trainer.should_stop = None, True

        def write(self, trainer):
            with tempfile.TemporaryDirectory() as folder:
                self.recorder.export_chrome_trace(f"{folder}/trace.json")
                trace = json.loads(Path(folder, "trace.json").read_text("utf8"))
            facts = dict(step_ms=round(self.step_ms, 2), device=device_name(), torch=torch.__version__)
            Path(out).write_text(json.dumps(facts | figures(kernels_of(trace, smoke)) | dict(calls=calls_of(trace))), "utf8")

    return Profile()


def record(name, data, folder, smoke):
    """Train a row in this process and record it."""
    import pytorch_lightning.strategies

    from fengshen.cli.fit import prepare, run_fit

    pytorch_lightning.strategies.SingleDeviceStrategy.teardown = lambda strategy: None  # brings all weights to the host, after the measuring
    words = [w for w in gpu.words_of(gpu.ROWS[name], data, folder, smoke) if not w.startswith("--trainer.max_steps")]
    cli = prepare([*words, f"--trainer.max_steps={WARM + TIMED + RECORDED + 1}"])
    cli.trainer.callbacks.append(profiler(Path(folder, "profile.json"), smoke))
    run_fit(cli)
    sys.stdout.flush()
    os._exit(0)  # compiled workers take their time to end


def measure(name, data, smoke, timeout):
    """One row, from a process of its own."""
    row = gpu.ROWS[name]
    out = gpu.describe(name, row)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--one", name, str(data), folder, *["--smoke"] * smoke]
        environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]))
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment)
            log, status = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as e:
            log, status = (e.stdout or b"").decode(errors="replace"), None
        found = Path(folder, "profile.json")
        if not found.exists():
            sys.stderr.write(log[-6000:])
            return out | dict(error=gpu.reason(log, status, timeout))
        return out | json.loads(found.read_text("utf8"))


def table(file):
    """The newest record of each row as markdown."""
    rows = {}
    for text in Path(file).read_text("utf8").splitlines():
        row = json.loads(text)
        rows[row["name"]] = row
    good = [row for row in rows.values() if "parts" in row]
    parts = [*PARTS, "other"]
    head = ["row", "step ms", *parts, "idle", "host late", "launches"]
    last = ("idle_ms", "late_ms", "launches")
    cells = [[row["name"], row["step_ms"], *(row["parts"].get(part, 0) for part in parts), *(row[key] for key in last)] for row in good]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *cells))


def main():
    if sys.argv[1:2] == ["--one"]:
        return record(*sys.argv[2:5], "--smoke" in sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--timeout", type=int, default=200)
    parser.add_argument("--out")
    for flag in ("smoke", "table"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args()
    options.out = options.out or ("" if options.smoke else str(HERE / "results" / "gpu_profile.jsonl"))
    if options.table:
        return print(table(options.out))
    unknown = [name for name in options.only if gpu.ROWS.get(name, {}).get("side") != "ours"]
    if unknown or not options.only:
        parser.error(f"--only takes rows of ours, which `gpu.py --list` names; got {unknown}")
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            if not options.smoke:
                parser.error("--data FOLDER is needed (benchmarks/gpu_data.py writes it)")
            gpu_data.write_demo(folder)
        for name in options.only:
            row = measure(name, options.data or folder, options.smoke, options.timeout)
            print(json.dumps(row), flush=True)
            if options.out:
                with open(options.out, "a", encoding="utf8") as f:
                    f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
