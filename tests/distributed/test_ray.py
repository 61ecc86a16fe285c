"""Processes that Ray starts: the same run as one process, a way out with our message when one fails, and a signal that saves."""
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fengshen
from fengshen.training.checkpoint import checkpoints
from fengshen.training.module import LanguageModelModule
from tests.distributed.test_processes import STEPS, settings
from tests.training_runs import ROOT, apart, cli, environment, fit_here, flags, here, read, series, weights, weights_apart

TWO = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.micro_batch": 2, "trainer.accumulate_grad_batches": 2, "trainer.val_check_interval": 2 * STEPS}


@pytest.mark.parametrize("words, message", [
    (["--engine", "rai"], "did you mean 'ray'"), (["--engine", "slurm"], "one of local, ray"), (["--engine", "ray"], "pip install 'fengshen[ray]'"),
    (["--engine=ray", "--trainer.max_stepz", "3"], "did you mean 'trainer.max_steps'")])
def test_what_is_refused_before_anything_starts(monkeypatch, tmp_path, words, message):
    "Ray is not there in this test; a slip in the recipe's words is found before it is looked for."
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, err = here("fit", "-c", "demo", "--run_dir", tmp_path / "run", *words)
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_a_live_view_is_no_place_for_a_cluster():
    with pytest.raises(ValueError, match="train beside no cell"):
        fengshen.fit("demo", live=True, engine="ray")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'fengshen[ray]'")
    return tmp_path_factory.mktemp("ray")


class Broken(LanguageModelModule):
    "A module with a mistake in it."

    def setup(self, stage):
        raise KeyError("nobody")


class Killed(LanguageModelModule):
    "A module that the system ends on one of the workers."

    def setup(self, stage):
        os.kill(os.getpid(), signal.SIGKILL) if os.environ["RANK"] == "1" else super().setup(stage)


def with_ray(folder, name, **more):
    "The words of a run of two workers."
    return ["fit", "--engine", "ray", "-c", "demo", *flags({"export": False, "run_dir": str(folder / name)} | settings(folder, **TWO | {"model.samples": 0} | more))]


def alive(mark):
    "Processes with this word in their environment."
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] if mark.encode() in path.read_bytes() else []
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_workers_are_one_process(folder, strategy):
    mark = f"{os.getpid()}-{strategy}"
    whole = fit_here(folder / f"whole-{strategy}", **settings(folder, **{"data.micro_batch": 8, "trainer.val_check_interval": STEPS}))
    done = cli(*with_ray(folder, strategy, **{"trainer.strategy": strategy}), cwd=folder, FENGSHEN_TEST=mark)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run = folder / strategy
    assert [r["step"] for r in read(run)] == list(range(1, STEPS + 1)), "one record, written by one process"
    for key, split, most in (("loss", "train", 1e-5), ("grad_norm", "train", 1e-4), ("loss", "valid", 1e-4)):
        assert apart(series(run, key, split), series(whole, key, split)) < most, key
    assert weights_apart(weights(run), weights(whole)) < 1e-5
    assert "workers = 2: " in done.stdout and done.stdout.count("run folder") == 1 and "ray::" not in done.stdout + done.stderr, done.stdout
    end = time.monotonic() + 120
    while alive(mark) and time.monotonic() < end:
        time.sleep(0.5)
    assert not alive(mark) and not (folder / f"{strategy}.ray").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_goes_wrong_on_a_cluster_is_one_line(folder):
    "More workers than CPUs, a refusal, a mistake, a kill: one Ray for all, which was there before and is left alone."
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_TRAIN_V2_ENABLED", "1")
        patch.chdir(folder)
        ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=100 * 2**20)
        try:
            status, _, err = here(*with_ray(folder, "many", **{"trainer.devices": 3}))
            assert status == 2 and "got '2 CPUs on 1 machine', expected 3 (trainer.devices 3 x trainer.num_nodes 1)" in err
            status, _, err = here(*with_ray(folder, "absent", **{"data.train": str(folder / "absent.jsonl")}))
            assert status == 2 and "absent.jsonl" in err and err.count("\n") == 1, err
            status, _, err = here(*with_ray(folder, "broken", **{"module": "tests.distributed.test_ray.Broken"}))
            assert status == 1 and "KeyError" in err and "error-" in err and err.count("\n") == 1, err
            assert "KeyError: 'nobody'" in next((folder / "broken").glob("error-*.txt")).read_text()
            status, _, err = here(*with_ray(folder, "killed", **{"module": "tests.distributed.test_ray.Killed"}))
            assert status == 1 and "worker 1 was lost" in err and err.count("\n") == 1, err
            assert ray.is_initialized()
        finally:
            ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_signal_saves_and_another_engine_goes_on(folder):
    "SIGTERM to the process that was started by hand: the workers save after a step, exit code 75, and one process ends what two workers of Ray began."
    more = {"trainer.max_steps": 4000, "model.schedule.kind": "constant_with_warmup"}
    log = open(folder / "stopped.log", "w")
    process = subprocess.Popen([sys.executable, "-m", "fengshen.cli.main", *with_ray(folder, "stopped", **more)], cwd=folder, env=environment(), stdout=log, stderr=log)
    run, end = folder / "stopped", time.monotonic() + 600
    while not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < end, (folder / "stopped.log").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, (folder / "stopped.log").read_text()
    last = read(run)[-1]["step"]
    assert [p.name for p in checkpoints(run)] == [f"step-{last:08d}"] and not os.path.exists(f"{run}.ray")
    fit_here(run, **settings(folder, **more | {"trainer.max_steps": last + 2, "data.micro_batch": 8, "trainer.val_check_interval": STEPS}))
    assert [r["step"] for r in read(run)] == list(range(1, last + 3))
