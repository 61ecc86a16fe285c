"Preprocessing: whatever the input, the dataset holds its documents, each once and in order, and what is left out is counted."

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fengshen.data.megatron_dataloader import IndexedDataset
from fengshen.data.mmap_dataloader.mmap_format import read_manifest
from fengshen.data.mmap_dataloader.mmap_writer import ShardWriter
from fengshen.data.preprocess import preprocess, split_sentences
from fengshen.data.preprocess.filters import find_duplicates, text_hash
from fengshen.data.preprocess.texts import texts_of
from fengshen.data.preprocess.tokenise import Tokeniser, check_engine, engine_of, overlapped, rules_of
from fengshen.data.preprocess.units import DOCUMENTS, make_units
from fengshen.data.task_dataloader.formats import OPENERS, BadLine

sys.path.insert(0, str(Path(__file__).parent))
from test_records import pack  # noqa: E402

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("house")

CHARS = "道可非常名，。！？a…”\"' \u3000\n"
TEXT = st.text(CHARS, max_size=30)


def tokenizer_of(characters=CHARS):
    "A tokenizer with a token for each character, whose ids tell the text."
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", *dict.fromkeys(characters)])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


TOKENIZER = tokenizer_of()


def spelled(ids):
    "The text of ids, with | for the end of a document."
    return "".join("|" if token == "<eos>" else token for token in TOKENIZER.convert_ids_to_tokens(ids))


def rows_of(folder, name="input_ids"):
    "The rows of a dataset, read by the naivest code there is."
    manifest, rows = read_manifest(folder), []
    for shard in manifest["shards"]:
        flat = np.fromfile(folder / f"{shard['prefix']}_{name}.bin", manifest["schema"][name])
        offsets = np.fromfile(folder / f"{shard['prefix']}_{name}.idx", "<u8").astype(int)
        rows += [flat[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:])]
    return rows


def files_of(folder):
    "{name: bytes} of a dataset, without its report."
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".") and p.name != "preprocess.json"}


