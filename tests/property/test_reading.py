"""Reading tokens: any runs over any shards, under every form of the loop; files that are not what they should be; other processes."""
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.data.reading import NONE, Ring, Shards, StoredWindows, copy_runs, map_file

settings.register_profile("house", deadline=None)
settings.load_profile("house")
KINDS = ["|u1", "<u2", "<u4", "<i4", "<i8", "|i1", "<i2", ">u2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


def written(folder, counts, kind, starts=None):
    "(shards of random numbers, all of them as one int64 array)"
    limits, rng, files, parts = np.iinfo(kind), np.random.default_rng(sum(counts)), [], []
    for k, count in enumerate(counts):
        values = rng.integers(limits.min, limits.max, count, endpoint=True, dtype=np.dtype(kind).newbyteorder("="))
        files.append(folder / f"{k}.bin")
        files[-1].write_bytes(b"x" * (starts[k] if starts else 0) + values.astype(kind).tobytes())
        parts.append(values.astype(np.int64))
    return Shards(files, kind, counts, starts), np.concatenate([*parts, NONE])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from(KINDS[:-1]), st.data())
def test_runs_over_any_shards(folder, counts, kind, data):
    shards, whole = written(folder, counts, kind)
    runs = data.draw(st.lists(st.tuples(st.integers(0, len(whole)), st.integers(0, 60)), max_size=8))
    runs = [(start, min(length, len(whole) - start)) for start, length in runs]
    starts, lengths = (np.array(x, np.int64) for x in zip(*runs)) if runs else (NONE, NONE)
    want = np.concatenate([*(whole[a : a + n] for a, n in runs), NONE])
    assert shards.read(starts, lengths).tolist() == want.tolist()
    for run in (copy_runs.plain, copy_runs.loop):
        out = np.zeros(len(want), np.int64)
        assert run(shards.addresses, shards.ends, shards.like, starts, 1, lengths, -1, out) == -1 and out.tolist() == want.tolist()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 9))
def test_windows_are_the_stream(folder, counts, length):
    shards, whole = written(folder, counts, "<u2")
    if len(whole) <= length:
        with pytest.raises(ValueError, match="shorter than one window"):
            StoredWindows(shards, length)
        return
    windows = StoredWindows(shards, length)
    assert len(windows) == (len(whole) - 1) // length
    batch = windows.__getitems__(range(len(windows)), copy=True)
    assert batch.dtype == torch.int64 and batch.shape == (len(windows), length + 1)
    assert batch[:, :-1].flatten().tolist() == whole[: len(windows) * length].tolist(), "every token once"
    assert batch[:, 1:].flatten().tolist() == whole[1 : len(windows) * length + 1].tolist(), "and every answer"
    assert all((windows[i] == batch[i]).all() and (windows[i - len(windows)] == batch[i]).all() for i in range(len(windows)))
    for i in (len(windows), -len(windows) - 1):
        with pytest.raises(IndexError):
            windows[i]


@pytest.mark.parametrize("start, length", [(-1, 2), (5, 6), (11, 0), (0, 11), (2**62, 1), (0, 2**62)])
def test_positions_outside_are_refused(folder, start, length):
    shards, _ = written(folder, [4, 0, 6], "<u2")
    for run in (copy_runs.plain, copy_runs.loop, copy_runs.ready()):
        assert run(shards.addresses, shards.ends, shards.like, np.array([0, start]), 1, np.array([0, length]), -1, np.zeros(20, np.int64)) == -3
    with pytest.raises(IndexError, match="of 10"):
        shards.windows([start], length) if length < 100 else shards.copy(np.array([start]), np.array([length]), NONE)


def test_numbers_after_a_header(folder):
    shards, whole = written(folder, [5, 7], "<i4", starts=[16, 64])
    assert shards.read([0], [12]).tolist() == whole.tolist()


def test_only_what_is_read_is_mapped(folder):
    shards, _ = written(folder, [10] * 50, "<u2")
    shards.read([105, 205], [3, 3])
    assert sorted(shards.arrays) == [10, 20]
    os.unlink(shards.files[33])
    shards.read([105], [3])
    with pytest.raises(FileNotFoundError):
        shards.read([335], [3])


def test_files_of_another_size(folder):
    for size, count, said in ((9, 5, "got 9, expected 10"), (11, 5, "got 11"), (0, 1, "got 0")):
        (folder / "wrong.bin").write_bytes(b"x" * size)
        with pytest.raises(ValueError, match=said):
            Shards([folder / "wrong.bin"], "<u2", [count]).read([0], [1])
    with pytest.raises(ValueError, match="whole numbers"):
        Shards([folder / "wrong.bin"], "<f4", [1])
    assert len(map_file(folder / "wrong.bin", "<u2", 0)) == 0


def test_mapped_files_cannot_be_written(folder):
    shards, _ = written(folder, [5], "<u2")
    with pytest.raises(ValueError, match="read-only"):
        shards.array(0)[0] = 1


def test_results_are_kept_as_long_as_is_told(folder):
    shards, whole = written(folder, [40], "<u2")
    for take in (lambda i: shards.read([i], [4]), lambda i: shards.windows([i], 4)[0]):
        first, second = take(0), take(4)
        assert first.tolist() == whole[:4].tolist() and second.tolist() == whole[4:8].tolist()
        third = take(8)
        assert first.data_ptr() == third.data_ptr() and first.tolist() == whole[8:12].tolist(), "overwritten after two more"


def test_a_ring_takes_any_shapes():
    ring = Ring(depth=2)
    for shape in [(3,), (2, 5), (1,), (0,), (4, 4), (3,), (0, 7)]:
        array, tensor = ring.take(shape)
        array[...] = 7
        assert array.shape == tuple(tensor.shape) == shape and (tensor == 7).all()
    assert len(pickle.loads(pickle.dumps(ring)).slots) == 2


def total(shards):
    "Runs in another process."
    return shards.read([0], [len(shards)]).sum().item(), len(shards.arrays)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_another_process_maps_for_itself(folder, method):
    shards, whole = written(folder, [1000, 2000], "<u2")
    shards.read([0], [10])
    assert len(pickle.dumps(shards)) < 2000, "paths, not contents"
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(total, (shards,)) == (int(whole.sum()), 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_loader_is_an_adapter(folder, workers):
    "A worker's tensors lie in shared memory until they are read: they must not be a ring's."
    shards, whole = written(folder, [1000, 2000], "<u2")
    loader = torch.utils.data.DataLoader(StoredWindows(shards, 10), batch_size=4, num_workers=workers, collate_fn=lambda batch: batch)
    assert [i for batch in loader for i in batch[:, 0].tolist()] == whole[:2990:10].tolist()
    assert not workers or torch.cat(list(loader))[:, 0].tolist() == whole[:2990:10].tolist()
