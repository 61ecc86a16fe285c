"""The loss of the same training under several ways to train, step by step, to lay the curves over each other: a JSON line a way.

usage: python benchmarks/curves.py --data FOLDER --set 110m|3b6 [--only NAME ...] [--steps N] [--together] [--timeout S] [--out FILE]
       python benchmarks/curves.py --smoke [--set 110m|3b6] [--only NAME ...] [--out FILE]
       python benchmarks/curves.py --table | --plot FILE.png [--out FILE]

FOLDER is what `benchmarks/gpu_data.py` writes. 110m: `pretrain_gpt2` from random weights on the corpus, 300 steps of 32 rows of 1,024
tokens (41 steps are the corpus once), with 6e-4, the rate that the recipe has for this size, after 30 steps of warm-up, so that the loss
falls from 10.8 as in a real run: a way that rounds badly shows only where weights move. 3b6: Wenzhong's shape with random weights on packed
questions and answers, 20 steps of 16,384 tokens, 2e-5 after 4 steps of warm-up. All ways of a set have the same seed, weights, order of the
data, rows a step, rates and no dropout; `tokens`, the real tokens of each step, shows that they had the same data.

    plain           float32 weights, AdamW of torch, autocast to bfloat16, torch's attention, nothing compiled
    fast            what one GPU gets by itself: bfloat16 weights with float32 masters, attention by document, compiled blocks, fused loss
    zero2           DeepSpeed's ZeRO-2 on one device, otherwise what it gets by itself
    zero3_offload   ZeRO-3 with weights and states on the host
    fp8             `fast` with the products of the blocks in 8 bits
    plain_halves    `plain` with half as many rows at once: the same sums in another order, which is how far rounding alone takes two runs
                    apart. Only when --only names it

Each way is a process of its own; one that fails, or runs out of time (--timeout), is a row with its error and the steps it made.
--together runs the ways of 110m side by side on the device. --table compares the newest row of each way with `plain`: the relative
difference of the losses after step 10 (mean and largest), the means of the last 20 steps. --smoke is for a CPU, with tiny models; fp8 is
refused there.
"""

import argparse
import fnmatch
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import gpu
import gpu_data

HERE = Path(__file__).resolve().parent
AFTER, LAST = 10, 20  # steps that are not compared, and steps of the mean at the end
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
PLAIN = dict(trainer__strategy="auto", model__optimizer__kind="fused_adamw", model__compile=False, model__attention="sdpa")
WAYS = dict(
    plain=PLAIN,
    fast=dict(trainer__strategy="auto"),
    zero2=dict(trainer__strategy="zero2"),
    zero3_offload=dict(trainer__strategy="zero3_offload"),
    fp8=dict(trainer__strategy="auto", model__fp8="tensorwise"),
    plain_halves=PLAIN,
)
STATES = dict(plain=gpu.MIXED, fast=gpu.MASTER, zero2="ZeRO-2", zero3_offload=gpu.OFFLOAD, fp8="fp8 linears, " + gpu.MASTER, plain_halves=gpu.MIXED)
SETS = {
    "110m": dict(
        model="gpt2_110m",
        recipe="pretrain_gpt2",
        rows=32,
        steps=300,
        flags=dict(
            model__gradient_checkpointing=False,
            model__optimizer__lr=6e-4,
            model__schedule__warmup_steps=30,
            data__limit_train=41 * 32,  # windows of the corpus' 1,335: without them an epoch would end in padding, a mask, and compiling again
        ),
        at_once={"plain_halves": 16},
        ways={},
    ),
    "3b6": dict(
        model="gpt2_3b6",
        recipe="wenzhong_qa",
        rows=16,
        steps=20,
        flags=dict(model__gradient_checkpointing=False, model__optimizer__lr=2e-5, model__schedule__warmup_steps=4),
        at_once=dict(plain=4, zero2=8, plain_halves=2),  # `fengshen.training.memory.estimate`: 94 GiB each; 125 and 116 with twice as many
        ways=dict(zero3_offload=dict(model__gradient_checkpointing=True)),
    ),
}


