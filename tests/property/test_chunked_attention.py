"""Attention in chunks is the full mask's attention: any length, reach, chunk, global tokens, padding and documents, and its gradients too."""
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.models.longformer.attention import chunked_attention, cut, make_chunks
from fengshen.models.transformer_utils import all_of, any_of, dense, documents, global_tokens, padding, window


@st.composite
def batches(draw):
    rows, length, reach = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 12))
    bits = st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)
    real = torch.tensor(draw(bits)).view(rows, length) if draw(st.booleans()) else torch.ones(rows, length).bool()
    rare = st.lists(st.sampled_from([False] * 6 + [True]), min_size=rows * length, max_size=rows * length)
    wide = torch.tensor(draw(rare)).view(rows, length) & real if draw(st.booleans()) else None
    starts = torch.tensor(draw(rare)).view(rows, length)
    places = torch.arange(length) - torch.where(starts, torch.arange(length), 0).cummax(-1).values
    return reach, draw(st.integers(1, 15)), real, wide, places if draw(st.booleans()) else None


@settings(max_examples=150, deadline=None)
@given(batches())
def test_chunks_are_the_full_mask(batch):
    reach, size, real, wide, places = batch
    rows, length = real.shape
    questions = [padding(real)] + ([] if places is None else [documents(places)])
    near = window(reach) if wide is None else any_of(window(reach), global_tokens(wide))
    mask = dense(all_of(near, *questions), rows, length, length, "cpu")
    chunks = make_chunks(reach, questions, torch.zeros(rows, length, 1), wide, size)
    q, k, v = (torch.randn(rows, 2, length, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    results = []
    for attend in (lambda *x: chunked_attention(*x, chunks), lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves).transpose(1, 2)
        (out[real] * torch.linspace(-1, 1, 4)).sum().backward()
        results.append([out[real], *(leaf.grad for leaf in leaves)])
    for ours, full in zip(*results):
        torch.testing.assert_close(ours, full, rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in results[0])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 9))
def test_a_cut_holds_every_position_and_its_margin(length, size, reach):
    x = torch.arange(1.0, length + 1).view(1, 1, length, 1)
    chunks = cut(x, size, reach)[0, :, 0, :, 0]
    for n, chunk in enumerate(chunks):
        for place, value in enumerate(chunk.tolist(), n * size - reach):
            assert value == (place + 1 if 0 <= place < length else 0)
    assert (len(chunks) - 1) * size < length <= len(chunks) * size
