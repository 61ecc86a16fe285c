"The chunked loss against the textbook line on full logits, its memory, and the metrics against their definitions."
import collections
import unicodedata

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fengshen.losses import cross_entropy
from fengshen.metric import Perplexity, TokenAccuracy, char_f1
from fengshen.utils.kernels.loss import chunked_loss, scored_rows

VOCAB, WIDTH = 13, 8


def problem(rows, length, share, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, WIDTH, generator=g, dtype=dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (rows, length), generator=g)
    labels[torch.rand(rows, length, generator=g) > share] = -100
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)).to(dtype)
    return hidden, labels, head


@given(rows=st.integers(1, 4), length=st.integers(1, 20), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]), chunk=st.integers(1, 30),
       seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.float64]))
@example(rows=1, length=1, share=1.0, chunk=1, seed=0, dtype=torch.float32)
@settings(max_examples=80, deadline=None)
def test_value_and_gradients_are_those_of_full_logits(rows, length, share, chunk, seed, dtype):
    hidden, labels, head = problem(rows, length, share, seed, dtype)
    inputs = [hidden, *head.parameters()]
    want = F.cross_entropy(head(hidden)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
    got = chunked_loss(hidden, labels, head, cross_entropy, chunk=chunk)
    assert got.dtype == dtype
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got, want, **tolerance)
    true = torch.autograd.grad(want, inputs, allow_unused=True)
    for a, b in zip(torch.autograd.grad(got, inputs), true):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, **tolerance)


def test_gradient_is_right_by_finite_differences():
    hidden, labels, head = problem(2, 5, 0.7, 1, torch.float64)
    assert torch.autograd.gradcheck(lambda h: chunked_loss(h, labels, head, cross_entropy, chunk=2), (hidden,))


@given(share=st.sampled_from([0.0, 0.3, 1.0]), chunk=st.integers(1, 9), train=st.booleans())
@settings(max_examples=20, deadline=None)
def test_an_observer_sees_every_scored_token_once_without_gradients(share, chunk, train):
    hidden, labels, head = problem(2, 12, share, 3, torch.float32)
    seen = []

    def observe(logits, tokens):
        assert not logits.requires_grad and not torch.is_grad_enabled()
        torch.testing.assert_close(logits.shape, (len(tokens), VOCAB))
        seen.append(tokens)

    with torch.set_grad_enabled(train):
        loss = chunked_loss(hidden, labels, head, cross_entropy, chunk=chunk, observe=observe)
    if train:
        loss.backward()
    wanted = labels[:, 1:][labels[:, 1:] != -100]
    assert torch.equal(torch.cat(seen) if seen else wanted, wanted) and loss.requires_grad == train


def test_bfloat16_states_are_scored_in_float32():
    hidden, labels, head = problem(2, 40, 1.0, 5, torch.bfloat16)
    got = chunked_loss(hidden, labels, head, cross_entropy, chunk=8)
    rows, wanted = scored_rows(hidden, labels)
    # chunk by chunk here too: a bfloat16 matrix product of another shape may be rounded otherwise
    want = sum(F.cross_entropy(head(h).float(), y, reduction="sum") for h, y in zip(rows.split(8), wanted.split(8)))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    got.backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_a_head_with_dropout_is_recomputed_with_the_same_noise():
    hidden, labels, _ = problem(1, 20, 1.0, 5, torch.float64)
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, VOCAB)).double()
    grads = []
    for chunk in (100, 100):
        torch.manual_seed(0)
        loss = chunked_loss(hidden, labels, head, cross_entropy, chunk=chunk)
        torch.manual_seed(99)
        grads.append(torch.autograd.grad(loss, hidden)[0])
    torch.manual_seed(0)
    plain = F.cross_entropy(head(hidden[0, :-1]), labels[0, 1:], reduction="sum")
    torch.testing.assert_close(grads[0], torch.autograd.grad(plain, hidden)[0])
    assert torch.equal(*grads)


