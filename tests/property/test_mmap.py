"Memory-mapped datasets: any rows come back, from any format, in any batch; shards written by several processes; what is damaged is refused or found."
import json
import multiprocessing
import os
import pickle
import shutil
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fengshen.data.mmap_dataloader import (
    MMapDataModule,
    MMapIndexDataset,
    ShardWriter,
    choose_dtype,
    convert,
    finished,
    mmap_convert,
    publish,
    verify,
    write_mmap,
)
from fengshen.data.mmap_dataloader.mmap_format import shard_name
from fengshen.data.mmap_dataloader.mmap_index_dataset import find_spans
from fengshen.data.mmap_dataloader.mmap_legacy import write_original
from fengshen.data.mmap_dataloader.mmap_writer import write_shards
from fengshen.data.reading import copy_runs

QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
IDS = st.integers(0, 70_000)
ROWS = st.lists(st.lists(IDS, max_size=9), max_size=30)


def lists(ds, name="input_ids"):
    return [row[name].tolist() for row in ds]


@pytest.fixture
def fresh(tmp_path):
    "A function that gives a path where nothing is."
    count = iter(range(10**6))
    return lambda: tmp_path / f"d{next(count)}"


# ---- round trips

@QUICK
@given(rows=ROWS, shard=st.integers(1, 60), given_schema=st.booleans(), pieces=st.lists(st.integers(0, 30), max_size=3))
def test_any_rows_come_back(fresh, rows, shard, given_schema, pieces):
    "However they are cut into shards and appended to, as rows, as a batch, as flat tokens; verified."
    path, cuts = fresh(), sorted({0, *(min(p, len(rows)) for p in pieces), len(rows)})
    known = dict(schema=dict(input_ids="<u4")) if given_schema else dict(vocab_size=70_001)
    for a, b in zip(cuts, cuts[1:]) if len(cuts) > 1 else [(0, 0)]:
        write_mmap(path, rows[a:b], **known, shard_values=shard, append=a > 0)
    ds = MMapIndexDataset(path)
    assert len(ds) == len(rows) and lists(ds) == rows
    assert ds.tokens().read([0], [len(ds.tokens())]).tolist() == sum(rows, [])
    assert verify(path, progress=False) and verify(path, progress=False).leftovers == []
    if rows:
        ids = np.random.default_rng(len(rows)).integers(-len(rows), len(rows), 40)
        for copy in (True, False):
            assert lists(ds.__getitems__(ids, copy)) == [rows[i] for i in ids]


@QUICK
@given(rows=st.lists(st.tuples(st.lists(st.integers(0, 60_000), max_size=6), st.lists(st.integers(-100, 90), max_size=4), st.tuples(st.integers(), st.integers()).map(
    lambda pair: [abs(x) % 2**40 for x in pair])), min_size=1, max_size=12))
def test_columns_of_every_kind(fresh, rows):
    "Ragged ones, one that shares an index, two values a row; through all formats and back."
    path = fresh()
    schema = dict(input_ids="<u2", scored=["|u1", "input_ids"], label_ids="<i4", line=["<i8", 2])
    rows = [dict(input_ids=ids, scored=[i % 2 for i in ids], label_ids=labels, line=line) for ids, labels, line in rows]
    write_mmap(path, rows, schema, shard_values=8)
    ds = MMapIndexDataset(path, list(schema))
    assert [{name: v.tolist() for name, v in row.items()} for row in ds] == rows
    assert [{name: v.tolist() for name, v in row.items()} for row in ds.__getitems__(range(len(rows)))] == rows
    ragged = ["input_ids", "scored", "label_ids"]
    old, new = fresh(), fresh()
    convert(path, old, "original", ragged, progress=False)
    convert(old, new, names=ragged, progress=False)
    for place in (old, new):
        assert [{name: v.tolist() for name, v in row.items()} for row in MMapIndexDataset(place, ragged)] == [{name: row[name] for name in ragged} for row in rows]
    convert(path, fresh(), progress=False)


