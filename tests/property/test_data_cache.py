"The cache of tokenised data: found again when nothing changed, never when something did, whole whatever happens to its builder, small in memory."
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from fengshen.data.cache import cache_folder
from fengshen.data.task_dataloader.conversations import ConversationDataset
from fengshen.data.task_dataloader.prepare import Preparation
from fengshen.data.task_dataloader.records import find_sources
from fengshen.data.task_dataloader.store import FIELDS
from fengshen.data.task_dataloader.templates import get_template
from fengshen.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("fengshen:tokenizer_demo")
AGAIN = "read from the cache"


def lines(count, mark=""):
    return "".join(json.dumps(dict(question=f"第{i}问{mark}", answer="答" * (i % 50 + 1)), ensure_ascii=False) + "\n" for i in range(count))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FENGSHEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(50), "utf-8")
    return path


def built(cache):
    return {p.name for p in cache.iterdir() if p.is_dir()}


def test_the_second_start_tokenises_nothing_and_gives_the_same(cache, path, capsys, monkeypatch):
    one = ConversationDataset(path, TOKENIZER, 64, on_long="split")
    assert AGAIN not in capsys.readouterr().out
    monkeypatch.setattr(Preparation, "write", lambda *_: pytest.fail("tokenised again"))
    two = ConversationDataset(str(path), TOKENIZER, 64, on_long="split")
    assert AGAIN in capsys.readouterr().out
    assert all(getattr(one, name).tolist() == getattr(two, name).tolist() for name in (*FIELDS, "ids", "offsets"))
    assert (one.report, one.cuts(), one.fingerprint) == (two.report, two.cuts(), two.fingerprint) and len(one.cuts()) == one.report["long"]
    assert one.conversation(7) == two.conversation(7)


def key(path, tokenizer=TOKENIZER, template=None, **settings):
    return Preparation(find_sources(str(path))[0], tokenizer, get_template(template, tokenizer), **settings).key()


def test_whatever_changes_the_arrays_changes_the_key(cache, path, tmp_path):
    more, other = load_tokenizer("fengshen:tokenizer_demo"), load_tokenizer("fengshen:tokenizer_demo")
    more.add_tokens(["头疼"])
    other.eos_token = other.pad_token
    packed = tmp_path / "a.txt"
    packed.write_bytes(path.read_bytes())
    changed = tmp_path / "b.jsonl"
    changed.write_text(lines(50).replace("第9问", "第8问"), "utf-8")
    keys = [
        key(path), key(path, template="ziya"), key(path, template="{question}|{answer}"), key(path, more), key(path, other), key(packed), key(changed),
        *(key(path, **{name: value}) for name, value in dict(
            max_length=64, shape="question_answer", loss_on="all", on_long="drop", on_bad_line="skip", limit=9).items())]
    assert None not in keys and len(set(keys)) == len(keys)
    assert key(path, load_tokenizer("fengshen:tokenizer_demo")) == keys[0]


def test_the_key_follows_the_content_and_not_the_clock(cache, path):
    before = key(path)
    os.utime(path, (1, 1))
    assert key(path) == before
    content = path.read_text("utf-8")
    time.sleep(0.05)  # a tick of the file system's clock
    path.write_text(content.replace("第9问", "第8问"), "utf-8")
    os.utime(path, (1, 1))
    assert key(path) != before, "as long as before, and of the same time"
    path.write_text(content, "utf-8")
    assert key(path) == before
    (cache / "content_keys.json").write_text('{"half')
    assert key(path) == before


def test_lists_are_found_again_when_they_are_long_and_iterables_never(cache, capsys):
    data = [dict(question=f"第{i}问", answer="答") for i in range(1000)]
    ConversationDataset(data, TOKENIZER), ConversationDataset(list(map(dict, data)), TOKENIZER)
    assert capsys.readouterr().out.count(AGAIN) == 1
    for short in (data[:99], iter(data), (r for r in data)):
        folder = ConversationDataset(short, TOKENIZER).folder
        assert AGAIN not in capsys.readouterr().out and not folder.exists(), "a temporary folder goes with its dataset"
    assert len(built(cache)) == 1


