"""Compiling blocks, one model after the other in a process."""

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel

from fengshen.utils.kernels.compile import compile_blocks
from tests.training_runs import fit_here


@pytest.fixture
def quick(monkeypatch):
    "Blocks are traced and run as they are, and nothing falls back: a recompile beyond the limit is an error."
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager", fullgraph=True))


@torch._dynamo.config.patch(recompile_limit=2)
def test_the_ninth_model_is_compiled_as_the_first_was(quick):
    "Blocks of all models share code, and torch gives code up that was compiled `recompile_limit` times: a notebook that tries ten models would run the last two as they are written, at half the speed."
    ids = torch.arange(8)[None]
    for width in (8, 16, 24, 32):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=width, n_layer=2, n_head=2)).train()
        compile_blocks(model)
        model(ids).logits.sum().backward()


@pytest.mark.parametrize("lora", [{}, {"model.lora": dict(r=4)}])
def test_all_blocks_of_a_model_are_one_program(quick, tmp_path, lora):
    "Also behind frozen embeddings: a first block whose input needs no gradient is another program, and compiling a second one of 3.56 billion parameters takes ten seconds and more."
    counters.clear()
    fit_here(tmp_path / "run", **{"trainer.accelerator": "cpu", "trainer.max_steps": 2, "model.compile": True, "model.attention": "sdpa", "trainer.limit_val_batches": 0, **lora})
    assert counters["stats"]["unique_graphs"] == 1