def test_a_conversion_that_was_cut_off_goes_on(fresh, monkeypatch):
    source, straight, path = fresh(), fresh(), fresh()
    rows = [[i] * (i % 7) for i in range(500)]
    write_mmap(source, rows, dict(input_ids="<u4"))
    monkeypatch.setattr(mmap_convert, "ranges", partial(mmap_convert.ranges, values=20, block=64))
    monkeypatch.setattr(mmap_convert, "write_shards", lambda folder, parts, schema, number, _: write_shards(folder, parts, schema, number, 300))
    convert(source, straight, progress=False)
    read = MMapIndexDataset.__getitems__
    with monkeypatch.context() as patch:
        patch.setattr(MMapIndexDataset, "__getitems__", lambda self, ids, copy=True: read(self, ids) if ids[0] < 300 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(source, path, progress=False)
    assert 0 < sum(record["rows"] for record in finished(path).values()) < 500
    convert(source, path, progress=False)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in straight.iterdir()}
    assert lists(MMapIndexDataset(path)) == rows and len(finished(path)) > 2


@QUICK
@given(rows=ROWS)
def test_through_megatrons_files(fresh, rows):
    first, files, second = fresh(), fresh(), fresh()
    write_mmap(first, rows)
    convert(first, files, "megatron", progress=False)
    convert(files, second, progress=False)
    assert lists(MMapIndexDataset(second)) == rows and verify(files)


@QUICK
@given(pairs=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted), min_size=1, max_size=10))
def test_the_originals_rows_may_overlap_and_leave_gaps(fresh, pairs):
    path, values = fresh(), np.arange(100, 100 + max(b for _, b in pairs), dtype="<i8")
    np.save(f"{path}_input_ids.npy", np.array(pairs, "<i8"))
    values.tofile(f"{path}_input_ids.bin")
    want = [values[a:b].tolist() for a, b in pairs]
    for source in (path, f"{path}_input_ids"):
        ds = MMapIndexDataset([source, str(source)])
        assert lists(ds) == want * 2 and lists(ds.__getitems__(range(len(ds)))) == want * 2
    new = fresh()
    convert(path, new, progress=False)
    assert lists(MMapIndexDataset(new)) == want


