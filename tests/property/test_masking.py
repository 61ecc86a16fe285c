"""Corruption of text: rates, laws and orders over 1e5 samples, exact arithmetic, and results that depend on the sample alone."""
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from fengshen.data.masking import bart_corrupt, bert_corrupt, pegasus_corrupt, t5_corrupt, t5_restore, unilm_corrupt
from fengshen.data.masking.bart import infilled, permuted
from fengshen.data.masking.bert import paired, split_places
from fengshen.data.masking.draws import Draws, rounded, shuffled, smallest, uniform
from fengshen.data.masking.objectives import OBJECTIVES, T5, Bart, Bert, Pegasus
from fengshen.data.masking.pegasus import budgets, rouge
from fengshen.data.masking.pieces import Vocabulary, sentence_starts, word_starts
from fengshen.data.masking.show import lines_of, show
from fengshen.data.masking.spans import ngram_law, poisson_law
from fengshen.data.masking.t5 import noise, sizes, source_length
from fengshen.tokenizer.load import load_tokenizer
from fengshen.tokenizer.pieces import Pieces

MANY = 100_000
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"<extra_id_{i}>" for i in range(100)]
CHINESE = [chr(0x4E00 + i) for i in range(200)] + list("，。？！")
TOKENIZER = BertTokenizer(vocab={w: i for i, w in enumerate(MARKS + CHINESE + [f"##{c}" for c in "abcdefgh"] + list("stuvwxyz"))},
                          additional_special_tokens=MARKS[5:])
PIECES = Vocabulary(TOKENIZER)
MASK, SEP, CLS, END = TOKENIZER.mask_token_id, TOKENIZER.sep_token_id, TOKENIZER.cls_token_id, TOKENIZER.convert_tokens_to_ids("。")
FIRST = len(MARKS)  # 200 characters, the stops behind them
texts = st.lists(st.integers(FIRST, len(TOKENIZER) - 1), min_size=1, max_size=40)


def sure(counts, shares):
    "Whether counts are as these shares say: chi-square at one in a million."
    counts, expected = np.asarray(counts, float), np.asarray(shares, float) * np.sum(counts)
    free = len(counts) - 1
    limit = free * (1 - 2 / (9 * free) + 4.75 * math.sqrt(2 / (9 * free))) ** 3  # Wilson and Hilferty
    return ((counts - expected) ** 2 / expected).sum() < limit


def near(values, mean, free=0):
    "Whether a mean is what it should be: within five standard errors."
    return abs(values.mean() - mean) < 5 * max(values.std(), free) / math.sqrt(len(values))


def words_row():
    "A row of words of one to four pieces, marks in between."
    character, piece, word = FIRST, FIRST + len(CHINESE), FIRST + len(CHINESE) + 8
    return np.array([CLS, character, word, piece, piece + 1, character + 1, word + 1, piece + 2, SEP, word + 2, piece, piece, piece, character + 2, 1, character + 3, SEP])


# draws

def test_bits_are_even_and_neighbours_do_not_know_each_other():
    draws = Draws(1, 2, np.arange(MANY))
    bits = draws.bits("places", 4)
    shares = [((bits >> np.uint64(shift)) & np.uint64(1)).mean() for shift in range(64)]
    assert max(abs(np.array(shares) - 0.5)) < 0.005
    values = uniform(bits)
    assert sure(np.histogram(values, 64, (0, 1))[0], np.full(64, 1 / 64))
    table = np.corrcoef(np.c_[values[:-1], values[1:], uniform(draws.bits("count", 2))[1:], uniform(Draws(1, 3, np.arange(MANY)).bits("places", 2))[1:]].T)
    assert abs(table - np.eye(len(table))).max() < 0.02
    assert near(rounded(np.full(MANY, 0.07), bits[:, 0]).astype(float), 0.07)


