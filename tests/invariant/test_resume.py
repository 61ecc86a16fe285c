"""A run that was stopped and started again is the run that was never stopped: losses, learning rates, gradient norms and weights, to the bit."""
import shutil

import pytest
import torch

from fengshen.training.checkpoint import checkpoints, step_of
from tests.training_runs import fit_here, read, tiny_config, uneven_pairs, weights

DROPOUT = dict(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
KEYS = ("step", "split", "loss", "lr", "grad_norm", "tokens", "perplexity")


def record(run):
    "The record without clocks and speeds."
    return [{k: row[k] for k in KEYS if k in row} for split in ("train", "valid") for row in read(run, split)]


def settings(folder, **more):
    "Dropout, accumulation, three epochs of 19 rows or so, a validation in the middle of an epoch and one at its end."
    return {"model.config": tiny_config(folder, **DROPOUT), "data.train": uneven_pairs(folder / "train.jsonl", 37), "data.valid": uneven_pairs(folder / "valid.jsonl", 5, seed=1),
            "data.micro_batch": 2, "data.packing": False, "trainer.accumulate_grad_batches": 2, "trainer.max_steps": 24, "trainer.val_check_interval": 7, "model.optimizer.lr": 3e-3} | more


def back_to(run, step, folder):
    "A copy of a run as a kill after `step` would have left it: later checkpoints and the end are missing."
    copy = folder / f"stopped-{step}"
    shutil.copytree(run, copy)
    for path in checkpoints(copy):
        if step_of(path) > step:
            shutil.rmtree(path)
    for name in ("summary.json", "report.html"):
        (copy / name).unlink()
    return copy


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
    for step in steps[:-1] if not packing else steps[:-1:5]:
        run = back_to(straight, step, tmp_path)
        fit_here(run, **given)
        assert record(run) == want, step
        assert same(weights(run), end), step
        shutil.rmtree(run)
