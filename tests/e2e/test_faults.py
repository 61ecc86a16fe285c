"""What a user sees, and what is left, when something breaks: signals, full disks, read-only folders, damaged files, clocks, processes that die."""
import os
import shutil
import signal
import subprocess
import time

import pytest

from fengshen.training.checkpoint import checkpoints
from fengshen.training.manifest import fault
from tests.invariant.test_kills import partials, start, steps_done
from tests.invariant.test_resume import record, same, settings
from tests.training_runs import QUIET, back_to, fit, fit_here, flags, here, read, weights

ONE = {"trainer.strategy": "auto"}
TWO = {"trainer.strategy": "ddp", "trainer.devices": 2, "trainer.accelerator": "cpu"}


def until(condition, process, seconds=240):
    "Wait for a condition while a process runs."
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the process ended, or nothing happened"
        time.sleep(0.002)


def said(run):
    "What the runs of a folder printed."
    return (run.parent / f"{run.name}.log").read_text()


@pytest.mark.parametrize("name", ["SIGTERM while saving", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGTERM where nothing is saved"))])
@pytest.mark.slow
def test_a_signal_saves_and_says_start_me_again(tmp_path, name):
    "Exit code 75, a checkpoint of the step that was computed, and a resumed run that equals a straight one."
    given = settings(tmp_path, **ONE | {"trainer.max_steps": 60, "checkpoint.every_n_steps": 1 if "saving" in name else 0})
    stopped = given | ({"checkpoint.at_end": False} if "nothing" in name else {})
    straight, run = fit_here(tmp_path / "straight", **given), tmp_path / "stopped"
    process = start(run, stopped)
    until(lambda: partials(run) if "saving" in name else steps_done(run) >= 5, process)
    process.send_signal(getattr(signal, name.split()[0]))
    assert process.wait(timeout=120) == 75, said(run)
    last = read(run)[-1]["step"]
    assert 1 <= last < 60 and checkpoints(run)[-1].name == f"step-{last:08d}" and not fault(checkpoints(run)[-1])
    assert f"stopped after step {last}, saved" in said(run) and not (run / "summary.json").exists()
    fit_here(run, **given)
    assert record(run) == record(straight) and same(weights(run), weights(straight))


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(tmp_path):
    run = tmp_path / "run"
    process = start(run, settings(tmp_path, **TWO | {"trainer.max_steps": 4000}))
    until(lambda: steps_done(run) >= 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, said(run)
    assert [p.name for p in checkpoints(run)] == [f"step-{read(run)[-1]['step']:08d}"]


@pytest.mark.slow
def test_a_signal_before_the_first_step(tmp_path):
    run = tmp_path / "run"
    process = start(run, settings(tmp_path, **ONE))
    until(lambda: (run / "run.yaml").exists(), process)
    process.send_signal(signal.SIGTERM)
    status = process.wait(timeout=120)
    assert status == 75 or (status == -signal.SIGTERM and not checkpoints(run)), said(run)


@pytest.mark.parametrize("victim", ["last", pytest.param("first", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_along(tmp_path, victim):
    "Within a minute, with a message; the same command goes on to the straight run's end."
    given = settings(tmp_path, **TWO | {"trainer.max_steps": 40, "checkpoint.every_n_steps": 2})
    straight, run = fit(tmp_path / "straight", **given), tmp_path / "run"
    process = start(run, given)
    until(lambda: checkpoints(run) and steps_done(run) >= 4, process)
    family = [process.pid, *children(process.pid)]
    assert len(family) == 2, family
    os.kill(family[0] if victim == "first" else family[1], signal.SIGKILL)
    began = time.monotonic()
    while any(alive(pid) for pid in family) and time.monotonic() < began + 60:
        process.poll()
        time.sleep(0.1)
    assert not any(alive(pid) for pid in family), "a process is left after a minute"
    assert process.wait() != 0
    fit(run, **given)
    assert record(run) == record(straight) and same(weights(run), weights(straight))


def children(pid):
    "Pids of a process's Python children that train."
    lines = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "fengshen.cli.main" in line]


def alive(pid):
    "Whether a process runs (a zombie does not)."
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("strategy", ["auto", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(tmp_path, small_disk, strategy):
    "Training goes on without new checkpoints, the end says what is missing, and the good one is whole."
    given = settings(tmp_path, **{"trainer.strategy": strategy, "checkpoint.every_n_steps": 2, "trainer.max_steps": 12})
    run = small_disk / "run"
    process = start(run, given | {"checkpoint.keep": 9})
    status = process.wait(timeout=300)
    text = (small_disk / "run.log").read_text()
    assert status == 2 and "was not saved" in text and "the last checkpoint could not be written" in text, text[-3000:]
    assert read(run)[-1]["step"] == 12
    kept = checkpoints(run)
    assert kept and not any(fault(p) for p in kept) and not partials(run)


def test_a_disk_that_cannot_hold_one_checkpoint_is_refused_first(tmp_path, small_disk):
    (small_disk / "filler").write_bytes(bytes(7_000_000))
    status, out, err = here("fit", "-c", "demo", *flags(QUIET | ONE | {"run_dir": str(small_disk / "run")} | settings(tmp_path)))
    assert status == 2 and "will not hold a checkpoint" in err and not checkpoints(small_disk / "run")


def test_a_folder_that_cannot_be_written(tmp_path, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status, out, err = here("fit", "-c", "demo", *flags(QUIET | ONE | {"run_dir": str(small_disk / "run")} | settings(tmp_path)))
    assert status == 2 and "cannot be written" in err and "Read-only" in err


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "Runs with two checkpoints each, by strategy."
    folder, runs = tmp_path_factory.mktemp("saved"), {}
    for strategy in ("auto", "zero3"):
        given = settings(folder, **{"trainer.strategy": strategy, "checkpoint.every_n_steps": 2, "checkpoint.keep": 99, "trainer.max_steps": 6})
        runs[strategy] = given, fit(folder / strategy, **given)
    return folder, runs


FILES = [("auto", "state.ckpt"), ("auto", "config.json"), ("auto", "run.yaml"), ("auto", "tokenizer.json"), ("auto", "manifest.json"),
         ("zero3", "state.ckpt/checkpoint/zero_pp_rank_0_mp_rank_00_model_states.pt"), ("zero3", "state.ckpt/latest"),
         ("zero3", "state.ckpt/checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt")]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("strategy, name", FILES)
def test_every_kind_of_file_that_is_damaged(saved, tmp_path, strategy, name, damage):
    "The checkpoint before is taken; asked for by its name, the damaged one is refused and the file named; nothing is deleted."
    _, runs = saved
    given, run = runs[strategy]
    run = back_to(run, 4, tmp_path)
    path = run / "checkpoints" / "step-00000004" / name
    matches = [path] if path.exists() else list(path.parent.glob(path.name.replace("zero_pp_rank_0", "*zero_pp_rank_0")))
    path = matches[0]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] if damage == "truncated" else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])
    from fengshen.training.resume import find_checkpoint

    assert find_checkpoint(run).name == "step-00000002"
    with pytest.raises(ValueError, match="step-00000004 is not a whole checkpoint|damaged") as error:
        find_checkpoint(run, run / "checkpoints" / "step-00000004")
    assert path.name in str(error.value)
    assert (run / "checkpoints" / "step-00000004").exists()


def test_a_clock_set_back_changes_nothing(tmp_path, monkeypatch):
    "Checkpoints are ordered by their steps, and speeds come from a clock that nobody can set."
    given = settings(tmp_path, **ONE | {"checkpoint.every_n_steps": 2, "checkpoint.keep": 99, "trainer.max_steps": 8})
    straight = fit_here(tmp_path / "straight", **given)
    run = back_to(straight, 4, tmp_path)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 10 * 365 * 86400)
    for path in run.rglob("*"):
        os.utime(path, (0, real() + 86400))
    fit_here(run, **given)
    assert record(run) == record(straight) and all(r["time"] > 0 and r["tokens_per_second"] > 0 for r in read(run))


def test_another_tokenizer_is_other_data(tmp_path):
    "It makes other tokens, so the saved position means nothing: refused, naming the setting."
    given = settings(tmp_path, **ONE | {"checkpoint.every_n_steps": 2, "checkpoint.keep": 99, "trainer.max_steps": 6})
    run = back_to(fit_here(tmp_path / "straight", **given), 4, tmp_path)
    from fengshen.utils.resources import resource

    other = shutil.copytree(resource("fengshen:tokenizer_demo"), tmp_path / "tokenizer")
    status, out, err = here("fit", "-c", "demo", *flags(QUIET | ONE | {"run_dir": str(run)} | given | {"data.tokenizer": str(other)}))
    assert status == 2 and "data.tokenizer was" in err
