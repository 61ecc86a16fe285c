"""`kill -9` at any moment, the same command again: what follows equals a run that was never killed, to the bit, whatever the strategy.

Each kill is looked at afterwards: a folder `step-XXXXXXXX.partial` that the dead process left behind means it died while saving. Kills before the first
checkpoint are not counted. `KILLS=FILE` has every kill appended to FILE as a line of JSON.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fengshen.training.checkpoint import checkpoints
from tests.invariant.test_resume import record, same, settings
from tests.training_runs import QUIET, environment, fit, flags, weights

TWO = {"trainer.devices": 2, "trainer.accelerator": "cpu"}
RUNS = {  # name: (settings, kills)
    "one device, padded": ({"trainer.strategy": "auto"}, 6),
    "one device, packed": ({"trainer.strategy": "auto", "data.packing": True}, 5),
    "DDP, 2 processes": ({"trainer.strategy": "ddp"} | TWO, 5),
    "ZeRO-1": ({"trainer.strategy": "zero1", "data.packing": True}, 4),
    "ZeRO-2": ({"trainer.strategy": "zero2"}, 4),
    "ZeRO-3": ({"trainer.strategy": "zero3", "data.packing": True}, 5),
    "ZeRO-3, offload": ({"trainer.strategy": "zero3_offload"}, 4),
    "ZeRO-2, 2 processes": ({"trainer.strategy": "zero2", "data.packing": True} | TWO, 5),
    "ZeRO-3, 2 processes": ({"trainer.strategy": "zero3"} | TWO, 6),
    "ZeRO-3, offload, 2 processes": ({"trainer.strategy": "zero3_offload"} | TWO, 4),
}


def steps_done(run):
    "Training steps in the record."
    path = run / "metrics.jsonl"
    return path.read_text("utf8").count('"split": "train"') if path.exists() else 0


def partials(run):
    "Checkpoints that are being written."
    return [p.name for p in (run / "checkpoints").glob("*.partial")] if (run / "checkpoints").is_dir() else []


def start(run, given):
    "The training in a process group of its own; what it prints goes to a file."
    words = [sys.executable, "-m", "fengshen.cli.main", "fit", "-c", "demo", *flags(QUIET | {"run_dir": str(run)} | given)]
    with open(run.parent / f"{run.name}.log", "a") as log:
        return subprocess.Popen(words, cwd=run.parent, env=environment(), stdout=log, stderr=log, start_new_session=True)


def kill_when(process, run, saving, rng, deadline=240):
    "Wait for a moment after the first checkpoint, kill every process of the run, and say what it was doing; None if it ended before."
    began, seen, end = steps_done(run), len(checkpoints(run)), time.monotonic() + deadline
    after = rng.randint(1, 3)
    while time.monotonic() < end:
        if process.poll() is not None:
            return None
        ready = partials(run) if saving else steps_done(run) >= began + after
        if ready and (checkpoints(run) or seen):
            if not saving:
                time.sleep(rng.random() * 0.15)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return dict(phase="saving" if partials(run) else "training", step=steps_done(run), checkpoints=[p.name for p in checkpoints(run)])
        time.sleep(0.0005)
    raise AssertionError((run.parent / f"{run.name}.log").read_text()[-3000:])


def killed_and_resumed(run, given, kills, seed):
    "Kill a run so many times, starting it again after each; then let it end. The kills, as they were seen."
    rng, done = random.Random(seed), []
    for i in range(4 * kills):
        process = start(run, given)
        if len(done) < kills:
            seen = kill_when(process, run, saving=i % 2 == 0, rng=rng)
            if seen:
                done.append(seen)
                continue
        assert process.wait(timeout=300) == 0, (run.parent / f"{run.name}.log").read_text()[-3000:]
        return done
    raise AssertionError(f"{len(done)} kills after {4 * kills} starts")


def kill_and_compare(folder, name, kills, steps):
    given = settings(folder, **{"checkpoint.every_n_steps": 1, "checkpoint.keep": 2, "trainer.max_steps": steps} | RUNS[name][0])
    straight = fit(folder / "straight", **given)
    run = folder / "killed"
    seen = killed_and_resumed(run, given, kills, seed=len(name))
    if os.environ.get("KILLS"):
        with open(os.environ["KILLS"], "a", encoding="utf8") as f:
            f.writelines(json.dumps(dict(run=name) | kill) + "\n" for kill in seen)
    assert len(seen) == kills and all(kill["checkpoints"] for kill in seen), seen
    assert record(run) == record(straight)
    assert same(weights(run), weights(straight))
    assert not list(Path(run / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("name, kills", [("one device, padded", 2), pytest.param("ZeRO-3, 2 processes", 1, marks=pytest.mark.slow)])
def test_killed_and_started_again(tmp_path, name, kills):
    kill_and_compare(tmp_path, name, kills, steps=16)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RUNS)
def test_killed_many_times(tmp_path, name):
    kill_and_compare(tmp_path, name, RUNS[name][1], steps=60)
