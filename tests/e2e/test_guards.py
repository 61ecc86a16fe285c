"""Runs that go wrong on purpose: what each guard decides, on one process and on two, and that what a skipped step would have changed is untouched."""
import json
import re

import pytest
import torch

from fengshen.training.checkpoint import checkpoints
from fengshen.training.weights import read_weights
from tests import poison
from tests.poison import LINE, marked_pairs
from tests.training_runs import QUIET, apart, cli, fit, fit_here, flags, here, read, same, series, tiny_config, weights, weights_apart

BAD = 8  # the optimizer step whose samples hold the marked line, with these settings
STEPS = 11
LOSS, WEIGHT = 1e-5, 1e-5  # between strategies: two orders of summation (see tests/invariant/test_strategies.py)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("guards")


@pytest.fixture(scope="module")
def settings(folder):
    "The settings of every run here, with changes."
    base = {"model.config": tiny_config(folder), "model.optimizer.eps": 1e-6, "data.train": marked_pairs(folder / "train.jsonl"), "data.packing": False,
            "data.micro_batch": 2, "trainer.accumulate_grad_batches": 2, "trainer.max_steps": STEPS, "trainer.accelerator": "cpu"}
    return lambda loss=None, **more: base | ({"model.loss": f"tests.poison.{loss}"} if loss else {}) | more


@pytest.fixture(scope="module")
def skipped(folder, settings):
    "A run on one device that skipped the bad step, and kept every checkpoint."
    return fit_here(folder / "skipped", **settings("nan_loss", **{"guards.on_nan": "skip", "checkpoint.every_n_steps": 1, "checkpoint.keep": 100}))


def events(run_dir):
    path = run_dir / "guards.jsonl"
    return [json.loads(line) for line in path.read_text("utf8").splitlines()] if path.exists() else []


def refused(run_dir, settings, recipe="demo"):
    "What a run in this process says when it ends with exit status 2."
    status, out, err = here("fit", "-c", recipe, *flags(QUIET | {"run_dir": str(run_dir), "trainer.strategy": "auto"} | settings))
    assert status == 2, (status, out[-500:], err[-2000:])
    return err


def state(run_dir, step):
    return torch.load(run_dir / "checkpoints" / f"step-{step:08d}" / "state.ckpt", weights_only=True)


def finite(run_dir):
    return [r["step"] for r in read(run_dir) if r["loss"] is not None and r["grad_norm"] is not None]


def figures(run_dir):
    "The losses that are numbers."
    return [x for x in series(run_dir, "loss") if x is not None]


def after(run_dir):
    "The losses of the steps behind the bad one."
    return series(run_dir, "loss")[BAD:]


# A step that is not finite: skipped


def test_a_skipped_step_changes_no_weight_and_no_moment(skipped):
    before, after, later = state(skipped, BAD - 1), state(skipped, BAD), state(skipped, BAD + 1)
    assert same(before["state_dict"], after["state_dict"]) and not same(after["state_dict"], later["state_dict"])
    assert same(before["optimizer_states"][0]["state"], after["optimizer_states"][0]["state"])
    assert finite(skipped) == [s for s in range(1, STEPS + 1) if s != BAD]


def test_a_skipped_step_is_a_step_that_was_never_taken(folder, settings, skipped):
    "The same losses and weights, to the bit, as a run with a good loss whose module drops that step's update by hand; schedule and data go on."
    without = fit_here(folder / "without", **settings("plain", module="tests.poison.WithoutStep"))
    ours, theirs = series(skipped, "loss"), series(without, "loss")
    assert ours[: BAD - 1] == theirs[: BAD - 1] and ours[BAD:] == theirs[BAD:] and ours[BAD - 1] is None
    assert series(skipped, "lr") == series(without, "lr") and series(skipped, "tokens") == series(without, "tokens")
    assert same(weights(skipped), weights(without))
    plain = fit_here(folder / "plain", **settings())
    assert not same(weights(plain), weights(without)), "the step would have changed something"


