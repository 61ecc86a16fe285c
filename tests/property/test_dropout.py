"Dropout by a hash of places: masks as random as dropout needs them, whatever the seeds and shapes."

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fengshen.utils.device import seeded
from fengshen.utils.kernels.compile import compile_blocks
from fengshen.utils.kernels.dropout import HashDropout, dropped, noise, quicken

N = 1 << 20
PLACES = torch.arange(N, dtype=torch.int32)


def seeds(count, first=0):
    "Random pairs, and pairs that differ in one bit or not at all in one half: what a bad hash would show."
    with seeded(first):
        drawn = torch.randint(-(2**31), 2**31, (count, 2), dtype=torch.int32)
    base = drawn[0]
    near = [base ^ torch.tensor(pair, dtype=torch.int32) for pair in ([0, 1], [1, 0], [0, -(2**31)], [-(2**31), 0], [0, 3], [1 << 16, 0], [1, 1])]
    return [*drawn, *near]


def bits(words):
    "[32, N] zeros and ones."
    return torch.stack([(words >> i & 1) for i in range(32)])


@pytest.mark.parametrize("seed_2", [torch.tensor(pair, dtype=torch.int32) for pair in ([0, 0], [1, 0], [0, 1], [-1, -1], [20_221_129, -5])], ids=str)
def test_bits_are_fair_and_do_not_know_each_other(seed_2):
    "Each bit is 1 half the time; no two bits, and no bit of places at a distance, agree more often than by chance (5 standard deviations)."
    found = bits(noise(PLACES, seed_2)).float() * 2 - 1
    limit = 5 / math.sqrt(N)
    assert found.mean(1).abs().max() < limit
    assert (found @ found.T / N - torch.eye(32)).abs().max() < limit
    for lag in (1, 2, 3, 64, 768, 1024, 3072, 1 << 15):
        assert (found[:, lag:] @ found[:, :-lag].T / (N - lag)).abs().max() < 5.5 / math.sqrt(N - lag), lag


def test_masks_of_two_seeds_are_independent():
    "Also where the seeds are neighbours; at 0.1, where the upper bits decide."
    masks = torch.stack([dropped(torch.ones(N), 0.1, seed_2) == 0 for seed_2 in seeds(24)]).double()
    centred = masks - 0.1
    together = centred @ centred.T / N / 0.09
    assert together.fill_diagonal_(0).abs().max() < 5.5 / math.sqrt(N)
    for shift in (1, 2, 3, 4096):  # the other mask some places further, by a sum and by a flipped bit
        for moved in (centred.roll(shift, 1), centred[:, (PLACES ^ shift).long()]):
            assert (centred[:24] @ moved[:24].T / N / 0.09).abs().max() < 5.5 / math.sqrt(N)  # seeds that agree in their second half are shifts of each other


@pytest.mark.parametrize("p", [0.001, 0.1, 0.15, 0.5, 0.9, 0.999])
def test_rates_are_exact_in_the_mean_and_spread_as_chance_has_it(p):
    "Over many blocks of 256 the counts vary as a binomial does."
    gone = dropped(torch.ones(N), p, torch.tensor([3, 4], dtype=torch.int32)) == 0
    assert abs(gone.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / N)
    counts = gone.view(-1, 256).sum(1).double()
    assert counts.var().item() == pytest.approx(256 * p * (1 - p), rel=5 * math.sqrt(2 / len(counts)) + 3 / math.sqrt(len(counts) * 256 * p * (1 - p)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (3, 5, 11), (2, 4, 8, 8)])
def test_values_and_gradients(dtype, shape):
    "What stays is x / (1 - p), rounded once; the gradient has the same zeros; a transposed tensor is numbered as it is indexed."
    with seeded(1):
        x = torch.randn(shape).to(dtype).requires_grad_()
    seed_2 = torch.tensor([8, 9], dtype=torch.int32)
    y = dropped(x, 0.25, seed_2)
    (y * 3).sum().backward()
    stays = dropped(torch.ones(shape), 0.25, seed_2) != 0
    assert y.dtype == dtype and torch.equal(y, torch.where(stays, x * (1 / 0.75), 0.0))
    assert torch.equal(x.grad, torch.where(stays, torch.full_like(x, 3.0) * (1 / 0.75), 0.0))
    turned = x.detach().transpose(0, -1)
    assert torch.equal(dropped(turned, 0.25, seed_2), dropped(turned.contiguous(), 0.25, seed_2))


def test_not_a_number_goes_with_its_place():
    "0 times infinity is no 0; a mask is."
    x = torch.full((1000,), torch.inf, requires_grad=True)
    y = dropped(x, 0.5, torch.tensor([1, 2], dtype=torch.int32))
    assert not y.isnan().any() and 400 < y.isinf().sum() < 600


