"""Megatron's files and order put to the test: bytes against a writer by hand, the order against the algorithm in plain Python, any damage, any split."""
import hashlib
import os
import pickle
import random
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fengshen.data.megatron_dataloader import (
    BlendableDataset,
    GPTDataset,
    IndexedDataset,
    IndexedDatasetBuilder,
    best_fitting_dtype,
    blend_steps,
    build_train_valid_test_datasets,
    infer_dataset_impl,
    parse_data_prefix,
    parse_split,
)
from fengshen.data.megatron_dataloader.blendable_dataset import blend
from fengshen.data.megatron_dataloader.format import CODES, header
from fengshen.data.megatron_dataloader.gpt_dataset import gather
from fengshen.data.megatron_dataloader.gpt_index import gpt_index, sample_index
from fengshen.data.megatron_dataloader.splits import core_cuts, original_cuts
from fengshen.data.reading import StoredWindows

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 127), max_size=6), min_size=1, max_size=4), max_size=6)
INTEGERS = [code for code, kind in CODES.items() if np.dtype(kind).kind != "f"]


def by_hand(documents, code=8, doc_idx=None, modes=b""):
    "(idx, bin) as the format says, one number at a time."
    kind = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "f", 8: "H"}[code]
    sequences = [sequence for document in documents for sequence in document]
    ends = [0]
    for document in documents:
        ends.append(ends[-1] + len(document))
    ends = ends if doc_idx is None else doc_idx
    at, pointers = 0, []
    for sequence in sequences:
        pointers.append(at)
        at += len(sequence) * struct.calcsize("<" + kind)
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(ends))
    idx += struct.pack(f"<{len(sequences)}i", *map(len, sequences)) + struct.pack(f"<{len(pointers)}q", *pointers) + struct.pack(f"<{len(ends)}q", *ends)
    return idx + modes, b"".join(struct.pack(f"<{len(s)}{kind}", *s) for s in sequences)


def put(folder, idx, data, name="p"):
    (folder / f"{name}.idx").write_bytes(idx)
    (folder / f"{name}.bin").write_bytes(data)
    return folder / name


def files(prefix):
    return tuple((prefix.parent / f"{prefix.name}.{kind}").read_bytes() for kind in ("idx", "bin"))


def corpus(folder, sizes, name="p", seed=0):
    "A corpus of one sequence a document."
    sizes = np.asarray(sizes)
    with IndexedDatasetBuilder(folder / name, np.uint16) as builder:
        builder.add_documents(np.random.default_rng(seed).integers(0, 50_000, sizes.sum()).astype(np.uint16), sizes)
    return IndexedDataset(folder / name)


def orders():
    return [path for path in (os.scandir(os.path.join(os.environ["FENGSHEN_CACHE"], "data"))) if path.is_dir()]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FENGSHEN_CACHE", str(tmp_path / "cache"))


# Files

@many
@given(DOCUMENTS, st.sampled_from(INTEGERS), st.integers(0, 3), st.data())
def test_every_way_of_writing_gives_the_same_bytes(tmp_path, documents, code, way, data):
    dtype = np.dtype(CODES[code])
    builder = IndexedDatasetBuilder(tmp_path / "p.bin", dtype)
    if way == 0:
        for document in documents:
            for sequence in document:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64))
            builder.end_document()
    elif way == 1:
        for document in documents:
            builder.add_document(np.array(sum(document, []), np.int64), [len(s) for s in document])
    elif way == 2:
        sequences = [s for document in documents for s in document]
        builder.add_documents(sum(sequences, []), [len(s) for s in sequences], [len(document) for document in documents])
    else:
        cut = data.draw(st.integers(0, len(documents)))
        for name, part in (("a", documents[:cut]), ("b", documents[cut:])):
            builder.add_index(put(tmp_path, *by_hand(part, code), name))
    builder.finalize(tmp_path / "p.idx")
    assert files(tmp_path / "p") == by_hand(documents, code)


