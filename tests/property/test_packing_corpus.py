"Packing a corpus: every token in exactly one piece, no row over capacity, the same rows for the same lengths, batches that say what they hold."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.data import packing
from fengshen.data.packing import CorpusRows, PackedCorpus, pack, pack_rows
from fengshen.data.reading import Shards

settings.register_profile("house", deadline=None)
settings.load_profile("house")
corpora = st.tuples(st.lists(st.integers(0, 70), max_size=60), st.integers(2, 20))
overflows = st.sampled_from(["split", "truncate", "drop"])


def covered(rows):
    "{document: sorted (start, end)} of all pieces."
    found = {}
    for row in rows:
        for document, start, length in row.tolist():
            found.setdefault(document, []).append((start, start + length))
    return {document: sorted(parts) for document, parts in found.items()}


def expected(length, capacity, overflow):
    "The pieces of one document, as the words say it."
    if overflow == "drop" and length > capacity:
        return []
    length = min(length, capacity) if overflow == "truncate" else length
    return [(a, min(a + capacity, length)) for a in range(0, length, capacity)]


@given(corpora, overflows, st.sampled_from([1, 3, 7, 1000]))
@settings(max_examples=300)
def test_every_token_in_exactly_one_piece_whatever_the_block(case, overflow, block):
    lengths, capacity = case
    old, packing.BLOCK = packing.BLOCK, block
    try:
        rows = CorpusRows(np.array(lengths, np.int32), capacity, overflow)
    finally:
        packing.BLOCK = old
    wanted = {i: expected(n, capacity, overflow) for i, n in enumerate(lengths)}
    assert covered(rows) == {i: parts for i, parts in wanted.items() if parts}
    sizes = [row[:, 2].sum() for row in rows]
    assert all(0 < n <= capacity for n in sizes) and sum(sizes) == rows.tokens == sum(b - a for parts in wanted.values() for a, b in parts)
    assert rows.lost == sum(lengths) - rows.tokens and rows.cut == sum(n > capacity for n in lengths)


@given(corpora)
def test_short_documents_are_packed_as_without_a_corpus(case):
    lengths, capacity = [n for n in case[0] if 0 < n < case[1]], case[1]
    rows = CorpusRows(np.array(lengths, np.int64), capacity)
    assert [row[:, 0].tolist() for row in rows] == [row.tolist() for row in pack(lengths, capacity)]


@given(corpora.filter(lambda case: sum(case[0])), overflows, st.integers(1, 5), st.data())
@settings(max_examples=150)
def test_batches_are_those_of_pack_rows(tmp_path_factory, case, overflow, shards, data):
    lengths, capacity = np.array(case[0]), case[1]
    tokens = np.random.RandomState(0).randint(1, 50, lengths.sum()).astype("<u4")
    cuts = np.sort(data.draw(st.lists(st.integers(0, len(tokens)), min_size=shards - 1, max_size=shards - 1)))
    corpus = PackedCorpus(Corpus(tmp_path_factory.mktemp("c"), tokens, lengths, np.split(tokens, np.array(cuts, int))), capacity, overflow, pad_id=3)
    if not len(corpus):
        return
    rows = data.draw(st.lists(st.integers(0, len(corpus) - 1), min_size=1, max_size=6))
    batch = corpus.__getitems__(rows)
    ends = np.cumsum(lengths)
    pieces = [[tokens[ends[d] - lengths[d] + s :][:n].astype(np.int64) for d, s, n in corpus.rows[r]] for r in rows]
    slow = pack_rows([[dict(input_ids=p, labels=p) for p in row] for row in pieces], capacity, 3)
    assert batch.keys() == slow.keys()
    assert all(torch.equal(batch[k], v) if torch.is_tensor(v) else batch[k] == v for k, v in slow.items())


class Corpus:
    "Documents in several files."

    fingerprint = "corpus"

    def __init__(self, folder, tokens, lengths, parts):
        self.lengths, self.starts = lengths, np.cumsum(lengths) - lengths
        for k, part in enumerate(parts):
            part.tofile(folder / str(k))
        self.shards = Shards([folder / str(k) for k in range(len(parts))], "<u4", [len(p) for p in parts])

    def __len__(self):
        return len(self.lengths)

    def spans(self, documents):
        return self.starts[documents], self.lengths[documents]

    def tokens(self):
        return self.shards


@pytest.mark.parametrize("overflow", ["split", "truncate", "drop", "error"])
def test_a_negative_length_is_refused_by_number(overflow, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 2)
    with pytest.raises(ValueError, match="the first is number 3: its length: got -1"):
        CorpusRows(np.array([1, 0, 2, -1]), 8, overflow)


def test_a_long_document_is_refused_unless_told_and_a_wrong_word_is_named():
    with pytest.raises(ValueError, match="number 1: its length: got 9, expected 0 to 8"):
        CorpusRows(np.array([1, 9]), 8)
    with pytest.raises(ValueError, match="did you mean 'split'"):
        CorpusRows(np.array([1, 9]), 8, "spilt")


def test_lengths_that_no_32_bit_number_holds():
    long, capacity = 5_000_000_000, 1 << 14
    rows = CorpusRows(np.array([long, 3]), capacity, "split")
    assert rows[0].tolist() == [[0, long - long % capacity, long % capacity], [1, 0, 3]]
    assert rows[-1].tolist() == [[0, long - long % capacity - capacity, capacity]]


def test_a_million_documents_of_a_corpus_keep_eight_bytes_each():
    import time

    lengths = np.maximum(1, np.random.RandomState(1).lognormal(np.log(400) - 0.5, 1, 1_000_000)).astype(np.int32)
    start = time.process_time()
    rows = CorpusRows(lengths, 2048, "split")
    assert time.process_time() - start < 3  # 0.2 s on an idle machine
    assert rows.fill > 0.999 and sum(part.nbytes for part in (rows.order, rows.bounds, rows.long, rows.ends)) < 8 * len(lengths)
    documents, starts, sizes, counts = rows.pieces(np.arange(len(rows)))
    assert np.bincount(documents, sizes, len(lengths)).astype(np.int64).tolist() == lengths.tolist()
    assert np.add.reduceat(sizes, np.cumsum(counts) - counts).max() <= 2048
