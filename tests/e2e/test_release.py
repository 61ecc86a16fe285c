"""A released run gives back the weights and the optimizer's states, not only the object that held them."""
import gc
import time
import weakref

import pytest
import torch

from fengshen.cli.fit import fit
from fengshen.training.control import RunControl
from tests.training_runs import QUIET, tiny_config


def tensors_of(run):
    "Weak references to every weight and every optimizer state of a run."
    optimizer = run.cli.trainer.optimizers[0]
    optimizer = getattr(optimizer, "optimizer", optimizer)
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    shards = [p.ds_tensor for p in run.module.model.parameters() if hasattr(p, "ds_tensor")]
    return [weakref.ref(t) for t in [*run.module.model.parameters(), *states, *groups, *shards]]


@pytest.mark.parametrize("strategy", ["auto", "zero3"])
def test_nothing_large_outlives_a_release(tmp_path, strategy):
    settings = QUIET | {"run_dir": str(tmp_path / "run"), "model.config": tiny_config(tmp_path), "trainer.strategy": strategy}
    settings["trainer.max_steps"] = 10_000
    run = fit("demo", settings, control=RunControl(), wait=False)
    while len(run.records("train")) < 3:
        assert run.error is None
        time.sleep(0.05)
    run.pause()
    held = tensors_of(run)
    before = sum(t().numel() for t in held)
    run.release()
    gc.collect()
    after = sum(t().numel() for t in held if t() is not None)
    assert after < before / 20, f"{after:,} of {before:,} numbers are still held"
