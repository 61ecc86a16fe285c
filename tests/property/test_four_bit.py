"""Matrices in 4 bits: any shape comes back, as near as nf4 can be, the same as bitsandbytes' own layer, and gradients pass through."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

pytest.importorskip("bitsandbytes", reason="weights in 4 bits need the extra qlora")

import bitsandbytes

from fengshen.utils.device import seeded
from fengshen.utils.kernels.four_bit import (
    FourBitLinear,
    four_bit_product,
    from_four_bits,
    sizes,
    to_four_bits,
    use_four_bits,
    whole,
    why_not_four_bit,
)

CODE = torch.tensor(bitsandbytes.functional.get_4bit_type("nf4", device="cpu").tolist())


def drawn(*shape, seed=0):
    with seeded(seed):
        return torch.randn(*shape)


@given(st.integers(1, 90), st.integers(1, 45).map(lambda n: 2 * n), st.integers(0, 9), st.sampled_from([1e-4, 1.0, 50.0]))
@settings(max_examples=40, deadline=None)
def test_every_number_comes_back_as_its_nearest(rows, columns, seed, scale):
    "Half the widest gap between two of the 16 values, times the block's largest, and what the scales lose."
    weight = scale * drawn(rows, columns, seed=seed)
    packed = to_four_bits(weight)
    back = from_four_bits(packed, weight.shape)
    assert packed.dtype == torch.uint8 and len(packed) == sum(sizes(weight.numel()))
    off, flat = (back - weight).abs().flatten(), weight.flatten()
    for start in range(0, len(flat), 64):
        largest = flat[start : start + 64].abs().max()
        spread = flat.abs().max()
        assert off[start : start + 64].max() <= 0.5 * CODE.diff().max() * largest + 0.02 * spread


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("bias", [True, False])
def test_the_bytes_and_outputs_are_those_of_bitsandbytes(kind, bias):
    layer = nn.Linear(192, 80, bias=bias) if kind is nn.Linear else Conv1D(80, 192)
    with torch.no_grad():
        layer.weight.copy_(drawn(*layer.weight.shape))
    weight = layer.weight.data if kind is nn.Linear else layer.weight.data.T
    theirs = bitsandbytes.nn.Linear4bit(192, 80, bias=layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4")
    theirs.weight = bitsandbytes.nn.Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    theirs.bias = layer.bias
    theirs, ours, x = theirs.to("cpu"), FourBitLinear(layer), drawn(3, 5, 192, seed=1).requires_grad_()
    assert torch.equal(ours.weight[: weight.numel() // 2], theirs.weight.view(-1))
    assert torch.equal(whole(ours.weight, ours.form()), bitsandbytes.functional.dequantize_4bit(theirs.weight, theirs.weight.quant_state).T if kind is Conv1D
                       else bitsandbytes.functional.dequantize_4bit(theirs.weight, theirs.weight.quant_state))
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)
    (one,), (two,) = (torch.autograd.grad(m(x).square().sum(), x) for m in (ours, theirs))
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-2)


def test_nothing_but_the_bytes_is_kept_for_the_backward_pass():
    layer, kept = FourBitLinear(nn.Linear(128, 256)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.ones(64, 128, requires_grad=True))
    assert {t.data_ptr() for t in kept} == {layer.weight.data_ptr()}


def test_gradients_are_those_of_the_whole_matrix():
    weight = drawn(64, 32)
    packed, x = to_four_bits(weight), drawn(7, 32, seed=2).requires_grad_()
    again, up = from_four_bits(packed, weight.shape), drawn(7, 64, seed=3)
    (one,) = torch.autograd.grad(four_bit_product(x, packed, 64, 32, False), x, up)
    (two,) = torch.autograd.grad(F.linear(x, again), x, up)
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_casts(dtype):
    "Outputs follow autocast; a cast of the module leaves its bytes alone."
    layer = FourBitLinear(nn.Linear(64, 64))
    before, x = layer.weight.clone(), drawn(2, 64)
    right = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        assert layer(x).dtype == dtype and torch.allclose(layer(x).float(), right, atol=5e-2)
    layer.to(dtype)
    assert torch.equal(layer.weight, before) and layer.weight.dtype == torch.uint8 and torch.allclose(layer(x.to(dtype)).float(), right, atol=5e-2)


def test_a_device_without_kernels_is_refused(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("Attempted to use bitsandbytes native library functionality but it's not available.")

    assert why_not_four_bit() == ""
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fails)
    with pytest.raises(ValueError, match="cannot be had here.*native library"):
        use_four_bits(nn.Module())