def test_every_choice_and_every_order_is_as_likely():
    draws = Draws(0, 0, np.arange(MANY))
    chosen = smallest(draws.bits("places", 5), np.ones((MANY, 5), bool), np.full(MANY, 2))
    assert sure(list(Counter(map(bytes, chosen)).values()), np.full(10, 0.1))
    moving = np.tile([True, False, True, True, True], (MANY, 1))
    orders = shuffled(draws.bits("order", 5), moving)
    assert (orders[:, 1] == 1).all() and sure(list(Counter(map(bytes, orders.astype(np.uint8))).values()), np.full(24, 1 / 24))


@settings(max_examples=25, deadline=None)
@given(st.integers(-2**63, 2**63 - 1), st.integers(0, 10**6), st.lists(st.integers(-2**63, 2**63 - 1), min_size=1, max_size=5))
def test_a_number_belongs_to_its_sample(seed, epoch, index):
    together = Draws(seed, epoch, index).bits("other", 3)
    assert all((Draws(seed, epoch, i).bits("other", 9)[0, :3] == row).all() for i, row in zip(index, together))


# BERT

@pytest.mark.parametrize("setting", [dict(whole_word=False), dict(), dict(ngrams=3), dict(ngrams=4, favour="long"), dict(ngrams=10, favour="geometric", rate=0.3)], ids=str)
def test_masking_rate_and_shares(setting):
    row, count = words_row(), MANY if setting.get("ngrams", 1) in (1, 3) and setting else MANY // 5
    out = bert_corrupt(np.tile(row, (count, 1)), 5, np.arange(count), 0, PIECES, **setting)
    chosen, rate = out["labels"] != -100, setting.get("rate", 0.15)
    special = PIECES.special[row]
    assert not chosen[:, special].any() and (out["input_ids"][:, special] == row[special]).all()
    assert abs(chosen[:, ~special].mean(0) - rate).max() < 5 * math.sqrt(rate * (1 - rate) / count), "at every place"
    assert near(chosen.sum(1).astype(float), rate * (~special).sum())
    given, was = out["input_ids"][chosen], out["labels"][chosen]
    assert (was == np.broadcast_to(row, chosen.shape)[chosen]).all() and (out["input_ids"] == row)[~chosen].all()
    share = 0.1 / len(PIECES.ordinary)
    assert sure([(given == MASK).sum(), (given == was).sum(), ((given != MASK) & (given != was)).sum()], [0.8, 0.1 + share, 0.1 - share])
    assert not PIECES.special[given[given != MASK]].any()
    if setting.get("whole_word", True):
        starts = word_starts(row[None], PIECES)[0]
        assert all((chosen[:, a] == chosen[:, a + 1]).all() for a in range(len(row) - 1) if not starts[a + 1])