def jsonl(path, texts):
    "Write texts as JSON lines."
    path.write_text("".join(json.dumps(dict(text=text), ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


@given(texts=st.lists(TEXT, max_size=20), limits=st.sampled_from([(1, None), (3, 12), (0, 5)]), dedup=st.booleans(), size=st.sampled_from([1, 60, 10_000]))
@settings(max_examples=15)
def test_the_dataset_is_what_passes_the_filters(tmp_path_factory, texts, limits, dedup, size):
    "Both formats hold the same ids; any size of unit gives the same documents; every document is counted once."
    folder, (least, most) = tmp_path_factory.mktemp("corpus"), limits
    jsonl(folder / "raw.jsonl", texts)
    seen, wanted = set(), []
    for text in texts:
        if text.strip() and least <= len(text) <= (most or 99) and not (dedup and text_hash(text) in seen):
            wanted.append(text + "|")
        seen |= {text_hash(text)} if text.strip() and least <= len(text) <= (most or 99) else set()
    words = dict(min_chars=least, max_chars=most, dedup=dedup, unit_bytes=size)
    if not wanted:
        with pytest.raises(ValueError, match="no document is left"):
            preprocess(folder / "raw.jsonl", folder / "mmap", TOKENIZER, **words)
        return
    report = preprocess(folder / "raw.jsonl", folder / "mmap", TOKENIZER, **words)
    preprocess(folder / "raw.jsonl", folder / "megatron", TOKENIZER, format="megatron", **words)
    assert [spelled(row) for row in rows_of(folder / "mmap")] == wanted
    assert [spelled(row) for row in IndexedDataset(folder / "megatron")[:]] == wanted
    counts = Counter(report["counts"])
    assert counts["read"] == len(texts) == counts["kept"] + sum(counts[why] for why in ("bad", "empty", "short", "long", "repeated", "wordless"))
    assert counts["tokens"] == sum(map(len, wanted)) and not list(folder.glob("*.work"))


@given(st.text("道。！？；…”’\"'」) \n\u3000a.", max_size=60))
def test_sentences_lose_nothing(text):
    parts = split_sentences(text)
    assert "".join(parts) == text and all(parts)
    assert all(part.strip() for part in parts[1:]) or not text.strip(), "white space alone is a sentence only at the front"


@given(texts=st.lists(TEXT, min_size=1, max_size=8), end=st.sampled_from([None, 1]))
def test_sentences_are_the_same_tokens(texts, end):
    rules = rules_of(TOKENIZER)
    whole, parts = (Tokeniser(rules, end, sentences)(texts) for sentences in (False, True))
    assert np.array_equal(whole.ids, parts.ids) and parts.counts.sum() == len(parts.lengths) and parts.lengths.sum() == len(parts.ids)
    assert (parts.lengths > 0).all() and len(whole.counts) == len(parts.counts) == sum(map(bool, texts))


def test_sentences_in_both_formats(tmp_path):
    jsonl(tmp_path / "raw.jsonl", ["道。可！非常", "名"])
    for name in ("mmap", "megatron"):
        preprocess(tmp_path / "raw.jsonl", tmp_path / name, TOKENIZER, format=name, sentences=True)
    dataset = IndexedDataset(tmp_path / "megatron")
    assert [spelled(row) for row in dataset[:]] == ["道。", "可！", "非常|", "名|"] and dataset.doc_idx.tolist() == [0, 3, 4]
    assert rows_of(tmp_path / "mmap", "sentences") == [[2, 2, 3], [2]]


@given(content=st.lists(st.sampled_from([b"\n", b"\r\n", "道可".encode(), b"a", b" ", b"\xff", b"\n\n"]), max_size=60).map(b"".join),
       form=st.sampled_from(list(DOCUMENTS)), size=st.integers(1, 40))
@settings(max_examples=60)
def test_units_cut_no_document(tmp_path_factory, content, form, size):
    "Any cut of a text gives the documents of the whole."
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes(content)
    whole, cut = ([repr(text) for unit in make_units([path], form, n) for piece in unit for _, text, _ in texts_of(piece)] for n in (1 << 30, size))
    assert whole == cut


@pytest.mark.parametrize("packed", OPENERS)
def test_every_container_gives_the_same_corpus(tmp_path, packed):
    texts = [f"道{'可' * (i % 7)}" for i in range(50)]
    pack(jsonl(tmp_path / "a.jsonl", texts[:10]).rename(tmp_path / "a.raw").with_name(f"a.jsonl{packed}"), (tmp_path / "a.raw").read_bytes())
    pa.parquet.write_table(pa.table(dict(title=["x"] * 10, content=texts[10:20])), tmp_path / "b.parquet", row_group_size=3)
    (tmp_path / "c.txt").write_text("\n".join(texts[20:30]), "utf-8")
    (tmp_path / "d.csv").write_text("text\n" + "\n".join(texts[30:40]), "utf-8")
    with pa.ipc.new_file(str(tmp_path / "e.arrow"), (table := pa.table(dict(正文=texts[40:]))).schema) as sink:
        sink.write_table(table, max_chunksize=4)
    preprocess(tmp_path, tmp_path.with_name("out" + packed), TOKENIZER, unit_bytes=100)
    assert [spelled(row) for row in rows_of(tmp_path.with_name("out" + packed))] == [text + "|" for text in texts]


BAD = ['{"text": "道', '{"title": "道"}', '{"text": ["道"]}', "[1]", '"道"', '{"text": "\\ud800"}', "\udcff"]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named_or_counted(tmp_path, bad):
    raw = tmp_path / "raw.jsonl"
    good = json.dumps(dict(text="道可道"), ensure_ascii=False)
    raw.write_text(f"{good}\n\n{bad}\n{good}\n", "utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=r"raw.jsonl, line 3: .*--on_bad_line skip"):
        preprocess(raw, tmp_path / "out", TOKENIZER)
    report = preprocess(raw, tmp_path / "out", TOKENIZER, on_bad_line="skip")
    assert (report["counts"]["bad"], report["counts"]["kept"]) == (1, 2) and len(rows_of(tmp_path / "out")) == 2
    skipped = json.loads((tmp_path / "out/skipped.jsonl").read_text("utf-8"))
    assert skipped["line"] == 3 and skipped["file"].endswith("raw.jsonl")


def test_a_null_is_an_empty_document(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"text": null}\n{"text": "道"}\n', "utf-8")
    assert preprocess(tmp_path / "raw.jsonl", tmp_path / "out", TOKENIZER)["counts"]["empty"] == 1


def test_a_corpus_of_one_document(tmp_path):
    (tmp_path / "raw.txt").write_text("道", "utf-8")
    for name in ("mmap", "megatron"):
        report = preprocess(tmp_path / "raw.txt", tmp_path / name, TOKENIZER, format=name, append_eod=False)
        assert report["counts"]["tokens"] == 1
    assert IndexedDataset(tmp_path / "megatron").doc_idx.tolist() == [0, 1] and len(rows_of(tmp_path / "mmap")) == 1


@given(st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=6), st.integers(1, 9))
@settings(max_examples=30)
def test_duplicates_of_any_corpus_in_any_memory(tmp_path_factory, units, at_once):
    folder = tmp_path_factory.mktemp("hashes")
    files, marks = ([folder / f"{what}{k}.npy" for k in range(len(units))] for what in "hm")
    seen, wanted = set(), []
    for file, unit in zip(files, units):
        np.save(file, np.array([text_hash(str(n)) for n in unit], np.uint64))
        wanted.append([int(n in seen or seen.add(n) is not None) for n in unit])
    assert find_duplicates(files, marks, at_once) == sum(map(sum, wanted))
    assert [np.load(mark).tolist() for mark in marks] == wanted


def test_a_mixture_of_fields(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"title": "名", "a": "道"}\n{"b": "可", "a": null}\n{"b": "非"}\n', "utf-8")
    preprocess(tmp_path / "raw.jsonl", tmp_path / "out", TOKENIZER, field=["b", "a"])
    assert [spelled(row) for row in rows_of(tmp_path / "out")] == ["道|", "可|", "非|"]


def test_text_is_text(tmp_path):
    "What somebody wrote on a page ends no document."
    jsonl(tmp_path / "raw.jsonl", ["道<eos>可"])
    preprocess(tmp_path / "raw.jsonl", tmp_path / "out", TOKENIZER)
    (row,) = rows_of(tmp_path / "out")
    assert row.count(TOKENIZER.eos_token_id) == 1 and row[-1] == TOKENIZER.eos_token_id


@pytest.mark.parametrize("words, message", [
    (dict(format="megatrom"), "did you mean 'megatron'"), (dict(documents="lines"), "did you mean 'line'"), (dict(ids="gigatokens"), "did you mean 'gigatoken'"),
    (dict(eod="</s>"), "no such token"), (dict(min_chars=9, max_chars=3), "no document has this many"), (dict(engine="rat"), "did you mean 'ray'"),
    (dict(on_bad_line="ignore"), "one of error, skip"), (dict(data=[dict(text="道")]), "preprocessing reads files"), (dict(workers=0, unit_bytes=1), "a number from 1"),
])
def test_what_cannot_be_is_refused(tmp_path, words, message):
    jsonl(tmp_path / "raw.jsonl", ["道", "可"])
    with pytest.raises(ValueError, match=message):
        preprocess(words.pop("data", tmp_path / "raw.jsonl"), tmp_path / "out", TOKENIZER, **words)
    assert not (tmp_path / "out").exists()


def test_another_command_for_the_same_place_is_refused(tmp_path):
    raw = jsonl(tmp_path / "raw.jsonl", ["道"])
    preprocess(raw, tmp_path / "out", TOKENIZER)
    before = files_of(tmp_path / "out")
    for words in (dict(min_chars=2), dict(sentences=True), dict(eod="道")):
        with pytest.raises(ValueError, match="work of another command"):
            preprocess(raw, tmp_path / "out", TOKENIZER, **words)
    with pytest.raises(ValueError, match="tokenizer differs"):
        preprocess(raw, tmp_path / "out", tokenizer_of("可道"))
    jsonl(raw, ["道", "可"])
    with pytest.raises(ValueError, match="inputs differs"):
        preprocess(raw, tmp_path / "out", TOKENIZER)
    assert files_of(tmp_path / "out") == before


def test_a_command_that_failed_at_once_may_be_corrected(tmp_path):
    raw = jsonl(tmp_path / "raw.jsonl", ["道"])
    with pytest.raises(ValueError, match="none of the fields body"):
        preprocess(raw, tmp_path / "out", TOKENIZER, field="body")
    assert preprocess(raw, tmp_path / "out", TOKENIZER, field="text")["counts"]["kept"] == 1


def test_a_dataset_of_somebody_else_is_left_alone(tmp_path):
    raw = jsonl(tmp_path / "raw.jsonl", ["道"])
    with ShardWriter(tmp_path / "shards", 0, dict(input_ids="<u2")) as writer:
        writer.add(dict(input_ids=[1]), dict(input_ids=[1]))
    with pytest.raises(ValueError, match="there is a dataset already"):
        preprocess(raw, tmp_path / "shards", TOKENIZER)
    for name, kind in (("out/manifest.json", "mmap"), ("out.idx", "megatron")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match="there is a dataset already"):
            preprocess(raw, tmp_path / "out", TOKENIZER, format=kind)


def test_order_stays_and_errors_come_through():
    def slow(n):
        if n == 30:
            raise BadLine("thirty")
        return -n

    results = overlapped(slow, range(50), threads=3)
    assert [next(results) for _ in range(30)] == [(n, -n) for n in range(30)]
    with pytest.raises(BadLine, match="thirty"):
        next(results)


def test_gigatoken_gives_the_tokenizers_ids():
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    corpus = ["道可道，非常道。" * 9, "名可名 the name that can be named<eos>\n\n" * 5]
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(corpus, vocab_size=400, special_tokens=["<eos>"], show_progress=False)
    rules = rules_of(transformers.PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="<eos>"))
    fast = Tokeniser(rules, 0, engine="gigatoken")
    assert check_engine(fast, corpus) == 3
    for texts in (corpus, [""], ["", "道", ""]):
        assert all(np.array_equal(a, b) for a, b in zip(fast(texts), Tokeniser(rules, 0)(texts)))
    with pytest.raises(ValueError, match="gigatoken does not know this tokenizer.*WordLevel"):
        engine_of("gigatoken", rules_of(TOKENIZER))
