"""Megatron's files and orders when something breaks: a killed process, a full disk, a folder that cannot be written, two processes at once."""
import multiprocessing
import os
import signal
import subprocess
import time

import numpy as np
import pytest

import fengshen.data.megatron_dataloader.gpt_dataset as module
from fengshen.data.megatron_dataloader import GPTDataset, IndexedDataset, IndexedDatasetBuilder


def write(prefix, wait=0):
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(300):
            builder.add_documents(np.arange(7000) % 50_000, np.full(1000, 7))
            time.sleep(wait)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def files(prefix):
    return [(prefix.parent / f"{prefix.name}.{kind}").read_bytes() for kind in ("bin", "idx")]


def child(target, *given):
    process = multiprocessing.get_context("fork").Process(target=target, args=given)
    process.start()
    return process


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FENGSHEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def test_killed_while_writing(tmp_path):
    write(tmp_path / "straight")
    process, partial = child(write, tmp_path / "p", 0.01), tmp_path / "p.bin.partial"
    while not (partial.exists() and partial.stat().st_size > 1_000_000):
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another process is writing this dataset"):
        IndexedDatasetBuilder(tmp_path / "p")
    process.kill()
    process.join()
    assert names(tmp_path) == ["p.bin.partial", "straight.bin", "straight.idx"]
    with pytest.raises(ValueError, match="no such file"):
        IndexedDataset(tmp_path / "p")
    write(tmp_path / "p")
    assert files(tmp_path / "p") == files(tmp_path / "straight") and "p.bin.partial" not in names(tmp_path)


@pytest.mark.parametrize("call", [1, 2])
def test_killed_between_the_renames(tmp_path, monkeypatch, call):
    "An older dataset is there until the first of them; then there is none until the last."
    write(tmp_path / "p")
    calls, replace = [], os.replace

    def killed(*paths):
        calls.append(paths)
        if len(calls) == call:
            raise KeyboardInterrupt
        replace(*paths)

    builder = IndexedDatasetBuilder(tmp_path / "p", np.uint16)
    builder.add_documents([1, 2], [2])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            builder.finalize()
    builder.close()
    with pytest.raises(ValueError, match="no such file: got '.*p.idx'"):
        IndexedDataset(tmp_path / "p")
    with IndexedDatasetBuilder(tmp_path / "p", np.uint16) as builder:
        builder.add_documents([1, 2], [2])
    assert IndexedDataset(tmp_path / "p")[0].tolist() == [1, 2] and names(tmp_path) == ["p.bin", "p.idx"]


@pytest.mark.parametrize("left", [2_000_000, 4_300_000])
def test_a_disk_that_fills_up(small_disk, left):
    "While tokens are written, and while the index is: nothing is left, and an older dataset stays."
    with IndexedDatasetBuilder(small_disk / "p", np.uint16) as builder:
        builder.add_documents([1, 2], [2])
    before, filler = files(small_disk / "p"), small_disk / "filler"
    filler.write_bytes(bytes(8_300_000 - left))
    with pytest.raises(OSError, match="cannot write .*p.bin and .idx: got 'No space left on device', expected room on the disk"):
        write(small_disk / "p")
    assert names(small_disk) == ["filler", "p.bin", "p.idx"] and files(small_disk / "p") == before


def test_a_folder_that_cannot_be_written(small_disk, cache):
    with IndexedDatasetBuilder(small_disk / "p", np.uint16) as builder:
        builder.add_documents(np.arange(700), np.full(100, 7))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ds = IndexedDataset(small_disk / "p")
    assert len(GPTDataset(ds, 16).__getitems__([0, 3])) == 2 and cache.is_dir() and names(small_disk) == ["p.bin", "p.idx"]
    with pytest.raises(OSError, match="Read-only"):
        IndexedDatasetBuilder(small_disk / "q")


def order(prefix, note, how):
    "What a process does that opens a dataset: it notes when it builds, and what it reads."
    build = module.gpt_index

    def watched(*args, **named):
        note.write_text("builds ")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(how)
        return build(*args, **named)

    module.gpt_index = watched
    rows = GPTDataset(IndexedDataset(prefix), 16, samples=90).__getitems__([0, 5, 7]).tolist()
    with note.open("a") as f:
        f.write(f"order {rows}")


def test_two_processes_build_one_order(tmp_path, cache):
    with IndexedDatasetBuilder(tmp_path / "p", np.uint16) as builder:
        builder.add_documents(np.arange(700), np.full(100, 7))
    notes = [tmp_path / "one", tmp_path / "two"]
    processes = [child(order, tmp_path / "p", note, 0.5) for note in notes]
    for process in processes:
        process.join(60)
    told = [note.read_text() for note in notes]
    assert sorted("builds" in text for text in told) == [False, True], told
    assert len({text.removeprefix("builds ") for text in told}) == 1 and sum(path.is_dir() for path in cache.iterdir()) == 1


def test_killed_while_building_an_order(tmp_path, cache):
    with IndexedDatasetBuilder(tmp_path / "p", np.uint16) as builder:
        builder.add_documents(np.arange(700), np.full(100, 7))
    process = child(order, tmp_path / "p", tmp_path / "note", "killed")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (half,) = [path for path in cache.iterdir() if path.is_dir()]
    assert len(GPTDataset(IndexedDataset(tmp_path / "p"), 16, samples=90)) > 89
    (whole,) = [path for path in cache.iterdir() if path.is_dir()]
    assert half.name.startswith(whole.name + "-")