def test_a_list_and_a_dataset_count_alike(fresh):
    rows, path = [[i] * (i % 3) for i in range(10)], fresh()
    write_mmap(path, rows, shard_values=4)
    ds = MMapIndexDataset([path])
    for i in range(-10, 10):
        assert ds[i]["input_ids"].tolist() == rows[i] and ds[np.int64(i)]["input_ids"].tolist() == rows[i]
    for i in (10, -11, 10**9):
        with pytest.raises(IndexError, match="of 10"):
            ds[i]
        with pytest.raises(IndexError, match="of 10"):
            ds.__getitems__([0, i])
    for part in (slice(None), slice(2, -2), slice(None, None, -3), slice(50, 60)):
        assert lists(ds[part]) == rows[part]
    assert lists(ds) == rows and ds[0]["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("rows", [[], [[]], [[7]], [[], [], []]])
def test_next_to_nothing(fresh, rows):
    path, other = fresh(), fresh()
    write_mmap(path, rows)
    assert lists(MMapIndexDataset(path)) == rows and verify(path, progress=False)
    write_mmap(path, [[1, 2]], append=True)
    assert lists(MMapIndexDataset(path)) == rows + [[1, 2]]
    convert(path, other, progress=False)
    assert lists(MMapIndexDataset(other)) == rows + [[1, 2]]


def test_a_million_rows(fresh):
    path, sizes = fresh(), np.random.default_rng(0).integers(0, 5, 1_000_000)
    flat = np.arange(sizes.sum()) % 60_000
    began = time.process_time()
    with ShardWriter(path, 0, dict(input_ids="<u2")) as shard:
        shard.add(dict(input_ids=flat), dict(input_ids=sizes))
    publish(path)
    ds = MMapIndexDataset(path)
    ids = np.random.default_rng(1).integers(0, len(ds), 100_000)
    found = ds.__getitems__(ids)
    starts = np.cumsum(sizes) - sizes
    assert found.cu_seqlens["input_ids"].diff().tolist() == sizes[ids].tolist()
    assert ds[999_999]["input_ids"].tolist() == flat[starts[-1] :].tolist() and len(ds.tokens()) == len(flat)
    assert time.process_time() - began < 5


def test_a_thousand_shards_open_at_once_and_are_mapped_when_read(fresh):
    path, rows = fresh(), [[i, i + 1] for i in range(1000)]
    for number, row in enumerate(rows):  # as a writer leaves them, without waiting for a disk a thousand times
        prefix, schema = shard_name(number), dict(input_ids="<u2")
        path.mkdir(exist_ok=True)
        np.array(row, "<u2").tofile(path / f"{prefix}_input_ids.bin")
        np.array([0, 2], "<u8").tofile(path / f"{prefix}_input_ids.idx")
        (path / f"{prefix}.json").write_text(json.dumps(dict(schema=schema, rows=1, elements=dict(input_ids=2), block=1 << 22, sums={})))
    publish(path)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        ds = MMapIndexDataset(path)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.03, times  # 10 ms on a machine that does nothing else
    (path / "shard-00500_input_ids.bin").unlink()
    assert ds[999]["input_ids"].tolist() == rows[999] and sum(len(s.arrays) for s in ds.values.values()) == 1
    assert lists(ds.__getitems__([3, 998, 0])) == [rows[3], rows[998], rows[0]]
    with pytest.raises(OSError, match="shard-00500_input_ids.bin"):
        ds[500]


# ---- the loop and its twin

@settings(max_examples=300, deadline=None)
@given(sizes=st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=5), step=st.sampled_from([1, 2]), data=st.data())
def test_the_loop_and_its_twin_agree(sizes, step, data):
    "Also on ids that are not there, shards that are not mapped, and damaged indexes."
    ends = np.concatenate([[0], np.cumsum([len(s) for s in sizes])]).astype(np.int64)
    bases = np.concatenate([[0], np.cumsum([sum(s) for s in sizes])]).astype(np.int64)
    index = [np.array(x, "<i8") for x in ([0, *np.cumsum(s)] if step == 1 else np.stack([np.cumsum(s) - s, np.cumsum(s)], 1).ravel() if s else [] for s in sizes)]
    if data.draw(st.booleans()):
        k = data.draw(st.integers(0, len(index) - 1))
        if len(index[k]):
            index[k][data.draw(st.integers(0, len(index[k]) - 1))] += data.draw(st.sampled_from([-7, 3, 50]))
    addresses = np.array([a.ctypes.data if len(a) else 1 for a in index], np.uint64)
    if data.draw(st.booleans()):
        addresses[data.draw(st.integers(0, len(index) - 1))] = 0
    ids = np.array(data.draw(st.lists(st.integers(-int(ends[-1]), max(int(ends[-1]) - 1, 0)), max_size=8)), np.int64)
    results = []
    for run in (find_spans.plain, find_spans.loop, find_spans.ready()):
        out = [np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64), np.zeros(len(ids) + 1, np.int64)]
        code = run(ids, ends, addresses, np.empty(0, "<i8"), step, bases, *out)
        results.append((code, [a.tolist() for a in out] if code == -1 else None))
    assert results[1] == results[2]
    assert results[0] == results[1] or min(results[0][0], results[1][0]) != -1 != max(results[0][0], results[1][0]), results


# ---- types

@given(vocab=st.integers(1, 2**40), values=st.lists(st.integers(-(2**40), 2**40), max_size=5))
def test_the_smallest_type_holds_what_it_is_chosen_for(vocab, values):
    kind = choose_dtype(vocab, np.array(values, np.int64))
    numbers = np.array([*values, vocab - 1, 0])
    assert np.array_equal(numbers.astype(kind).astype(np.int64), numbers)
    assert kind != "<u4" or numbers.max() > 65_535


@pytest.mark.parametrize("rows, message", [
    ([[1, 2], [65_536]], "got 65536, expected 0 to 65535"), ([[1], [-1]], "got -1, expected 0 to"), ([[1.5]], "no whole numbers"),
    ([[1], ["猫"]], "no whole numbers"), ([dict(ids=[1])], "a row with other columns"), ([[1], dict(input_ids=[1])], "a row with other columns"), ([[[1, 2], [3, 4]]], "one dimension"),
])
def test_rows_that_do_not_fit_are_refused_and_leave_nothing(fresh, rows, message):
    path = fresh()
    with pytest.raises(ValueError, match=message):
        write_mmap(path, rows, dict(input_ids="<u2"))
    assert not list(path.glob("shard-*"))


