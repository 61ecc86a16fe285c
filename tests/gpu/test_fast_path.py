"""The kernels of the fast path against their plain lines, on the device, and a run with them beside one without."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from fengshen.training.run import Run
from fengshen.utils import device
from fengshen.utils.kernels.adamw import MasterAdamW, Rates, is_even, update_in_kernel, update_in_torch
from fengshen.utils.kernels.compile import compile_blocks
from fengshen.utils.kernels.dropout import HashDropout, dropped
from fengshen.utils.kernels.float8 import RECIPES, use_float8
from fengshen.utils.kernels.head_loss import head_loss, slopes_in_kernel, slopes_in_torch
from tests.poison import marked_pairs
from tests.training_runs import cli, flags, tiny_config

HERE = device.device_kind()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(HERE == "cpu", reason="no accelerator here")]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator(HERE).manual_seed(seed), device=HERE).to(dtype)


@pytest.mark.parametrize("sizes", [(1, 2047, 2049, 100_003), (16, 2048, 4128, 1_000_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_updates_as_the_lines_do(sizes, dtype):
    def parts(i, n):
        master = drawn(n, seed=i)
        return [master.to(dtype, copy=True), drawn(n, seed=100 + i, dtype=dtype), master, drawn(n, seed=200 + i) * 0.1, drawn(n, seed=300 + i).abs()]

    ours, plain = ([parts(i, n) for i, n in enumerate(sizes)] for _ in range(2))
    for tensors in ours:
        tensors[0].fill_(torch.nan)  # what is not written shows
    even, scale = all(map(is_even, ours)), torch.tensor(0.3, device=HERE)
    assert even == (sizes[0] == 16)
    for step in (1, 2):
        rates = Rates(1e-3, 0.9, 0.999, 1e-8, 0.1, step)
        update_in_kernel(ours, scale, rates, even)
        for tensors in plain:
            update_in_torch(*tensors, scale, rates)
    before = [[t.clone() for t in tensors] for tensors in ours]
    update_in_kernel(ours, torch.tensor(torch.nan, device=HERE), rates, even)
    for mine, right, kept in zip(ours, plain, before):
        for a, b in zip(mine[2:], right[2:]):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
        assert torch.equal(mine[0], mine[2].to(dtype)) and all(map(torch.equal, mine, kept))


def test_states_on_the_host_learn_the_same():
    shapes = [(3000, 20_000), (1,), (512, 513)]  # the first takes two pieces
    found = {}
    for host in (False, True):
        params = [nn.Parameter(drawn(*shape, seed=i)) for i, shape in enumerate(shapes)]
        optimizer = MasterAdamW(params, lr=1e-2, host=host)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = drawn(*p.shape, seed=10 * step + i, dtype=torch.bfloat16)
            optimizer.scale = torch.tensor(0.5, device=HERE)
            optimizer.step()
        assert next(iter(optimizer.own.values())).mean.device.type == ("cpu" if host else HERE)
        assert all(torch.equal(p, own.master.to(p)) for p, own in optimizer.own.items())
        found[host] = [own.master.to(HERE) for own in optimizer.own.values()]
    for a, b in zip(*found.values()):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("width", [100, 50_304, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slopes_of_scores(width, dtype):
    scores, labels = (drawn(37, width) * 4).to(dtype), torch.randint(0, width, (37,), device=HERE)
    ours, plain = scores.clone(), scores.clone()
    torch.testing.assert_close(slopes_in_kernel(ours, labels), slopes_in_torch(plain, labels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.float(), plain.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    scores[5, 7] = torch.nan
    assert slopes_in_kernel(scores, labels).isnan().nonzero().tolist() == [[5]]


def test_head_and_loss_in_bfloat16():
    head, hidden = nn.Linear(256, 5000, bias=False, device=HERE, dtype=torch.bfloat16), drawn(2, 900, 256, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 5000, (2, 900), device=HERE).masked_fill(drawn(2, 900, seed=1) > 0.3, -100)
    count = int((labels[:, 1:] != -100).sum())
    wide = [t.detach().double().requires_grad_() for t in (hidden, head.weight)]
    exact = F.cross_entropy((wide[0] @ wide[1].T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    right = torch.autograd.grad(exact, wide)
    for chunk in (100, 4096):
        ours = head_loss(hidden, labels, head, chunk, count)
        assert abs(ours.item() / exact.item() - 1) < 1e-3
        for a, b in zip(torch.autograd.grad(ours, [hidden, head.weight]), right):
            assert (a - b).norm() / b.norm() < 1e-2


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_products_in_8_bits(recipe, compiled):
    layer = nn.Linear(512, 1024, device=HERE, dtype=torch.bfloat16)
    x, goal = drawn(256, 512, dtype=torch.bfloat16).requires_grad_(), drawn(256, 1024, seed=1, dtype=torch.bfloat16)
    model = nn.ModuleDict(dict(layers=nn.ModuleList([layer])))
    wanted = [x, layer.weight, layer.bias]
    right = [layer(x), *torch.autograd.grad((layer(x) * goal).sum(), wanted)]
    assert use_float8(model, recipe) == 1
    run = torch.compile(layer, dynamic=False) if compiled else layer
    ours = [run(x), *torch.autograd.grad((run(x) * goal).sum(), wanted)]
    for a, b, limit in zip(ours, right, (0.06, 0.1, 0.1, 0.02)):
        assert (a.float() - b.float()).norm() / b.float().norm() < limit


def losses(folder, config, **settings):
    """Losses of a small run on the device."""
    words = {"model.config": config, "trainer.max_steps": 40, "trainer.strategy": "auto", "export": False, "model.samples": 0, "run_dir": str(folder)}
    done = cli("fit", "-c", "demo", *flags(words | settings), cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.tensor([r["loss"] or torch.nan for r in Run(folder).records("train")]), done.stdout


def test_a_step_that_is_not_finite_is_left_out_on_the_device(tmp_path):
    "Its figures are read while the next step is computed: the record, the guards and the optimizer's count are those of a run that waits for each step."
    data = marked_pairs(tmp_path / "train.jsonl")
    words = {"model.loss": "tests.poison.nan_loss", "data.train": data, "data.packing": False, "data.micro_batch": 2, "trainer.accumulate_grad_batches": 2, "trainer.max_steps": 11,
             "guards.on_nan": "skip", "checkpoint.every_n_steps": 8, "checkpoint.keep": 9}
    losses(tmp_path / "late", tiny_config(tmp_path), **words)
    rows = Run(tmp_path / "late").records("train")
    assert [row["step"] for row in rows] == list(range(1, 12)) and [row["step"] for row in rows if row["loss"] is None] == [8]
    found = [json.loads(line) for line in (tmp_path / "late" / "guards.jsonl").read_text("utf8").splitlines()]
    assert [(row["step"], row["did"], len(row["samples"])) for row in found] == [(8, "skip", 2)]
    for step, taken in ((8, 7), (11, 10)):
        state = torch.load(tmp_path / "late" / "checkpoints" / f"step-{step:08d}" / "state.ckpt", weights_only=True)
        assert {int(own["step"]) for own in state["optimizer_states"][0]["state"].values()} == {taken}


def test_fast_runs_learn_what_the_plain_one_learns(tmp_path):
    config = tiny_config(tmp_path, n_embd=128, n_head=2)
    plain, _ = losses(tmp_path / "plain", config, **{"model.optimizer.kind": "fused_adamw", "model.compile": False})
    fast, said = losses(tmp_path / "fast", config)
    assert "optimizer = master_adamw" in said and "loss = in one with the head" in said and "compiled blocks = True" in said
    host, _ = losses(tmp_path / "host", config, **{"model.optimizer.kind": "host_adamw"})
    eight, said = losses(tmp_path / "eight", config, **{"model.fp8": "tensorwise"})
    assert "8-bit products = 8 linear layers" in said
    sharded, said = losses(tmp_path / "zero3", config, **{"trainer.strategy": "zero3"})
    assert "compiled blocks = True" in said
    assert plain[0] - plain[-1] > 1 and (sharded - plain).abs().max() < 0.05
    assert (fast - plain).abs().max() < 0.05 and (host - fast).abs().max() < 0.05 and (eight - plain).abs().max() < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropout_by_hash_is_the_same_compiled(dtype):
    "Forward and backward, in a kernel with what is around it: the mask that the lines give on a CPU."
    def block(x, seed_2):
        return F.gelu(x) + dropped(x * 2, 0.1, seed_2)

    for seed in (0, 1):
        seed_2 = torch.randint(-(2**31), 2**31, (2,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        x = drawn(64, 1000, seed=seed, dtype=dtype).requires_grad_()
        plain = x.detach().cpu().double().requires_grad_()
        found, right = torch.compile(block, dynamic=False)(x, seed_2.to(HERE)), block(plain, seed_2)
        found.float().sum().backward()
        right.sum().backward()
        for a, b in ((found, right), (x.grad, plain.grad)):
            torch.testing.assert_close(a.double().cpu(), b.detach(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
        layer = torch.compile(HashDropout(0.25), dynamic=False)
        masks = [layer(torch.ones(1000, 1000, device=HERE)) == 0 for _ in range(2)]
        assert all(abs(mask.float().mean().item() - 0.25) < 3e-3 for mask in masks) and not torch.equal(*masks)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_a_compiled_block_with_wide_rows_is_the_block(activation):
    "Hash, GELU and norms over 2,304 numbers in one program: the same values and gradients as the block in float32, without dropout; with it, another draw each time."
    shape = dict(n_embd=2304, n_head=24, n_layer=1, n_inner=512, vocab_size=50, n_positions=64, bos_token_id=0, eos_token_id=0, activation_function=activation)
    model = AutoModelForCausalLM.from_config(GPT2Config(**shape, resid_pdrop=0.0, attn_pdrop=0.0), dtype=torch.float32).to(HERE).train()
    plain = copy.deepcopy(model)
    x_bld = drawn(2, 64, 2304)
    ours, right = compile_blocks(model)[0], plain.transformer.h[0]
    inputs = [x_bld.clone().requires_grad_() for _ in range(2)]
    made = [first(block(x)) for block, x in zip((ours, right), inputs)]
    for y in made:
        (y * drawn(*y.shape, seed=3)).sum().backward()
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-4)
    grads = [[x.grad, *(p.grad for p in block.parameters())] for block, x in zip((ours, right), inputs)]
    for a, b in zip(*grads, strict=True):
        assert b.norm() > 0 and (a - b).norm() < 1e-3 * b.norm()
    noisy = AutoModelForCausalLM.from_config(GPT2Config(**shape, resid_pdrop=0.5, attn_pdrop=0.0), dtype=torch.bfloat16).to(HERE).train()
    block = compile_blocks(noisy)[0]
    one, two = (first(block(x_bld.bfloat16())) for _ in range(2))
    assert one.isfinite().all() and not torch.equal(one, two)


def first(made):
    "The states that a block gives, in a tuple or alone."
    return made[0] if isinstance(made, tuple) else made