@pytest.mark.parametrize("name, damage", [
    ("shard-00000_input_ids.bin", lambda b: b[:-4]), ("shard-00000_input_ids.idx", lambda b: b""), ("shard-00000_scored.bin", lambda b: b + b"x"), ("manifest.json", lambda b: b[: len(b) // 2]),
    ("manifest.json", lambda b: b"\x00" * len(b)), ("manifest.json", lambda b: b"{}"), ("manifest.json", lambda b: b"[]"), ("shard-00000_hashes.bin", None), ("manifest.json", None)])
def test_what_is_damaged_is_built_again(cache, path, capsys, name, damage):
    one = ConversationDataset(path, TOKENIZER)
    file, fingerprint, ids = one.folder / name, one.fingerprint, one.ids.tolist()
    content = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(content))
    capsys.readouterr()
    two = ConversationDataset(path, TOKENIZER)
    assert AGAIN not in capsys.readouterr().out and two.fingerprint == fingerprint and two.ids.tolist() == ids
    ConversationDataset(path, TOKENIZER)
    assert AGAIN in capsys.readouterr().out and built(cache) == {two.folder.name}


def test_a_refusal_leaves_nothing(cache, path):
    path.write_text(lines(50) + "nothing\n", "utf-8")
    with pytest.raises(ValueError, match="line 51"):
        ConversationDataset(path, TOKENIZER)
    with pytest.raises(ValueError, match="longer than max_length"):
        ConversationDataset(path, TOKENIZER, 32, on_bad_line="skip")
    assert built(cache) == set()


def test_a_cache_that_cannot_be_written_is_replaced(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("FENGSHEN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    assert cache_folder().is_relative_to(tmp_path / "tmp")
    dataset = ConversationDataset(path, TOKENIZER)
    assert len(dataset) == 50 and "cannot be written" in capsys.readouterr().out
    ConversationDataset(path, TOKENIZER)
    assert AGAIN in capsys.readouterr().out


# Processes

BUILD = """
import os, sys, time
from fengshen.data.task_dataloader.conversations import ConversationDataset
from fengshen.data.task_dataloader.store import Writer
from fengshen.tokenizer import load_tokenizer
tokenizer, close = load_tokenizer("fengshen:tokenizer_demo"), Writer.close
def closed(self, *report):
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
    time.sleep(float(sys.argv[2]))  # the others wait meanwhile
    close(self, *report)
Writer.close = closed
print("fingerprint", ConversationDataset(sys.argv[1], tokenizer).fingerprint)
"""


def start(path, how):
    return subprocess.Popen([sys.executable, "-c", BUILD, str(path), how], stdout=subprocess.PIPE, text=True)


def test_one_process_builds_and_the_others_wait(cache, path):
    runs = [start(path, "2") for _ in range(2)]
    told = [run.communicate(timeout=120)[0] for run in runs]
    assert sorted(AGAIN in out for out in told) == [False, True], told
    assert len(set(re.findall("fingerprint (.*)", "".join(told)))) == 1 and len(built(cache)) == 1


def test_a_builder_that_is_killed_leaves_nothing_that_is_opened(cache, path, capsys):
    assert start(path, "killed").wait(timeout=120) == -signal.SIGKILL
    (half,) = built(cache)
    dataset = ConversationDataset(path, TOKENIZER)
    assert AGAIN not in capsys.readouterr().out and len(dataset) == 50
    assert built(cache) == {dataset.folder.name} and half != dataset.folder.name, "what it left is gone"


MEASURE = """
import sys, time
from fengshen.data.task_dataloader.conversations import ConversationDataset
from fengshen.tokenizer import load_tokenizer
def most():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024
tokenizer = load_tokenizer("fengshen:tokenizer_demo")
ConversationDataset([dict(question="a", answer="b")], tokenizer)
before, start = most(), time.perf_counter()
dataset = ConversationDataset(sys.argv[1], tokenizer)
assert len(dataset) == int(sys.argv[2])
print("measured", most() - before, time.perf_counter() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_a_million_conversations_in_constant_memory(cache, tmp_path):
    def measured(count):
        path = tmp_path / f"{count}.jsonl"
        with open(path, "w") as f:
            for i in range(count):
                f.write(f'{{"question": "{i}?", "answer": "{i * 7919 % 1000}"}}\n')
        outs = [subprocess.run([sys.executable, "-c", MEASURE, str(path), str(count)], capture_output=True, text=True, check=True).stdout for _ in range(2)]
        assert [AGAIN in out for out in outs] == [False, True]
        return [tuple(map(float, re.search(r"measured (\S+) (\S+)", out).groups())) for out in outs]

    (some, _), _ = measured(100_000)
    (cold, seconds), (warm, start) = measured(1_000_000)
    print(f"1,000,000 conversations: {seconds:.0f} s, {cold:.0f} MiB (100,000: {some:.0f} MiB); from the cache {start:.2f} s, {warm:.0f} MiB")
    assert cold < some + 100 and warm < 100 and start < 5
