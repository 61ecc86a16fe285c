"""Attention with a learned bias, as a model calls it: what the kernels are told, computed by their plain lines, beside the model's own attention."""

import copy

import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration, UMT5Config, UMT5ForConditionalGeneration

from fengshen.utils.device import seeded
from fengshen.utils.kernels import biased
from fengshen.utils.kernels.attention import set_attention
from fengshen.utils.kernels.compile import blocks
from fengshen.utils.kernels.dropout import quicken

SMALL = dict(vocab_size=60, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0)
MODELS = dict(t5=(T5ForConditionalGeneration, T5Config), umt5=(UMT5ForConditionalGeneration, UMT5Config))


def drawn(name):
    model, config = MODELS[name]
    with seeded(0):
        model = model(config(**SMALL)).double().train()
        for layer in model.modules():
            if hasattr(layer, "relative_attention_bias"):
                torch.nn.init.normal_(layer.relative_attention_bias.weight)
    return model


def results(model, padded, checked=False):
    with seeded(1):
        ids, labels = torch.randint(1, 60, (2, 12)), torch.randint(1, 60, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    if checked:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    loss = model(input_ids=ids, attention_mask=mask if padded else None, labels=labels, use_cache=False).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]


@pytest.fixture
def told(monkeypatch):
    "The plain lines in place of the kernels, and what they were told."
    calls = []

    def plain(q, k, v, bias, seen, seed, dropout, scaling, causal):
        assert all(t.is_contiguous() for t in (q, k, v, bias)) and (seen is None or seen.is_contiguous())
        calls.append(dict(seen=seen is not None, seed=int(seed), dropout=dropout, causal=causal))
        return biased.biased_in_torch(q, k, v, bias, seen, seed, dropout, scaling, causal), None

    monkeypatch.setattr(biased, "can_fuse", lambda *call: True)
    monkeypatch.setattr(biased, "biased_attention", plain)
    return calls


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_gradients_of_its_own_attention(told, name, padded):
    model = drawn(name)
    set_attention(model, "eager")
    own = results(model, padded)
    assert not told
    set_attention(model, biased.register_biased())
    for a, b in zip(results(model, padded), own):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert len(told) == 6 and any(call["seen"] or call["causal"] for call in told) and not any(call["seen"] and call["causal"] for call in told)


def test_a_block_that_is_computed_again_drops_the_same(told):
    found = {}
    for checked in (False, True):
        told.clear()
        model = drawn("t5")
        model.config.dropout_rate = 0.3
        for part in model.modules():
            if hasattr(part, "has_relative_attention_bias"):
                part.dropout = 0.3
        set_attention(model, biased.register_biased())
        with seeded(2):
            found[checked] = results(model, False, checked)
        seeds = [call["seed"] for call in told]
        assert len(seeds) == (12 if checked else 6) and len(set(seeds)) == 6 and all(call["dropout"] == 0.3 for call in told)
    for a, b in zip(*found.values()):
        torch.testing.assert_close(a, b)


def test_parts_with_a_configuration_of_their_own_are_told(monkeypatch):
    "transformers 5.17 leaves parts out whose configuration is a copy of the model's."
    model = drawn("t5")
    for part in (model.encoder, model.decoder):
        part.config = copy.deepcopy(part.config)
    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", lambda self, name: setattr(self.config, "_attn_implementation", name))
    set_attention(model, "eager")
    assert [part.config._attn_implementation for part in (model, model.encoder, model.decoder)] == ["eager"] * 3


def test_a_model_that_cannot_be_told_keeps_its_own(monkeypatch):
    model = drawn("t5")
    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", lambda self, name: None)
    set_attention(model, "eager")
    assert {part.config._attn_implementation for part in (model, model.encoder, model.decoder)} == {"sdpa"}


@pytest.mark.parametrize("change,takes", [
    ({}, True), (dict(dtype=torch.float32), False), (dict(width=80), False), (dict(mask=torch.zeros(2, 1, 4, 4)), False), (dict(mask=torch.ones(2, 1, 4, 4, dtype=torch.bool)), True),
    (dict(causal=True), True), (dict(causal=True, keys=5), False), (dict(keys=5), True), (dict(rows=40_000), False), (dict(device="cpu"), False)])
def test_what_the_kernels_take(monkeypatch, change, takes):
    monkeypatch.setattr(biased, "TRITON", True)
    call = dict(dtype=torch.bfloat16, width=64, mask=None, causal=False, keys=4, rows=2, device="meta") | change
    q, k = (torch.empty(call["rows"], 2, n, call["width"], dtype=call["dtype"], device=call["device"]) for n in (4, call["keys"]))
    assert biased.can_fuse(q, k, call["mask"], call["causal"]) is takes


def test_a_block_is_compiled_in_one_piece(monkeypatch):
    "With the kernels and with dropout by a hash: a break would cost copies of queries, keys and values, and five times the launches. On tensors without numbers, which take a GPU's way."
    monkeypatch.setattr(biased, "TRITON", True)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**SMALL | dict(dropout_rate=0.1, num_layers=3))).train().to(torch.bfloat16)
    set_attention(model, biased.register_biased())
    assert quicken(blocks(model)) > 0
    for block in blocks(model):
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    ids = torch.ones(2, 16, dtype=torch.long, device="meta")
    assert model(input_ids=ids, attention_mask=None, decoder_input_ids=ids[:, :8], use_cache=False).logits.shape == (2, 8, 60)