@pytest.mark.parametrize("most, favour", [(3, "short"), (3, "long"), (6, "geometric")])
def test_ngram_lengths_follow_their_law(most, favour):
    width = 64
    row = np.arange(FIRST, FIRST + width)
    chosen = bert_corrupt(np.tile(row, (20_000, 1)), 0, np.arange(20_000), 0, PIECES, rate=0.02, ngrams=most, favour=favour)["labels"] != -100
    edges = np.diff(np.pad(chosen, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, starts), ends = np.nonzero(edges == 1), np.nonzero(edges == -1)[1]
    alone = np.bincount(rows, minlength=len(chosen))[rows] == 1  # two that touch would look like one
    lengths = (ends - starts)[alone & (starts < width - most)]
    assert len(lengths) > 5000 and (lengths <= most).mean() > 0.995
    counts = np.bincount(lengths[lengths <= most], minlength=most + 1)[1:]
    assert abs(counts / counts.sum() - ngram_law(most, favour)).max() < 0.015


def test_order_of_sentences():
    text = np.array([FIRST, END, FIRST + 1, FIRST + 2, END, FIRST + 3, END, FIRST + 4])
    rows, lengths = np.tile(text, (MANY, 1)), np.full(MANY, len(text))
    draws = Draws(3, 1, np.arange(MANY))
    at = split_places(rows, lengths, draws, PIECES)
    assert sure([(at == k).sum() for k in (2, 5, 7)], np.full(3, 1 / 3))
    out, whole, types, order, _ = paired(rows, lengths, len(text) + 5, draws, PIECES)
    assert near(order.astype(float), 0.5) and set(whole) == {len(text) + 3}
    for k in range(50):
        seps = np.flatnonzero(out[k] == SEP)
        one, two = out[k, 1 : seps[0]].tolist(), out[k, seps[0] + 1 : seps[1]].tolist()
        assert (two + one if order[k] else one + two) == text.tolist() and len(two if order[k] else one) == at[k]
        assert types[k].tolist() == [0] * (len(one) + 2) + [1] * (len(two) + 1) + [0] * 2


# T5

@given(st.integers(0, 400), st.floats(0, 0.9), st.floats(1, 12))
def test_sizes_of_both_sides(length, rate, mean_span):
    hidden, spans = (int(n) for n in noise(length, rate, mean_span))
    assert spans <= hidden and spans <= length - hidden and (hidden == 0) == (spans == 0)
    assert hidden in (0, 1) or abs(hidden - rate * length) <= 1
    assert sizes(length + 1, rate, mean_span)[0] >= sizes(length, rate, mean_span)[0], "a longer text never gives a shorter input"


@settings(max_examples=30, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), st.floats(0.05, 0.6), st.floats(1, 6), st.integers(0, 10**9))
def test_t5_sides_are_exact_and_make_the_text(rows, rate, mean_span, seed):
    out = t5_corrupt(rows, seed, np.arange(len(rows)), 0, PIECES, rate=rate, mean_span=mean_span)
    for text, source, target in zip(rows, out["input_ids"], out["labels"]):
        assert (len(source), len(target)) == tuple(map(int, sizes(len(text), rate, mean_span)))
        assert t5_restore(source, target, PIECES).tolist() == text
        marks = [id for id in source.tolist() if id in range(5, 105)]
        assert marks == [id for id in target.tolist() if id in range(5, 105)] == list(range(5, 5 + len(marks)))


def test_every_division_into_spans_is_as_likely():
    text = np.arange(FIRST, FIRST + 10)
    out = t5_corrupt(np.tile(text, (MANY, 1)), 0, np.arange(MANY), 0, PIECES, rate=0.5, mean_span=2)
    assert noise(10, 0.5, 2)[0] == 5 and noise(10, 0.5, 2)[1] == 2
    found = Counter(map(bytes, out["input_ids"].astype(np.uint16)))
    assert len(found) == math.comb(4, 1) ** 2 and sure(list(found.values()), np.full(16, 1 / 16))


@pytest.mark.parametrize("length", [3, 17, 64, 128, 256, 512])
def test_a_row_of_t5_is_full(length):
    bound = T5().bind(TOKENIZER)
    rows = np.tile(np.arange(FIRST, FIRST + 100), (3, 7))[:, : source_length(length)]
    batch = bound.batch(rows, 3, length, 0, 0, np.arange(3))
    assert batch["input_ids"].shape == (3, length) and batch["attention_mask"].all() and (batch["labels"][:, 1:] != -100).all()
    assert batch["decoder_input_ids"].shape[1] == bound.target_length(length)


# BART

def test_lengths_of_infilled_spans():
    row = np.arange(FIRST, FIRST + 200)
    rows = np.tile(row, (5000, 1))
    out, _ = infilled(rows, np.ones(rows.shape, bool), Draws(0, 0, np.arange(5000)), PIECES, rate=0.1, random=0.0)
    masks = out == MASK
    lone = masks[:, 1:-1] & ~masks[:, :-2] & ~masks[:, 2:] & (out[:, 2:] != 0)
    lengths = (out[:, 2:] - out[:, :-2] - 1)[lone]
    law, none = poisson_law(3.0)
    expected = np.r_[none, law[:7] * (1 - none)]
    counts = np.bincount(lengths, minlength=8)[:8]
    assert len(lengths) > 20_000 and abs(counts / len(lengths) - expected).max() < 0.012


