"""A run beside its caller: paused, asked, changed, interrupted, stopped, released; and what goes wrong in it reaches the caller."""
import _thread
import gc
import threading
import time
import weakref

import pytest
import torch

from fengshen.cli.fit import fit
from fengshen.training.control import RunControl
from tests.training_runs import QUIET, tiny_config

STRATEGIES = ["auto", "zero3"]


class FailingMetric(torch.nn.Module):
    "A metric that breaks down in validation."

    def update(self, logits, labels):
        raise ArithmeticError("the metric broke down")

    def compute(self):
        return torch.tensor(0.0)

    def reset(self):
        pass


@pytest.fixture
def start(tmp_path):
    "Start a live run; whatever is still going on after the test is stopped."
    runs, config = [], tiny_config(tmp_path)

    def make(name="run", **settings):
        chosen = QUIET | {"run_dir": str(tmp_path / name), "model.config": config, "trainer.strategy": "auto", "trainer.max_steps": 100_000,
                          "checkpoint.at_end": False, "model.schedule.kind": "constant"} | settings
        run = fit("demo", chosen, control=RunControl(), wait=False)
        runs.append(run)
        return run

    yield make
    for run in runs:
        run.control.stop()
        run.done.wait(60)


def reach(run, step, seconds=60):
    "Wait until the record holds a step."
    deadline = time.monotonic() + seconds
    while not any(r["step"] >= step for r in run.records("train")):
        assert run.error is None and time.monotonic() < deadline, (run.error, run)
        time.sleep(0.05)


def last_step(run):
    return run.records("train")[-1]["step"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pause_ask_resume_with_another_rate_stop(start, strategy):
    run = start(**{"trainer.strategy": strategy})
    reach(run, 3)
    run.pause()
    at = last_step(run)
    time.sleep(0.5)
    assert run.control.waiting and last_step(run) == at and not run.done.is_set()
    assert isinstance(run.ask("你好", max_new_tokens=4), str)
    run.resume(lr=1.25e-4, wait=False)
    reach(run, at + 3)
    run.stop()
    assert run.done.is_set() and run.summary()["steps"] == last_step(run)
    rates = {r["step"]: r["lr"] for r in run.records("train")}
    assert rates[at] != pytest.approx(1.25e-4) and rates[at + 1] == pytest.approx(1.25e-4), "from the next step on"
    assert isinstance(run.ask("你好", max_new_tokens=4), str), "the finished model answers too"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_wait_pauses_and_the_run_finishes(start, strategy):
    run = start(**{"trainer.strategy": strategy})
    reach(run, 2)
    timer = threading.Timer(0.5, _thread.interrupt_main)
    timer.start()
    run.wait()  # returns: the interrupt pauses
    timer.join()
    assert run.control.waiting and not run.done.is_set()
    at = last_step(run)
    assert isinstance(run.ask("你好", max_new_tokens=4), str)
    run.resume(wait=False)
    reach(run, at + 2)
    run.stop()
    assert run.error is None and run.summary()["steps"] == last_step(run) >= at + 2
    steps = [r["step"] for r in run.records("train")]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or done twice"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_released_model_is_gone_and_another_run_works(start, strategy):
    run = start(**{"trainer.strategy": strategy})
    reach(run, 2)
    run.pause()
    model = weakref.ref(run.module.model)
    run.release()
    gc.collect()
    assert model() is None
    assert run.checkpoints() == [] and not run.export.exists()
    again = start("second", **{"trainer.strategy": strategy, "trainer.max_steps": 2})
    again.wait()
    assert last_step(again) == 2


def test_what_goes_wrong_in_training_reaches_the_caller(start):
    settings = {"model.metrics": {"broken": f"{__name__}.FailingMetric"}, "trainer.max_steps": 4, "trainer.val_check_interval": 2}
    run = start(**settings)
    with pytest.raises(ArithmeticError, match="the metric broke down"):
        run.wait()
    assert run.done.is_set() and not run.summary() and last_step(run) == 2


def test_after_a_failed_zero3_run_models_are_whole_again(start):
    "ZeRO-3 tells transformers to build models in shards; that has to end with the training, also when it fails."
    from fengshen.models.loading import from_config

    metrics = {"broken": f"{__name__}.FailingMetric"}
    run = start(**{"trainer.strategy": "zero3", "model.metrics": metrics, "trainer.max_steps": 4, "trainer.val_check_interval": 2})
    with pytest.raises(ArithmeticError):
        run.wait()
    try:
        assert all(p.numel() for p in from_config(run.settings()["model"]["config"]).parameters())
        again = start("second", **{"trainer.max_steps": 2})
        again.wait()
        assert last_step(again) == 2
    finally:
        run.module.teardown("fit")  # the tests after this one shall not fail for it


def test_a_bad_rate_is_refused_and_the_pause_goes_on(start):
    run = start()
    reach(run, 1)
    run.pause()
    with pytest.raises(ValueError, match="learning rate"):
        run.resume(lr=-1)
    assert run.control.waiting
