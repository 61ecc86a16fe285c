"""Writing a dataset when something breaks: a killed process, a full disk, a folder that cannot be written; nothing half-written is opened, and the same call completes it to the same bytes."""
import inspect
import os
import signal
import subprocess
import sys
import time

import pytest

from fengshen.data.mmap_dataloader.mmap_format import MANIFEST, read_manifest
from fengshen.data.mmap_dataloader.mmap_verify import verify
from fengshen.data.mmap_dataloader.mmap_writer import ShardWriter, finished, publish, write_mmap

SCHEMA = dict(input_ids="<u2")


def rows():
    for i in range(20_000):
        yield [i % 60_000] * (i % 13)


WRITER = inspect.getsource(rows) + """
import sys, time
from fengshen.data.mmap_dataloader.mmap_writer import write_mmap

def slowly(rows):
    for i, row in enumerate(rows):
        if i % 100 == 0:
            time.sleep(0.01)
        yield row

write_mmap(sys.argv[1], slowly(rows()), dict(input_ids="<u2"), shard_values=20_000)
"""


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "What an undisturbed call writes."
    folder = tmp_path_factory.mktemp("straight") / "corpus"
    write_mmap(folder, rows(), SCHEMA, shard_values=20_000)
    assert verify(folder, progress=False)
    return contents(folder)


def started(folder):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stderr=subprocess.PIPE, text=True)


def refused(folder):
    from fengshen.data.mmap_dataloader import MMapIndexDataset

    with pytest.raises(ValueError, match="is not finished|no dataset"):
        MMapIndexDataset(folder)


@pytest.mark.parametrize("shards", [0, 2])
def test_killed_while_writing(tmp_path, straight, shards):
    folder = tmp_path / "corpus"
    process = started(folder)
    while not (folder / f"shard-0000{shards}.partial").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(finished(folder)) >= shards and not (folder / MANIFEST).exists()
    refused(folder)
    write_mmap(folder, rows(), SCHEMA, shard_values=20_000)
    assert contents(folder) == straight


def test_killed_while_another_goes_on(tmp_path):
    "The shard of a killed process can be taken by another at once; that of a living one cannot."
    writer = ShardWriter(tmp_path, 0, SCHEMA)
    child = os.fork()
    if child == 0:
        ShardWriter(tmp_path, 1, SCHEMA).add(dict(input_ids=[1] * 100), dict(input_ids=[100]))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "shard-00001.partial").exists()
    with pytest.raises(ValueError, match="another process"):
        ShardWriter(tmp_path, 0, SCHEMA)
    for shard in (writer, ShardWriter(tmp_path, 1, SCHEMA)):
        shard.add(dict(input_ids=[7]), dict(input_ids=[1]))
        shard.close()
    assert publish(tmp_path)["rows"] == 2 and verify(tmp_path, progress=False) and not verify(tmp_path, progress=False).leftovers


@pytest.mark.parametrize("step", ["the first file moved", "all files moved", "the record half written"])
def test_killed_while_closing(tmp_path, straight, monkeypatch, step):
    "Whatever is in its place without its record does not count, and is written again."
    folder = tmp_path / "corpus"

    def killed(*_):
        raise KeyboardInterrupt

    import fengshen.data.mmap_dataloader.mmap_writer as module
    with monkeypatch.context() as patch:
        if step == "the record half written":
            patch.setattr(module, "write_json", lambda path, content: path.with_name(path.name + ".partial").write_text("{") and killed())
        elif step == "all files moved":
            patch.setattr(module, "write_json", killed)
        else:
            moved, replace = [], type(folder).replace
            patch.setattr(type(folder), "replace", lambda self, target: killed() if moved else moved.append(replace(self, target)) or target)
        patch.setattr(ShardWriter, "abort", lambda self: self.lock.release())
        with pytest.raises(KeyboardInterrupt):
            write_mmap(folder, rows(), SCHEMA, shard_values=20_000)
    assert finished(folder) == {}
    refused(folder)
    write_mmap(folder, rows(), SCHEMA, shard_values=20_000)
    assert contents(folder) == straight


def test_a_disk_that_fills_up(straight, small_disk):
    "The message names the file and what to do; finished shards stay, and with room the same call completes them."
    folder, filler = small_disk / "corpus", small_disk / "filler"
    filler.write_bytes(bytes(8_200_000))
    with pytest.raises(OSError, match=r"cannot write .*shard-0000\d_input_ids.(bin|idx): got 'No space left on device', expected room on the disk; make room and start again"):
        write_mmap(folder, rows(), SCHEMA, shard_values=20_000)
    assert not list(folder.glob("*.partial")) and not (folder / MANIFEST).exists()
    filler.unlink()
    write_mmap(folder, rows(), SCHEMA, shard_values=20_000)
    assert contents(folder) == straight


def test_a_folder_that_cannot_be_written(small_disk):
    from fengshen.data.mmap_dataloader import MMapIndexDataset

    write_mmap(small_disk / "corpus", [[1, 2]], SCHEMA)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert MMapIndexDataset(small_disk / "corpus")[0]["input_ids"].tolist() == [1, 2] and verify(small_disk / "corpus", progress=False)
    with pytest.raises(OSError, match="Read-only"):
        write_mmap(small_disk / "corpus", [[3]], append=True)
    with pytest.raises(OSError, match="Read-only"):
        write_mmap(small_disk / "other", [[3]])


def test_two_processes_publish(tmp_path):
    "Whoever comes last lists all shards that were finished before it."
    for number in range(6):
        with ShardWriter(tmp_path, number, SCHEMA) as shard:
            shard.add(dict(input_ids=[number]), dict(input_ids=[1]))
        if number % 2:
            children = []
            for _ in range(2):
                child = os.fork()
                if child == 0:
                    publish(tmp_path)
                    os._exit(0)
                children.append(child)
            assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
            assert read_manifest(tmp_path)["rows"] == number + 1 and not list(tmp_path.glob("*.partial"))