def test_share_of_masked_words():
    row = np.tile(words_row()[1:8], 8)
    rows = np.tile(row, (MANY // 10, 1))
    for mean_span in (0, 1, 3):
        out = bart_corrupt(rows, 1, np.arange(len(rows)), 0, PIECES, permute=0, random=0, mean_span=mean_span)["input_ids"]
        left = (out[:, 1:] >= FIRST).sum(1)
        assert near(1 - left / len(row), 0.3)
    wild = bart_corrupt(rows, 1, np.arange(len(rows)), 0, PIECES, permute=0, mean_span=0, random=0.25)["input_ids"]
    hidden = (wild == MASK).sum(1) / word_starts(row[None], PIECES).sum()
    assert near(hidden, 0.3 * 0.75)


def test_orders_of_sentences():
    text = np.array([FIRST, END, FIRST + 1, FIRST + 2, END, FIRST + 3, END, FIRST + 4, FIRST + 5, FIRST + 6])
    rows, real = np.tile(text, (MANY, 1)), np.ones((MANY, len(text)), bool)
    out = permuted(rows, real, Draws(0, 0, np.arange(MANY)), PIECES)
    found = Counter(map(bytes, out.astype(np.uint16)))
    parts = np.split(text, np.flatnonzero(sentence_starts(text[None], PIECES)[0])[1:])
    assert {bytes(np.concatenate(order).astype(np.uint16)) for order in itertools.permutations(parts)} == set(found)
    assert sure(list(found.values()), np.full(24, 1 / 24))
    half = permuted(rows, real, Draws(0, 0, np.arange(MANY)), PIECES, 0.5)
    still = (half == text).all(1).sum()
    assert sure([still, MANY - still], [0.5, 0.5]), "two of four change places, or keep them by chance"


# PEGASUS, UniLM

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(5, 12), min_size=1, max_size=40), st.integers(1, 6), st.randoms(use_true_random=False))
def test_rouge(ids, sentences, random):
    number = sorted(random.randrange(sentences) for _ in ids)
    got = rouge(np.array([ids]), np.array([number]), np.ones((1, len(ids)), bool), sentences)[0]
    for k in range(sentences):
        inside, outside = (Counter(i for i, n in zip(ids, number) if (n == k) == same) for same in (True, False))
        common = (inside & outside).total()
        precision, recall = common / max(inside.total(), 1), common / max(outside.total(), 1)
        assert got[k] == pytest.approx(2 * precision * recall / (precision + recall) if common else 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.just(END), st.integers(FIRST, FIRST + 9)), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 99))
def test_gaps_and_the_rest_make_the_text(text, rate, seed):
    out = pegasus_corrupt(np.array(text), seed, 0, 0, PIECES, rate=rate)
    target, source = out["labels"][:-1].tolist(), out["input_ids"][:-1].tolist()
    assert len(target) <= budgets(len(text), rate) and (len(target) > 0) == (budgets(len(text), rate) > 0)
    assert sorted(target + [id for id in source if id != MASK]) == sorted(text)
    around = iter(text)
    assert all(id in around for id in source if id != MASK), "what is left stands in its order"


def test_cuts_of_unilm():
    text = np.arange(FIRST, FIRST + 10)
    out = unilm_corrupt(np.tile(text, (MANY, 1)), 0, np.arange(MANY), 0, PIECES)
    first = (out["input_ids"] == SEP).argmax(1) - 1
    assert sure(np.bincount(first)[1:], np.full(9, 1 / 9))
    assert ((out["labels"] != -100) == (out["token_type_ids"] == 1)).all() and ((out["labels"] != -100).sum(1) == 11 - first).all()


# all

BOUND = {name: cls().bind(TOKENIZER) for name, cls in OBJECTIVES.items()} | {
    "pairs": Bert(sentence_order=True, ngrams=3).bind(TOKENIZER), "words": Bart(mean_span=0, permute=0.5).bind(TOKENIZER)}