@pytest.mark.parametrize("loss, named", [("nan_loss", 2), ("infinite_loss", 2), ("nan_gradient", 4)])
def test_the_samples_are_written_down(folder, settings, loss, named):
    "The micro-batch with the loss at fault; all of the step when only the gradient is."
    run = fit_here(folder / f"written-{loss}", **settings(loss, **{"guards.on_nan": "skip", "checkpoint.at_end": False}))
    [event] = events(run)
    assert event["step"] == BAD and event["guard"] == "nan" and event["did"] == "skip"
    assert LINE in event["lines"] and len(event["lines"]) == len(event["samples"]) == named
    assert event["samples"] == [line - 1 for line in event["lines"]], "nothing was left out of this file"
    assert (isinstance(event["loss"], float) and event["grad_norm"] == "nan") if loss == "nan_gradient" else event["loss"] in ("nan", "inf")


def test_samples_of_a_packed_row(folder, settings):
    run = fit_here(folder / "packed", **settings("nan_loss", **{"guards.on_nan": "skip", "data.packing": True, "data.micro_batch": 1, "checkpoint.at_end": False}))
    lines = {tuple(e["lines"]) for e in events(run)}
    assert len(lines) == 1 and LINE in [*lines][0] and 1 < len([*lines][0]) < 40, "one row, whenever it comes"


