"""The view, the microscope and `fengshen data show`: ten million samples, odd tokenizers, odd texts, and clicks without a browser."""
import json
import re
import shlex
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fengshen.cli.main import main
from fengshen.data import picture
from fengshen.data.packing import PackedDataset, Rows
from fengshen.data.task_dataloader.conversations import ConversationDataset
from fengshen.data.task_dataloader.datamodule import ConversationDataModule
from fengshen.data.view import CHUNK, View
from fengshen.tokenizer import load_tokenizer
from fengshen.tokenizer.pieces import Pieces, characters

TOKENIZER = load_tokenizer("fengshen:tokenizer_demo")
PIECES = Pieces(TOKENIZER)
PAIRS = [dict(question=f"第{i}个问题：感冒怎么办？", answer="多喝水，多休息。") for i in range(5)] + [
    dict(question="糖尿病怎么办？", answer="少吃糖。\n多运动。"), dict(question="糖尿病人能吃什么？", answer="请先问医生，再决定吃什么。" * 12)]
PAIRS.append(PAIRS[0])


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    "A data module of eight pairs: one is cut, one is there twice."
    path = tmp_path_factory.mktemp("microscope") / "qa.jsonl"
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in PAIRS), "utf8")
    return ConversationDataModule(str(path), tokenizer="fengshen:tokenizer_demo", max_length=64, on_long="truncate")


def flat(lengths, ids, scored, **more):
    "A dataset of flat arrays, as a cache gives them."
    n = len(lengths)
    zeros = dict(file=np.zeros(n, np.int32), line=np.arange(1, n + 1), hashes=np.arange(n, dtype=np.uint64), state=np.zeros(n, np.uint8))
    offsets = more.pop("offsets", None)
    offsets = np.concatenate([[0], np.cumsum(lengths)]) if offsets is None else offsets
    dataset = type("Flat", (), dict(__len__=lambda self: n))()
    vars(dataset).update(zeros | dict(lengths=lengths, ids=ids, scored=scored, offsets=offsets, files=["a.jsonl"], cuts=lambda: [], tokenizer=TOKENIZER,
                                      max_length=64, template=SimpleNamespace(name="yuyuan"), report={}) | more)
    return dataset


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "Ten million samples of 100 tokens in sparse files: a gigatoken that takes no disk. One sample, far behind, holds a text."
    folder, n, length = tmp_path_factory.mktemp("many"), 10_000_000, 100
    arrays = {}
    for name, kind, size in (("ids", np.int32, n * length), ("scored", np.uint8, n * length), ("state", np.uint8, n), ("file", np.int32, n)):
        (folder / name).touch()
        arrays[name] = np.memmap(folder / name, kind, "r+" if (folder / name).stat().st_size else "w+", shape=size)
    text = TOKENIZER("糖尿病怎么办")["input_ids"]
    arrays["ids"][8_000 * length : 8_000 * length + len(text)] = text
    arrays["state"][9_999_000] = 1
    return flat(np.full(n, length), offsets=np.arange(n + 1) * length, **arrays)


def test_ten_million_samples_are_painted_within_a_second(many):
    packed = SimpleNamespace(rows=Rows(np.arange(len(many), dtype=np.int32), np.arange(0, len(many) + 1, 10)), capacity=1000)
    begun = time.perf_counter()
    view = View(SimpleNamespace(sets=dict(train=many, train_rows=packed)))
    view.go(7_654_321)
    page = view.html()
    took = time.perf_counter() - begun
    assert took < 1 and "7,654,321" in page and view.neighbours()["row"] == 765_432
    assert len(page) < 200_000


def test_a_search_stops_at_the_first_hit_and_goes_on_from_where_its_time_ended(many):
    view, reached = View(many), []
    assert view.find(text="糖尿病", progress=reached.append).at == 8_000 and len(reached) == 8_000 // CHUNK
    assert view.find(cut=True).at == 9_999_000
    view.find(text="没有的", seconds=0.0)
    assert view.found is False and view.stopped == CHUNK
    assert view.seek(view.stopped, seconds=0.0).stopped == 2 * CHUNK


def test_a_long_sample_is_shown_in_windows():
    ids = np.array(TOKENIZER("糖尿病怎么办？" * 100_000)["input_ids"], np.int32)
    view = View(flat(np.array([len(ids)]), ids, np.ones(len(ids), np.uint8)))
    begun = time.perf_counter()
    page = view.go(0, start=123_457).html()
    assert time.perf_counter() - begun < 1 and "123,457" in page and page.count('class="fs-chip') <= 404


TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.integers(1, 9))
def test_windows_of_tokens_are_the_tokens_and_spell_the_text(text, size):
    ids = TOKENIZER(text, split_special_tokens=True)["input_ids"]
    whole = picture.token_list(ids, [True] * len(ids), PIECES)
    windows = [t for start in range(0, len(ids), size) for t in picture.token_list(ids, [True] * len(ids), PIECES, start, size)]
    assert windows == whole and [t["id"] for t in whole] == ids
    assert "".join({t["group"]: t["whole"] for t in whole}.values()) == text == b"".join(PIECES[i] for i in ids).decode()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=5), max_size=12))
def test_any_bytes_are_grouped_without_loss(pieces):
    groups = characters(pieces)
    assert [a for a, _, _ in groups] == ([0] + [b for _, b, _ in groups])[: len(groups)] and (not pieces or groups[-1][1] == len(pieces))
    if all(text.isprintable() and "�" not in text for _, _, text in groups):
        assert "".join(text for _, _, text in groups).encode() == b"".join(pieces)


class Balanced(HTMLParser):
    "Counts tags that are opened and closed, and keeps the text."

    def __init__(self, page):
        super().__init__()
        self.open, self.words, self.tags = [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("br", "meta", "rect", "line", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


NASTY = "<script>alert('糖')</script>&amp;\x1b[31m\r\x00\u202e\"'<i>"


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.just(NASTY), TEXTS.filter(len)))
def test_no_text_breaks_the_page_or_the_terminal(text):
    ids = np.array(TOKENIZER(text, split_special_tokens=True)["input_ids"] + [TOKENIZER.eos_token_id], np.int32)
    view = View(flat(np.array([len(ids)]), ids, np.ones(len(ids), np.uint8)))
    page = Balanced(view._repr_html_())
    assert not page.open and not page.tags & {"script", "i"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e]", view.text() + "".join(page.words))


@pytest.mark.parametrize("kind", ["words", "marks"])
def test_other_vocabularies(kind):
    if kind == "words":
        inner = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "糖": 2, "尿": 3, "insulin": 4, "##s": 5}, unk_token="[UNK]"))
        inner.pre_tokenizer, inner.decoder, expected = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), "糖尿 insulins"
    else:
        inner = Tokenizer(models.BPE({"<unk>": 0, "[SEP]": 1, "▁糖": 2, "尿": 3, "▁insulin": 4, "s": 5}, []))
        inner.decoder, expected = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), " 糖尿 insulins"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[SEP]")
    view = View(flat(np.array([5]), np.array([2, 3, 4, 5, 1], np.int32), np.ones(5, np.uint8), tokenizer=tokenizer))
    assert "".join(t["whole"] for t in view.tokens()) == expected + "[SEP]" and view.tokens()[-1]["special"]
    assert view.find(text="糖尿").found


def test_filters_agree_with_a_look_at_each_sample():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 40, 3 * CHUNK)
    tokens = int(lengths.sum())
    data = flat(lengths, rng.integers(10, 500, tokens).astype(np.int32), (rng.random(tokens) < 0.1).astype(np.uint8),
                state=rng.integers(0, 3, len(lengths)).astype(np.uint8), hashes=rng.integers(0, 30_000, len(lengths)).astype(np.uint64))
    view, hashes = View(data), data.hashes.tolist()
    asked = dict(longer=20, shorter=35, cut=True, duplicates=True, loss_at_most=0.05)
    view.find(**asked)
    found = [hit for _, hit in view.scan() if hit is not None]
    counts = {h: hashes.count(h) for h in set(hashes[i] for i in found)}
    scored = [int(data.scored[a + 1 : b].sum()) for a, b in zip(data.offsets, data.offsets[1:])]
    assert all(counts[hashes[i]] > 1 for i in found) and found
    plain = [i for i in range(len(data)) if 20 < lengths[i] < 35 and data.state[i] and scored[i] <= 0.05 * lengths[i]]
    assert found == [i for i in plain if hashes.count(hashes[i]) > 1]
    assert [hit for _, hit in view.scan(len(data) - 1, -1) if hit is not None] == found[::-1]


def test_every_sample_is_found_in_its_row(module):
    module.setup("fit")
    view, rows = View(module), module.sets["train_rows"].rows
    for i in range(len(view)):
        row = view.neighbours(i)
        assert i in rows[row["row"]] and [s["sample"] for s in row["samples"]] == rows[row["row"]].tolist()
    assert View(module.sets["train"]).neighbours(0) is None and isinstance(module.sets["train_rows"], PackedDataset)


