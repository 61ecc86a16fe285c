"""The data path against the memory's own speed and against other libraries: a JSON line each result.

usage: python benchmarks/data.py [--peers PYTHON] [--work FOLDER] [--shared FOLDER] [--only PART ...] [--rounds N] [--out FILE]

PYTHON is the interpreter of an environment with benchmarks/data_requirements.txt; without it FengShen is measured alone. FOLDER holds the
corpora (1 GB, and files of holes that pretend to be 2 TB). Parts:

  read      batches of 32 windows, 32 documents, one document, one window, opening: tokens a second of CPU time, and `of_limit`, the
            share of a C loop's speed that gathers runs of the same lengths from the same file into a reused int64 buffer
  write     storing documents: tokens a second of wall time, bytes a token
  index     the sample index of ten million documents; packing a million and ten million
  tokens    raw text to a tokenised corpus, against `encode_batch_fast` alone and gigatoken alone
  scale     2 TB of holes in 1,000 files, against 1 GB: opening, memory, speed, eight processes, resuming; the curve in between
  step      the share of a training step that waits for its batch, warm, cold, and on a disk slowed by a cgroup

The corpus is 50 million 16-bit tokens in documents of log-normal length, 400 on average, seed 0. Every reader runs in a process of its
own and is first compared, by sha256, with a naive reader of the same indices. In each of the rounds the readers take turns; inside a
process the limit is measured before and after every measurement, on addresses that were not read just before, and the ratio taken there.
A line is the median of the rounds, with the machine's load beside it; it replaces the line of an earlier run. Speeds of reading are for
results in buffers used again, as they are documented, and for the limit too. The last lines, `target`, are ratios of these numbers beside
what they are meant to be.
"""

import argparse
import ctypes
import hashlib
import itertools
import json
import lzma
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import data_scale  # noqa: E402
from data_peers import BATCH, OURS, PEERS, SEED, SEQ, VOCAB  # noqa: E402
from data_record import Record  # noqa: E402

TOKENS = 50_000_000
C = r"""
#include <stdint.h>
/* runs of src, widened; a new batch begins after `per` runs, and uses the same buffer */
void widen(const uint16_t *restrict src, const int64_t *starts, const int64_t *lengths, int64_t runs, int64_t per, int64_t *restrict out) {
  int64_t *restrict to = out;
  for (int64_t i = 0; i < runs; i++) {
    if (i % per == 0) to = out;
    const uint16_t *from = src + starts[i];
    const int64_t length = lengths[i];
    for (int64_t j = 0; j < length; j++) to[j] = from[j];
    to += length;
  }
}
"""


