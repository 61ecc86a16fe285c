"""How fast documents are put into rows, and how full the rows are: a JSON line each.

usage: python benchmarks/packing.py [--documents N ...] [--capacity N ...] [--out FILE]

Lengths are log-normal (sigma 0.8; the median is 493 tokens for rows of up to 1,024, else 898), cut at the capacity, seed 0.
`bisect` is best-fit decreasing, one document at a time over a sorted list of rooms, in plain Python: the same number of rows, on the
first 100,000 documents. `trl` is `trl.pack_dataset(strategy="bfd")` where it can be imported, up to a million documents; it packs
thousands by thousands and copies the tokens too, so its speed is that of more work. `stream` is `pack_stream` with 1,000 samples of
look-ahead, on the first 100,000. Speeds are documents a second, the median of three for `pack`.
"""

import argparse
import bisect
import importlib.util
import json
import statistics
import time
from pathlib import Path

import numpy as np

from fengshen.data.packing import fill, pack, pack_stream


def plain_best_fit(lengths, capacity):
    """Best-fit decreasing in plain Python; returns the number of rows."""
    rooms, rows = [], 0
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            room, rows = capacity, rows + 1
        else:
            room = rooms.pop(at)
        bisect.insort(rooms, room - length)
    return rows


def timed(function, *arguments):
    """(result, seconds)"""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def trl_rows(lengths, capacity):
    """(rows, seconds) of TRL's packing of documents that hold one zero a token."""
    import pyarrow as pa
    from datasets import Dataset
    from trl import pack_dataset

    ends = np.concatenate([[0], np.cumsum(lengths)])
    ids = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(np.zeros(ends[-1], np.int32)))
    data = Dataset(pa.table(dict(input_ids=ids)))
    packed, seconds = timed(lambda: pack_dataset(data, capacity, strategy="bfd"))
    return len(packed), seconds


def measure(documents, capacity):
    """One line of the record."""
    middle = 6.2 if capacity <= 1024 else 6.8
    lengths = np.clip(np.random.RandomState(0).lognormal(middle, 0.8, documents), 1, capacity).astype(np.int64)
    runs = [timed(pack, lengths, capacity) for _ in range(3)]
    rows, seconds = runs[0][0], statistics.median(s for _, s in runs)
    record = dict(documents=documents, capacity=capacity, seconds=round(seconds, 3), documents_per_second=round(documents / seconds),
                  fill=round(fill(rows, lengths, capacity), 5), bytes_per_document=round((rows.order.nbytes + rows.bounds.nbytes) / documents, 2))
    some = lengths[:100_000]
    count, seconds = timed(plain_best_fit, some.tolist(), capacity)
    assert count == len(pack(some, capacity))
    record["bisect_per_second"] = round(len(some) / seconds)
    stream = [dict(input_ids=range(n)) for n in some.tolist()]
    count, seconds = timed(lambda: sum(1 for _ in pack_stream(stream, capacity)))
    record |= dict(stream_per_second=round(len(some) / seconds), stream_fill=round(fill(count, some, capacity), 5))
    record["whole_fill"] = round(fill(pack(some, capacity), some, capacity), 5)
    if importlib.util.find_spec("trl") and documents <= 1_000_000:
        count, seconds = trl_rows(lengths, capacity)
        record |= dict(trl_per_second=round(documents / seconds), trl_fill=round(fill(count, lengths, capacity), 5))
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--capacity", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--out", default="benchmarks/results/packing.jsonl")
    options = parser.parse_args()
    for documents in options.documents:
        for capacity in options.capacity:
            line = json.dumps(measure(documents, capacity))
            print(line, flush=True)
            with Path(options.out).open("a", encoding="utf8") as f:
                f.write(line + "\n")


if __name__ == "__main__":
    main()
