"""Packed rows on two processes: rows differ in scored tokens, the last window is incomplete, and the step is still that of one process."""
import pytest

from fengshen.training.module import CausalLMModule
from tests.training_runs import apart, fit, fit_here, read, series, tiny_config, uneven_pairs, weights, weights_apart

STEPS = 5
LOSS, NORM, WEIGHT = 1e-5, 1e-4, 1e-5


def settings(folder, micro_batch, accumulate=1, **more):
    return {
        "model.config": tiny_config(folder), "model.optimizer.lr": 3e-3, "model.optimizer.eps": 1e-6, "model.schedule.warmup_steps": 2,
        "data.train": uneven_pairs(folder / "train.jsonl", 61), "data.packing": True, "data.micro_batch": micro_batch, "trainer.max_steps": STEPS,
        "trainer.accelerator": "cpu", "trainer.accumulate_grad_batches": accumulate} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def whole(folder):
    return fit_here(folder / "whole", **settings(folder, 8))


def check_equal(run, whole):
    assert [r["step"] for r in read(run)] == list(range(1, STEPS + 1))
    loss = max(abs(x - y) for x, y in zip(series(run, "loss"), series(whole, "loss")))
    norm = apart(series(run, "grad_norm"), series(whole, "grad_norm"))
    found = dict(loss=loss, norm=norm, weight=weights_apart(weights(run), weights(whole)))
    print(found)
    assert found["loss"] <= LOSS and found["norm"] <= NORM and found["weight"] <= WEIGHT, found
    assert series(run, "tokens") == series(whole, "tokens")


def test_the_last_window_of_an_epoch_is_incomplete(whole):
    tokens = series(whole, "tokens")
    steps = [b - a for a, b in zip([0, *tokens], tokens)]
    assert min(steps) < 0.8 * max(steps)


def test_accumulation_is_one_batch(folder, whole):
    check_equal(fit_here(folder / "4x2", **settings(folder, 4, 2)), whole)


@pytest.mark.parametrize("strategy", ["ddp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("zero2", "zero3"))])
def test_two_processes_are_one(folder, whole, strategy):
    check_equal(fit(folder / strategy, **settings(folder, 4, **{"trainer.strategy": strategy, "trainer.devices": 2})), whole)


class MeanOfMeans(CausalLMModule):
    "The usual mistake: each micro-batch has its own mean, and those are averaged."

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        return self.token_loss(batch) / max(batch["num_labels"], 1)


def test_a_mean_of_means_is_told_apart(folder, whole):
    "A row at a time: packing evens out the scored tokens of larger micro-batches, which hides the mistake better."
    run = fit_here(folder / "naive", **settings(folder, 1, 8, module=f"{__name__}.MeanOfMeans"))
    norm, weight = apart(series(run, "grad_norm"), series(whole, "grad_norm")), weights_apart(weights(run), weights(whole))
    print("naive", norm, weight)
    assert norm > 1e-2 and weight > 10 * WEIGHT