def row_of(which, way, steps=None, smoke=False):
    """A way of a set as a row of `benchmarks/gpu.py`."""
    found = SETS[which]
    at_once = found["at_once"].get(way, found["rows"])
    accumulate = found["rows"] // at_once
    flags = found["flags"] | dict(data__micro_batch=at_once, trainer__accumulate_grad_batches=accumulate, trainer__max_steps=steps or found["steps"])
    flags |= WAYS[way] | found["ways"].get(way, {})
    return dict(
        side="ours",
        group=f"{which} curves",
        model=found["model"],
        lengths="zh",
        recipe=found["recipe"],
        rows=at_once,
        accumulate=accumulate,
        states=STATES[way],
        flags={key.replace("__", "."): value for key, value in flags.items()}
        | {"model.config": gpu_data.shape_of(found["model"], smoke) | NO_DROPOUT, "global_batch": found["rows"]},
        tiny={
            "trainer.max_steps": steps or 14,
            "global_batch": 4,
            "data.micro_batch": max(1, 4 // accumulate),
            "model.schedule.warmup_steps": 2,
            **({"data.limit_train": 132} if found["recipe"].startswith("pretrain") else {"trainer.accumulate_grad_batches": min(4, accumulate)}),
            **({"trainer.precision": "bf16-mixed", "model.optimizer.kind": "master_adamw"} if way == "fast" else {}),
        },
    )


def curve(file):
    """What a run's record says of each step."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    records = [r for r in lines if r["split"] == "train"]
    seen = [r["tokens"] for r in records]
    return dict(
        steps=len(records),
        losses=[r["loss"] if r["loss"] is None else round(r["loss"], 5) for r in records],
        grad_norms=[r["grad_norm"] if r["grad_norm"] is None else round(r["grad_norm"], 4) for r in records],
        tokens=[now - before for now, before in zip(seen, [0, *seen])],
        seconds=records[-1]["time"] if records else None,
    )


def measure(which, way, data, steps=None, smoke=False, timeout=300):
    """Run one way: its row."""
    row, start = row_of(which, way, steps, smoke), time.time()
    with tempfile.TemporaryDirectory() as folder:
        log, status, _ = gpu.execute(row, data, folder, smoke, timeout)
        found, memory = curve(Path(folder, "run", "metrics.jsonl")), Path(folder, "memory.json")
        found |= json.loads(memory.read_text()) if memory.exists() else {}
    settings = row["flags"] | (row["tiny"] if smoke else {})
    out = dict(name=way, set=which, model=row["model"], states=row["states"], recipe=row["recipe"], settings=settings, smoke=smoke)
    out |= dict(wall_s=round(time.time() - start, 1)) | found
    if status != 0 or not found["steps"]:
        sys.stderr.write(log[-6000:])
        out["error"] = gpu.reason(log, status, timeout)
    return out


# ---------------------------------------------------------------------------------------------------------------- comparing
def newest(file):
    """{set: {way: its newest row with steps, else its newest}} of a file; `plain` is first."""
    found = {}
    for row in map(json.loads, Path(file).read_text("utf8").splitlines()):
        ways = found.setdefault(row["set"], {})
        if row["losses"] or not ways.get(row["name"], {}).get("losses"):
            ways[row["name"]] = row
    return {which: dict(sorted(ways.items(), key=lambda item: list(WAYS).index(item[0]))) for which, ways in found.items()}


def distance(row, plain):
    """How far a curve is from another, or why that cannot be said."""
    n = min(row["steps"], plain["steps"])
    if n <= AFTER or None in row["losses"] + plain["losses"]:
        return dict(why=f"fewer than {AFTER + 1} steps to compare" if n <= AFTER else "a loss is not finite")
    if row["tokens"][:n] != plain["tokens"][:n]:
        return dict(why="the steps had other data")
    apart = [abs(a / b - 1) for a, b in zip(row["losses"][AFTER:n], plain["losses"][AFTER:n])]
    ends = [statistics.mean(r["losses"][max(0, n - LAST) : n]) for r in (row, plain)]
    return dict(compared=n - AFTER, mean=statistics.mean(apart), largest=max(apart), last=ends[0], last_apart=ends[0] / ends[1] - 1)


ENDS = ["way", "steps", "first loss", "mean of the last 20"]
HEAD = [*ENDS, "to plain", "mean difference after step 10", "largest", "reserved GiB", "seconds of training", "remark"]


def cells(row, plain):
    """A row as the cells of the table."""
    losses = [x for x in row["losses"] if x is not None]
    start = [row["name"], str(row["steps"]), f"{losses[0]:.4f}" if losses else "", f"{statistics.mean(losses[-LAST:]):.4f}" if losses else ""]
    apart = distance(row, plain) if plain and losses and row is not plain else {}
    middle = [f"{apart['last_apart']:+.2%}", f"{apart['mean']:.3%}", f"{apart['largest']:.3%}"] if "mean" in apart else ["", "", ""]
    seconds = row.get("seconds")
    remark = "; ".join(filter(None, [row.get("error", ""), apart.get("why", "")])).replace("|", "/")
    return [*start, *middle, str(row.get("reserved_gib", "")), "" if seconds is None else f"{seconds:.0f}", remark]


def table(file):
    """The file as markdown, a table a set."""
    parts = []
    for which, ways in newest(file).items():
        body = [cells(row, ways.get("plain")) for row in ways.values()]
        parts.append(f"### {which}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in (HEAD, ["---"] * len(HEAD), *body)))
    return "\n\n".join(parts)


def plot(file, out):
    """The curves of each set over each other, and below them how far each is from `plain`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = {which: {way: row for way, row in ways.items() if row["losses"]} for which, ways in newest(file).items()}
    sets = {which: ways for which, ways in sets.items() if ways}
    if not sets:
        sys.exit(f"no curve in {file}")
    fig, axes = plt.subplots(2, len(sets), figsize=(6 * len(sets), 6), sharex="col", squeeze=False, height_ratios=[2, 1], layout="constrained")
    for (top, bottom), (which, ways) in zip(axes.T, sets.items()):
        for way, row in ways.items():
            (line,) = top.plot(range(1, row["steps"] + 1), row["losses"], label=way, linewidth=1)
            if "plain" in ways and "mean" in distance(row, ways["plain"]):
                apart = [100 * (a / b - 1) for a, b in zip(row["losses"], ways["plain"]["losses"])]
                bottom.plot(range(1, len(apart) + 1), apart, color=line.get_color(), linewidth=1)
        top.set(title=which, ylabel="loss")
        top.legend()
        bottom.set(xlabel="step", ylabel="% from plain")
    fig.savefig(out, dpi=120)


# ---------------------------------------------------------------------------------------------------------------- the program
def chosen(only):
    """The ways asked for; a pattern that fits nothing ends the program."""
    for pattern in only or []:
        if not fnmatch.filter(WAYS, pattern):
            sys.exit(f"no way fits {pattern!r}; there are {', '.join(WAYS)}")
    return [way for way in WAYS if any(fnmatch.fnmatch(way, pattern) for pattern in only)] if only else [way for way in WAYS if way != "plain_halves"]


def measure_all(options, data):
    """The ways one after the other, or side by side; each row is written as soon as it is there."""
    ways = chosen(options.only)
    with ThreadPoolExecutor(len(ways) if options.together else 1) as pool:
        runs = [pool.submit(measure, options.set, way, data, options.steps, options.smoke, options.timeout) for way in ways]
        for run in as_completed(runs):
            text = json.dumps(run.result() | dict(together=options.together))
            print(text[:600], flush=True)
            with open(options.out, "a", encoding="utf8") as f:
                f.write(text + "\n")
    print(table(options.out), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--set", choices=SETS)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--timeout", type=int, default=300)
    parser.add_argument("--out", default=str(HERE / "results" / "curves.jsonl"))
    parser.add_argument("--plot")
    for flag in ("together", "smoke", "table"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args()
    if options.table or options.plot:
        if options.plot:
            plot(options.out, options.plot)
        return print(table(options.out)) if options.table else None
    options.set = options.set or ("110m" if options.smoke else parser.error("--set 110m or --set 3b6 is needed"))
    if options.together and options.set != "110m":
        parser.error("--together is for --set 110m; the others need the device for themselves")
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            if not options.smoke:
                parser.error("--data FOLDER is needed (benchmarks/gpu_data.py writes it)")
            gpu_data.write_demo(folder)
            options.data = folder
        measure_all(options, options.data)


if __name__ == "__main__":
    main()
