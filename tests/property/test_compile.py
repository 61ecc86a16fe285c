"""Compiling blocks, one model after the other in a process."""

from functools import partialmethod

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fengshen.utils.kernels.compile import compile_blocks


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
