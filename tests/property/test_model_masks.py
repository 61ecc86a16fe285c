"""Masks are what their questions say, in every form and behind any cache; rotations keep lengths and forget where they are."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.models.transformer_utils import masks
from fengshen.models.transformer_utils.rotary import rotary_table, rotate

small = settings(max_examples=60, deadline=None)


@small
@given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(0, 4), st.data())
def test_prefix_behind_a_cache(types, past, data):
    real = data.draw(st.lists(st.integers(0, 1), min_size=past + len(types), max_size=past + len(types)))
    got = masks.dense(masks.all_of(masks.prefix(torch.tensor([types]), past), masks.padding(torch.tensor([real]))), 1, len(types), past + len(types), "cpu", past)[0, 0]
    for i in range(len(types)):
        for s in range(past + len(types)):
            level = 0 if s < past else sum(types[: s - past + 1])
            assert bool(got[i, s]) == (level <= sum(types[: i + 1]) and bool(real[s]))


@small
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 3))
def test_documents_by_positions_and_by_boundaries(lengths, spare):
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), *[sum(lengths)] * spare], dtype=torch.int32)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    same = number[:, None] == number
    for question in (masks.documents(positions), masks.boundaries(ends, sum(lengths))):
        assert torch.equal(masks.dense(question, 1, sum(lengths), sum(lengths), "cpu")[0, 0], same)
    assert masks.is_packed(positions) == (len(lengths) > 1)


@small
@given(st.integers(1, 9), st.integers(0, 9), st.data())
def test_window_and_global_tokens(length, reach, data):
    far = torch.tensor([data.draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    got = masks.dense(masks.any_of(masks.window(reach), masks.global_tokens(far)), 1, length, length, "cpu")[0, 0]
    place = torch.arange(length)
    assert torch.equal(got, ((place[:, None] - place).abs() <= reach) | far[0][:, None] | far[0])


@small
@given(st.integers(1, 4), st.integers(0, 5), st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_form_gives_the_same_attention(queries, past, is_causal, some_padding, seed):
    "sdpa and plain products, against a softmax written out over the keys that are seen."
    gen, keys = torch.Generator().manual_seed(seed), past + queries
    q, k, v = torch.randn(2, 2, queries, 4, generator=gen), *torch.randn(2, 2, 2, keys, 4, generator=gen)
    real = torch.ones(2, keys).long()
    if some_padding:
        real[1, : keys // 2] = 0
    questions, layer = [masks.padding(real)] if some_padding else [], torch.nn.Module().eval()
    seen = masks.dense(masks.all_of(masks.padding(real), *[masks.causal] * is_causal), 2, queries, keys, "cpu", past)
    scores = (q @ k.mT / 2).masked_fill(~seen, -torch.inf)
    want = (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).flatten(2)
    for name in ("sdpa", "eager"):
        mask, built_in = masks.make_mask(name, questions, torch.zeros(2, queries, 8), keys, is_causal, past)
        got = masks.attend(layer, q, k, v, mask, name, built_in)[0]
        full = seen.any(-1)[:, 0]
        torch.testing.assert_close(got[full], want[full], rtol=1e-5, atol=1e-6)


@small
@given(st.integers(1, 6), st.integers(0, 10000), st.booleans(), st.integers(0, 99))
def test_rotation(pairs, shift, halves, seed):
    q, k = torch.randn(2, 1, 1, 6, 2 * pairs, generator=torch.Generator().manual_seed(seed)).double()
    here, there = (rotary_table(torch.arange(6)[None] + s, 2 * pairs, halves, dtype=torch.float64) for s in (0, shift))
    torch.testing.assert_close(rotate(q, there).norm(dim=-1), q.norm(dim=-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(q, here) @ rotate(k, here).mT, rotate(q, there) @ rotate(k, there).mT, rtol=1e-2, atol=1e-2)
    turned_back = rotate(rotate(q, there), there._replace(sin=-there.sin))
    torch.testing.assert_close(turned_back, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_do_not_lose_places_in_16_bits(dtype):
    table = rotary_table(torch.tensor([[1000, 1001]]), 8, dtype=dtype)
    exact = torch.tensor([1000.0, 1001.0]).cos()
    assert table.cos.dtype == dtype
    torch.testing.assert_close(table.cos[0, 0, :, 0].float(), exact, rtol=0, atol=4e-3)