@pytest.mark.parametrize("name", BOUND)
@settings(max_examples=6, deadline=None)
@given(st.lists(texts, max_size=4), st.integers(0, 2), st.integers(0, 10**6), st.data())
def test_a_sample_is_the_same_in_any_company(name, rows, empty, seed, data):
    bound, length = BOUND[name], 48
    index = np.array(data.draw(st.lists(st.integers(0, 2**62), min_size=len(rows), max_size=len(rows))), np.int64)
    batch = bound.batch(rows, len(rows) + empty or 1, length, seed, 3, index)
    full = bound.batch(np.zeros((0, bound.source_length(length)), np.int64), len(rows) + empty or 1, length, seed, 3, index[:0])
    assert {k: v.shape for k, v in batch.items() if hasattr(v, "shape")} == {k: v.shape for k, v in full.items() if hasattr(v, "shape")}
    assert (full["labels"] == -100).all() and full["tokens"] == full["num_labels"] == 0
    for row, (text, number) in enumerate(zip(rows, index)):
        alone = bound.batch([text], 1, length, seed, 3, [number])
        assert all((alone[key][0] == batch[key][row]).all() for key in alone if hasattr(alone[key], "shape"))
    assert batch["num_labels"] == int((batch["labels"] != -100).sum()) and (batch["labels"][:, 0] == -100).all()
    reached = batch["labels"][:, 1:][:, : batch["attention_mask"].shape[1]] != -100
    if batch.own_place:
        assert not (reached & (batch["attention_mask"] == 0)).any()
    repr(batch), batch._repr_html_(), str(show(batch)), show(batch)._repr_html_()


@pytest.mark.parametrize("name", ["Bert", "pairs"])
def test_labels_of_masked_rows_are_the_text(name):
    rows = np.random.default_rng(0).integers(FIRST, len(TOKENIZER), (50, 40))
    batch = BOUND[name].batch(rows, 50, 43, 0, 0, np.arange(50))
    pieces = Pieces(TOKENIZER)
    back = torch.where(batch["labels"][:, 1:] == -100, batch["input_ids"], batch["labels"][:, 1:])
    for row in range(50):
        assert sorted(id for id in back[row].tolist() if id >= FIRST) == sorted(rows[row].tolist())
        assert [id for _, id in lines_of(batch, row, pieces)["text"]] == back[row][batch["attention_mask"][row] == 1].tolist()


@pytest.mark.parametrize("name", ["T5", "Bart", "Pegasus", "words"])
def test_decoder_reads_what_it_has_said(name):
    rows = np.random.default_rng(0).integers(FIRST, FIRST + 204, (20, 30))
    batch = BOUND[name].batch(list(rows), 21, 48, 0, 0, np.arange(20))
    labels, read = batch["labels"][:20, 1:], batch["decoder_input_ids"][:20]
    scored = labels != -100
    assert (read[:, 1:] == labels[:, :-1])[scored[:, 1:]].all() and (scored[:, 1:] <= scored[:, :-1]).all()
    assert len(set(read[:, 0].tolist())) == 1 and (labels.gather(1, scored.sum(1, keepdim=True) - 1) == SEP).all()


def test_epochs_seeds_and_numbers_differ():
    rows = np.tile(np.arange(FIRST, FIRST + 40), (4, 1))
    for bound in (BOUND["Bert"], BOUND["T5"], BOUND["Bart"], BOUND["UniLM"]):
        made = [bound.batch(rows, 4, 48, seed, epoch, np.arange(4) + index)["input_ids"].tolist() for seed, epoch, index in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 4))]
        assert len({str(m) for m in made}) == 4


