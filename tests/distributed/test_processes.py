"""DeepSpeed over two processes on the CPU: the same run as one process, whole checkpoints, and an end to it when something is wrong."""
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from fengshen.training.checkpoint import checkpoints
from fengshen.training.export import build, export
from fengshen.utils.core import Explained
from tests.training_runs import apart, cli, fit, fit_here, flags, read, series, tiny_config, uneven_pairs, weights, weights_apart

STEPS = 6
LOSS, NORM, WEIGHT = 1e-5, 1e-4, 1e-5
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost")


def settings(folder, **more):
    return {
        "model.config": tiny_config(folder), "model.optimizer.lr": 3e-3, "model.optimizer.eps": 1e-6, "model.schedule.warmup_steps": 2,
        "data.train": uneven_pairs(folder / "train.jsonl", 21), "data.valid": uneven_pairs(folder / "valid.jsonl", 5, seed=1), "data.packing": False,
        "data.valid_micro_batch": 2, "trainer.max_steps": STEPS, "trainer.accelerator": "cpu", "model.samples": 1, "model.max_new_tokens": 4} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def whole(folder):
    return fit_here(folder / "whole", **settings(folder, **{"data.micro_batch": 8, "trainer.val_check_interval": STEPS}))


@pytest.fixture(scope="module")
def runs(folder):
    "Two-process runs by strategy, each made once; zero3 is started by torchrun, the others by Lightning."
    done = {}

    def run(strategy):
        if strategy not in done:
            more = {"trainer.strategy": strategy, "trainer.devices": 2, "data.micro_batch": 2, "trainer.accumulate_grad_batches": 2,
                    "trainer.val_check_interval": 2 * STEPS}
            done[strategy] = fit(folder / strategy, launcher=TORCHRUN if strategy == "zero3" else (), **settings(folder, **more))
        return done[strategy]

    return run


SLOW = [pytest.param(s, marks=pytest.mark.slow) for s in ("zero1", "zero2", "zero3_offload")]


@pytest.mark.parametrize("strategy", ["zero3", *SLOW])
def test_two_processes_are_one(runs, whole, strategy):
    run = runs(strategy)
    assert [r["step"] for r in read(run)] == list(range(1, STEPS + 1)), "one record, written by one process"
    assert apart(series(run, "loss"), series(whole, "loss")) < LOSS
    assert apart(series(run, "grad_norm"), series(whole, "grad_norm")) < NORM
    assert series(run, "lr") == series(whole, "lr") and series(run, "tokens") == series(whole, "tokens")
    assert weights_apart(weights(run), weights(whole)) < WEIGHT
    for key in ("loss", "perplexity", "token_accuracy"):
        assert apart(series(run, key, "valid"), series(whole, key, "valid")) < 1e-4, key


@pytest.mark.slow
def test_the_checkpoint_of_two_processes_becomes_a_folder(runs):
    "Each process wrote its shards; the export joins them, and plain transformers loads what comes out."
    run = runs("zero3")
    assert len(list(checkpoints(run)[-1].rglob("*optim_states.pt"))) == 2
    model = AutoModelForCausalLM.from_pretrained(export(run, out=run.parent / "exported"))
    joined = weights(run)
    assert weights_apart({k: v for k, v in model.state_dict().items() if k in joined}, joined) == 0


@pytest.mark.parametrize("lost", ["*pp_rank_1_*optim_states.pt", "*pp_rank_0_*optim_states.pt", "*optim_states.pt"])
def test_a_lost_shard_is_refused(runs, tmp_path, lost):
    "Half a model is no model: a file of one node was not copied. With a manifest it is named; without one the reader finds out."
    copy = tmp_path / "step-00000006"
    shutil.copytree(checkpoints(runs("zero3"))[-1], copy)
    for path in copy.rglob(lost):
        path.unlink()
    with pytest.raises(ValueError, match="optim_states.pt is missing"):
        export(copy, out=tmp_path / "out")
    with pytest.raises(ValueError) as refusal:
        build(copy, torch.float32)
    assert isinstance(refusal.value.args[0], Explained) and "shards" in str(refusal.value), refusal.value


@pytest.mark.slow
def test_under_zero2_the_model_states_have_all_of_it(runs, tmp_path):
    "A shard of the optimizer is lost, and the weights of the forward pass, float32 in this run, are still whole."
    copy = tmp_path / "step-00000006"
    shutil.copytree(checkpoints(runs("zero2"))[-1], copy)
    next(copy.rglob("*pp_rank_0_*optim_states.pt")).unlink()
    found, joined = build(copy, torch.float32).state_dict(), weights(runs("zero2"))
    assert weights_apart({k: v for k, v in found.items() if k in joined}, joined) == 0


@pytest.mark.slow
def test_a_refusal_ends_both_processes(runs, whole):
    "The second process does not wait for a first one that has refused to start."
    words = flags(settings(whole.parent, **{"run_dir": str(whole), "trainer.devices": 2, "trainer.strategy": "ddp"}))
    done = cli("fit", "-c", "demo", *words, cwd=whole.parent, launcher=TORCHRUN, timeout=120)
    assert done.returncode != 0 and done.stderr.count("the folder holds a finished run") == 1, done.stderr[-3000:]
    assert "ValueError" not in done.stderr


@pytest.mark.slow
def test_a_failure_while_reading_the_data_ends_both_processes(folder, tmp_path):
    words = flags(settings(folder, **{"run_dir": str(tmp_path / "run"), "data.train": str(tmp_path / "absent.jsonl"), "trainer.devices": 2,
                                      "trainer.strategy": "ddp"}))
    done = cli("fit", "-c", "demo", *words, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and done.stderr.count("absent.jsonl") == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
