"""Attention with a learned bias: the kernels against their plain lines, and a T5 that trains with them."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from fengshen.utils import device
from fengshen.utils.device import seeded
from fengshen.utils.kernels.biased import biased_attention, biased_in_torch, register_biased
from fengshen.utils.kernels.compile import compile_blocks

HERE = device.device_kind()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(HERE == "cpu", reason="no accelerator here")]


def drawn(b, l, s, h, d, dtype):
    with seeded(0):
        made = [torch.randn(*shape) for shape in ((b, l, h, d), (b, s, h, d), (b, s, h, d), (h, l, s), (b, l, h, d))]
    *made, grad = (t.to(HERE, dtype) for t in made)
    return [t.requires_grad_() for t in made], grad


def masks(name, b, l, s):
    "Nothing; keys that some rows lack; or any pattern, with queries that see no key."
    if name == "all":
        return None
    seen = torch.arange(s).expand(b, l, s) < torch.tensor([s, s // 3])[:b, None, None]
    if name == "holes":
        with seeded(1):
            seen = torch.rand(b, l, s) > 0.3
        seen[-1, : l // 2] = False
    return seen.contiguous().to(HERE)


@pytest.mark.parametrize("mask", ["all", "padding", "holes"])
@pytest.mark.parametrize("l,s,d,causal", [(200, 333, 64, False), (129, 129, 64, True), (512, 512, 32, False), (1, 17, 16, False), (65, 65, 128, True)])
@pytest.mark.parametrize("dtype,near", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_kernels_compute_what_the_lines_do(l, s, d, causal, mask, dtype, near, dropout):
    given, grad = drawn(2, l, s, 3, d, dtype)
    seen, seed = masks(mask, 2, l, s), torch.tensor([12345], device=HERE)
    ours = biased_attention(*given, None if seen is None else seen.view(torch.uint8), seed, dropout, d**-0.5, causal)[0]
    wide = [t.detach().double().requires_grad_() for t in given]
    plain = biased_in_torch(*wide, seen, seed, dropout, d**-0.5, causal)
    for a, b in zip((ours, *torch.autograd.grad(ours, given, grad)), (plain, *torch.autograd.grad(plain, wide, grad.double()))):
        assert a.isfinite().all() and (a.double() - b).norm() <= near * b.norm().clamp(min=1e-6), (float((a.double() - b).norm()), float(b.norm()))


def test_the_gradient_of_the_bias_is_the_same_to_the_bit():
    given, grad = drawn(2, 300, 300, 3, 64, torch.bfloat16)
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
    for name in ("eager", register_biased(), "compiled"):
        with seeded(0):
            model = T5ForConditionalGeneration(config).to(HERE).train()
        model.set_attn_implementation("eager" if name == "eager" else register_biased())
        if name == "compiled":
            compile_blocks(model)
        loss = model(input_ids=ids, attention_mask=mask if padded else None, labels=labels, use_cache=False).loss
        loss.backward()
        found[name] = [loss.detach(), *(p.grad for p in model.parameters())]
    for name in (register_biased(), "compiled"):
        for a, b in zip(found["eager"], found[name]):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
