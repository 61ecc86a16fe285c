"""Weights in 4 bits on the device: the kernels against the CPU's, compiled blocks against plain ones, a base that goes there a layer at a time, and a run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

pytest.importorskip("bitsandbytes", reason="weights in 4 bits need the extra qlora")

from fengshen.models.lora import LoRAConfig, add_lora
from fengshen.utils import device
from fengshen.utils.device import seeded
from fengshen.utils.kernels.compile import blocks, compile_blocks
from fengshen.utils.kernels.four_bit import (
    by_bitsandbytes,
    four_bit_product,
    from_four_bits,
    in_kernel,
    to_four_bits,
    use_four_bits,
    why_not_four_bit,
)
from tests.training_runs import cli, flags, series, tiny_config

HERE = device.device_kind()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(HERE == "cpu", reason="no accelerator here")]


def drawn(*shape, seed=0):
    with seeded(seed):
        return torch.randn(*shape)


def small(width=256, layers=3):
    config = GPT2Config(vocab_size=512, n_positions=128, n_embd=width, n_layer=layers, n_head=4, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    with seeded(0):
        return GPT2LMHeadModel(config)


@pytest.mark.parametrize("shape", [(64, 64), (256, 1024), (96, 130)])
def test_the_device_reads_what_the_host_wrote(shape):
    "Bytes of either are the same matrix on both, but for the last bit of a scale."
    weight = drawn(*shape)
    packed = to_four_bits(weight)
    assert why_not_four_bit(HERE) == ""
    torch.testing.assert_close(from_four_bits(packed.to(HERE), shape).cpu(), from_four_bits(packed, shape), rtol=1e-5, atol=1e-6)
    mine = from_four_bits(to_four_bits(weight.to(HERE)), shape).cpu()
    assert (mine - from_four_bits(packed, shape)).norm() < 1e-2 * weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 43), (96, 130), (64, 64), (1000, 1000), (3072, 9216)])
def test_our_kernel_is_that_of_bitsandbytes(shape, dtype):
    packed = to_four_bits(drawn(*shape).mul(10).to(HERE))
    exact = by_bitsandbytes(packed, shape, torch.float32)
    assert torch.equal(in_kernel(packed, shape, torch.float32), exact) and torch.equal(in_kernel(packed, shape, dtype), exact.to(dtype))


def test_the_product_and_its_gradient():
    packed, x, up = to_four_bits(drawn(512, 256).to(HERE)), drawn(100, 256, seed=1).to(HERE, torch.bfloat16).requires_grad_(), drawn(100, 512, seed=2).to(HERE, torch.bfloat16)
    whole = from_four_bits(packed, (512, 256), torch.bfloat16)
    out, right = four_bit_product(x, packed, 512, 256, False), F.linear(x, whole)
    assert torch.equal(out, right) and torch.equal(*(torch.autograd.grad(y, x, up)[0] for y in (out, right)))


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_compiled_blocks_learn_the_same(budget):
    "And keep no matrix whole for the backward pass."
    model, ids = add_lora(small(), LoRAConfig(r=4, quantize="nf4"), device=HERE).to(HERE), torch.arange(64, device=HERE)[None]
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(p, std=0.02)

    def grads():
        model.zero_grad()
        with torch.autocast(HERE, torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = grads()
    torch._dynamo.reset()
    compile_blocks(model, budget)
    found = grads()
    assert all(((found[n] - plain[n]).norm() / plain[n].norm()) < 0.05 for n in plain)


def test_the_base_goes_to_the_device_a_layer_at_a_time():
    model = small(width=1024, layers=6)
    body, largest = sum(p.nbytes for p in blocks(model).parameters()), 4 * 1024 * 4096
    before = device.memory()["allocated"]
    device.reset_peak_memory()
    use_four_bits(model, HERE)
    peak = device.memory()["peak_allocated"] - before
    assert peak < 0.16 * body + 4 * largest < 0.6 * body


def test_a_run_learns(tmp_path):
    settings = {"run_dir": str(tmp_path / "run"), "model.config": tiny_config(tmp_path), "model.lora.r": 4, "model.lora.quantize": "nf4", "model.optimizer.lr": 1e-2, "trainer.strategy": "auto",
                "trainer.max_steps": 6, "model.compile": True, "model.samples": 1, "export": True}
    done = cli("fit", "-c", "demo", *flags(settings), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "base = nf4" in done.stdout and (tmp_path / "run" / "export" / "config.json").exists()
    losses = series(tmp_path / "run", "loss")
    assert losses[-1] < losses[0]