@many
@given(DOCUMENTS, st.sampled_from(INTEGERS), st.data())
def test_reading_is_a_list(tmp_path, documents, code, data):
    ds = IndexedDataset(put(tmp_path, *by_hand(documents, code)))
    sequences = [s for document in documents for s in document]
    ds.verify()
    assert len(ds) == len(sequences) and [s.tolist() for s in ds] == sequences and ds.sizes.tolist() == list(map(len, sequences))
    assert infer_dataset_impl(tmp_path / "p") == "mmap" and infer_dataset_impl(tmp_path / "q") is None and ds.dtype == CODES[code]
    a, b = data.draw(st.integers(-30, 30)), data.draw(st.integers(-30, 30))
    assert [s.tolist() for s in ds[a:b]] == sequences[a:b]
    if sequences:
        i = data.draw(st.integers(-len(sequences), len(sequences) - 1))
        offset = data.draw(st.integers(0, len(sequences[i])))
        length = data.draw(st.integers(0, len(sequences[i]) - offset))
        assert ds.get(i, offset).tolist() == sequences[i][offset:] and ds.get(i, offset, length).tolist() == sequences[i][offset : offset + length]
        ids = data.draw(st.lists(st.integers(0, len(sequences) - 1), max_size=5))
        if code in (4, 8):  # a loop is compiled for each type
            assert ds.read(ids, copy=True).tolist() == sum((sequences[i] for i in ids), [])
    for i in (len(sequences), -len(sequences) - 1):
        with pytest.raises(IndexError):
            ds[i]
    with pytest.raises(TypeError):
        ds[1.5]


def legacy(sequences, doc_idx, code=4, width=4):
    starts = np.cumsum([0, *map(len, sequences)])
    head = struct.pack("<QQQQQQ", 1, code, width, len(sequences), len(sequences), len(doc_idx))
    numbers = [*range(len(sequences) + 1), *starts, *map(len, sequences), *doc_idx]
    return b"TNTIDX\x00\x00" + head + struct.pack(f"<{len(numbers)}q", *numbers)


def test_the_older_format(tmp_path):
    sequences = [[1, 2, 3], [], [4], [5, 6]]
    ds = IndexedDataset(put(tmp_path, legacy(sequences, [0, 2, 4]), np.array(sum(sequences, []), "<i4").tobytes()))
    ds.verify()
    assert [s.tolist() for s in ds] == sequences and ds.doc_idx.tolist() == [0, 2, 4] and ds.pointers.tolist() == [0, 12, 12, 16]
    assert ds.get(3, 1).tolist() == [6] and ds.read([3, 0]).tolist() == [5, 6, 1, 2, 3] and infer_dataset_impl(tmp_path / "p") == "cached"
    with IndexedDatasetBuilder(tmp_path / "new") as builder:
        builder.add_index(tmp_path / "p")
    assert files(tmp_path / "new") == by_hand([[[1, 2, 3], []], [[4], [5, 6]]], 4)
    whole = (tmp_path / "p.idx").read_bytes()
    for n in range(len(whole)):
        (tmp_path / "p.idx").write_bytes(whole[:n])
        with pytest.raises(ValueError):
            IndexedDataset(tmp_path / "p")


def test_floats_are_refused_unless_their_code_is_explained(tmp_path):
    for code, kind in ((6, "float64"), (7, "float32"), (7, "float64")):
        idx, data = by_hand([[[1.0, 2.5]]], 6 if kind == "float64" else 7)
        path = put(tmp_path, idx[:17] + bytes([code]) + idx[18:], data)
        with pytest.raises(ValueError, match="holds floats, which are no tokens"):
            IndexedDataset(path)
        assert IndexedDataset(path, float_code=kind)[0].tolist() == [1.0, 2.5]
        with pytest.raises(ValueError, match="wrong size in bytes|does not begin"):
            IndexedDataset(path, float_code="float32" if kind == "float64" else "float64")
        with pytest.raises(ValueError, match="whole numbers"):
            IndexedDataset(path, float_code=kind).tokens()


WHOLE = by_hand([[[1, 2, 3], [4, 5]], [[6]], [[], [7, 8, 9]]])
AT_SIZES, AT_POINTERS, AT_DOCUMENTS = 34, 34 + 20, 34 + 60


def changed(at, *values, kind="q"):
    "The index with numbers written over it."
    new = struct.pack(f"<{len(values)}{kind}", *values)
    return WHOLE[0][:at] + new + WHOLE[0][at + len(new) :], WHOLE[1]