@pytest.mark.parametrize("strategy", ["zero3", *(pytest.param(s, marks=pytest.mark.slow) for s in ("zero1", "zero2", "zero3_offload"))])
@pytest.mark.slow
def test_deepspeed_leaves_the_same_step_out(folder, settings, skipped, strategy):
    run = fit(folder / strategy, **settings("nan_loss", **{"guards.on_nan": "skip", "trainer.strategy": strategy}))
    assert finite(run) == finite(skipped)
    assert apart(figures(run), figures(skipped)) < LOSS and series(run, "lr") == series(skipped, "lr")
    assert weights_apart(weights(run), weights(skipped)) < WEIGHT
    assert [(e["step"], e["lines"]) for e in events(run)] == [(e["step"], e["lines"]) for e in events(skipped)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_two_processes_decide_as_one(folder, settings, skipped, strategy):
    "One of them has the bad sample; both leave the step out, and its micro-batch is the one named."
    run = fit(folder / f"two-{strategy}", **settings("nan_loss", **{"guards.on_nan": "skip", "trainer.strategy": strategy, "trainer.devices": 2, "data.micro_batch": 1}))
    assert finite(run) == finite(skipped) and [(e["step"], e["lines"]) for e in events(run)] == [(BAD, [LINE])]
    assert apart(figures(run), figures(skipped)) < LOSS and weights_apart(weights(run), weights(skipped)) < WEIGHT


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("loss", ["nan_loss", "nan_gradient"])
def test_bfloat16_leaves_it_out_too(folder, settings, strategy, loss):
    run = fit(folder / f"bf16-{strategy}-{loss}", **settings(loss, **{"guards.on_nan": "skip", "trainer.strategy": strategy, "trainer.precision": "bf16-mixed"}))
    assert finite(run) == [s for s in range(1, STEPS + 1) if s != BAD]
    assert [(e["step"], e["did"]) for e in events(run)] == [(BAD, "skip")]


def test_skipping_has_an_end(folder, settings):
    err = refused(folder / "patience", settings("always_nan", **{"guards.on_nan": "skip", "guards.patience": 2}))
    assert "2 steps in a row were skipped before it" in err and "Traceback" not in err
    assert [e["did"] for e in events(folder / "patience")] == ["skip", "skip", "stop"]


def test_a_good_step_between_them_starts_the_count_anew(folder, settings):
    "The mark comes back every epoch of ten steps: patience 1 is enough."
    run = fit_here(folder / "count", **settings("nan_loss", **{"guards.on_nan": "skip", "guards.patience": 1, "trainer.max_steps": 31, "checkpoint.at_end": False}))
    assert [e["did"] for e in events(run)] == ["skip"] * 3


# Stopped


def test_it_stops_unless_told_otherwise(folder, settings):
    run = folder / "stopped"
    err = refused(run, settings("nan_loss", **{"checkpoint.every_n_steps": 1, "checkpoint.keep": 100}))
    assert f"step {BAD} is not finite: got 'loss nan, gradient norm nan'" in err and "Traceback" not in err
    assert str(run / "guards.jsonl") in err and "--guards.on_nan skip" in err and str(LINE) in err
    assert [(e["step"], e["did"]) for e in events(run)] == [(BAD, "stop")]
    assert all(bool(w.isfinite().all()) for w in weights(run).values())
    for line in (run / "metrics.jsonl").read_text("utf8").splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_a_stopped_run_goes_on_with_skip(folder, settings, skipped):
    "The same command with the flag from the message; to the bit the run that skipped from the start."
    run, keep = folder / "mended", {"checkpoint.every_n_steps": 3}
    refused(run, settings("nan_loss", **keep))
    run = fit_here(run, **settings("nan_loss", **keep, **{"guards.on_nan": "skip"}))
    assert series(run, "loss") == series(skipped, "loss") and same(weights(run), weights(skipped))


@pytest.mark.slow
def test_two_processes_stop_together(folder, settings):
    words = flags(QUIET | settings("nan_loss", **{"run_dir": str(folder / "together"), "trainer.strategy": "ddp", "trainer.devices": 2, "data.micro_batch": 1}))
    done = cli("fit", "-c", "demo", *words, cwd=folder, timeout=120)
    assert done.returncode != 0 and done.stderr.count(f"step {BAD} is not finite") == 1, done.stderr[-3000:]
    assert [(e["did"], e["lines"]) for e in events(folder / "together")] == [("stop", [LINE])]


# Rolled back


def rolled(folder, settings, name, strategy="auto", last=BAD, make=fit_here, **more):
    "A run that goes back at the bad step, to the checkpoint of step 6."
    keys = {"guards.on_nan": "rollback", "checkpoint.every_n_steps": 3, "checkpoint.keep": 100, "trainer.strategy": strategy, "trainer.max_steps": last,
            "model.schedule.kind": "constant"}
    return make(folder / name, **settings("nan_loss", **keys, **more))


def test_back_is_the_checkpoint(folder, settings):
    "The run ends with the bad step: what it saves then are the weights and moments of step 6, with the schedule of step 8."
    run = rolled(folder, settings, "back")
    then, now = state(run, 6), state(run, BAD)
    assert same(then["state_dict"], now["state_dict"]) and same(then["optimizer_states"][0]["state"], now["optimizer_states"][0]["state"])
    assert now["global_step"] == BAD and now["lr_schedulers"][0]["last_epoch"] == BAD
    assert [(e["step"], e["did"]) for e in events(run)] == [(BAD, "rollback")]


def test_after_going_back_data_and_schedule_go_on(folder, settings, skipped):
    keys = {"guards.on_nan": "rollback", "checkpoint.every_n_steps": 3}
    run = fit_here(folder / "onward", **settings("nan_loss", **keys))
    assert series(run, "step") == series(skipped, "step") and series(run, "tokens") == series(skipped, "tokens"), "no batch came twice"
    assert series(run, "lr") == series(skipped, "lr")
    assert series(run, "loss")[: BAD - 1] == series(skipped, "loss")[: BAD - 1] and series(run, "loss")[BAD] != series(skipped, "loss")[BAD]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero1", "zero3", "zero3_offload"])
def test_deepspeed_goes_back(folder, settings, strategy):
    run = rolled(folder, settings, f"back-{strategy}", strategy, make=fit)
    by_step = {p.name[-1]: read_weights(p) for p in checkpoints(run)}
    assert same(by_step["6"], by_step["8"]) and not same(by_step["3"], by_step["6"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_deepspeed_goes_on_from_there(folder, settings, strategy):
    "The moments are those of the checkpoint too, or the steps after it would differ."
    plain, deep = (rolled(folder, settings, f"on-{s}-{strategy}", s, STEPS, make=fit) for s in ("auto", strategy))
    assert apart(after(deep), after(plain)) < LOSS and series(deep, "lr") == series(plain, "lr")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_processes_go_back_together(folder, settings, strategy):
    two = {"trainer.devices": 2, "data.micro_batch": 1}
    one, run = rolled(folder, settings, f"one-{strategy}", last=STEPS), rolled(folder, settings, f"two-back-{strategy}", strategy, STEPS, fit, **two)
    assert apart(after(run), after(one)) < LOSS and [e["did"] for e in events(run)] == ["rollback"]


def test_nothing_to_go_back_to(folder, settings):
    err = refused(folder / "nowhere", settings("nan_loss", **{"guards.on_nan": "rollback"}))
    assert "no whole checkpoint to go back to yet" in err and "checkpoint.every_n_steps" in err


def test_a_damaged_checkpoint_is_passed_over(folder, settings):
    "The loss damages the newest checkpoint just before it is NaN; the one before it is taken."
    run, keys = folder / "damaged", {"guards.on_nan": "rollback", "checkpoint.every_n_steps": 3, "checkpoint.keep": 100, "trainer.max_steps": BAD}
    poison.damage = run / "checkpoints" / "step-00000006" / "state.ckpt"
    fit_here(run, **settings("damaging", **keys))
    assert same(state(run, 3)["state_dict"], state(run, BAD)["state_dict"])


def test_going_back_has_an_end(folder, settings):
    keys = {"guards.on_nan": "rollback", "guards.patience": 1, "checkpoint.every_n_steps": 3, "trainer.max_steps": 40}
    err = refused(folder / "often", settings("nan_loss", **keys))
    assert "the run went back 1 times before" in err and [e["did"] for e in events(folder / "often")] == ["rollback", "stop"]


# Spikes, learning rates, models that do not move


def test_a_spike_is_named_and_nothing_else(folder, settings):
    "Every epoch of ten steps has one; from the 51st step on they are spikes."
    keys = {"trainer.max_steps": 80, "model.optimizer.lr": 1e-5, "checkpoint.at_end": False}
    run = fit_here(folder / "spike", **settings("high", **keys))
    found = events(run)
    assert len(found) == 3 and all(e["guard"] == "spike" and e["did"] == "warn" and e["step"] > 50 for e in found)
    assert all(LINE in e["lines"] and len(e["lines"]) == 2 and e["loss"] > e["ceiling"] for e in found)
    assert len(read(run)) == 80
    err = refused(folder / "spike-stop", settings("high", **keys, **{"guards.on_spike": "stop"}))
    assert "is a spike" in err and "--guards.on_spike warn" in err and events(folder / "spike-stop")[0]["step"] == found[0]["step"]


def test_another_learning_rate_is_refused(folder, settings):
    err = refused(folder / "rate", settings(module="tests.poison.OtherRate"))
    assert "the optimizer's learning rate is not the schedule's after step 3: got 0.123" in err and "RunControl" in err
    assert len(read(folder / "rate")) == 3, "the step was not taken"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_another_learning_rate_is_refused_under_deepspeed(folder, settings, strategy):
    words = flags(QUIET | {"run_dir": str(folder / f"rate-{strategy}"), "trainer.strategy": strategy} | settings(module="tests.poison.OtherRate"))
    done = cli("fit", "-c", "demo", *words, cwd=folder)
    assert done.returncode == 2 and "got 0.123" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("strategy", ["auto", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_loss_that_does_not_reach_the_weights(folder, settings, strategy):
    make = fit_here if strategy == "auto" else fit
    run = make(folder / f"frozen-{strategy}", **settings(module="tests.poison.CutOff", **{"trainer.strategy": strategy}))
    assert [(e["guard"], e["step"]) for e in events(run)] == [("frozen", 5)], "told once; the decay still moves the weights"


def test_a_longer_run_takes_up_its_own_schedule(folder, settings):
    "Resumed at the old run's end, where its schedule was at 0, the next step uses the longer one's."
    straight = fit_here(folder / "long", **settings(**{"trainer.max_steps": 12, "checkpoint.at_end": False}))
    run = fit_here(folder / "short", **settings(**{"trainer.max_steps": 6}))
    assert read(run)[-1]["step"] == 6
    run = fit_here(run, **settings(resume=str(run), **{"trainer.max_steps": 12}))
    assert series(run, "step") == list(range(1, 13)) and series(run, "lr")[6:] == series(straight, "lr")[6:] and series(run, "lr")[6] > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_longer_run_takes_up_its_own_schedule_under_deepspeed(folder, settings, strategy):
    straight = fit_here(folder / f"long-{strategy}", **settings(**{"trainer.max_steps": 12, "checkpoint.at_end": False}))
    run = folder / f"short-{strategy}"
    for steps, resume in ((6, "auto"), (12, str(run))):
        fit(run, **settings(resume=resume, **{"trainer.max_steps": steps, "trainer.strategy": strategy}))
    assert series(run, "lr")[6:] == series(straight, "lr")[6:]


# Data and memory


def test_a_starving_device_is_told_once(folder, settings):
    slow = fit_here(folder / "slow", **settings(datamodule="tests.poison.SlowData", **{"trainer.max_steps": 45, "checkpoint.at_end": False}))
    [event] = events(slow)
    assert event["guard"] == "data_wait" and event["share"] > 0.2
    waiting, usual = series(slow, "data_wait"), series(fit_here(folder / "usual", **settings(**{"checkpoint.at_end": False})), "data_wait")
    assert all(0 <= w <= 1 for w in waiting + usual) and sorted(waiting)[22] > 0.2 > sorted(usual)[5]


def test_samples_without_a_label_are_reported_once(folder, settings):
    "Two of forty samples; an epoch of ten steps sees each once."
    status, out, err = here("fit", "-c", "demo", *flags(QUIET | {"run_dir": str(folder / "silent"), "trainer.strategy": "auto"} | settings(
        datamodule="tests.poison.SilentData", **{"trainer.max_steps": 10, "checkpoint.at_end": False})))
    assert status == 0, err
    [event] = events(folder / "silent")
    assert event["guard"] == "unlabelled" and set(event["lines"]) <= {LINE, 30} and event["lines"]
    assert "2 times a sample without a scored token was seen" in out and out.count("without a single scored token") == 1


def test_memory_that_runs_out_is_advice_that_works(folder, settings):
    "The flags it names are typed: the run goes through, with the same global batch."
    keys = {"data.micro_batch": 4, "trainer.accumulate_grad_batches": 1, "checkpoint.at_end": False}
    err = refused(folder / "hungry", settings("hungry", **keys))
    assert "memory ran out" in err and "Tried to allocate 2.00 GiB" in err and "Traceback" not in err
    assert "--model.gradient_checkpointing true" in err and "--trainer.strategy zero3_offload" in err
    for _ in range(2):  # 4 rows are too many, and 2 may be
        advice = dict(re.findall(r"--(data\.micro_batch|trainer\.accumulate_grad_batches) (\d+)", err))
        assert int(advice["data.micro_batch"]) * int(advice["trainer.accumulate_grad_batches"]) == 4
        words = flags(QUIET | {"run_dir": str(folder / "fed"), "overwrite": True, "trainer.strategy": "auto"} | settings("hungry", **keys) | {k: int(v) for k, v in advice.items()})
        status, out, err = here("fit", "-c", "demo", *words)
        if status == 0:
            break
    assert status == 0, err
    assert apart(series(folder / "fed", "loss"), series(fit_here(folder / "enough", **settings(**keys)), "loss")) < LOSS


def test_unknown_decisions_are_refused(folder, settings):
    assert "did you mean 'skip'" in refused(folder / "x", settings(**{"guards.on_nan": "skp"}))
    assert "guards.patience" in refused(folder / "x", settings(**{"guards.patience": -1}))
    assert "did you mean 'guards.on_nan'" in refused(folder / "x", settings(**{"guards.on_nam": "skip"}))