def test_layers_follow_torchs_generator():
    "The same state gives the same masks, one call after the other gives others; outside training nothing happens."
    layer = nn.Dropout(0.3)
    assert quicken(nn.ModuleList([layer])) == 1 and type(layer) is HashDropout and layer.p == 0.3
    x = torch.ones(50, 50)
    with seeded(5):
        first, second = layer(x), layer(x)
    with seeded(5):
        assert torch.equal(layer(x), first) and torch.equal(layer(x), second) and not torch.equal(first, second)
    assert torch.equal(layer.eval()(x), x)
    wide = torch.empty(1, device="meta").expand(2**31)
    assert layer.train()(wide).shape == wide.shape  # more places than the hash has: torch's own


def test_subclasses_and_special_rates_stay():
    "A class that somebody derived may do other things; 0 and 1 need no noise."
    class Own(nn.Dropout):
        pass

    model = nn.ModuleList([Own(0.1), nn.Dropout(0.0), nn.Dropout(1.0), nn.Dropout(0.1, inplace=True), nn.Dropout1d(0.1), nn.AlphaDropout(0.1)])
    assert quicken(model) == 0 and not any(isinstance(m, HashDropout) for m in model)


def hashed(model):
    "Layers that draw by hash."
    return sum(isinstance(m, HashDropout) for m in model.modules())


def test_only_compiled_blocks_on_an_accelerator_draw_by_hash(monkeypatch, capsys):
    "On a CPU nothing changes; elsewhere it is said."
    from transformers import BertConfig, BertModel

    from fengshen.utils.kernels import compile as compiling

    small = dict(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    model = BertModel(BertConfig(**small))
    held = []
    monkeypatch.setattr(compiling, "hold_rows", lambda: held.append(True))
    compiling.compile_blocks(model)
    assert hashed(model) == 0 and not held and "dropout" not in capsys.readouterr().out
    monkeypatch.setattr(compiling, "device_kind", lambda: "cuda")
    compiling.compile_blocks(model)
    said = capsys.readouterr().out
    assert hashed(model) == 9 == hashed(model.encoder) and "dropout = by a hash in 9 layers" in said
    assert held and "GELU = by one exponential in 3 layers" in said


class Block(nn.Module):
    "A block with dropout before a linear layer and after one."

    def __init__(self):
        super().__init__()
        self.first, self.second, self.dropout, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Dropout(0.3), nn.Dropout(0.1)

    def inner(self, x):
        "The numbers, and what the first dropout let through."
        kept = self.dropout(self.first(x).sin() + 2)
        return self.last(self.second(kept)), kept

    def forward(self, x):
        return self.inner(x)


class Checkpointed(Block):
    "The same, computed again in the backward pass."

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Attending(Block):
    "Attention with dropout of its weights as well."

    def inner(self, x):
        "The numbers, and what the first dropout let through."
        q = self.first(x).view(1, 2, 64, 64)
        return super().inner(nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.2).view(128, 64) + x)


SLOW = [(kind, budget, hashed) for kind, budget in ((Block, 1.0), (Block, 0.5), (Block, 0.0), (Checkpointed, 1.0), (Checkpointed, 0.3)) for hashed in (False, True)]


@pytest.mark.parametrize("kind, budget, hashed", [(Block, 0.5, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case != (Block, 0.5, False))])
def test_compiled_the_backward_pass_has_the_mask_of_the_forward_pass(kind, budget, hashed):
    "Also where the block is computed again, by checkpointing or by a budget of activations, which torch left alone gets wrong."
    torch._dynamo.reset()
    with seeded(3):
        block, x = kind(), torch.randn(128, 64, requires_grad=True)
    assert not hashed or quicken(block) == 2
    compile_blocks(nn.ModuleList([nn.ModuleList([block, kind()])]), budget)
    for _ in range(2):
        x.grad = None
        y, kept = block(x)
        y.sum().backward()
        plain = x.detach().clone().requires_grad_()
        between = (block.first(plain).sin() + 2) * (kept != 0) / 0.7
        right = block.second(between) * (y != 0) / 0.9
        right.sum().backward()
        for found, wanted in ((kept, between), (y, right), (x.grad, plain.grad)):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert abs((kept == 0).float().mean().item() - 0.3) < 0.03 and abs((y == 0).float().mean().item() - 0.1) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.5, 0.0])
def test_attention_with_dropout_is_kept_too(budget):
    "The slope along a direction, from the gradient and from two calls with the same noise."
    torch._dynamo.reset()
    with seeded(3):
        block, x, way = Attending(), torch.randn(128, 64, requires_grad=True), torch.randn(128, 64)
    compile_blocks(nn.ModuleList([nn.ModuleList([block, Attending()])]), budget)
    values = []
    for step in (0.0, 1e-3, -1e-3):
        with seeded(7):
            y = block((x + step * way).detach().requires_grad_() if step else x)[0].double().sum()
        values.append(y.item())
        if not step:
            y.backward()
    assert (x.grad * way).sum().item() == pytest.approx((values[1] - values[2]) / 2e-3, rel=2e-2)