@pytest.mark.parametrize("call, words", [
    (lambda: bert_corrupt([10**6], 0, 0, 0, PIECES), "outside the vocabulary"),
    (lambda: bert_corrupt([-1], 0, 0, 0, PIECES), "outside the vocabulary"),
    (lambda: bert_corrupt([FIRST], 0, 0, 0, PIECES, ngrams=0), "at least one word"),
    (lambda: t5_corrupt([FIRST], 0, 0, 0, PIECES, rate=15), "15% is rate"),
    (lambda: BOUND["Bert"].batch([[FIRST] * 50], 1, 48, 0, 0, [0]), "longer than its row"),
    (lambda: BOUND["pairs"].batch([[FIRST] * 46], 1, 48, 0, 0, [0]), "longer than its row"),
    (lambda: BOUND["Bart"].batch([[FIRST] * 50], 1, 48, 0, 0, [0]), "longer than its row"),
    (lambda: BOUND["UniLM"].batch([[FIRST] * 50], 1, 48, 0, 0, [0]), "longer than its row"),
    (lambda: BOUND["Causal"].batch([[FIRST] * 50], 1, 48, 0, 0, [0]), "longer than its row"),
    (lambda: BOUND["T5"].batch([[FIRST] * 60], 1, 48, 0, 0, [0]), "longer than its row"),
    (lambda: BOUND["Pegasus"].batch([[FIRST] * 60], 1, 48, 0, 0, [0]), "longer than its row"),
    (lambda: BOUND["Bert"].batch([[FIRST]] * 3, 2, 48, 0, 0, [0, 1, 2]), "more texts than rows"),
    (lambda: Bert(rate=2).bind(TOKENIZER), "rate is a share"),
    (lambda: Pegasus(noise=-1).bind(TOKENIZER), "noise is a share"),
    (lambda: T5(start="<nothing>").bind(TOKENIZER), "start is no token"),
    (lambda: T5(mean_span=1).bind(TOKENIZER).source_length(1024), "more spans than the tokenizer has sentinels"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_rates_at_their_ends():
    text = np.arange(FIRST, FIRST + 30)
    assert (bert_corrupt(text, 0, 0, 0, PIECES, rate=1)["labels"] == text).all()
    assert (bert_corrupt(text, 0, 0, 0, PIECES, rate=0)["input_ids"] == text).all()
    assert t5_corrupt(text, 0, 0, 0, PIECES, rate=0)["input_ids"][:-1].tolist() == text.tolist()
    assert set(bart_corrupt(text, 0, 0, 0, PIECES, rate=1, random=0)["input_ids"].tolist()) == {CLS, MASK, SEP}
    assert (bert_corrupt([CLS, SEP], 0, 0, 0, PIECES, rate=1)["labels"] == -100).all()
    for corrupt in (bert_corrupt, t5_corrupt, bart_corrupt, unilm_corrupt, pegasus_corrupt):
        assert len(corrupt([text[:1].tolist(), text.tolist()], 0, [0, 1], 0, PIECES)["labels"]) == 2


# words of real vocabularies

@pytest.mark.parametrize("name", ["bert_base_chinese", "gpt2"])
def test_words_of_jieba(shared, name):
    jieba = pytest.importorskip("jieba")
    pieces = Vocabulary(load_tokenizer(shared / "data/tokenizers" / name))
    text = "今天天气很好，我们去公园散步。Transformers模型在2022年发布了！北京大学的学生喜欢自然语言处理。"
    ids = np.array([pieces.tokenizer(text, add_special_tokens=False)["input_ids"]])
    starts = word_starts(ids, pieces, jieba=True)[0]
    words = [b"".join(pieces.texts[int(i)] for i in part).decode() for part in np.split(ids[0], np.flatnonzero(starts)[1:])]
    assert "".join(words).replace(" ", "").lower() == text.lower()
    known = {word.lower() for word in jieba.lcut(text)}
    assert {"天气", "公园", "北京大学", "自然语言", "散步"} & known <= set(words)
    assert all(len(word.strip()) > 1 for word in words if word.strip().isascii() and word.strip().isalpha())
    mixed = np.array([pieces.tokenizer("天气hello，世界", add_special_tokens=False)["input_ids"]])
    plain = np.split(mixed[0], np.flatnonzero(word_starts(mixed, pieces)[0])[1:])
    assert [b"".join(pieces.texts[int(i)] for i in part).decode().strip() for part in plain] == ["天", "气", "hello", "，", "世", "界"]
