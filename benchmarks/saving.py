"""What saving costs, and whether a killed run equals a straight one: a JSON line each.

usage: python benchmarks/saving.py --train FILE --tokenizer FOLDER [--size cpu|1b] [--steps N] [--out FILE] [--any.flag=VALUE ...]

Runs of `fengshen fit` with the same settings, each in a process of its own: with checkpoints written while training waits, with
checkpoints written beside it, and the last one again with `kill -9` after its first checkpoint, started again by the same command.
`seconds_per_step` is the median before the first checkpoint; `lost_per_100` the time the training stood still for one checkpoint, as a
share of 100 steps; `slower` the median step after the first checkpoint, while the thread may be writing, against those before it.
`host_gib` is the peak of all processes so far. The 1.1B model is a GPT-2 of 24 layers, 1920 wide, vocabulary 50,304, random weights.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {
    "cpu": dict(n_embd=384, n_layer=4, n_head=6, n_positions=1024),
    "1b": dict(n_embd=1920, n_layer=24, n_head=20, n_positions=1024),
}
COMMON = {
    "model.samples": 0,
    "model.compile": "false",
    "data.on_long": "truncate",
    "data.max_length": 1024,
    "data.valid": "null",
    "export": "false",
    "checkpoint.at_end": "false",
    "trainer.limit_val_batches": 0,
    "trainer.devices": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.strategy": "auto",
}
WAYS = {
    "waiting": {"checkpoint.background": "false"},
    "beside": {"checkpoint.background": "true"},
}


def command(run, settings, extra):
    """The words of one run."""
    flags = COMMON | settings | {"run_dir": run}
    return [sys.executable, "-m", "fengshen.cli.main", "fit", "-c", "medical_qa", *[f"--{k}={v}" for k, v in flags.items()], *extra]


def records(run):
    """The training lines of a run's record."""
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text("utf8").split("\n")[:-1] if path.exists() else []
    return [r for r in map(json.loads, lines) if r["split"] == "train"]


def train(run, settings, extra, kill_after=None):
    """Run, or kill after a step; fails loudly."""
    with open(f"{run}.log", "a") as log:
        process = subprocess.Popen(command(run, settings, extra), stdout=log, stderr=log, start_new_session=True)
        if kill_after is not None:
            while process.poll() is None and (len(records(run)) < kill_after or not list(Path(run, "checkpoints").glob("step-*[0-9]"))):
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    if kill_after is None and status:
        sys.exit(Path(f"{run}.log").read_text()[-4000:])


def size_of(run):
    """Bytes of the newest checkpoint."""
    newest = sorted(Path(run, "checkpoints").glob("step-*[0-9]"))[-1]
    return sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())


def measure(name, run, first):
    """One run's figures; its first checkpoint was taken after step `first`."""
    summary, rows = json.loads(Path(run, "summary.json").read_text()), records(run)
    pace = {b["step"]: b["time"] - a["time"] for a, b in zip(rows, rows[1:])}
    step = statistics.median(v for k, v in pace.items() if 2 < k <= first)
    later = statistics.median(v for k, v in pace.items() if k > first + 1)
    each = summary["saving_seconds"] / max(1, summary["saves"])
    return dict(
        name=name,
        seconds_per_step=round(step, 4),
        saves=summary["saves"],
        checkpoint_gib=round(size_of(run) / 2**30, 3),
        stood_still_s=round(each, 3),
        lost_per_100=round(each / (100 * step + each), 5),
        slower=round(later / step, 3),
        memory_gib=max(r["memory_gib"] for r in rows),
        host_gib=round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 1),
    )


def agreement(resumed, straight, twice, step):
    """How far a resumed run is from a straight one, and, for comparison, two straight runs from each other."""
    apart = [abs(a - b) / b for a, b in zip(resumed, straight, strict=True)]
    repeat = [abs(a - b) / b for a, b in zip(*twice, strict=True)]
    shown = [round(loss, 4) for loss in resumed]
    name = f"killed after step {step} and resumed"
    return dict(name=name, steps=len(apart), worst=max(apart), mean=statistics.mean(apart), same_run_twice_worst=max(repeat), losses=shown)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--size", default="cpu", choices=SIZES)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=12)
    parser.add_argument("--out", default="benchmarks/results/saving.jsonl")
    options, extra = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        vocabulary = dict(vocab_size=50304, bos_token_id=50256, eos_token_id=50256)
        config.write_text(json.dumps(dict(model_type="gpt2") | vocabulary | SIZES[options.size]))
        settings = {"model.config": config, "data.train": options.train, "data.tokenizer": options.tokenizer}
        settings |= {"trainer.max_steps": options.steps, "checkpoint.every_n_steps": options.every}
        rows, done = [], {}
        for name, way in WAYS.items():
            run = f"{folder}/{name}"
            train(run, settings | way, extra)
            done[name] = records(run)
            rows.append(measure(name, run, options.every))
            print(json.dumps(rows[-1]), flush=True)
            subprocess.run(["rm", "-rf", f"{run}/checkpoints"], check=True)
        again = settings | WAYS["beside"]
        train(f"{folder}/killed", again, extra, kill_after=options.every + 3)
        train(f"{folder}/killed", again, extra)
        losses = [[r["loss"] for r in x] for x in (records(f"{folder}/killed"), done["beside"])]
        rows.append(agreement(*losses, [[r["loss"] for r in done[name]] for name in ("waiting", "beside")], options.every + 3))
        print(json.dumps(rows[-1]), flush=True)
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with open(options.out, "a", encoding="utf8") as f:
        f.writelines(json.dumps(dict(device=device, size=options.size) | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