@pytest.mark.parametrize("idx, data, words", [
    (b"", WHOLE[1], "p.idx is cut off: got '0 bytes', expected at least 34"),
    (WHOLE[0][:33], WHOLE[1], "p.idx is cut off"),
    (WHOLE[0][:-1], WHOLE[1], "p.idx has the wrong size in bytes"),
    (WHOLE[0] + b"x", WHOLE[1], "p.idx has the wrong size in bytes"),
    (WHOLE[0], WHOLE[1][:-1], "p.bin has the wrong size in bytes: got 17, expected 18"),
    (WHOLE[0], WHOLE[1] * 2, "p.bin has the wrong size in bytes: got 36, expected 18: 9 tokens of uint16; it is cut off, or belongs to another index"),
    (WHOLE[1] * 9, WHOLE[0], "p.idx is no Megatron index.*are .bin and .idx swapped"),
    (b"X" + WHOLE[0][1:], WHOLE[1], "is no Megatron index"),
    (*changed(9, 2), "is no Megatron index"),
    (*changed(17, 0, kind="B"), "unknown type of tokens: got 0"),
    (*changed(17, 9, kind="B"), "unknown type of tokens: got 9"),
    (*changed(17, 4, kind="B"), "p.bin has the wrong size in bytes|does not begin"),
    (*changed(18, 1 << 62), "p.idx has the wrong size in bytes"),
    (WHOLE[0] + bytes(5), WHOLE[1], "a mode for each sequence: got 'a multimodal dataset'"),
    (*changed(AT_DOCUMENTS, 1), "the document index"),
    (*changed(AT_DOCUMENTS + 24, 6), "the document index"),
    (*changed(AT_DOCUMENTS + 24, -1), "the document index"),
    (*changed(AT_POINTERS, 2), "where the first sequence begins"),
    (*changed(AT_POINTERS + 32, 14), "p.bin has the wrong size in bytes"),
])
def test_files_that_do_not_belong_together_are_refused(tmp_path, idx, data, words):
    path = put(tmp_path, idx, data)
    with pytest.raises(ValueError, match=words):
        IndexedDataset(path)


@pytest.mark.parametrize("idx, words, bad", [
    (changed(AT_POINTERS + 8, -2)[0], "sequence 1 does not begin where", 1),
    (changed(AT_POINTERS + 16, 1 << 40)[0], "sequence 2 does not begin where", 2),
    (changed(AT_POINTERS + 8, 10, 6)[0], "sequence 1 does not begin where", None),
    (changed(AT_SIZES + 4, -1, kind="i")[0], "sequence 1 does not begin where", 1),
    (changed(AT_SIZES, 4, 1, kind="i")[0], "sequence 1 does not begin where", None),
    (changed(AT_DOCUMENTS + 8, 3, 2)[0], "document 2 begins before the one before it: got 2", None),
])
def test_what_only_a_look_at_every_entry_finds(tmp_path, idx, words, bad):
    ds = IndexedDataset(put(tmp_path, idx, WHOLE[1]))
    for block in (1, 2, 1 << 20):
        with pytest.raises(ValueError, match=words):
            ds.verify(block)
    if bad is not None:
        with pytest.raises(ValueError, match=f"sequence {bad} is not inside"):
            ds[bad]
    with pytest.raises(ValueError, match=words):
        GPTDataset(ds, 2)


@many
@given(st.integers(0, len(WHOLE[0]) - 1), st.integers(0, 255))
def test_no_changed_byte_of_an_index_reads_outside_the_file(tmp_path, at, value):
    idx = WHOLE[0][:at] + bytes([value]) + WHOLE[0][at + 1 :]
    path = put(tmp_path, idx, WHOLE[1])
    try:
        ds = IndexedDataset(path)
        ds.verify()
        read = [s.tolist() for s in ds]
    except ValueError:
        return
    assert read == [[1, 2, 3], [4, 5], [6], [], [7, 8, 9]]


def test_documents_that_a_merge_forgot(tmp_path, capsys):
    ds = IndexedDataset(put(tmp_path, *by_hand([[[1], [2]], [[3]]], doc_idx=[0, 2])))
    assert "1 of 3 sequences are in no document" in capsys.readouterr().out and [s.tolist() for s in ds] == [[1], [2], [3]]


def test_missing_files_are_named(tmp_path):
    path = put(tmp_path, *WHOLE)
    with pytest.raises(ValueError, match="without .bin and .idx"):
        IndexedDataset(f"{path}.idx")
    (tmp_path / "p.bin").unlink()
    with pytest.raises(ValueError, match="no such file: got '.*p.bin'"):
        IndexedDataset(path)


def test_a_dataset_travels_as_its_path(tmp_path):
    ds = corpus(tmp_path, [5] * 1000)
    ds[3], ds.tokens().read([0], [9])
    sent = pickle.dumps((ds, GPTDataset(ds, 16)))
    again, gpt = pickle.loads(sent)
    assert len(sent) < 2000 and again.fingerprint == ds.fingerprint and (again[3] == ds[3]).all() and len(gpt.__getitems__([0, 1])) == 2
    ds.set_doc_idx(ds.get_doc_idx()[:11])
    assert len(ds.doc_idx) == 11 and len(ds) == 1000


