"""The results of benchmarks/data.py: a line for each cell and name, and then what was aimed at."""

import json

from data_peers import PEERS

NEEDED = {"write", "batch", "sample index", "packing 10,000,000", "tokenise, tokenizers", "tokenise, gigatoken", "scale", "epoch"}


class Record:
    """A file of JSON lines: the newest of each cell and name, and the targets where all that they compare is there."""

    def __init__(self, path):
        self.path, self.lines = path, {}
        if path.is_file():
            found = map(json.loads, path.read_text("utf8").splitlines())
            self.lines = {(line["cell"], line["who"]): line for line in found if "cell" in line}

    def __call__(self, cell, who, **numbers):
        line = self.lines[cell, who] = dict(cell=cell, who=who, **numbers)
        print(json.dumps(line, ensure_ascii=False), flush=True)
        lines = [*self.lines.values(), *self.judged()]
        self.path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf8")

    def judged(self):
        """A line for each target: what was found, what is wanted, whether it is met."""
        if not NEEDED <= {cell for cell, _ in self.lines}:
            return
        for what, wanted, found in targets(self.lines):
            if found is not None:
                met = found >= wanted if wanted > 0 else found <= -wanted
                yield dict(target=what, wanted=f"{'at least' if wanted > 0 else 'at most'} {abs(wanted)}", found=float(f"{found:.4g}"), met=met)


def times(records, cell, ours, peers, key="of_limit"):
    """How many times the best of the peers."""
    known = [records[cell, peer][key] for peer in peers if (cell, peer) in records]
    return records[cell, ours][key] / max(known) if known else None


def targets(r):
    """(what, wanted, what was measured): larger is better where the wanted number is positive, smaller where it is negative."""
    small, large = (r["scale", f"holes-{n}"] for n in (1, 2000))
    yield "a batch in stored order, of the C loop", 0.85, r["batch", "mmap"]["of_limit"]
    yield "a batch in Megatron's order, of the C loop", 0.35, r["batch", "megatron"]["of_limit"]
    for peer, wanted in (("datasets", 12), ("litdata", 12), ("nanoGPT", 8)):
        yield f"a batch in stored order, times {peer}", wanted, times(r, "batch", "mmap", [peer])
    yield "a batch in Megatron's order, times megatron-core", 15, times(r, "batch", "megatron", ["megatron-core"])
    yield "32 documents, of the C loop", 0.28, r["documents", "mmap"]["of_limit"]
    for cell, wanted in (("documents", 8), ("document", 2), ("window", 1.2)):
        yield f"{cell}, times the best peer", wanted, times(r, cell, "mmap", PEERS)
    yield "opening one shard, ms", -1, r["open", "mmap"]["milliseconds"]
    yield "opening 1,000 shards, ms", -10, large["open_ms"]
    yield "writing from arrays, times nanoGPT", 2, times(r, "write", "mmap_arrays", ["nanoGPT"], "tokens_per_second")
    yield "writing Megatron's format, times megatron-core", 4, times(r, "write", "megatron_arrays", ["megatron-core"], "tokens_per_second")
    yield "sample index, times megatron-core's C++", 1, times(r, "sample index", "megatron", ["megatron-core"], "per_second")
    yield "packing a million, times TRL", 50, times(r, "packing 1,000,000", "mmap", ["trl"], "documents_per_second")
    one, ten = (r[f"packing {documents}", "mmap"] for documents in ("1,000,000", "10,000,000"))
    yield "packing, fill", 0.999, one["fill"]
    yield "packing ten million, times the time of one", -11, ten["cpu_seconds"] / one["cpu_seconds"]
    for ids, wanted in (("tokenizers", 0.9), ("gigatoken", 0.55)):
        yield f"tokenise and write, of {ids} alone", wanted, share(r, ids)
    yield "2 TB: open, ms", -1000, large["open_ms"]
    yield "2 TB: anonymous memory, MB", -300, large["anonymous_mb"]
    yield "2 TB: second pass of 20,000 windows, of 1 GB", 0.9, large["second_pass_tokens_per_second"] / small["second_pass_tokens_per_second"]
    yield "2 TB: first batch, ms", -1000, large["first_batch_ms"]
    yield "2 TB: seeking a saved position, ms", -10, large["seek_ms"]
    for (cell, who), found in r.items():
        if cell.startswith("step") and who != "500000 spinning":  # 200 reads a second are fewer than the 488 windows it learns
            yield f"waiting at {who}", -0.005, found["waiting"]
    yield "memory gained over an epoch, MB", -5, r["epoch", "holes-1"]["last_mb"] - r["epoch", "holes-1"]["first_mb"]


def share(r, ids):
    """What tokenising keeps of the library's speed."""
    return times(r, f"tokenise, {ids}", f"fengshen {ids}", [f"library {ids}"], "megabytes_per_cpu_second")
