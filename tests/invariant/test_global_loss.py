"""One definition of the loss: the same 8 samples make the same step, in one batch, in micro-batches with accumulation, or on two processes.

The samples have between 1 and 60 scored characters, and the last window of an epoch has 5 of them: what is wrong for unequal micro-batches shows.
"""
import pytest

from fengshen.training.module import LanguageModelModule
from tests.training_runs import TINY, apart, fit, fit_here, read, series, tiny_config, uneven_pairs, weights, weights_apart

PAIRS, BATCH, STEPS = 37, 8, 10  # two epochs of 5 steps
LOSS, NORM, WEIGHT = 1e-5, 1e-4, 1e-5


def settings(folder, micro_batch, accumulate, **more):
    return {
        "model.config": tiny_config(folder), "model.optimizer.lr": 3e-3, "model.optimizer.eps": 1e-6, "model.schedule.warmup_steps": 2,
        "data.train": uneven_pairs(folder / "train.jsonl", PAIRS), "data.valid": uneven_pairs(folder / "valid.jsonl", 11, seed=1),
        "data.packing": False, "data.micro_batch": micro_batch, "data.valid_micro_batch": 3, "trainer.accumulate_grad_batches": accumulate, "trainer.max_steps": STEPS,
        "trainer.accelerator": "cpu", "trainer.val_check_interval": STEPS * accumulate} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("global_loss")


@pytest.fixture(scope="module")
def whole(folder):
    "The run all others have to repeat: one device, one batch of 8."
    return fit_here(folder / "whole", **settings(folder, BATCH, 1))


def check_equal(run, whole):
    assert [r["step"] for r in read(run)] == list(range(1, STEPS + 1))
    assert apart(series(run, "loss"), series(whole, "loss")) < LOSS
    assert apart(series(run, "grad_norm"), series(whole, "grad_norm")) < NORM
    assert series(run, "tokens") == series(whole, "tokens") and series(run, "lr") == series(whole, "lr")
    assert weights_apart(weights(run), weights(whole)) < WEIGHT
    for key in ("loss", "perplexity", "token_accuracy"):
        assert apart(series(run, key, "valid"), series(whole, key, "valid")) < 1e-4, key


def test_the_data_is_uneven(folder, whole):
    from fengshen.data.task_dataloader.conversations import ConversationDataset
    from fengshen.tokenizer import load_tokenizer

    data = ConversationDataset(str(folder / "train.jsonl"), load_tokenizer("fengshen:tokenizer_demo"), max_length=TINY["n_positions"])
    scored = [int((sample["labels"] != -100).sum()) for sample in data]
    assert len(data) == PAIRS and PAIRS % BATCH and max(scored) >= 8 * min(scored)
    assert len(series(whole, "loss")) == STEPS and series(whole, "loss")[0] - series(whole, "loss")[-1] > 0.5


@pytest.mark.parametrize("micro_batch, accumulate", [(4, 2), (2, 4), (1, 8)])
def test_accumulation_is_one_batch(folder, whole, micro_batch, accumulate):
    check_equal(fit_here(folder / f"{micro_batch}x{accumulate}", **settings(folder, micro_batch, accumulate)), whole)


class MeanOfMeans(LanguageModelModule):
    "The usual mistake: each micro-batch has its own mean, and those are averaged."

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        return self.token_loss(batch) / max(batch["num_labels"], 1)


def test_a_mean_of_means_is_told_apart(folder, whole):
    naive = dict(module=f"{__name__}.MeanOfMeans")
    run = fit_here(folder / "naive", **settings(folder, 4, 2, **naive))
    assert apart(series(run, "grad_norm"), series(whole, "grad_norm")) > 100 * NORM
    assert apart(series(run, "loss")[1:], series(whole, "loss")[1:]) > 100 * LOSS
    assert weights_apart(weights(run), weights(whole)) > 100 * WEIGHT


@pytest.fixture(scope="module")
def two(folder):
    "DDP: 2 processes x 2 samples x 2 accumulations; in the last window of an epoch the second process has one sample and then none."
    return fit(folder / "ddp", **settings(folder, 2, 2, **{"trainer.strategy": "ddp", "trainer.devices": 2}))


@pytest.mark.slow
def test_two_processes_are_one_batch(two, whole):
    check_equal(two, whole)


@pytest.mark.slow
def test_the_record_counts_the_tokens_of_both_processes(two):
    "A validation's line and the step's line before it stand at the same number of real tokens."
    assert series(two, "tokens", "valid") == series(two, "tokens")[-1:]