def test_a_fingerprint_is_of_the_content(tmp_path):
    one, two, three = (corpus(tmp_path, [50] * 9000, name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert one.fingerprint == two.fingerprint != three.fingerprint


# Writing

def test_what_does_not_fit_is_refused(tmp_path):
    for dtype, ids, words in ((np.uint16, [65_536], "got 65536, expected 0 to 65535"), (np.int32, [-(1 << 31) - 1], "does not fit into int32"),
                              (np.uint8, [-1], "got -1"), (np.int32, [0.5], "whole numbers"), (np.int32, ["字"], "whole numbers")):
        with pytest.raises(ValueError, match=words):
            with IndexedDatasetBuilder(tmp_path / "p", dtype) as builder:
                builder.add_item(ids)
    with pytest.raises(ValueError, match="no such type in a Megatron file: got 'uint32'"):
        IndexedDatasetBuilder(tmp_path / "p", np.uint32)
    with pytest.raises(ValueError, match="is of another type: got 'uint16', expected 'int64'|int64"):
        corpus(tmp_path, [1], "q")
        with IndexedDatasetBuilder(tmp_path / "p", np.int64) as builder:
            builder.add_index(tmp_path / "q")
    for lengths, counts in (([2], None), ([4, -1], None), ([3], [2]), ([1, 2], [3, -1])):
        with pytest.raises(ValueError, match="lengths of the sequences|sequences of the documents"):
            with IndexedDatasetBuilder(tmp_path / "p") as builder:
                builder.add_documents([1, 2, 3], lengths, counts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.bin", "q.idx"]


def test_an_older_dataset_is_replaced_as_a_whole(tmp_path):
    corpus(tmp_path, [3] * 10)
    before = files(tmp_path / "p")
    with pytest.raises(ZeroDivisionError):
        with IndexedDatasetBuilder(tmp_path / "p") as builder:
            builder.add_item([1])
            1 / 0
    assert files(tmp_path / "p") == before
    with IndexedDatasetBuilder(tmp_path / "p") as builder:
        builder.add_item([1])
        builder.end_document()
    assert len(IndexedDataset(tmp_path / "p")) == 1


def test_a_million_documents_and_none(tmp_path):
    sizes = np.arange(1_000_000) % 7
    ds = corpus(tmp_path, sizes)
    ds.verify()
    assert len(GPTDataset(ds, 128)) == (sizes.sum() - 1) // 128
    assert len(ds[999_999]) == sizes[-1] and len(ds.doc_idx) == 1_000_001
    empty = IndexedDataset(put(tmp_path, *by_hand([]), "none"))
    assert len(empty) == 0 and empty[:] == [] and len(empty.tokens()) == 0
    empty.verify()
    for dataset in (empty, corpus(tmp_path, [0, 0], "hollow")):
        with pytest.raises(ValueError, match="at least one"):
            GPTDataset(dataset, 4)


def test_two_terabytes(tmp_path):
    "A file with holes: what is opened is a thousand documents of a billion tokens."
    sizes = np.full(1000, 1_000_000_000, "<i4")
    ends = np.cumsum(sizes, dtype="<i8")
    parts = header("<u2", 1000, 1001), sizes.tobytes(), ((ends - sizes) * 2).tobytes(), np.arange(1001, dtype="<i8").tobytes()
    path = put(tmp_path, b"".join(parts), b"")
    with open(f"{path}.bin", "r+b") as file:
        try:
            file.truncate(2_000_000_000_000)
        except OSError:
            pytest.skip("the file system has no room for a name of 2 TB")
        file.seek(1_999_999_999_998)
        file.write(b"\x07\x00")
    ds = IndexedDataset(path)
    windows = StoredWindows(ds.tokens(), 1024, ds.fingerprint)
    assert windows.tokens.read([10**12 - 1], [1]).tolist() == [7] and ds[-1][-1] == 7 and len(windows) == 976_562_499
    assert windows.__getitems__([0, 500_000_000, len(windows) - 1]).sum() == 0


def test_types_by_vocabulary():
    assert [best_fitting_dtype(n) for n in (None, 0, 65_499, 65_500, 200_000)] == [np.int32, np.uint16, np.uint16, np.int32, np.int32]


# Megatron's order

def megatron(sizes, first, stop, length, samples, seed, drop_last, extra):
    "The algorithm, in plain Python over lists: (documents, rows, shuffle)."
    tokens, epochs = sum(sizes[first:stop]), 1
    while samples is not None and epochs * tokens < samples * length + extra:
        epochs += 1
    before, apart = ((epochs - 1) * tokens - extra) // length, False
    if epochs > 1:
        apart = samples - before < int(0.8 * ((tokens - extra) // length))
    rng, documents = np.random.RandomState(seed), []
    for times in (epochs - 1, 1) if apart else (epochs,):
        part = np.array(list(range(first, stop)) * times)
        rng.shuffle(part)
        documents += part.tolist()
    count = (epochs * tokens - extra) // length if drop_last else -(-(epochs * tokens - extra) // length)
    rows, place, offset = [(0, 0)], 0, 0
    while len(rows) <= count:
        left = length + extra
        while left:
            here = sizes[documents[place]] - offset
            left -= here
            if left <= 0:
                offset, left = offset + left + here - extra, 0
            elif place == len(documents) - 1:
                offset, left = sizes[documents[place]] - extra, 0
            else:
                place, offset = place + 1, 0
        rows.append((place, offset))
    shuffle = []
    for low, high in ((0, before), (before, count)) if apart else ((0, count),):
        part = np.arange(low, high)
        rng.shuffle(part)
        shuffle += part.tolist()
    return documents, rows, shuffle


SETTINGS = st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=25), st.integers(1, 20), st.none() | st.integers(1, 60), st.integers(0, 2**32 - 1),
                     st.booleans(), st.integers(0, 1), st.data())


def part_of(sizes, data):
    first = data.draw(st.integers(0, len(sizes) - 1))
    return first, data.draw(st.integers(first + 1, len(sizes)))


@settings(max_examples=200, deadline=None)
@given(SETTINGS)
def test_the_order_is_megatrons(asked):
    sizes, length, samples, seed, drop_last, extra, data = asked
    first, stop = part_of(sizes, data)
    tokens = sum(sizes[first:stop])
    if tokens == 0 or (samples is None and tokens < length + extra and (drop_last or tokens <= extra)):
        with pytest.raises(ValueError, match="at least"):
            gpt_index(np.array(sizes, np.int32), first, stop, length, samples, seed, drop_last, extra)
        return
    index = gpt_index(np.array(sizes, np.int32), first, stop, length, samples, seed, drop_last, extra)
    documents, rows, shuffle = megatron(sizes, first, stop, length, samples, seed, drop_last, extra)
    assert index["document_index"].tolist() == documents and index["shuffle_index"].tolist() == shuffle
    assert index["sample_index"].tolist() == [list(row) for row in rows]
    assert [index[f"{name}_index"].dtype for name in ("document", "sample", "shuffle")] == [np.int32, np.int32, np.uint32]


@settings(max_examples=100, deadline=None)
@given(SETTINGS, st.sampled_from(["<u2", "<i4"]))
def test_three_ways_of_cutting_and_copying_are_one(asked, dtype):
    sizes, length, samples, seed, drop_last, extra, data = asked
    first, stop = part_of(sizes, data)
    sizes = np.array(sizes, np.int32)
    if sizes[first:stop].sum() < length + extra:
        return
    index = gpt_index(sizes, first, stop, length, samples, seed, drop_last, extra)
    rows, documents, shuffle = index["sample_index"], index["document_index"], index["shuffle_index"]
    for form in (sample_index.loop, sample_index.plain):
        for kind in (np.int32, np.int64):
            other = np.full(rows.shape, -7, kind)
            form(sizes, documents, length, extra, other)
            assert other.tolist() == rows.tolist()
    flat, pointers = np.arange(sizes.sum()).astype(dtype), (np.cumsum(sizes) - sizes).astype(np.int64) * 2
    stream = [int(token) for k in documents for token in flat[pointers[k] // 2 : pointers[k] // 2 + sizes[k]]]
    ids = np.array(data.draw(st.lists(st.integers(0, len(shuffle) - 1), max_size=8)), np.int64)
    wanted = [(stream[shuffle[i] * length : shuffle[i] * length + length + extra] + [7] * (length + extra))[: length + extra] for i in ids]
    for form in (gather, gather.loop, gather.plain):
        out = np.full((len(ids), length + extra), -1, np.int64)
        assert form(flat, pointers, 2, sizes, documents, rows, shuffle, ids, 7, out) >= 0
        assert out.tolist() == wanted
        assert form(flat[:0], pointers, 2, sizes, documents, rows, shuffle, np.arange(len(shuffle)), 7, np.empty((len(shuffle), length + extra), np.int64)) < 0


GOLDEN = [  # documents, length, samples, seed, drop_last, extra, samples there are, SHA-256 of types and arrays: recorded from megatron-core 0.16.0
    (1000, 64, None, 1234, True, 1, 750, "25f72e0f9f65d307"),
    (1000, 64, 900, 7, True, 1, 1500, "ef23cdb06e565845"),
    (1000, 64, 2000, 7, True, 1, 2250, "dcddb50918a39a08"),
    (50, 512, 3, 0, True, 1, 4, "7bea69fbe15fac74"),
    (1000, 33, None, 5, False, 0, 1456, "40d8a10086541971"),
    (1000, 33, 1500, 5, False, 1, 2911, "0f302b742e67bf6a"),
]


@pytest.mark.parametrize("count, length, samples, seed, drop_last, extra, there, wanted", GOLDEN)
def test_recorded_orders(tmp_path, count, length, samples, seed, drop_last, extra, there, wanted):
    ds = GPTDataset(corpus(tmp_path, np.arange(count) * 7919 % 97), length, samples, seed, None, drop_last, 0, extra)
    hash = hashlib.sha256()
    for array in (ds.document_index, ds.sample_index, ds.shuffle_index):
        hash.update(str(array.dtype).encode() + array.tobytes())
    assert (len(ds), hash.hexdigest()[:16]) == (there, wanted)


def test_recorded_bytes(tmp_path):
    sizes = np.arange(1000) * 7919 % 97
    with IndexedDatasetBuilder(tmp_path / "p", np.uint16) as builder:
        builder.add_documents(np.arange(sizes.sum()) % 50_000, sizes)
    idx, data = files(tmp_path / "p")
    assert hashlib.sha256(data + idx).hexdigest()[:16] == "48377e36d77a3bbb"


def test_streams_longer_than_32_bits():
    sizes, documents = np.array([2_000_000_000] * 7, np.int32), np.arange(7, dtype=np.int32)
    count, rows = (14_000_000_000 - 1) // 1_000_000, []
    for form in (sample_index, sample_index.plain):
        rows.append(np.empty((count + 1, 2), np.int64))
        form(sizes, documents, 1_000_000, 1, rows[-1])
    assert (rows[0] == rows[1]).all() and rows[0][-1].tolist() == [6, 1_999_000_000]


def test_documents_of_several_sequences(tmp_path, capsys):
    GPTDataset(IndexedDataset(put(tmp_path, *by_hand([[[1, 2, 3], [4, 5, 6]]]))), 2)
    assert "a document is several sequences" in capsys.readouterr().out
    GPTDataset(corpus(tmp_path, [3, 3]), 2)
    assert capsys.readouterr().out == ""


def test_samples_of_a_dataset(tmp_path):
    ds = corpus(tmp_path, [0, 7, 3, 0, 11, 1, 26])
    gpt = GPTDataset(ds, 5, samples=25, seed=3)
    stream = [token for k in gpt.document_index for token in ds[k].tolist()]
    batch = gpt.__getitems__(range(len(gpt)), copy=True)
    assert batch.tolist() == [stream[5 * row : 5 * row + 6] for row in gpt.shuffle_index.tolist()]
    assert gpt[-1].tolist() == batch[-1].tolist() and gpt[np.int64(0)].tolist() == batch[0].tolist()
    for ids in ([-1], [len(gpt)], [0, 1 << 40]):
        with pytest.raises(IndexError, match="sample"):
            gpt.__getitems__(ids)
    for i in (len(gpt), -len(gpt) - 1):
        with pytest.raises(IndexError):
            gpt[i]
    assert len(gpt.__getitems__([])) == 0
    stored = StoredWindows(ds.tokens(), 5)
    assert torch.cat([row[:-1] for row in stored.__getitems__(range(len(stored)))]).tolist() == ds.flat().tolist()[: 5 * len(stored)]
    with pytest.raises(ValueError, match="the part of the dataset"):
        GPTDataset(ds, 5, part=(3, 3))
    with pytest.raises(ValueError, match="the documents are shorter than one sample: got '48 tokens', expected at least 50"):
        GPTDataset(ds, 49)
    with pytest.raises(ValueError, match="needs a token to fill it up"):
        GPTDataset(ds, 5, drop_last=False)


def test_without_numba(cache, tmp_path, monkeypatch):
    ds = corpus(tmp_path, np.arange(300) * 7919 % 23)
    with_it = GPTDataset(ds, 16, samples=500)
    monkeypatch.setenv("FENGSHEN_CACHE", str(tmp_path / "other"))
    for loop in (sample_index, gather, blend):
        monkeypatch.setattr(loop, "run", loop.plain)
    without = GPTDataset(ds, 16, samples=500)
    ids = range(len(without))
    assert len(orders()) == 1 and (without.sample_index == with_it.sample_index).all()
    mixed = BlendableDataset([without, with_it], [2, 1])
    batches = [dataset.__getitems__(ids, copy=True) for dataset in (without, mixed)]
    monkeypatch.undo()
    assert batches[0].equal(with_it.__getitems__(ids)) and batches[1].equal(BlendableDataset([with_it, with_it], [2, 1]).__getitems__(ids))


# Blends

WEIGHTS = st.lists(st.floats(0, 1e3) | st.just(0.0), min_size=1, max_size=6).filter(lambda weights: sum(weights) > 1e-3)


@settings(max_examples=150, deadline=None)
@given(WEIGHTS, st.integers(0, 300), st.data())
def test_a_blend_may_be_cut_anywhere(weights, count, data):
    corpora, samples, used = blend_steps(weights, [0] * len(weights), 0, count)
    cut = data.draw(st.integers(0, count))
    one, first, middle = blend_steps(weights, [0] * len(weights), 0, cut)
    two, second, last = blend_steps(weights, middle, cut, count - cut)
    assert [*one, *two] == corpora.tolist() and [*first, *second] == samples.tolist() and last.tolist() == used.tolist()
    share, counts = np.array(weights) / np.sum(weights), np.zeros(len(weights), int)
    for t, (k, sample) in enumerate(zip(corpora, samples), 1):
        assert sample == counts[k] and weights[k] > 0
        counts[k] += 1
        assert (counts - share * t < 1 + 1e-9).all() and (share * t - counts < max(len(weights) - 1, 1) + 1e-9).all()
    results = []
    for form in (blend.loop, blend.plain):
        state, a, b = np.zeros(len(weights), np.int64), np.empty(count, np.int16), np.empty(count, np.int64)
        form(np.where(share > 0, share, -np.inf), state, 0, a, b)
        results.append((a.tolist(), b.tolist(), state.tolist()))
    assert results == [(corpora.tolist(), samples.tolist(), used.tolist())] * 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), st.integers(0, 40)), min_size=1, max_size=6))
def test_other_weights_lose_nothing_and_repeat_nothing(changes):
    reached, seen = np.zeros(3, np.int64), [[], [], []]
    for weights, count in changes:
        corpora, samples, used = blend_steps(weights, [0, 0, 0], 0, count)
        for k, sample in zip(corpora, reached[corpora] + samples):
            seen[k].append(int(sample))
        reached = reached + used
    assert seen == [list(range(n)) for n in reached]


def test_a_recorded_blend():
    corpora, samples, _ = blend_steps([5, 3, 2, 0.5], [0] * 4, 0, 100_000)
    assert hashlib.sha256(corpora.tobytes() + samples.tobytes()).hexdigest()[:16] == "fa4612b93d4668f2"


@pytest.mark.parametrize("weights, used, first", [([], [], 0), ([0, 0], [0, 0], 0), ([1, -1], [0, 0], 0), ([1, float("nan")], [0, 0], 0),
                                                  ([1, 1], [0], 0), ([1, 1], [1, 1], 3), ([1, 1], [-1, 1], 0)])
def test_blends_that_mean_nothing_are_refused(weights, used, first):
    with pytest.raises(ValueError, match="the weights of the corpora|the state of a blend"):
        blend_steps(weights, used, first, 3)


def test_a_small_corpus_begins_anew(tmp_path):
    big, small = GPTDataset(corpus(tmp_path, [9] * 90, "big"), 8), GPTDataset(corpus(tmp_path, [9] * 3, "small", 1), 8)
    blended = BlendableDataset([big, small], [1, 1], 60)
    batch = blended.__getitems__(range(60), copy=True)
    assert [row.tolist() for row in batch] == [blended[i].tolist() for i in range(60)]
    assert [row.tolist() for row in batch[1::2]] == [small[i % 3].tolist() for i in range(30)] and blended.rounds[1] == 10
    order = random.Random(0).sample(range(60), 60)
    assert blended.__getitems__(order).tolist() == batch[order].tolist()
    assert blended.fingerprint != BlendableDataset([big, small], [1, 2], 60).fingerprint


# Splits and paths

def reference_cuts(split, count):
    "The original's arithmetic."
    parts = [float(part) for part in split.replace("/", ",").split(",")]
    parts = [part / sum(parts) for part in (parts + [0.0, 0.0])[:3]]
    cuts = [0]
    for part in parts:
        cuts.append(cuts[-1] + int(round(part * float(count))))
    return [0, *(cut - (cuts[-1] - count) for cut in cuts[1:])]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any), st.integers(0, 10**7), st.sampled_from(",/"))
