"""Blocks compiled under ZeRO-3, whose weights come and go around the compiled code: the same losses and weights as without, and one program."""

import pytest
import torch

from tests.training_runs import fit_here, series, tiny_config, weights

ZERO3 = {"trainer.strategy": "zero3", "model.attention": "sdpa", "data.micro_batch": 2, "trainer.max_steps": 4, "model.optimizer.lr": 3e-3, "checkpoint.every_n_steps": 2}


@pytest.mark.slow  # a compiler for the CPU takes a minute
@pytest.mark.parametrize("again", [False, True])
def test_compiled_blocks_learn_the_same(tmp_path, again):
    from torch._dynamo.utils import counters

    still = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # compiled code draws dropout otherwise
    given = ZERO3 | {"model.gradient_checkpointing": again, "model.config": tiny_config(tmp_path, **still)}
    counters.clear()
    compiled = fit_here(tmp_path / "compiled", **given | {"model.compile": True})
    assert 1 <= counters["stats"]["unique_graphs"] <= 2, "one for all blocks, and one for a block that is computed again at most"
    plain = fit_here(tmp_path / "plain", **given | {"model.compile": False})
    assert max(abs(a - b) for a, b in zip(series(compiled, "loss"), series(plain, "loss"))) < 1e-5
    one, other = weights(compiled), weights(plain)
    assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
