"""Chinese words kept in a file: the same masks with and without it, whatever happens to the file."""
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from fengshen.data.masking import words as words_module
from fengshen.data.masking.bert import bert_corrupt
from fengshen.data.masking.objectives import Bart, Bert
from fengshen.data.masking.pieces import Vocabulary, chinese_starts
from fengshen.data.masking.rows import as_rows
from fengshen.data.masking.words import Words, finder_mark

jieba = pytest.importorskip("jieba")

TEXT = "今天天气很好，我们去公园散步。北京大学的学生喜欢自然语言处理！你呢？“真的吗？”他说，中华人民共和国的法律保护公民的权利"
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENIZER = BertTokenizer(vocab={word: i for i, word in enumerate(MARKS + list(dict.fromkeys(TEXT)) + ["ab", "##c"])})
PIECES = Vocabulary(TOKENIZER)
IDS = np.array(TOKENIZER(TEXT, add_special_tokens=False)["input_ids"])
WIDTH = 13
WINDOWS = np.stack([IDS[at : at + WIDTH] for at in range(len(IDS) - WIDTH)])
rows_of = st.lists(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=WIDTH), min_size=1, max_size=4)


def forbidden(*_):
    raise AssertionError("a kept row was looked through again")


def batches(objective, length):
    "Batches of two epochs, of windows that cut through words."
    bound = objective.bind(TOKENIZER)
    texts = WINDOWS[:, : bound.source_length(length)]
    return [bound.batch(texts[at : at + 7], 8, length, 1, epoch, np.arange(len(texts))[at : at + 7]) for epoch in range(2) for at in range(0, len(texts), 7)]


@pytest.mark.parametrize("make", [Bert, Bart, lambda **more: Bert(sentence_order=True, ngrams=3, **more), lambda **more: Bart(permute=0.5, mean_span=0, **more)])
def test_kept_words_give_the_same_batches(make, tmp_path, monkeypatch):
    plain, first = batches(make(jieba=True), WIDTH + 2), batches(make(jieba=True, keep_words=str(tmp_path)), WIDTH + 2)
    monkeypatch.setattr(words_module, "chinese_starts", forbidden)
    second = batches(make(jieba=True, keep_words=str(tmp_path)), WIDTH + 2)
    assert repr(make(jieba=True)) == repr(make(jieba=True, keep_words="elsewhere")), "so a run goes on with them and without"
    for one, *others in zip(plain, first, second):
        assert all(torch.equal(one[name], other[name]) for other in others for name in one if torch.is_tensor(one[name]))


def test_words_of_a_text_are_those_of_its_row():
    bound = Bert(jieba=True).bind(TOKENIZER)
    framed = np.pad(WINDOWS, ((0, 0), (1, 1)))
    framed[:, 0], framed[:, -1] = TOKENIZER.cls_token_id, TOKENIZER.sep_token_id
    made = bound.batch(WINDOWS, len(WINDOWS), WIDTH + 2, 3, 0, np.arange(len(WINDOWS)))
    assert (made["input_ids"].numpy() == bert_corrupt(framed, 3, np.arange(len(WINDOWS)), 0, PIECES, jieba=True)["input_ids"]).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_rows_in_any_order_under_any_numbers(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("words")
    for _ in range(3):
        rows = as_rows(data.draw(rows_of), PIECES)
        numbers = data.draw(st.lists(st.integers(0, 5), min_size=len(rows.ids_bl), max_size=len(rows.ids_bl), unique=True))
        found = Words(PIECES, folder)(rows, numbers, WIDTH)
        assert (found == chinese_starts(rows.ids_bl, PIECES))[rows.real_bl].all()


@pytest.mark.parametrize("fault", ["cut", "noise", "zeros", "one bit", "gone"])
def test_a_damaged_file_is_found_out(fault, tmp_path):
    rows, numbers = as_rows(WINDOWS[:5], PIECES), np.arange(5)
    right = Words(PIECES, tmp_path)(rows, numbers, WIDTH)
    path, random = Words(PIECES, tmp_path).file(WIDTH), np.random.default_rng(0)
    content = bytearray(path.read_bytes())
    if fault == "gone":
        path.unlink()
    else:
        content[-1] ^= 128 if fault == "one bit" else 0
        path.write_bytes(dict(cut=content[:23], noise=random.bytes(len(content)), zeros=bytes(len(content))).get(fault, content))
    words = Words(PIECES, tmp_path)
    assert (words(rows, numbers, WIDTH) == right).all()
    assert words.read(rows, numbers, WIDTH)[1].all(), "and mended"


def test_another_tokenizer_or_dictionary_finds_its_own_words(tmp_path):
    rows, numbers = as_rows(WINDOWS[:3], PIECES), np.arange(3)
    Words(PIECES, tmp_path)(rows, numbers, WIDTH)
    turned = Vocabulary(BertTokenizer(vocab={word: i for i, word in enumerate(MARKS + [*dict.fromkeys(TEXT)][::-1] + ["ab", "##c"])}))
    assert not Words(turned, tmp_path).read(as_rows(rows.ids_bl, turned), numbers, WIDTH)[1].any()
    before = finder_mark(PIECES)
    jieba.add_word("天气很好")
    try:
        assert finder_mark(PIECES) != before and not Words(PIECES, tmp_path).read(rows, numbers, WIDTH)[1].any()
    finally:
        jieba.dt.initialized = False
        jieba.initialize()
    assert finder_mark(PIECES) == before


def test_two_processes_grow_one_file(tmp_path):
    one, two = Words(PIECES, tmp_path), pickle.loads(pickle.dumps(Words(PIECES, tmp_path)))
    rows = as_rows(WINDOWS[:1], PIECES)
    for number, words in ((0, one), (900, two), (40, one), (3, two), (2000, one)):
        words(rows, [number], WIDTH)
    for words in (one, two):
        assert all(words.read(rows, [number], WIDTH)[1].all() for number in (0, 3, 40, 900, 2000))
    assert os.stat(one.file(WIDTH)).st_size == 2001 * 10


def test_what_is_set_in_vain_is_said(capsys):
    Bert(keep_words="somewhere").bind(TOKENIZER)
    assert "keep_words is not used" in capsys.readouterr().out
    assert Bert(jieba=True, whole_word=False).bind(TOKENIZER).finder is None