def test_columns_of_one_row_that_do_not_match(fresh):
    schema = dict(input_ids="<u2", scored=["|u1", "input_ids"])
    with pytest.raises(ValueError, match="a row of scored is not as long as that of input_ids: got 1, expected 2"):
        write_mmap(fresh(), [dict(input_ids=[1, 2], scored=[1]), dict(input_ids=[1], scored=[1, 0])], schema)
    with pytest.raises(ValueError, match="different numbers of rows"):
        ShardWriter(fresh(), 0, dict(a="<u2", b="<u2")).add(dict(a=[1, 2], b=[3]), dict(a=[1, 1], b=[1]))
    with pytest.raises(ValueError, match="negative length"):
        ShardWriter(fresh(), 0, dict(a="<u2")).add(dict(a=[1, 2]), dict(a=[3, -1]))


# ---- processes

def write_one(path, number):
    with ShardWriter(path, number, dict(input_ids="<u2")) as shard:
        for row in range(20):
            shard.add(dict(input_ids=np.full(number + 1, row)), dict(input_ids=[number + 1]))


def read_some(ds, ids):
    return lists(ds.__getitems__(ids)), ds[-1]["input_ids"].tolist()


def test_processes_write_shards_of_one_dataset_and_a_spawned_one_reads_it(fresh):
    path = fresh()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(write_one, [(path, number) for number in (3, 0, 2, 1)])
    assert list(finished(path)) == [0, 1, 2, 3]
    publish(path)
    ds = MMapIndexDataset(path)
    assert lists(ds) == [[row] * (number + 1) for number in range(4) for row in range(20)]
    sent = pickle.dumps(ds)
    assert len(sent) < 4000
    again = pickle.loads(sent)
    assert again.values["input_ids"].arrays == {} and read_some(again, [5, 70]) == read_some(ds, [5, 70])


@pytest.mark.slow
def test_a_spawned_process_reads(fresh):
    path = fresh()
    write_mmap(path, [[i] * (i % 5) for i in range(50)], shard_values=30)
    ds = MMapIndexDataset(path)
    want = read_some(ds, [5, 43])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_some, (ds, [5, 43])) == want


def test_two_writers_of_one_shard(fresh):
    path = fresh()
    first = ShardWriter(path, 0, dict(input_ids="<u2"))
    with pytest.raises(ValueError, match="is being written by another process"):
        ShardWriter(path, 0, dict(input_ids="<u2"))
    first.add(dict(input_ids=[1]), dict(input_ids=[1]))
    first.close()
    with pytest.raises(ValueError, match="is finished already"):
        ShardWriter(path, 0, dict(input_ids="<u2"))


def test_shards_of_another_type_are_not_published(fresh):
    path = fresh()
    for number, kind in enumerate(("<u2", "<u4")):
        with ShardWriter(path, number, dict(input_ids=kind)) as shard:
            shard.add(dict(input_ids=[1]), dict(input_ids=[1]))
    with pytest.raises(ValueError, match="shard-00001 has another schema"):
        publish(path)


def test_torchs_loader_and_its_workers(fresh):
    path, rows = fresh(), [[i] * (i % 5) for i in range(50)]
    write_mmap(path, rows, shard_values=30)
    loader = DataLoader(MMapIndexDataset(path), batch_size=8, num_workers=2, collate_fn=list)
    assert [row["input_ids"].tolist() for batch in loader for row in batch] == rows
    kept = list(DataLoader(MMapIndexDataset(path), batch_size=8, collate_fn=lambda batch: batch))
    assert [row for batch in kept for row in lists(batch)] == rows, "batches that are kept stay what they are"
    whole = DataLoader(MMapIndexDataset(path), batch_size=5, sampler=[5, 10, 15, 20, 25])
    assert next(iter(whole))["input_ids"].shape == (5, 0), "torch's own collate_fn, where rows are of one length"


