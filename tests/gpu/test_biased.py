"""Attention with a learned bias: the kernels against their plain lines, and a T5 that trains with them."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from fengshen.utils import device
from fengshen.utils.device import seeded
from fengshen.utils.kernels.attention import set_attention
from fengshen.utils.kernels.biased import biased_attention, biased_in_torch, register_biased
from fengshen.utils.kernels.compile import compile_blocks

HERE = device.device_kind()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(HERE == "cpu", reason="no accelerator here")]


def drawn(rows, queries, keys, heads, width):
    lengths = queries, keys, keys
    with seeded(0):
        made = [torch.randn(rows, n, heads, width) for n in lengths] + [torch.randn(heads, queries, keys), torch.randn(rows, queries, heads, width)]
    *made, grad = (t.to(HERE, torch.bfloat16) for t in made)
    return [t.requires_grad_() for t in made], grad


def masks(name, rows, queries, keys):
    "Nothing; keys that some rows lack; or any pattern, with queries that see no key."
    if name == "all":
        return None
    seen = torch.arange(keys).expand(rows, queries, keys) < torch.tensor([keys, keys // 3])[:rows, None, None]
    if name == "holes":
        with seeded(1):
            seen = torch.rand(rows, queries, keys) > 0.3
        seen[-1, : queries // 2] = False
    return seen.contiguous().to(HERE)


@pytest.mark.parametrize("queries,keys,d,causal,mask,dropout", [
    (200, 333, 64, False, "all", 0.0), (200, 333, 64, False, "holes", 0.2), (129, 129, 64, True, "padding", 0.2), (512, 512, 32, False, "padding", 0.0),
    (1, 17, 16, False, "all", 0.2), (65, 65, 128, True, "all", 0.0)])
def test_kernels_compute_what_the_lines_do(queries, keys, d, causal, mask, dropout):
    given, grad = drawn(2, queries, keys, 3, d)
    seen, seed = masks(mask, 2, queries, keys), torch.tensor([12345], device=HERE)
    ours = biased_attention(*given, seen, seed, dropout, d**-0.5, causal)[0]
    wide = [t.detach().double().requires_grad_() for t in given]
    plain = biased_in_torch(*wide, seen, seed, dropout, d**-0.5, causal)
    for a, b in zip((ours, *torch.autograd.grad(ours, given, grad)), (plain, *torch.autograd.grad(plain, wide, grad.double()))):
        assert a.isfinite().all() and (a.double() - b).norm() <= 1e-2 * b.norm().clamp(min=1e-6), (float((a.double() - b).norm()), float(b.norm()))


def test_the_gradient_of_the_bias_is_the_same_to_the_bit():
    given, grad = drawn(2, 300, 300, 3, 64)
    seed, found = torch.tensor([5], device=HERE), []
    for _ in range(2):
        found.append(torch.autograd.grad(biased_attention(*given, None, seed, 0.1, 1.0, False)[0], given, grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("padded", [False, True])
def test_a_t5_has_the_gradients_of_its_own_attention(padded):
    config = T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0)
    with seeded(0):
        ids, labels = torch.randint(1, 128, (2, 48)).to(HERE), torch.randint(1, 128, (2, 20)).to(HERE)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    found = {}
    for name in ("float32", "eager", register_biased(), "compiled"):
        with seeded(0):
            model = T5ForConditionalGeneration(config).to(HERE, torch.float32 if name == "float32" else torch.bfloat16).train()
        set_attention(model, "eager" if name in ("float32", "eager") else register_biased())
        assert model.encoder.config._attn_implementation == model.config._attn_implementation
        if name == "compiled":
            compile_blocks(model)
        loss = model(input_ids=ids, attention_mask=mask if padded else None, labels=labels, use_cache=False).loss
        loss.backward()
        found[name] = [loss.detach().float(), *(p.grad.float() for p in model.parameters())]
    for name in (register_biased(), "compiled"):  # no further from float32 than 16 bits are anyway
        for right, plain, ours in zip(found["float32"], found["eager"], found[name]):
            assert (ours - right).norm() <= 1.5 * (plain - right).norm() + 1e-2 * right.norm()
