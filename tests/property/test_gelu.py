"GELU by one exponential: the same curve, its slope, its ends, in every dtype and layer that transformers has."

import math
from types import SimpleNamespace

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2CLS, ACT2FN

from fengshen.utils.device import seeded
from fengshen.utils.kernels.compile import WholeRows
from fengshen.utils.kernels.float8 import scaled_product
from fengshen.utils.kernels.gelu import ErfGELU, ErfGelu, TanhGELU, erf_gelu, one_exponential, tanh_gelu

PAIRS = {"tanh": (tanh_gelu, lambda x: F.gelu(x, approximate="tanh")), "erf": (erf_gelu, F.gelu)}
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("form, plain", PAIRS.values(), ids=PAIRS)
def test_values_and_slopes(form, plain, dtype):
    "Against torch in float64, as near as the dtype has digits; the gradient is multiplied by what comes in."
    with seeded(0):
        x, grad = (3 * torch.randn(7, 33, 5)).to(dtype).requires_grad_(), torch.randn(7, 33, 5).to(dtype)
    exact = x.detach().double().requires_grad_()
    y, right = form(x), plain(exact)
    y.backward(grad)
    right.backward(grad.double())
    assert y.dtype == dtype and x.grad.dtype == dtype
    for a, b in ((y, right), (x.grad, exact.grad)):
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@given(st.floats(-1e4, 1e4))
def test_it_lies_between_nothing_and_x(x):
    "0 or x far out, never below the curve's lowest point, and no number is lost."
    for form, plain in PAIRS.values():
        x_1 = torch.tensor([x], dtype=torch.float32, requires_grad=True)
        y = form(x_1)
        slope, right = (torch.autograd.grad(made.sum(), x_1)[0].item() for made in (form(x_1), plain(x_1)))
        assert min(0.0, x) - 1e-6 <= y.item() <= max(0.0, x) * (1 + 1e-6) + 1e-30 and y.item() > -0.171
        assert slope == pytest.approx(right, abs=3e-6)


@pytest.mark.parametrize("form, plain", PAIRS.values(), ids=PAIRS)
def test_what_is_no_number_stays_so_and_the_ends_are_right(form, plain):
    x = torch.tensor([math.nan, math.inf, 1e30, -1e30, 0.0, -0.0])
    y, right = form(x), plain(x)
    assert y[0].isnan() and torch.equal(y[1:3], right[1:3]) and torch.equal(y[3:].abs(), torch.zeros(3))


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_every_activation_of_transformers_stays_what_it_is(name):
    "Those that are GELU are turned, with the same values in training and outside; the rest is left alone."
    model = nn.ModuleList([ACT2FN[name] if name != "xielu" else nn.Identity()])
    with seeded(1):
        x = torch.randn(100)
    expected, kind = model[0](x), type(model[0])
    turned = one_exponential(model)
    assert turned == (name in ("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"))
    assert type(model[0]) is kind or isinstance(model[0], (TanhGELU, ErfGELU))
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)[0](x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", [erf_gelu, tanh_gelu])
def test_compiled_it_hands_its_gradient_on(form, dtype):
    "torch 2.11 lost it, without a word, where the last cast changed nothing."
    x = torch.linspace(-4, 4, 50, dtype=dtype, requires_grad=True)
    torch.compiler.reset()
    got, want = (torch.autograd.grad(made(x * 2).sum(), x)[0] for made in (torch.compile(form, backend="eager"), form))
    torch.testing.assert_close(got, want)
    assert want.abs().sum() > 1


class Casts(TorchFunctionMode):
    "Notes what a cast that changes nothing gives back: the tensor itself."

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.same = [*getattr(self, "same", []), *([out] if function is torch.Tensor.to and out is args[0] else [])]
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_cast_that_changes_nothing_is_the_last_thing_a_function_does(dtype):
    "What torch 2.11 trips over when it compiles an autograd.Function, on any torch: GELU's, and the 8-bit product of a CPU."
    x = torch.ones(16, 16, dtype=dtype)
    with Casts() as casts:
        made = ErfGelu.forward(SimpleNamespace(save_for_backward=lambda *saved: None), x)
    assert not any(made is tensor for tensor in casts.same)
    a, scale = x.to(torch.float8_e4m3fn), torch.ones(())
    with Casts() as casts:
        made = scaled_product(a, scale, a.T, scale, dtype=torch.float32)
    assert not any(made is tensor for tensor in casts.same)


def test_nothing_wide_is_kept_for_the_backward_pass():
    "What is saved is the 16-bit input alone, as torch's own does."
    saved, x = [], torch.randn(64, 8).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        erf_gelu(x)
    assert len(saved) == 1 and saved[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("hint, numel, cooperative, held", [
    (ReductionHint.INNER, 768, False, True), (ReductionHint.INNER, 3072, False, True), (ReductionHint.INNER, 4096, False, True),
    (ReductionHint.INNER, 4097, False, False), (ReductionHint.OUTER, 3072, False, False), (ReductionHint.INNER, 3072, True, False)])
def test_rows_of_up_to_4096_numbers_are_held(hint, numel, cooperative, held, monkeypatch):
    "Beyond them, and for sums that run another way, the compiler's own rule is asked."
    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", staticmethod(lambda features, cooperative: False))
    features = SimpleNamespace(get_reduction_hint=lambda: hint, reduction_numel=sympy.Integer(numel))
    assert WholeRows.should_use_persistent_reduction(features, cooperative) is held
    free = SimpleNamespace(get_reduction_hint=lambda: hint, reduction_numel=sympy.Symbol("s0"))
    assert not WholeRows.should_use_persistent_reduction(free, cooperative)