def test_splits(parts, count, mark):
    split = mark.join(map(str, parts))
    one, two = core_cuts(split, count), original_cuts(split, count)
    assert two == reference_cuts(split, count) and two[-1] == one[-1] == count
    assert one[0] == 0 and all(a <= b for a, b in zip(one, one[1:])) and sum(abs(a - b) for a, b in zip(one, two)) <= 4


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "0,0,0", "-1,2", "1;2", None, "1,,2", "nan"])
def test_no_split(split):
    with pytest.raises(ValueError, match="the split"):
        parse_split(split)


@pytest.mark.parametrize("given, paths, weights", [
    ("a", ["a"], None), (["a"], ["a"], None), ([1, "a"], ["a"], [1.0]), (["0.5", "a", "1.5", "b"], ["a", "b"], [0.25, 0.75]), (["a", "b"], ["a", "b"], None),
    (["1e-3", "a"], ["a"], [1.0]), (["a", "b", "c"], ["a", "b", "c"], None)])
def test_data_paths(given, paths, weights):
    assert parse_data_prefix(given) == (paths, weights)


@pytest.mark.parametrize("given", [[], [1], ["a", 1], [1, "a", "b"], [1, 2, "a", "b"], ["0", "a"]])
def test_no_data_path(given):
    with pytest.raises(ValueError, match="the data path|the weights"):
        parse_data_prefix(given)