def corpus(work):
    """(tokens, ends of documents from 0): made once."""
    flat, ends = work / "flat.npy", work / "ends.npy"
    if not ends.exists():
        random = np.random.default_rng(0)
        lengths = np.maximum(1, random.lognormal(np.log(400) - 0.5, 1, TOKENS // 300)).astype(np.int64)
        found = np.concatenate([[0], np.cumsum(lengths)])
        found = found[: np.searchsorted(found, TOKENS) + 1]
        found[-1] = TOKENS
        np.save(flat, np.minimum(VOCAB * random.random(TOKENS, np.float32) ** 3, VOCAB - 1).astype(np.uint16))
        np.save(ends, found)
    return np.asarray(np.load(flat, mmap_mode="r")), np.load(ends)


class Limit:
    """What the processor can do: the C loop over a mapped corpus."""

    def __init__(self, work, flat):
        library = work / "limit.so"
        if not library.exists():
            command = ["gcc", "-O3", "-march=native", "-shared", "-fPIC", "-x", "c", "-", "-o", f"{library}.new"]
            subprocess.run(command, input=C, text=True, check=True)
            os.replace(f"{library}.new", library)
        self.flat, self.out, self.widen = flat, np.zeros(1 << 21, np.int64), ctypes.CDLL(str(library)).widen
        self.random = np.random.default_rng(os.getpid())

    def rate(self, lengths, per):
        """Tokens a second of CPU time, for runs of these lengths from anywhere, `per` in a batch."""
        lengths = np.ascontiguousarray(lengths, np.int64)
        starts = self.random.integers(0, len(self.flat) - lengths.max(), len(lengths))
        address = [ctypes.c_void_p(a.ctypes.data) for a in (self.flat, starts, lengths, self.out)]
        start = time.process_time()
        self.widen(*address[:3], ctypes.c_int64(len(lengths)), ctypes.c_int64(per), address[3])
        return int(lengths.sum()) / (time.process_time() - start)


def digest(tensors):
    """sha256 over the bytes of int64 tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        assert str(tensor.dtype) == "torch.int64"
        found.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return found.hexdigest()


class Naive:
    """What a reader has to give, by definition."""

    def __init__(self, flat, ends):
        self.flat, self.ends = flat, ends

    def document(self, i):
        return self.flat[self.ends[i] : self.ends[i + 1]]

    def megatron(self):
        """(the corpus in the order of megatron-core's shuffled documents, its shuffled windows): one epoch."""
        random = np.random.RandomState(SEED)
        order = np.arange(len(self.ends) - 1, dtype=np.int32)
        random.shuffle(order)
        windows = np.arange((len(self.flat) - 1) // SEQ, dtype=np.uint32)
        random.shuffle(windows)
        return np.concatenate([self.document(i) for i in order]), windows

    def batches(self, ids, reader):
        """int64 [32, length] for each row of ids."""
        flat, order = (self.flat, None) if reader.order == "stored" else self.megatron()
        for row in ids if order is None else order[ids]:
            yield np.stack([flat[i * reader.stride : i * reader.stride + reader.length] for i in row.tolist()]).astype(np.int64)


def same(tensors, arrays):
    """Both have the same bytes, or the measurement means nothing."""
    wanted = hashlib.sha256(b"".join(np.ascontiguousarray(a, np.int64).tobytes() for a in arrays)).hexdigest()
    assert digest(tensors) == wanted, "this reader gives other tokens than the naive one"


def check(make, naive, ids, batch_ids):
    """A reader against the naive one."""
    reader = make()
    reader.open()
    same([reader.document(i) for i in ids.tolist()], [naive.document(i) for i in ids])
    same([reader.documents(ids)], [naive.document(i) for i in ids])
    rows = np.arange(batch_ids.size).reshape(batch_ids.shape) if reader.stride != SEQ else batch_ids
    same(map(lambda t: t.clone(), itertools.islice(reader.batches(rows), 8)), naive.batches(rows[:8], reader))
    if reader.length == SEQ + 1:
        same([reader.window(i) for i in rows[0].tolist()], naive.batches(rows[:1], reader))


def jobs(reader, ends, random):
    """{cell: (function that reads and returns nothing, lengths of what it reads, runs in a batch)}"""
    windows = (TOKENS - 1) // reader.stride
    order = random.permutation(windows)[: windows // BATCH * BATCH].reshape(-1, BATCH)[:400]
    many, some = random.integers(0, len(ends) - 1, (150, BATCH)), random.integers(0, len(ends) - 1, 4000)
    one = random.integers(0, windows, 2000)
    sizes = np.diff(ends)
    found = dict(
        documents=(lambda: [None for row in many if reader.documents(row) is None], sizes[many.ravel()], BATCH),
        document=(lambda: [None for i in some.tolist() if reader.document(i) is None], sizes[some], 1),
        batch=(lambda: drain(reader.batches(order)), np.full(order.size, reader.length), BATCH),
    )
    if reader.length == SEQ + 1:
        found["window"] = (lambda: [None for i in one.tolist() if reader.window(i) is None], np.full(2000, reader.length), 1)
    return found


def drain(batches):
    """Read 400 batches at most."""
    for _ in itertools.islice(batches, 400):
        pass


def read(work, name):
    """One round of one reader: {cell: numbers}."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    (flat, ends), folder = corpus(work), work / name.replace(" ", "")
    limit, random, make = Limit(work, flat), np.random.default_rng(), lambda: (OURS | PEERS)[name](folder)
    ids = random.integers(0, len(ends) - 1, BATCH)
    for path in (work / "flat.npy", *folder.rglob("*")):  # into the page cache
        path.is_file() and path.read_bytes()
    check(make, Naive(flat, ends), ids, random.integers(0, 40_000, (8, BATCH)))
    out = dict(open=dict(milliseconds=opening(make)))
    reader = make()
    reader.open()
    for repeat in range(3):
        for cell, (job, lengths, per) in jobs(reader, ends, random).items():
            before, start = limit.rate(lengths, per), time.process_time()
            job()
            rate = lengths.sum() / (time.process_time() - start)
            if repeat:  # the first warms up
                ratio = rate / ((before + limit.rate(lengths, per)) / 2)
                out.setdefault(cell, dict(tokens_per_second=[], of_limit=[], limit=[]))
                for key, value in dict(tokens_per_second=rate, of_limit=ratio, limit=before).items():
                    out[cell][key].append(float(value))
    return {cell: {k: statistics.median(v) if isinstance(v, list) else v for k, v in numbers.items()} for cell, numbers in out.items()}


def opening(make):
    """Milliseconds to open and read one document, the third time: what is imported and compiled once is not counted."""
    for _ in range(3):
        reader, start = make(), time.perf_counter()
        reader.open()
        seconds = time.perf_counter() - start
        reader.document(0)
    return seconds * 1e3


def write(work, name):
    """One round of one writer: the corpus three times, after a few documents that warm it up."""
    flat, ends = corpus(work)
    flat, folder, spent = flat.copy(), work / name.replace(" ", ""), []
    for last in (100, *[len(ends)] * 3):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        writer = (OURS | PEERS)[name](folder)
        os.sync()
        start, cpu = time.perf_counter(), time.process_time()
        writer.write(flat, ends[:last])
        spent.append((time.perf_counter() - start, time.process_time() - cpu))
        if last == len(ends) and spent[-1][0] > 5:
            break
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    writer.prepare(flat)
    wall, cpu = (statistics.median(found) for found in zip(*spent[1:]))
    return dict(write=dict(tokens_per_second=TOKENS / wall, tokens_per_cpu_second=TOKENS / cpu, bytes_per_token=size / TOKENS))


def lengths_of(documents):
    """Log-normal lengths, 400 on average, int32."""
    return np.maximum(1, np.random.default_rng(0).lognormal(np.log(400) - 0.5, 1, documents)).astype(np.int32)


def index(work, name, documents=10_000_000):
    """The sample index of shuffled documents, in windows of 1,024: CPU milliseconds, and the digest of what came out."""
    sizes, order = lengths_of(documents), np.arange(documents, dtype=np.int32)
    np.random.RandomState(SEED).shuffle(order)
    tokens = int(sizes.sum())
    if name == "megatron":
        from fengshen.data.megatron_dataloader.gpt_index import sample_index

        def build():
            out = np.empty(((tokens - 1) // SEQ + 1, 2), np.int32)
            sample_index(sizes, order, SEQ, 1, out)
            return out
    else:
        from megatron.core.datasets import helpers

        def build():
            return helpers.build_sample_idx(sizes, order, SEQ, 1, tokens, True, True)

    seconds, found = timed(build, 5)
    mark = hashlib.sha256(found.tobytes()).hexdigest()[:16]
    return {"sample index": dict(documents=documents, per_second=1 / seconds, milliseconds=seconds * 1e3, sha256=mark)}


def timed(build, times):
    """(median CPU seconds of some calls after one that warms up, the result)"""
    found, spent = build(), []
    for _ in range(times):
        start = time.process_time()
        found = build()
        spent.append(time.process_time() - start)
    return statistics.median(spent), found


def packing(work, name, capacity=2048):
    """Best-fit decreasing: CPU seconds and fill; documents longer than a row are cut to it."""
    out = {}
    for documents in (1_000_000, 10_000_000) if name == "mmap" else (1_000_000,):
        lengths = np.minimum(lengths_of(documents), capacity)
        seconds, rows = (packed if name == "mmap" else packed_by_trl)(lengths, capacity)
        fill = float(lengths.sum(dtype=np.int64) / (rows * capacity))
        out[f"packing {documents:,}"] = dict(cpu_seconds=seconds, documents_per_second=documents / seconds, rows=rows, fill=fill)
    return out


def packed(lengths, capacity):
    """(seconds, rows) of FengShen."""
    from fengshen.data.packing import pack

    seconds, rows = timed(lambda: pack(lengths, capacity), 3)
    return seconds, len(rows)


def packed_by_trl(lengths, capacity):
    """(seconds, rows) of TRL's best fit over all documents at once; a token is one byte, so that moving them costs little."""
    import pyarrow as pa
    from datasets import Dataset
    from trl import pack_dataset

    ends = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    data = Dataset(pa.table(dict(input_ids=pa.LargeListArray.from_arrays(ends, pa.array(np.zeros(int(lengths.sum()), np.int8))))))
    start = time.process_time()
    rows = pack_dataset(data, capacity, strategy="bfd", map_kwargs=dict(batch_size=len(lengths), keep_in_memory=True))
    return time.process_time() - start, len(rows)


def texts(work, shared):
    """The Chinese corpora of the shared folder as JSON lines, once for gigatoken and every sixth for tokenizers; and GPT-2's tokenizer."""
    from fengshen.tokenizer import load_tokenizer

    if (work / "tokenizer").exists():
        return
    lines = [line for packed in sorted((shared / "data/corpus").glob("*.jsonl.xz")) for line in lzma.open(packed)]
    (work / "gigatoken.jsonl").write_bytes(b"".join(lines))
    (work / "tokenizers.jsonl").write_bytes(b"".join(lines[::6]))
    load_tokenizer(shared / "data/tokenizers/gpt2").save_pretrained(work / "tokenizer")


def documents_in(path):
    """The documents as FengShen's preprocessing finds them."""
    from fengshen.data.preprocess.texts import FIELDS

    records = map(json.loads, open(path, encoding="utf8"))
    return [next(record[field] for field in FIELDS if field in record) for record in records]


def by_tokenizers(path):
    """Texts to a number of tokens: the tokenizers library alone, a thousand texts at a time."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(path))
    return lambda found: sum(len(e) for i in range(0, len(found), 1000) for e in own.encode_batch_fast(found[i : i + 1000], add_special_tokens=False))


def by_gigatoken(path):
    """Texts to a number of tokens: gigatoken alone, all texts at once."""
    from gigatoken import Tokenizer

    own = Tokenizer.from_json(Path(path).read_text("utf8"))

    def encode(found):
        offsets = own.encode_batch(found).layout.offsets.data
        return int(offsets[-1] - offsets[0])

    return encode


def processor():
    """CPU seconds of this process and of those it has ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def preprocessed(path, work, ids):
    """(seconds, CPU seconds, tokens without the ends of documents) of FengShen's preprocessing."""
    from fengshen.data.preprocess import preprocess

    shutil.rmtree(work / f"tokens-{ids}", ignore_errors=True)
    start, cpu = time.perf_counter(), processor()
    counts = preprocess(path, work / f"tokens-{ids}", work / "tokenizer", ids=ids)["counts"]
    return time.perf_counter() - start, processor() - cpu, counts["tokens"] - counts["kept"]


def tokens(work, name):
    """Text to a dataset on all cores, or as far as the numbers of its tokens: megabytes of text a second, and a CPU second.

    The start, loading a tokenizer above all, is measured on twenty documents and taken off: a corpus is larger than this one.
    """
    os.environ.pop("OMP_NUM_THREADS")
    who, ids = name.split()
    path = work / f"{ids}.jsonl"
    found = documents_in(path)
    megabytes = sum(len(text.encode()) for text in found) / 1e6
    if who == "fengshen":
        few = work / "few.jsonl"
        few.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in found[:20]))
        preprocessed(few, work, ids)
        (start, start_cpu, _), (wall, cpu, count) = preprocessed(few, work, ids), preprocessed(path, work, ids)
        wall, cpu = wall - start, cpu - start_cpu
    else:
        encode = dict(tokenizers=by_tokenizers, gigatoken=by_gigatoken)[ids](work / "tokenizer/tokenizer.json")
        encode(found[:100])
        start, start_cpu = time.perf_counter(), processor()
        count = encode(found)
        wall, cpu, start = time.perf_counter() - start, processor() - start_cpu, 0
    rates = dict(megabytes_per_second=megabytes / wall, megabytes_per_cpu_second=megabytes / cpu)
    return {f"tokenise, {ids}": rates | dict(start_seconds=start, tokens=count)}


PARTS = {f.__name__: f for f in (read, write, index, packing, tokens, *data_scale.PARTS)}


SECTIONS = dict(  # {section: {part: the processes that take turns}}
    write=dict(write=[*OURS, *PEERS]),
    read=dict(read=[name for name in [*OURS, *PEERS] if name not in ("mmap_arrays", "megatron_arrays")]),
    index=dict(index=["megatron", "megatron-core"], packing=["mmap", "trl"]),
    tokens=dict(tokens=["library tokenizers", "fengshen tokenizers", "library gigatoken", "fengshen gigatoken"]),
    scale=dict(scale=[f"holes-{n}" for n in data_scale.SIZES], workers=["holes-2000"], advice=["random", "usual"]),
    step=dict(step=[f"{rate} {state}" for rate in (30_000, 500_000) for state in ("warm", "cold", *data_scale.DISKS)], epoch=["holes-1"]),
)


def versions(python):
    """{package: version} of the requirements, where the peers are installed."""
    if not python:
        return {}
    names = [line.split("==")[0] for line in (HERE / "data_requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def child(python, part, work, name):
    """The result of one round in a process of its own."""
    command = [python, __file__, "--child", part, name, "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1"))
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"{name}, {part}: {done.stderr[-3000:]}", file=sys.stderr, flush=True)
        return {}
    return json.loads(lines[-1])


def middle(values):
    """The median of numbers, to four digits; of anything else, the one value there is."""
    if isinstance(values[0], str):
        assert len(set(values)) == 1, values
        return values[0]
    found = statistics.median(values)
    return found if isinstance(found, int) else float(f"{found:.4g}")


def medians(rounds):
    """{cell: {number: median over the rounds}}"""
    cells = {cell for found in rounds for cell in found}
    return {c: {k: middle([found[c][k] for found in rounds if c in found]) for k in next(f[c] for f in rounds if c in f)} for c in cells}


def contest(part, names, options, record):
    """Processes that take turns, in as many rounds as asked for; their medians."""
    pythons = {name: options.peers if name in PEERS or name == "trl" else sys.executable for name in names}
    pythons = {name: python for name, python in pythons.items() if python and (not options.who or name in options.who)}
    found = {name: [] for name in pythons}
    for _ in range(options.rounds):
        for name, python in pythons.items():
            found[name].append(child(python, part, options.work, name))
    for name, rounds in found.items():
        for cell, numbers in sorted(medians(rounds).items()):
            record(cell, name, **numbers, load=round(os.getloadavg()[1], 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fengshen-data")
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("FENGSHEN_SHARED", HERE.parent.parent / "shared")))
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--who", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results/data.jsonl")
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.child:
        part, name = options.child
        print("\nRESULT " + json.dumps(PARTS[part](options.work, name)), flush=True)
        os._exit(0)  # some libraries wait for their threads
    corpus(options.work)
    record = Record(options.out)
    record("machine", "machine", cores=os.cpu_count(), python=sys.version.split()[0], **versions(options.peers))
    if "tokens" in options.only:
        texts(options.work, options.shared)
    if {"scale", "step"} & set(options.only):
        data_scale.make(options.work)
    for section in options.only:
        for part, names in SECTIONS[section].items():
            contest(part, names, options, record)


if __name__ == "__main__":
    main()