def test_the_data_module_takes_a_blend_of_arguments(fresh):
    path = fresh()
    write_mmap(path, [[1, 2], [3]] * 5)
    module = MMapDataModule(len, train_datas=str(path), valid_datas=None, val_batchsize=3, train_batchsize=4, num_workers=0)
    module.setup("fit")
    assert list(module.train_dataloader()) == [4, 4, 2] and module.val_dataloader() == [] and module.hparams["eval_batchsize"] == 3
    with pytest.raises(ValueError, match="no dataset"):
        module.setup("test")


def test_appending_that_is_cut_off(fresh):
    "The dataset stays what it was; the same call goes on, one with other rows is refused, and readers see the new rows when they open it again."
    path, old, new = fresh(), [[1, 2, 3]] * 3, [[i] * (i % 4) for i in range(40)]

    def crashing():
        yield from new[:30]
        raise RuntimeError

    write_mmap(path, old, dict(input_ids="<u2"))
    before = MMapIndexDataset(path)
    with pytest.raises(RuntimeError):
        write_mmap(path, crashing(), shard_values=10, append=True)
    assert lists(MMapIndexDataset(path)) == old and len(finished(path)) > 2
    with pytest.raises(ValueError, match="hold other rows"):
        write_mmap(path, new[3:], shard_values=10, append=True)
    write_mmap(path, new, shard_values=10, append=True)
    assert lists(MMapIndexDataset(path)) == old + new and lists(before) == old and verify(path, progress=False)


def test_without_numba(fresh, monkeypatch):
    path, rows = fresh(), [[i] * (i % 5) for i in range(40)]
    write_mmap(path, rows, shard_values=20)
    for loop in (find_spans, copy_runs):
        monkeypatch.setattr(loop, "run", loop.plain)
    ds = MMapIndexDataset(path)
    assert lists(ds.__getitems__(range(-40, 40))) == rows * 2
    with pytest.raises(IndexError):
        ds.__getitems__([40])


# ---- damage

def damaged(path, name, act):
    file = path / f"shard-00000_{name}"
    data = bytearray(file.read_bytes())
    file.write_bytes(act(data))


@pytest.fixture
def corpus(fresh):
    path = fresh()
    write_mmap(path, [[1, 2, 3], [], [4, 5]])
    return path


def put(data, at, number):
    data[8 * at : 8 * at + 8] = number.to_bytes(8, "little")
    return data


@pytest.mark.parametrize("name, act, message", [
    ("input_ids.bin", lambda data: data[:-1], "wrong size in bytes"), ("input_ids.bin", lambda data: data + b"\0\0", "wrong size in bytes"),
    ("input_ids.bin", lambda data: b"", "wrong size in bytes"), ("input_ids.idx", lambda data: data[8:], "wrong size in bytes"),
    ("input_ids.idx", lambda data: put(data, 1, 9), r"row 0 of .*got \[0, 9\], expected start and end in order, from 0 to 5"),
    ("input_ids.idx", lambda data: put(data, 0, 2**64 - 1), r"row 0 of"), ("input_ids.idx", lambda data: put(data, 0, 4), r"row 0 of .*got \[4, 3\]"),
])
def test_damaged_files_are_refused_and_found(corpus, name, act, message):
    damaged(corpus, name, act)
    for read in (lambda ds: ds[0], lambda ds: ds.__getitems__([2, 0])):
        with pytest.raises(ValueError, match=message):
            read(MMapIndexDataset(corpus))
    report = verify(corpus, progress=False)
    assert not report and f"shard-00000_{name}" in report.faults[0]


@QUICK
@given(data=st.data())
def test_any_changed_byte_is_found(fresh, data):
    path = fresh()
    write_mmap(path, [[1, 2, 3], [], [4, 5]], tokenizer=dict(name="a", fingerprint="b", vocab_size=9))
    files = sorted(p for p in path.glob("shard-*"))
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    assert [fault for fault in verify(path, progress=False).faults if file.name in fault]
    shutil.rmtree(path)