def test_training_validation_and_test_share_nothing(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for number, path in enumerate(paths):
        with IndexedDatasetBuilder(path, np.int32) as builder:
            builder.add_documents(np.arange(4000) + 10_000 * number, [8] * 500)
    parts = build_train_valid_test_datasets([3, paths[0], 1, paths[1]], "8,1,1", (200, 40, 40), 16)
    shown = [set(part.__getitems__(range(len(part))).flatten().tolist()) for part in parts]
    assert [len(part) for part in parts] == [200, 40, 40] and not (shown[0] & shown[1] or shown[0] & shown[2] or shown[1] & shown[2])
    whole = build_train_valid_test_datasets(paths, "1", (None, None, None), 16)
    assert whole[1:] == [None, None] and sorted(whole[0].place(np.arange(len(whole[0])))[1].tolist()) == sorted([*range(249)] * 2)
    one = build_train_valid_test_datasets(paths[0], "9/1", (None, 3, None), 16)
    assert isinstance(one[0], GPTDataset) and len(one[1]) == 24 and one[2] is None


# The cache of orders

def test_an_order_is_kept_by_content_and_settings(cache, tmp_path):
    ds = corpus(tmp_path, [5] * 100)
    first = GPTDataset(ds, 8)
    (tmp_path / "elsewhere").mkdir()
    GPTDataset(corpus(tmp_path / "elsewhere", [5] * 100, seed=9), 8)  # the order depends on sizes, not on tokens
    assert len(orders()) == 1
    for other in (dict(seed=1), dict(samples=90), dict(part=(0, 99)), dict(drop_last=False, pad_id=0), dict(extra=0)):
        GPTDataset(ds, 8, **other)
    assert len(orders()) == 6
    GPTDataset(corpus(tmp_path, [5] * 99 + [6]), 8)
    assert len(orders()) == 7 and sorted(p.name for p in tmp_path.iterdir()) == ["cache", "elsewhere", "p.bin", "p.idx"]
    assert not first.shuffle_index.flags.writeable


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x" * len(data), None])
def test_a_damaged_order_is_built_again(cache, tmp_path, damage):
    ds = corpus(tmp_path, [5] * 100)
    wanted = GPTDataset(ds, 8).sample_index.tolist()
    (folder,) = orders()
    for name in ("sample_index.npy", "made_of.json"):
        path = os.path.join(folder.path, name)
        data = open(path, "rb").read()
        os.unlink(path)
        if damage:
            open(path, "wb").write(damage(data))
        assert GPTDataset(ds, 8).sample_index.tolist() == wanted
