"""A run that was stopped and started again is the run that was never stopped: losses, learning rates, gradient norms and weights, to the bit."""
import json
import shutil

import pytest
import torch
import yaml

from fengshen.cli.fit import make_cli, split_args
from fengshen.cli.lightning import without
from fengshen.training.checkpoint import checkpoints, step_of
from fengshen.training.resume import differences
from tests.training_runs import QUIET, apart, back_to, fit, fit_here, flags, here, read, series, tiny_config, uneven_pairs, weights, weights_apart

DROPOUT = dict(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
KEYS = ("step", "split", "loss", "lr", "grad_norm", "tokens", "perplexity")


def record(run):
    "The record without clocks and speeds."
    return [{k: row[k] for k in KEYS if k in row} for split in ("train", "valid") for row in read(run, split)]


def settings(folder, **more):
    "Dropout, accumulation, three epochs of 19 rows or so, a validation in the middle of an epoch and one at its end."
    return {"model.config": tiny_config(folder, **DROPOUT), "data.train": uneven_pairs(folder / "train.jsonl", 37), "data.valid": uneven_pairs(folder / "valid.jsonl", 5, seed=1),
            "data.micro_batch": 2, "data.packing": False, "trainer.accumulate_grad_batches": 2, "trainer.max_steps": 24, "trainer.val_check_interval": 7, "model.optimizer.lr": 3e-3} | more


def same(a, b):
    "Equal to the bit, name by name."
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("packing", [False, True])
def test_resumed_from_every_step_on_one_device(tmp_path, packing):
    "Every step of three epochs: in their middle, at their ends, before and after validations."
    given = settings(tmp_path, **{"checkpoint.every_n_steps": 1, "checkpoint.keep": 99, "data.packing": packing})
    straight = fit_here(tmp_path / "straight", **given)
    want, end = record(straight), weights(straight)
    steps = [step_of(p) for p in checkpoints(straight)]
    assert steps == list(range(1, 25))
    for step in steps[:-1:5] if packing else steps[:-1:2]:
        run = back_to(straight, step, tmp_path)
        fit_here(run, **given)
        assert record(run) == want, step
        assert same(weights(run), end), step
        shutil.rmtree(run)


@pytest.mark.parametrize("every", ["epoch", "step"])
def test_runs_that_end_with_their_epochs(tmp_path, every):
    "Two epochs, a validation after each; stopped at the end of an epoch and inside one."
    bounds = {"trainer.max_steps": -1, "trainer.max_epochs": 2, "trainer.val_check_interval": 1.0, "trainer.check_val_every_n_epoch": 1}
    given = settings(tmp_path, **bounds | {"checkpoint.every_n_steps": 10 if every == "epoch" else 7, "checkpoint.keep": 99})
    straight = fit_here(tmp_path / "straight", **given)
    for step in {"epoch": (10,), "step": (7, 14)}[every]:
        run = back_to(straight, step, tmp_path)
        fit_here(run, **given)
        assert record(run) == record(straight), step
        assert same(weights(run), weights(straight)), step


def test_going_on_longer_is_a_longer_run(tmp_path):
    "A finished run goes on with more steps when asked to, and is what the longer run would have been."
    given = settings(tmp_path, **{"model.schedule.kind": "constant"})
    short, long = fit_here(tmp_path / "short", **given | {"trainer.max_steps": 12}), fit_here(tmp_path / "long", **given)
    fit_here(short, **given | {"resume": str(short)})
    assert [r for r in record(short) if r["split"] == "train"] == [r for r in record(long) if r["split"] == "train"]
    assert same(weights(short), weights(long))


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    "The one before is used, it is said, and the damaged one is set aside, not deleted."
    given = settings(tmp_path, **{"checkpoint.every_n_steps": 4, "checkpoint.keep": 99})
    straight = fit_here(tmp_path / "straight", **given)
    run = back_to(straight, 16, tmp_path)
    state = run / "checkpoints" / "step-00000016" / "state.ckpt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 4
    state.write_bytes(content)
    status, out, err = here("fit", "-c", "demo", *flags(QUIET | {"run_dir": str(run), "trainer.strategy": "auto"} | given))
    assert status == 0, err
    assert "step-00000016 is passed over: state.ckpt has other content" in out and "going on after step 12" in out
    assert (run / "checkpoints" / "step-00000016.aside").exists()
    assert record(run) == record(straight) and same(weights(run), weights(straight))


@pytest.mark.parametrize("changed, named", [
    ({"model.optimizer.lr": 1e-3}, "model.optimizer.lr was 0.003, is 0.001"),
    ({"data.micro_batch": 4}, "the global batch was 4, is 8"),
    ({"trainer.gradient_clip_val": 0.5}, "trainer.gradient_clip_val"),
    ({"data.max_length": 64}, "data.max_length"),
    ({"trainer.strategy": "zero2"}, "another kind of strategy"),
])
def test_another_run_is_refused_by_name(tmp_path, changed, named):
    given = settings(tmp_path, **{"checkpoint.every_n_steps": 2, "trainer.max_steps": 6})
    run = back_to(fit_here(tmp_path / "straight", **given | {"checkpoint.keep": 99}), 4, tmp_path)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    status, out, err = here("fit", "-c", "demo", *flags(QUIET | {"run_dir": str(run), "trainer.strategy": "auto"} | given | changed))
    assert status == 2 and named in err, err
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}, "nothing is lost by a refusal"