class Peak(TorchDispatchMode):
    "The largest tensor made inside, and how often each size came."

    def __init__(self):
        super().__init__()
        self.sizes = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.sizes[t.numel()] += 1
        return out


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_full_logits_never_exist(share):
    vocab, length, chunk = 5000, 600, 32
    hidden = torch.randn(1, length, WIDTH, requires_grad=True)
    labels = torch.full((1, length), -100)
    labels[:, 1 : 1 + int(share * (length - 1))] = 7
    head = nn.Linear(WIDTH, vocab, bias=False)
    with Peak() as peak:
        chunked_loss(hidden, labels, head, cross_entropy, chunk=chunk).backward()
    scored = int((labels != -100).sum())
    assert max(peak.sizes) == vocab * max(WIDTH, min(chunk, scored)) < vocab * length


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("train", [False, True])
def test_the_head_is_called_once_with_the_scored_tokens(share, train):
    "Under ZeRO-3 every call of the head is a collective: their number must not depend on a process's own data."
    rows = []
    hidden, labels, head = problem(3, 50, share, 8, torch.float32)
    head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with torch.set_grad_enabled(train):
        loss = chunked_loss(hidden, labels, head, cross_entropy, chunk=7)
    if train:
        loss.backward()
    assert rows == [max(1, int((labels[:, 1:] != -100).sum()))]


def test_the_head_is_itself_again_after_an_error():
    hidden, labels, head = problem(1, 5, 1.0, 8, torch.float32)
    with pytest.raises(ZeroDivisionError):
        chunked_loss(hidden, labels, head, lambda logits, labels: 1 / 0)
    assert head(hidden).shape == (1, 5, VOCAB) and "forward" not in vars(head)


def test_a_forward_that_another_library_put_on_the_instance_is_used_and_kept():
    hidden, labels, head = problem(1, 5, 1.0, 8, torch.float32)
    plain, theirs = chunked_loss(hidden, labels, head, cross_entropy), lambda h: 2 * type(head).forward(head, h)
    head.forward = theirs
    assert chunked_loss(hidden, labels, head, cross_entropy) != plain and head.forward is theirs


# Metrics


@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_metrics_do_not_depend_on_the_batches(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    logits, labels = torch.randn(n, VOCAB, generator=g), torch.randint(0, VOCAB, (n,), generator=g)
    accuracy, perplexity = TokenAccuracy(), Perplexity()
    for a, b in zip(logits.split(sizes), labels.split(sizes)):
        accuracy.update(a, b)
        perplexity.update(a, b)
    if n == 0:
        assert accuracy.compute().isnan() and perplexity.compute().isnan()
        return
    torch.testing.assert_close(accuracy.compute(), (logits.argmax(-1) == labels).float().mean())
    torch.testing.assert_close(perplexity.compute(), F.cross_entropy(logits, labels).exp(), rtol=1e-5, atol=1e-5)


def test_totals_of_a_long_validation_do_not_stall():
    metric = Perplexity()
    metric.total += 2.0**30
    metric.count += 2**30
    before = metric.total.clone()
    metric.update(torch.zeros(1, 2), torch.tensor([0]))
    assert metric.total > before


def test_states_are_summed_over_processes():
    for metric in (TokenAccuracy(), Perplexity()):
        assert {f.__name__ for f in metric._reductions.values()} == {"dim_zero_sum"}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_metrics_survive_reset_and_a_round_trip():
    metric = TokenAccuracy()
    metric.persistent(True)
    metric.update(torch.eye(3), torch.tensor([0, 1, 0]))
    other = TokenAccuracy()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    assert other.compute() == metric.compute()
    metric.reset()
    assert metric.count == 0


texts = st.text(alphabet="多喝水,，休息 。.\nabＡ1１", max_size=12)


@given(texts, texts)
def test_char_f1_is_the_overlap_of_characters(a, b):
    bags = [collections.Counter(c for c in unicodedata.normalize("NFKC", t) if not c.isspace()) for t in (a, b)]
    both, sizes = sum((bags[0] & bags[1]).values()), [sum(bag.values()) for bag in bags]
    if not any(sizes):
        want = 1.0
    elif not both:
        want = 0.0
    else:
        precision, recall = both / sizes[0], both / sizes[1]
        want = 2 * precision * recall / (precision + recall)
    assert char_f1(a, b) == pytest.approx(want) and char_f1(a, b) == char_f1(b, a)


@given(texts)
def test_a_text_equals_itself_however_it_is_spaced(text):
    assert char_f1(text, " ".join(text) + "\n") == 1.0
