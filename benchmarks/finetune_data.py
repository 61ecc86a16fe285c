"""From a file of conversations to packed rows: what is reported, how full the rows are, how fast it is, how soon again, and in how much
memory: a JSON line for each file, and one for many samples.

usage: TOKENIZERS_PARALLELISM=true python benchmarks/finetune_data.py [--data FOLDER] [--tokenizer FOLDER] [--files NAME ...] [--samples N ...]
       [--out FILE]

The files of `medical_qa` are unpacked to JSONL first; the tokenizer is GPT-2's, the template Yuyuan's, samples have at most 1,024 tokens and
what is longer is split. `ratio` is the rate of the preparation (reading, recognising, tokenising, the proof of the mask, hashing, writing)
against `encode_batch_fast` alone over the same texts, held in memory, with reading of `.ids`: the median of three, in turn, where nothing is
too long (4,096 tokens); `ratio_cpu` is the same of the processor's time, which other work on the machine changes less, and `ratio_split`
where 1,024 tokens are the limit. `fill` is the share of real tokens: rows of 1,024; batches of eight as long as their longest, shuffled and
by length; packed into rows of 1,024 and of 4,096. `cold_s` and `cached_s` are the times of a new process from the settings to a data module
that is ready, imports left out, and `peak_mib` the most memory that the first of them needs. For many samples the records are the real
ones, each text cut to its first 30 characters, with a running number. `load` is the machine's load average at the time.
"""

import argparse
import itertools
import json
import lzma
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fengshen.data.packing import PackedDataset
from fengshen.data.sampler import by_length
from fengshen.data.task_dataloader.datamodule import ConversationDataModule
from fengshen.data.task_dataloader.prepare import Preparation
from fengshen.data.task_dataloader.records import find_sources, read
from fengshen.data.task_dataloader.shapes import conversation
from fengshen.data.task_dataloader.templates import get_template
from fengshen.tokenizer import load_tokenizer

SETTINGS = dict(template="yuyuan", max_length=1024, on_long="split", packing=True)


def timed(function):
    """(seconds, seconds of the processor)"""
    start, worked = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - worked


def load():
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def prepare(path, tokenizer, template, most):
    """Seconds of a whole preparation into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        return timed(lambda: Preparation(find_sources(str(path))[0], tokenizer, template, most, on_long="split")(Path(folder)))


def bare(texts, tokenizer):
    """Seconds of `encode_batch_fast` over the texts, a thousand at a time, with reading of the ids."""
    def run():
        for start in range(0, len(texts), 1000):
            for encoding in tokenizer.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False):
                encoding.ids

    return timed(run)


def rate(path, tokenizer, template):
    """How fast it is, in turn with the tokenizer alone."""
    texts = []
    for _, record in read(find_sources(str(path))[0][0], None):
        (told, said), = template.turns(conversation(record, "question_answer"))
        texts.append(told + said + template.end)
    ways = dict(bare=lambda: bare(texts, tokenizer.backend_tokenizer), whole=lambda: prepare(path, tokenizer, template, 4096),
                split=lambda: prepare(path, tokenizer, template, SETTINGS["max_length"]))
    runs = [{way: run() for way, run in ways.items()} for _ in range(3)]
    wall, cpu = ({way: statistics.median(run[way][i] for run in runs) for way in ways} for i in (0, 1))
    return dict(seconds=round(wall["whole"], 2), bare_seconds=round(wall["bare"], 2), ratio=round(wall["bare"] / wall["whole"], 3),
                ratio_cpu=round(cpu["bare"] / cpu["whole"], 3), ratio_split=round(wall["bare"] / wall["split"], 3))


def fills(path, tokenizer):
    """The report in short, and the share of real tokens before and after packing."""
    module = ConversationDataModule(str(path), tokenizer=tokenizer, **SETTINGS)
    module.setup("fit")
    found, report = module.sets["train"], module.report()["train"]
    lengths = np.asarray(found.lengths)

    def padded(order):
        eights = np.split(lengths[order], range(8, len(order), 8))
        return lengths.sum() / sum(len(group) * group.max() for group in eights)

    shares = dict(rows_of_1024=lengths.mean() / 1024, shuffled=padded(np.random.RandomState(0).permutation(len(lengths))),
                  by_length=padded(by_length(lengths, 8, seed=0)(epoch=0)), packed=report["fill"], packed_4096=PackedDataset(found, 4096).fill)
    kept = ("conversations", "samples", "tokens", "scored", "lengths", "long", "lost", "duplicates", "empty", "bad", "rows", "steps_per_epoch")
    return dict(report={name: report[name] for name in kept}, fill={name: round(float(share), 4) for name, share in shares.items()})


def child(path, tokenizer):
    """What a new process needs until a data module is ready: printed as JSON."""
    tokenizer = load_tokenizer(tokenizer)
    seconds, _ = timed(lambda: ConversationDataModule(path, tokenizer=tokenizer, **SETTINGS).setup("fit"))
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps([seconds, int(peak) / 1024]))


def starts(path, tokenizer):
    """Seconds of the first start and of the second, and the first one's memory."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--tokenizer", tokenizer, "--child", str(path)]
        runs = [subprocess.run(command, env=os.environ | dict(FENGSHEN_CACHE=cache), capture_output=True, text=True, check=True) for _ in range(2)]
    (cold, peak), (cached, _) = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    return dict(cold_s=round(cold, 2), cached_s=round(cached, 3), peak_mib=round(peak))


def many(path, count, target):
    """Write `count` records, none like another."""
    records = [json.loads(line) for line in Path(path).open(encoding="utf8")]
    with target.open("w", encoding="utf8") as f:
        for number, record in zip(range(count), itertools.cycle(records)):
            short = dict(question=f"{number}. {record['question'][:30]}", answer=record["answer"][:30])
            f.write(json.dumps(short, ensure_ascii=False) + "\n")


def unpacked(data, name, folder):
    """The file as JSONL."""
    path = folder / f"{name}.jsonl"
    path.write_bytes(lzma.decompress(Path(data, f"{name}.jsonl.xz").read_bytes()))
    return path


def measure(options, folder):
    """The lines of the record."""
    tokenizer = load_tokenizer(options.tokenizer)
    template = get_template("yuyuan", tokenizer)
    for name in options.files:
        path = unpacked(options.data, name, folder)
        line = dict(file=name, load=load()) | fills(path, tokenizer) | rate(path, tokenizer, template)
        yield line | starts(path, options.tokenizer) | dict(load_after=load())
    for count in options.samples:
        many(unpacked(options.data, "medqa_zh_train", folder), count, folder / "many.jsonl")
        yield dict(samples=count, load=load()) | starts(folder / "many.jsonl", options.tokenizer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/medical_qa")
    parser.add_argument("--tokenizer", default="../shared/data/tokenizers/gpt2")
    parser.add_argument("--files", nargs="*", default=["medqa_zh_train", "medquad_en"])
    parser.add_argument("--samples", type=int, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--out", default="benchmarks/results/finetune_data.jsonl")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FENGSHEN_CACHE"] = f"{folder}/cache"
        for line in measure(options, Path(folder)):
            print(json.dumps(line), flush=True)
            with Path(options.out).open("a", encoding="utf8") as f:
                f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