def test_a_setting_that_is_younger_than_the_run_is_no_change_at_its_default(tmp_path):
    "A run of an earlier version: its run.yaml lacks settings, plain ones and those of an adapter. At another value than the default they are refused by name."
    given = settings(tmp_path, **{"checkpoint.every_n_steps": 2, "trainer.max_steps": 6, "model.lora.r": 4})
    straight = fit_here(tmp_path / "straight", **given | {"checkpoint.keep": 99})
    run = back_to(straight, 4, tmp_path)
    of_then = run / "checkpoints" / "step-00000004" / "run.yaml"
    saved = yaml.safe_load(of_then.read_text("utf8"))
    del saved["model"]["activation_budget"], saved["model"]["lora"]["alpha"], saved["guards"]
    of_then.write_text(yaml.safe_dump(saved), "utf8")
    for changed, named in (({"model.activation_budget": 0.5}, "model.activation_budget was 1.0, is 0.5;"), ({"model.lora.alpha": 8}, "model.lora.alpha was 16, is 8;")):
        status, out, err = here("fit", "-c", "demo", *flags(QUIET | {"run_dir": str(run), "trainer.strategy": "auto"} | given | changed))
        assert status == 2 and f"got '{named[:-1]}'" in err, err
    fit_here(run, **given)
    assert record(run) == record(straight)


def test_an_adapter_that_the_run_did_not_have_is_a_change():
    "Also where all of its settings are those by default; and a setting without a default is a change."
    cli = make_cli(*split_args(["-c", "demo", "--smoke", "--model.lora.r=8"]))
    now = cli.effective()
    then = without(now, {"model.lora", "data.max_length"}) | dict(model=now["model"] | dict(lora=None))
    assert "model.lora.r" in differences(then, now, cli.unsaid) and "model.lora.r" in differences(now, then, cli.unsaid)
    assert differences(without(now, {"model.lora", "model.config"}), now, cli.unsaid).keys() >= {"model.lora.r", "model.config"}


def test_other_data_are_refused_and_taken_over_on_request(tmp_path):
    given = settings(tmp_path, **{"checkpoint.every_n_steps": 2, "trainer.max_steps": 6})
    run = back_to(fit_here(tmp_path / "straight", **given | {"checkpoint.keep": 99}), 4, tmp_path)
    uneven_pairs(tmp_path / "train.jsonl", 37, seed=9)
    words = ["fit", "-c", "demo", *flags(QUIET | {"run_dir": str(run), "trainer.strategy": "auto"} | given)]
    status, out, err = here(*words)
    assert status == 2 and "the data" in err, err
    status, out, err = here(*words, "--accept_changes", "true")
    assert status == 0 and "starting with their first epoch" in out, err
    assert [r["step"] for r in read(run)] == list(range(1, 7))


def test_settings_that_change_no_number_are_free(tmp_path):
    "Extended, watched more closely, saved more often: still the same run."
    given = settings(tmp_path, **{"checkpoint.every_n_steps": 2, "trainer.max_steps": 6, "model.schedule.kind": "constant"})
    run = back_to(fit_here(tmp_path / "straight", **given | {"checkpoint.keep": 99}), 4, tmp_path)
    fit_here(run, **given | {"trainer.max_steps": 8, "checkpoint.keep": 3, "trainer.log_every_n_steps": 2, "model.samples": 1})
    assert read(run)[-1]["step"] == 8


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
    given = settings(tmp_path, **{"trainer.max_steps": 3})
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps(dict(step=1, split="train", loss=1.0)) + "\n")
    fit_here(run, **given)
    assert [r["step"] for r in read(run)] == [1, 2, 3]
    status, out, err = here("fit", "-c", "demo", *flags(QUIET | {"run_dir": str(run), "resume": "never"} | given))
    assert status == 2 and "holds a finished run" in err


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy, saved, later", [
    pytest.param("ddp", 2, 1, marks=pytest.mark.slow), pytest.param("zero2", 2, 1, marks=pytest.mark.slow), pytest.param("zero3", 2, 1, marks=pytest.mark.slow), pytest.param("zero3", 2, 4, marks=pytest.mark.slow),
    pytest.param("zero1", 1, 2, marks=pytest.mark.slow), pytest.param("zero3_offload", 2, 1, marks=pytest.mark.slow)])
def test_another_number_of_processes(tmp_path, strategy, saved, later):
    "The global batch stays, every row of the epoch is seen once, and the losses are those of the straight run to 1e-5."
    (tmp_path / "calm").mkdir()
    calm = {"model.config": tiny_config(tmp_path / "calm"), "trainer.strategy": strategy, "trainer.accelerator": "cpu", "trainer.max_steps": 14,
            "checkpoint.every_n_steps": 7, "checkpoint.keep": 99}
    given = settings(tmp_path, **calm | {"trainer.devices": saved})
    straight = fit(tmp_path / "straight", **given)
    run = back_to(straight, 7, tmp_path)
    fit(run, **given | {"trainer.devices": later})
    assert apart(series(run, "loss"), series(straight, "loss")) < 1e-5
    assert series(run, "tokens") == series(straight, "tokens"), "the same rows, each once"
    assert weights_apart(weights(run), weights(straight)) < 1e-4
