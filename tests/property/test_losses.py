"""Losses of classes, sets of classes and sequences against their definitions."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.losses import (
    CRF,
    FocalLoss,
    LabelSmoothingCrossEntropy,
    cross_entropy,
    focal,
    label_smoothing,
    linear_cross_entropy,
    multilabel_cross_entropy,
)

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 9999)


def rows(seed, n=6, v=5, ignored=0.3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = -100
    return (3 * torch.randn(n, v, generator=g, dtype=torch.float64)).to(dtype), labels


@few
@given(seed=seeds, smoothing=st.floats(0, 1), gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]))
def test_formulas_row_by_row(seed, smoothing, gamma):
    logits, labels = rows(seed)
    smooth, focused = label_smoothing(logits, labels, smoothing), focal(logits, labels, gamma)
    for i, (row, label) in enumerate(zip(logits, labels.tolist())):
        log_p = row - row.exp().sum().log()
        want = 0.0 if label == -100 else -(1 - smoothing) * log_p[label] - smoothing * log_p.mean()
        assert float(smooth[i]) == pytest.approx(float(want), abs=1e-9)
        want = 0.0 if label == -100 else -((1 - log_p[label].exp()) ** gamma) * log_p[label]
        assert float(focused[i]) == pytest.approx(float(want), abs=1e-9)


@few
@given(seed=seeds, gamma=st.sampled_from([0.0, 0.3, 2.0]))
def test_rows_that_are_not_scored_change_nothing(seed, gamma):
    "Neither the loss nor the gradient of the others, and their own gradient is an exact 0."
    logits, labels = rows(seed)
    kept = labels != -100
    for module, by_hand in ((LabelSmoothingCrossEntropy(), label_smoothing), (FocalLoss(gamma), lambda x, y: focal(x, y, gamma))):
        whole, part = logits.clone().requires_grad_(), logits[kept].requires_grad_()
        loss = module(whole, labels)
        loss.backward()
        if not kept.any():
            assert loss == 0 and not whole.grad.any()
            continue
        alone = by_hand(part, labels[kept]).mean()
        alone.backward()
        torch.testing.assert_close(loss, alone)
        torch.testing.assert_close(whole.grad[kept], part.grad)
        assert not whole.grad[~kept].any()


@pytest.mark.parametrize("loss_fn", [cross_entropy, label_smoothing, focal, lambda x, y: focal(x, y, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_certainty_costs_no_infinity(loss_fn, dtype):
    "Scores at the end of float16, right and wrong: finite losses in float32, finite gradients."
    logits = torch.tensor([[6e4, -6e4, 0], [-6e4, 6e4, 0], [0, 0, 0]], dtype=dtype, requires_grad=True)
    loss = loss_fn(logits, torch.tensor([0, 0, -100]))
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and logits.grad.isfinite().all() and loss[2] == 0


def test_focal_with_weights_is_torchs_weighted_mean_at_gamma_0():
    logits, labels = rows(3, dtype=torch.float32)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    torch.testing.assert_close(FocalLoss(0.0, weight)(logits, labels), F.cross_entropy(logits, labels, weight))


@few
@given(seed=seeds, n=st.integers(1, 4), v=st.integers(1, 6))
def test_several_labels_by_definition(seed, n, v):
    g = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(n, v, generator=g, dtype=torch.float64)
    labels = torch.tensor([0, 1, -100])[torch.randint(0, 3, (n, v), generator=g)]
    got = multilabel_cross_entropy(scores, labels)
    for row, kinds, loss in zip(scores.tolist(), labels.tolist(), got.tolist()):
        off, on = (sum(math.exp(sign * s) for s, kind in zip(row, kinds) if kind == which) for which, sign in ((0, 1), (1, -1)))
        assert loss == pytest.approx(math.log(1 + off) + math.log(1 + on))


def test_several_labels_survive_float16():
    scores = torch.tensor([[6e4, -6e4, 6e4, 0.0]], dtype=torch.float16, requires_grad=True)
    loss = multilabel_cross_entropy(scores, torch.tensor([[1, 0, 0, -100]]))
    loss.sum().backward()
    assert loss.isfinite().all() and scores.grad.isfinite().all() and loss > 5e4 and scores.grad[0, 3] == 0


@few
@given(seed=seeds, chunk=st.integers(1, 9), smoothing=st.sampled_from([0.0, 0.2]))
def test_a_head_in_chunks_is_the_head(seed, chunk, smoothing):
    hidden, labels = rows(seed, n=8, v=4)
    hidden, head = hidden.reshape(2, 4, 4).requires_grad_(), torch.nn.Linear(4, 7, dtype=torch.float64)
    got = linear_cross_entropy(hidden, labels.reshape(2, 4), head, lambda x, y: label_smoothing(x, y, smoothing), chunk, "sum")
    want = F.cross_entropy(head(hidden).flatten(0, 1), labels, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, [hidden, head.weight, head.bias]), torch.autograd.grad(want, [hidden, head.weight, head.bias])):
        torch.testing.assert_close(a, b)


def crf_case(seed, length, v):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        crf = CRF(v).double()
        for weight in crf.parameters():
            torch.nn.init.normal_(weight)
        return crf, torch.randn(2, length, v, dtype=torch.float64)


def by_hand(crf, emissions, tags):
    "The score of one sequence, term by term."
    inside = sum(emissions[i, t] for i, t in enumerate(tags)) + sum(crf.transitions[a, b] for a, b in zip(tags, tags[1:]))
    return float((crf.start_transitions[tags[0]] + inside + crf.end_transitions[tags[-1]]).detach())


@settings(max_examples=15, deadline=None)
@given(seed=seeds, short=st.integers(1, 4), v=st.integers(1, 3), nbest=st.integers(1, 4))
def test_a_crf_against_all_sequences(seed, short, v, nbest):
    "Likelihood, best and next best of a padded row and of a full one; padding changes nothing."
    crf, emissions = crf_case(seed, 4, v)
    mask = torch.arange(4)[None] < torch.tensor([[short], [4]])
    decoded = crf.decode(emissions, mask, nbest=nbest, pad_tag=-1)
    for row, length in enumerate((short, 4)):
        every = sorted(((by_hand(crf, emissions[row], tags), tags) for tags in itertools.product(range(v), repeat=length)), reverse=True)
        log_sum = math.log(sum(math.exp(score) for score, _ in every))
        score, tags = every[seed % len(every)]
        padded = torch.full((2, 4), -100)
        padded[row, :length], padded[1 - row] = torch.tensor(tags), 0
        assert float(crf(emissions, padded, mask)[row].detach()) == pytest.approx(log_sum - score, abs=1e-8)
        want = [[*tags, *[-1] * (4 - length)] for _, tags in every[:nbest]] + [[-1] * 4] * (nbest - len(every))
        assert decoded[:, row].tolist() == want


def test_the_gradient_of_a_crf_is_right_by_finite_differences():
    crf, emissions = crf_case(1, 3, 3)
    tags, mask = torch.tensor([[0, 2, 1], [1, 1, -100]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert torch.autograd.gradcheck(lambda e: crf(e, tags, mask), (emissions.requires_grad_(),))
    crf(emissions, tags, mask).sum().backward()
    assert not emissions.grad[1, 2].any() and all(weight.grad.isfinite().all() for weight in crf.parameters())


def test_a_long_row_in_half_precision_stays_finite():
    crf = CRF(5)
    emissions = torch.full((1, 400, 5), 300.0, dtype=torch.float16)
    loss = crf(emissions, torch.zeros(1, 400, dtype=torch.long))
    assert loss.dtype == torch.float32 and loss.isfinite().all() and crf.decode(emissions).shape == (1, 1, 400)