def test_a_real_dataset_is_told_as_it_is(module):
    module.setup("fit")
    view = View(module).find(cut=True)
    facts = view.sample()
    assert (facts["line"], facts["state"], facts["tokens"]) == (7, "cut", 64) and view.cuts()[0]["lost"] > 0
    assert view.find(duplicates=True).sample()["same"] == [7] and view.duplicates()["extra"] == 1
    labels = module.sets["train"][5]["labels"]
    assert [t["scored"] for t in view.tokens(5)] == (labels != -100).tolist()
    other = view.go(5).compare(template="ziya").sides()[1][1]
    assert "".join({t["group"]: t["whole"] for t in other}.values()) == "<human>:糖尿病怎么办？\n<bot>:少吃糖。\n多运动。<|endoftext|>"


def test_the_printed_command_and_the_printed_python_show_the_same(module, capsys):
    module.setup("fit")
    view = View(module).find(text="糖尿病", cut=True).compare(template="ziya")
    again = eval(view.python(), dict(View=View, data=module))
    assert again.text() == view.text()
    capsys.readouterr()
    assert main(shlex.split(view.command())[1:]) == 0
    assert capsys.readouterr().out.rstrip("\n") == view.text()


@pytest.mark.parametrize("words, message", [
    (["--sample", "99"], "no such sample"), (["--file", "qb.jsonl"], "did you mean 'qa.jsonl'"), (["--split", "trian"], "did you mean 'train'"),
    (["--compare_template", "zia"], "did you mean 'ziya'"), (["--data.max_lenght", "64"], "did you mean 'data.max_length'"), (["--language", "fr"], "language"),
])
def test_wrong_words_are_refused_in_a_line(module, capsys, words, message):
    data = ["--data.train", module.train, "--data.tokenizer", "fengshen:tokenizer_demo", "--data.max_length", "64", "--data.on_long", "truncate"]
    assert main(["data", "show", *data, *words]) == 2
    assert message in capsys.readouterr().err


def test_what_was_left_out_is_listed(module, capsys):
    data = ["--data.train", module.train, "--data.tokenizer", "fengshen:tokenizer_demo", "--data.max_length", "64", "--data.on_long", "drop"]
    assert main(["data", "show", *data, "--lost"]) == 0
    out = capsys.readouterr().out
    assert "line 7" in out and "left out" in out and "请先问医生" in out
    assert main(["data", "show", *data, "--cut"]) == 1


def test_the_microscope_without_a_browser(module):
    pytest.importorskip("ipywidgets", reason="the extra 'widgets' is not installed")
    from fengshen.widgets import Microscope

    microscope = Microscope(module, language="zh")
    microscope.next_button.click()
    assert microscope.view.at == microscope.number.value == 1
    microscope.number.value = 99
    assert "no such sample" in microscope.message.value and microscope.view.at == 1
    microscope.fields["cut"].value = True
    microscope.search_button.click()
    assert microscope.view.at == 6 and "请先问医生" in microscope.page.value and "被截断" in microscope.page.value
    microscope.template.value = "zia"
    microscope.compare_button.click()
    assert "ziya" in microscope.message.value
    microscope.template.value = "ziya"
    microscope.compare_button.click()
    assert "&lt;human&gt;" in microscope.page.value and microscope.message.value == ""
    bundle = microscope._repr_mimebundle_()
    assert {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"} <= set(bundle)


def test_a_search_in_the_microscope_ends_and_can_go_on(many, monkeypatch):
    pytest.importorskip("ipywidgets", reason="the extra 'widgets' is not installed")
    from fengshen.widgets import Microscope, microscope

    monkeypatch.setattr(microscope, "SECONDS", 0.0)
    shown = Microscope(many)
    assert shown.go_on_button.layout.display == "none"
    shown.fields["text"].value = "糖尿病"
    assert shown.view.stopped == CHUNK and shown.go_on_button.layout.display is None and "4,096" in shown.page.value
    shown.go_on_button.click()
    assert shown.view.at == 8_000 and shown.go_on_button.layout.display == "none"


def test_the_first_token_is_never_scored():
    data = ConversationDataset([dict(text="糖尿病")], TOKENIZER, max_length=16, loss_on="all")
    assert [t["scored"] for t in View(data).tokens()][0] is False and View(data).sample()["scored"] == len(data.ids) - 1