def test_files_that_changed_places(corpus):
    one, other = (corpus / f"shard-00000_input_ids.{ending}" for ending in ("bin", "idx"))
    one.rename(corpus / "x"), other.rename(one), (corpus / "x").rename(other)
    with pytest.raises(ValueError, match="wrong size"):
        MMapIndexDataset(corpus)[0]
    assert len(verify(corpus, progress=False).faults) == 2


@pytest.mark.parametrize("change, message", [
    (lambda m: "[]", "is damaged"), (lambda m: m[:-9], "is damaged"), (lambda m: m.replace('"version": 1', '"version": 9'), "another format"),
    (lambda m: m.replace("<u2", "<f4"), "the type of column"),
])
def test_a_damaged_manifest(corpus, change, message):
    path = corpus / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        MMapIndexDataset(corpus)


@pytest.mark.parametrize("pairs, count, message", [
    ([[0, 3], [3, 2]], 3, r"row 1 of .*got \[3, 2\]"), ([[-1, 3]], 3, r"got \[-1, 3\]"), ([[0, 3], [3, 9]], 5, "cut off, damaged"), ([[0, 3]], 9, "elements behind the last row"),
])
def test_the_originals_index_is_checked(fresh, pairs, count, message):
    path = fresh()
    np.save(f"{path}_input_ids.npy", np.array(pairs, "<i8"))
    np.arange(count, dtype="<i8").tofile(f"{path}_input_ids.bin")
    with pytest.raises(ValueError, match=message):
        MMapIndexDataset(path)
    assert not verify(path)


def test_the_originals_files_of_other_kinds(fresh):
    path = fresh()
    write_original(path, [(dict(input_ids=[1, 2], label_ids=[3]), dict(input_ids=[1, 1], label_ids=[1]))])
    with pytest.raises(ValueError, match="different numbers of rows: got {'input_ids': 2, 'label_ids': 1}"):
        MMapIndexDataset(path, ["input_ids", "label_ids"])
    size = os.path.getsize(f"{path}_input_ids.npy")
    os.truncate(f"{path}_input_ids.npy", size - 16)
    with pytest.raises(ValueError, match="144 bytes', expected 160 for 2 rows"):
        MMapIndexDataset(path)
    os.truncate(f"{path}_input_ids.npy", size)
    os.truncate(f"{path}_input_ids.bin", 13)
    with pytest.raises(ValueError, match="multiple of 8"):
        MMapIndexDataset(path)
    os.remove(f"{path}_input_ids.bin")
    with pytest.raises(ValueError, match="only d0_input_ids.npy"):
        MMapIndexDataset(path)
    np.save(f"{path}_input_ids.npy", np.array([dict(a=1)]), allow_pickle=True)
    with pytest.raises(ValueError, match="is no index"):
        MMapIndexDataset(path)
    (path.parent / f"{path.name}_input_ids.npy").write_bytes(b"not numpy")
    with pytest.raises(ValueError, match="is no NumPy file"):
        MMapIndexDataset(path)
    with pytest.raises(ValueError, match="no files for"):
        MMapIndexDataset(path, ["label_ids", "target_ids"])


def test_another_tokenizers_data(fresh):
    path, mine, other = fresh(), dict(name="a", fingerprint="1", vocab_size=9), dict(name="b", fingerprint="2", vocab_size=9)
    write_mmap(path, [[1]], tokenizer=mine)
    assert len(MMapIndexDataset(path, tokenizer=mine)) == 1
    for act in (lambda: MMapIndexDataset(path, tokenizer=other), lambda: write_mmap(path, [[1]], tokenizer=other, append=True), lambda: publish(path, other)):
        with pytest.raises(ValueError, match="was written with another tokenizer: got 'a .1.'"):
            act()
    write_mmap(path, [[2]], append=True)
    assert MMapIndexDataset(path, tokenizer=mine).fingerprint != "" and lists(MMapIndexDataset(path)) == [[1], [2]]


def test_the_fingerprint_is_that_of_the_content(fresh):
    paths = [fresh() for _ in range(4)]
    for path, rows in zip(paths, ([[1, 2]], [[1, 2]], [[1], [2]], [[2, 1]])):
        write_mmap(path, rows)
    prints = [MMapIndexDataset(path).fingerprint for path in paths]
    assert prints[0] == prints[1] and len(set(prints)) == 3
