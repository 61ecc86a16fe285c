"""Training on one GPU: this library through `fengshen fit`, and the trainers that a user could pick instead, a JSON line a configuration.

usage: python benchmarks/gpu.py --data FOLDER [--only NAME ...] [--group NAME ...] [--rounds N] [--timeout S] [--minutes N]
       [--out FILE]
       python benchmarks/gpu.py --list | --table [--out FILE] | --smoke [--only NAME ...]

FOLDER is what `benchmarks/gpu_data.py` writes; nothing else is read, and nothing is fetched. Each configuration is a process of its own;
one that fails, runs out of memory or out of time (--timeout) is a row with its error, and none starts after --minutes. --only takes names
or patterns such as 'qwen*'. With --rounds the list is run several times, so that the two sides of a ratio alternate; --table prints, from
the file alone, the medians over the rounds and what ours is to the fastest peer of the same group, and to the fastest stock one (a peer is
tuned where a user has to write code for its attention). Rows that carry a `call` (on one machine, one after the other) are compared within
it, and the newest of a name stand for it.

Models have random weights, rows are packed questions and answers (zh: median 524 tokens under the GPT-2 tokenizer, en: 199; cut at 1,024),
of which the answers are scored. `tokens_per_second` counts real tokens, no padding: the median over the steps after the first four. `mfu`
is the model's arithmetic (see `gpu_data.arithmetic`) to a bfloat16 matrix product of 8192^3 timed in the same round, and `mfu_989` to the
device's nominal 989 TFLOP/s. Memory is torch's peak on the device, reserved and allocated, in GiB; `host_gib` is what the machine's used
memory rose by. `first_step_s` is the time from the start of the process to the end of the first optimizer step. --smoke runs the same on a
CPU with tiny models in float32, to know that it works, and writes no file but one that --out names.
"""

import argparse
import fnmatch
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import gpu_data
import psutil

HERE = Path(__file__).resolve().parent
WARM, STEPS = 4, 10
BIG = "3.56B full zh, 16,384 tokens a step"
ROWS = {}


def ours(name, group, model, recipe="wenzhong_qa", lengths="zh", rows=16, accumulate=1, warm=WARM, steps=STEPS, states="", **flags):
    """A row of `fengshen fit`; a flag's __ are its dots."""
    found = dict(data__micro_batch=rows, trainer__accumulate_grad_batches=accumulate, trainer__max_steps=warm + steps) | flags
    ROWS[name] = dict(
        side="ours",
        group=group,
        model=model,
        lengths=lengths,
        recipe=recipe,
        rows=rows,
        accumulate=accumulate,
        warm=warm,
        states=states,
        flags={key.replace("__", "."): value for key, value in found.items()},
    )


def peer(name, group, model, states="fp32 weights and states, autocast", tuned=False, **case):
    """A row of `gpu_peers.py`."""
    ROWS[name] = dict(side="peer", group=group, model=model, states=states, tuned=tuned, case=dict(model=model, warm=WARM, steps=STEPS) | case)


MASTER, MIXED = "bf16 weights, fp32 masters and moments", "fp32 weights and states, autocast"
LORA = dict(r=16, alpha=32)
QLORA = LORA | dict(quantize="nf4")
FOUR, FOUR_OURS = "nf4 base, fp32 LoRA, autocast", "nf4 base, LoRA in bf16 with fp32 masters"
FAST = dict(trainer__strategy="auto")
HOST = dict(recipe="wenzhong_qa_offload", warm=2, steps=4)

LONG, HALF = dict(rows=1, data__row_length=16384), dict(rows=1, accumulate=2, data__row_length=8192)
ours("ours", BIG, "gpt2_3b6", states=MASTER, **FAST, **LONG)
ours("ours_rows", BIG, "gpt2_3b6", states=MASTER, **FAST)
peer("hf_packed", BIG, "gpt2_3b6")
peer("hf_varlen", BIG, "gpt2_3b6", batch="flat", tuned=True)
peer("trl_packed", BIG, "gpt2_3b6", trainer="trl", tuned=True)
peer("hf_padded", BIG, "gpt2_3b6", batch="padded", rows=8, accumulate=2, compile=False, steps=16)
ours("ours_80gb", BIG, "gpt2_3b6", states=MASTER, **FAST, **HALF)
ours("ours_80gb_nine_tenths", BIG, "gpt2_3b6", states=MASTER, **FAST, **HALF, model__activation_budget=0.9)
ours("ours_80gb_quarters", BIG, "gpt2_3b6", states=MASTER, **FAST, rows=1, accumulate=4, data__row_length=4096)
ours("ours_80gb_budget", BIG, "gpt2_3b6", states=MASTER, **FAST, **LONG, model__activation_budget=0.5)
ours("ours_mixed", BIG, "gpt2_3b6", states=MIXED, **FAST, model__optimizer__kind="fused_adamw")
ours("ours_zero2", BIG, "gpt2_3b6", states="ZeRO-2", trainer__strategy="zero2")
ours("ours_fp8", BIG, "gpt2_3b6", states="fp8 linears, " + MASTER, **FAST, **LONG, model__fp8="tensorwise")
ours("ours_fp8_rowwise", BIG, "gpt2_3b6", states="fp8 linears (rowwise), " + MASTER, **FAST, **LONG, model__fp8="rowwise")
TWICE = "3.56B full zh, 32,768 tokens at once"
ours("ours_32", TWICE, "gpt2_3b6", rows=32, states=MASTER, **FAST, model__gradient_checkpointing=False)
ours("ours_32_auto", TWICE, "gpt2_3b6", rows=32, states=MASTER, **FAST)
PARTS = "3.56B full zh, one part left out"
ours("ours_uncompiled", PARTS, "gpt2_3b6", states=MASTER, **FAST, rows=8, accumulate=2, model__compile=False)
ours("ours_sdpa", PARTS, "gpt2_3b6", states=MASTER, **FAST, rows=8, accumulate=2, model__attention="sdpa")
ours("ours_padded", PARTS, "gpt2_3b6", states=MASTER, **FAST, rows=8, accumulate=2, data__packing=False)
ours("ours_zero3", PARTS, "gpt2_3b6", states="ZeRO-3", rows=8, accumulate=2, trainer__strategy="zero3")
EN = "3.56B full en, 16,384 tokens a step"
ours("ours_en", EN, "gpt2_3b6", lengths="en", states=MASTER, **FAST, **LONG)
ours("ours_en_fp8", EN, "gpt2_3b6", lengths="en", states="fp8 linears, " + MASTER, **FAST, **LONG, model__fp8="tensorwise")
peer("hf_en_packed", EN, "gpt2_3b6", lengths="en")
peer("hf_en_varlen", EN, "gpt2_3b6", lengths="en", batch="flat", tuned=True)
SMALL = "3.56B full zh, states on the host, 65,536 tokens a step"
OFFLOAD = "ZeRO-3, weights and states on the host"
ours("ours_offload_4", SMALL, "gpt2_3b6", rows=4, accumulate=16, states=OFFLOAD, **HOST)
ours("ours_offload_8", SMALL, "gpt2_3b6", rows=8, accumulate=8, states=OFFLOAD, **HOST)
ours("ours_offload_16", SMALL, "gpt2_3b6", rows=16, accumulate=4, states=OFFLOAD, **HOST)
ours("ours_offload_32", SMALL, "gpt2_3b6", rows=32, accumulate=2, states=OFFLOAD, **HOST)
ours("ours_offload_64", SMALL, "gpt2_3b6", rows=64, accumulate=1, states=OFFLOAD, **HOST)
AT_HOST = dict(warm=2, steps=4, states="bf16 weights, fp32 masters and moments on the host", model__optimizer__kind="host_adamw")
for rows in (4, 8, 16):
    ours(f"ours_host_{rows}", SMALL, "gpt2_3b6", rows=rows, accumulate=64 // rows, **FAST, **AT_HOST, model__gradient_checkpointing=True)
ours("ours_host_8_budget", SMALL, "gpt2_3b6", rows=8, accumulate=8, **FAST, **AT_HOST, model__activation_budget=0.3)
HOST_ADAMW = dict(trainer__strategy="auto", model__optimizer__kind="host_adamw", model__gradient_checkpointing=True)
ON_HOST = "bf16 weights and gradients on the device, fp32 masters and moments on the host"
ours("ours_host", SMALL, "gpt2_3b6", rows=1, accumulate=4, warm=2, steps=4, states=ON_HOST, data__row_length=16384, **HOST_ADAMW)
peer("lightning_offload", SMALL, "gpt2_3b6", trainer="lightning", rows=8, accumulate=8, checkpointing=True, warm=2, steps=4, states=OFFLOAD)
for model, title in (("gpt2_3b6", "3.56B"), ("qwen3_4b", "Qwen3-4B-type")):
    short, group = model.split("_")[0], f"{title} LoRA r=16 zh, 16,384 tokens a step"
    ours(f"{short}_lora", group, model, states="bf16 base, LoRA", **FAST, model__lora=LORA)
    ours(f"{short}_lora_20gb", group, model, rows=2, accumulate=8, states="bf16 base, LoRA", **FAST, model__lora=LORA)
    four = dict(rows=4, accumulate=4, model__activation_budget=0.7)
    ours(f"{short}_lora_20gb_budget", group, model, states="bf16 base, LoRA", **FAST, model__lora=LORA, **four)
    peer(f"{short}_lora_hf", group, model, lora=True, states="bf16 base, fp32 LoRA, autocast")
    peer(f"{short}_lora_hf_20gb", group, model, lora=True, rows=2, accumulate=8, states="bf16 base, fp32 LoRA, autocast")
    peer(f"{short}_lora_hf_varlen", group, model, lora=True, batch="flat", tuned=True, states="bf16 base, fp32 LoRA, autocast")
    peer(f"{short}_lora_trl", group, model, lora=True, trainer="trl", tuned=True, states="bf16 base, fp32 LoRA, autocast")
    for suffix, rows in (("", 16), ("_10gb", 2)):
        four = dict(rows=rows, accumulate=16 // rows, states=FOUR_OURS, model__lora=QLORA)
        ours(f"{short}_qlora{suffix}", f"{title} QLoRA r=16 zh, 16,384 tokens a step", model, **FAST, **four)
    ours(f"{short}_qlora_10gb_budget", f"{title} QLoRA r=16 zh, 16,384 tokens a step", model, **FAST, **four, model__activation_budget=0.7)
    peer(f"{short}_qlora_hf", f"{title} QLoRA r=16 zh, 16,384 tokens a step", model, lora=True, four_bit=True, states=FOUR)
    peer(f"{short}_qlora_hf_10gb", f"{title} QLoRA r=16 zh, 16,384 tokens a step", model, lora=True, four_bit=True, rows=2, accumulate=8, states=FOUR)
UNSLOTH = dict(lora=True, trainer="unsloth", tuned=True, states="bf16 base, fp32 LoRA, autocast")
for suffix, checkpointing in (("", False), ("_checkpointing", True)):
    peer(f"qwen3_lora_unsloth{suffix}", ROWS["qwen3_lora"]["group"], "qwen3_4b", checkpointing=checkpointing, **UNSLOTH)
QWEN = "Qwen3-4B-type full zh, 16,384 tokens a step"
ours("qwen3", QWEN, "qwen3_4b", states=MASTER, **FAST)
ours("qwen3_8x2", QWEN, "qwen3_4b", rows=8, accumulate=2, states=MASTER, **FAST)
peer("qwen3_hf_packed", QWEN, "qwen3_4b", rows=8, accumulate=2)
peer("qwen3_hf_varlen", QWEN, "qwen3_4b", rows=8, accumulate=2, batch="flat", tuned=True)
peer("qwen3_trl", QWEN, "qwen3_4b", rows=8, accumulate=2, trainer="trl", tuned=True)
peer("qwen3_unsloth", QWEN, "qwen3_4b", rows=8, accumulate=2, trainer="unsloth", tuned=True, states="bf16 weights and moments")
SHORT = dict(trainer__strategy="auto", steps=30, model__gradient_checkpointing=False)
for name, model, recipe, batch, rows in (
    ("gpt2_110m", "gpt2_110m", "pretrain_gpt2", "windows", 32),
    ("bert", "bert_base", "pretrain_bert", "masked", 128),
    ("t5", "t5_base", "pretrain_t5", "spans", 64),
    ("megatron_bert", "megatron_bert_1b3", "pretrain_megatron_bert", "masked", 32),
):
    group = f"{model}: {recipe} from a tokenised corpus, {rows} rows"
    ours(name, group, model, recipe, rows=rows, states=MASTER, **SHORT)
    if name == "megatron_bert":
        ours(f"{name}_one_kernel", group, model, recipe, rows=rows, states=MASTER, **SHORT, model__attention="sdpa")
    if name != "t5":
        ours(f"{name}_fp8", group, model, recipe, rows=rows, states="fp8 linears, " + MASTER, **SHORT, model__fp8="tensorwise")
    peer(f"{name}_hf", group, model, batch=batch, rows=rows, steps=30)
    peer(f"{name}_hf_eager", group, model, batch=batch, rows=rows, steps=30, compile=False)

TWO = "two GPUs, as many tokens a step on each as on one"
for strategy, states in (("ddp", MIXED), ("zero2", "ZeRO-2"), ("zero3", "ZeRO-3")):
    ours(f"two_{strategy}", f"3.56B full zh, {TWO}", "gpt2_3b6", states=states, trainer__devices=2, trainer__strategy=strategy)
DDP = SHORT | dict(rows=32, trainer__strategy="ddp")
ours("one_110m_ddp", f"gpt2_110m, {TWO}", "gpt2_110m", "pretrain_gpt2", states=MIXED, **DDP)
ours("two_110m_ddp", f"gpt2_110m, {TWO}", "gpt2_110m", "pretrain_gpt2", states=MIXED, trainer__devices=2, **DDP)

MATMUL = """
import statistics, torch
n, times = 8192, []
a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
b = torch.randn_like(a)
for _ in range(25):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(); a @ b; end.record()
    torch.cuda.synchronize()
    times.append(start.elapsed_time(end))
print(2 * n**3 / statistics.median(times[5:]) / 1e9, torch.cuda.get_device_name(), torch.__version__, sep="|")
"""


def matmul():
    """(TFLOP/s of a bfloat16 8192^3 matrix product, median of 20; the device; torch's version)"""
    rate, device, version = subprocess.run([sys.executable, "-c", MATMUL], capture_output=True, text=True, check=True).stdout.strip().split("|")
    return dict(matmul_tflops=round(float(rate), 1), device=device, torch=version)


class Watch(threading.Thread):
    """While a process runs: the most memory that the machine used beyond what it used before, and when a file came to have a line."""

    def __init__(self, file, started):
        super().__init__(daemon=True)
        self.file, self.started, self.first, self.ended = file, started, None, threading.Event()
        self.before = self.most = psutil.virtual_memory().used

    def run(self):
        while not self.ended.wait(0.1):
            self.most = max(self.most, psutil.virtual_memory().used)
            if self.first is None and self.file.exists() and self.file.stat().st_size:
                self.first = time.time() - self.started


def fit(out, words):
    """`fengshen fit` in this process; then the peak of its memory on the device, to a file, also where it ended in an error."""
    import pytorch_lightning.strategies
    import torch

    from fengshen.cli.main import main as fengshen

    pytorch_lightning.strategies.SingleDeviceStrategy.teardown = lambda strategy: None  # brings all weights to the host, after the measuring
    try:
        status = fengshen(["fit", *words])
    finally:
        if torch.cuda.is_available():
            peaks = dict(reserved=torch.cuda.max_memory_reserved(), allocated=torch.cuda.max_memory_allocated())
            facts = dict(device=torch.cuda.get_device_name(), torch=torch.__version__)
            Path(out).write_text(json.dumps({f"{name}_gib": round(value / 2**30, 2) for name, value in peaks.items()} | facts))
    sys.stdout.flush()
    os._exit(status)  # compiled workers take their time to end


def words_of(row, data, folder, smoke):
    """The command line of one of ours; `tiny`, where a row has it, are settings of its smoke run."""
    pretrain = row["recipe"].startswith("pretrain")
    tokenizer = {"pretrain_bert": "bert", "pretrain_megatron_bert": "bert", "pretrain_t5": "t5"}.get(row["recipe"], "gpt2")
    devices = row["flags"].get("trainer.devices", 1)
    flags = {
        "model.path": None,
        "model.config": gpu_data.shape_of(row["model"], smoke),
        "data.tokenizer": f"{data}/{tokenizer}",
        "run_dir": f"{folder}/run",
        "trainer.devices": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.limit_val_batches": 0,
        "export": False,
        "checkpoint.at_end": False,
    }
    if pretrain:
        flags |= {
            "data.train": f"{data}/{tokenizer}_corpus",
            "global_batch": row["rows"] * devices,
            "data.max_length": 32 if smoke else 1024 if tokenizer == "gpt2" else 512,
        }
    else:
        batch = row["rows"] * row["accumulate"] * devices
        flags |= {"data.train": f"{data}/{row['lengths']}.jsonl", "data.on_long": "truncate", "global_batch": batch}
    flags |= row["flags"]
    if pretrain:
        del flags["model.path"], flags["trainer.accumulate_grad_batches"]
    if smoke:
        flags |= {"data.row_length": 128} if "data.row_length" in flags else {}
        precision = "bf16-mixed" if row["flags"].get("model.optimizer.kind") == "host_adamw" else "32-true"
        flags |= {"trainer.max_steps": 3, "trainer.precision": precision} | ({} if pretrain else {"data.max_length": 64})
        accumulate = 1 if pretrain else min(row["accumulate"], 2)
        flags |= {"global_batch": 2 * devices * accumulate, "data.micro_batch": 2}
        flags |= {} if pretrain else {"trainer.accumulate_grad_batches": accumulate}
        flags |= row.get("tiny", {})
    return ["-c", row["recipe"], *[f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flags.items()]]


def command(row, data, folder, smoke, started):
    """What is run for a row, and the case of a peer."""
    if row["side"] == "ours":
        return [sys.executable, str(HERE / "gpu.py"), "--fit", f"{folder}/memory.json", *words_of(row, data, folder, smoke)]
    case = row["case"] | dict(data=str(data), started=started, smoke=smoke)
    if smoke:
        case |= dict(rows=2, steps=2, warm=1, accumulate=min(case.get("accumulate", 1), 2))
    return [sys.executable, str(HERE / "gpu_peers.py"), json.dumps(case)]


def of_run(folder, watch, warm):
    """The figures of one of ours: from its record, and from what its process left."""
    file, memory = Path(folder, "run", "metrics.jsonl"), Path(folder, "memory.json")
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    peaks = json.loads(memory.read_text()) if memory.exists() else {}
    if len(records) <= warm:
        return peaks
    tokens, seconds = (records[-1][name] - records[warm - 1][name] for name in ("tokens", "time"))
    return peaks | dict(
        tokens_per_second=statistics.median(r["tokens_per_second"] for r in records[warm:]),
        mean_tokens_per_second=tokens / seconds,
        steps=len(records),
        tokens_per_step=round(records[-1]["tokens"] / len(records)),
        first_step_s=round(watch.first or 0, 1),
        losses=[round(r["loss"], 4) for r in records],
    )


def of_peer(log):
    """The figures of a peer: its last line."""
    found = [line for line in log.splitlines() if line.startswith("RESULT ")]
    return json.loads(found[-1].removeprefix("RESULT ")) if found else {}


def reason(log, status, timeout):
    """One line on why there are no figures."""
    if status is None:
        _, _, where = log.rpartition("Current thread")  # what Python's fault handler said when it was told to stop
        calls = [f"{Path(file).name}:{line} {name}" for file, line, name in re.findall(r'File "(.*?)", line (\d+),? in (\S+)', where)]
        return f"not finished in {timeout} s" + (f"; it was in {' < '.join(calls[:8])}" if calls else "")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line or line.startswith("fengshen fit:")]
    return (told or lines or [f"exit status {status}"])[-1][:400]


def end(process):
    """End what is left of a process and of what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def execute(row, data, folder, smoke, timeout):
    """(what it printed, its exit status or None where its time was up, what was watched meanwhile)"""
    started = time.time()
    watch = Watch(Path(folder, "run", "metrics.jsonl"), started)
    watch.start()
    with open(Path(folder, "log"), "w+") as log:
        environment = dict(FENGSHEN_CACHE=f"{tempfile.gettempdir()}/fengshen-gpu") | os.environ
        environment["PYTHONFAULTHANDLER"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(command(row, data, folder, smoke, started), stdout=log, stderr=log, start_new_session=True, env=environment)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
            process.send_signal(signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            end(process)
            watch.ended.set()
        log.seek(0)
        return log.read(), status, watch


def describe(name, row):
    """What a row says of itself before it is run."""
    config = gpu_data.MODELS[row["model"]]
    what = dict(
        name=name,
        side=row["side"],
        group=row["group"],
        model=row["model"],
        states=row["states"],
        dropout=0.0 if config["model_type"] == "qwen3" else 0.1,
    )
    if row["side"] == "ours":
        return what | dict(library="fengshen", recipe=row["recipe"], settings=row["flags"])
    return what | dict(
        library=row["case"].get("trainer", "hf"), tuned=row["tuned"], settings={key: value for key, value in row["case"].items() if key != "trainer"}
    )


def share(row, name_of_lengths, data, rate, peak, smoke):
    """The model's arithmetic a second, to what the device can do."""
    pretrain = row.get("recipe", "").startswith("pretrain") or row.get("case", {}).get("batch") in ("windows", "masked", "spans")
    length = 1024 if row["model"].startswith("gpt2") else 512
    lengths = [length] if pretrain else gpu_data.documents(data, name_of_lengths)[1]
    adapter = bool(row["flags"].get("model.lora") if row["side"] == "ours" else row["case"].get("lora"))
    work = gpu_data.arithmetic(gpu_data.shape_of(row["model"], smoke), lengths, adapter)
    rate /= row["flags"].get("trainer.devices", 1) if row["side"] == "ours" else 1
    return dict(mfu=round(rate * work / peak / 1e12, 3), mfu_989=round(rate * work / 989e12, 3)) if work and peak else {}


def measure(name, data, facts, smoke=False, timeout=300):
    """Run one configuration: its row."""
    row, start = ROWS[name], time.time()
    with tempfile.TemporaryDirectory() as folder:
        log, status, watch = execute(row, data, folder, smoke, timeout)
        ours_here = row["side"] == "ours"
        found = of_run(folder, watch, 1 if smoke else row["warm"]) if ours_here else of_peer(log)
    out = describe(name, row) | facts | dict(wall_s=round(time.time() - start, 1), host_gib=round((watch.most - watch.before) / 2**30, 1)) | found
    if "tokens_per_second" in found:
        lengths = row["lengths"] if ours_here else row["case"].get("lengths", "zh")
        out |= share(row, lengths, data, found["tokens_per_second"], facts.get("matmul_tflops"), smoke)
    if status != 0 or "tokens_per_second" not in found:
        sys.stderr.write(log[-6000:])
        out["error"] = reason(log, status, timeout)
    return out


# ---------------------------------------------------------------------------------------------------------------- table
def medians(rows):
    """One row a name: medians over the rounds that have figures."""
    out = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        runs = [row for row in rows if row["name"] == name]
        good = [row for row in runs if "tokens_per_second" in row and "error" not in row]
        numbers = ("tokens_per_second", "tokens_per_step", "mfu", "reserved_gib", "allocated_gib", "host_gib", "first_step_s")
        out[name] = (
            runs[-1]
            | dict(runs=len(good))
            | {key: statistics.median(r[key] for r in good if key in r) for key in numbers if any(key in r for r in good)}
        )
        out[name].pop("error" if good else "", None)
    return out


def fastest(rows, stock=False):
    """Tokens a second of the fastest peer, or None."""
    return max((row["tokens_per_second"] for row in rows if row["side"] == "peer" and row["runs"] and not (stock and row["tuned"])), default=None)


def line(row, best, stock):
    """A row as markdown."""
    if not row["runs"]:
        return [row["name"], row["library"], row["states"], row.get("error", ""), *[""] * 9]
    rate, is_ours = row["tokens_per_second"], row["side"] == "ours"
    ratios = [f"{rate / other:.2f}" if is_ours and other else "" for other in (best, stock)]
    forms = dict(mfu=".1%", reserved_gib=".1f", allocated_gib=".1f", host_gib=".0f", first_step_s=".0f", tokens_per_step=",.0f", runs="d")
    numbers = [format(row[key], form) if key in row else "" for key, form in forms.items()]
    return [row["name"], row["library"], row["states"], f"{rate:,.0f}", *ratios, *numbers]


HEAD = [
    "row",
    "library",
    "states",
    "real tokens/s",
    "to the best peer",
    "to the best stock",
    "MFU",
    "reserved",
    "allocated",
    "host",
    "first step s",
    "tokens a step",
    "rounds",
]


def newest(rows):
    """Of each name, the rows of the last call that has figures of it: programs and machines change from call to call."""
    last = {row["name"]: row.get("call") for row in rows} | {row["name"]: row.get("call") for row in rows if row.get("tokens_per_second")}
    return [row for row in rows if row.get("call") == last[row["name"]]]


def table(file):
    """The file as markdown, a table a group: the newest figures of each row, compared with the peers of the same call."""
    every = [json.loads(text) for text in Path(file).read_text("utf8").splitlines()]
    rows, parts = medians(newest(every)), []
    for group in dict.fromkeys(row["group"] for row in rows.values()):
        members, body = [row for row in rows.values() if row["group"] == group], []
        for row in members:
            others = medians([other for other in every if other["group"] == group and other.get("call") == row.get("call")]).values()
            body.append(line(row, fastest(others), fastest(others, stock=True)))
        parts.append(f"### {group}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *body)))
    return "\n\n".join(parts)


def chosen(options):
    """The names asked for, in the order of the list; a pattern that fits nothing ends the program."""
    names = [name for name, row in ROWS.items() if not options.group or any(word in row["group"] for word in options.group)]
    for pattern in options.only or []:
        if not fnmatch.filter(names, pattern):
            sys.exit(f"no configuration fits {pattern!r}; --list names them")
    return [name for name in names if not options.only or any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]


def measure_all(options, data):
    """Round after round, each row written as soon as it is there."""
    names, start = chosen(options), time.time()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a process whose time is up is aborted, to say where it is
    for number in range(options.rounds):
        facts = dict(round=number) | ({} if options.smoke else matmul())
        for name in names:
            if time.time() - start > 60 * options.minutes:
                return
            row = measure(name, data, facts, options.smoke, options.timeout)
            print(json.dumps(row), flush=True)
            if options.out:
                with open(options.out, "a", encoding="utf8") as f:
                    f.write(json.dumps(row) + "\n")


def main():
    if sys.argv[1:2] == ["--fit"]:
        return fit(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--group", nargs="*")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--out")
    for flag in ("smoke", "list", "table"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args()
    options.out = options.out or ("" if options.smoke else str(HERE / "results" / "gpu.jsonl"))
    if options.list:
        return print("\n".join(f"{name:24} {ROWS[name]['group']}" for name in chosen(options)))
    if options.table:
        return print(table(options.out))
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            if not options.smoke:
                parser.error("--data FOLDER is needed (benchmarks/gpu_data.py writes it)")
            gpu_data.write_demo(folder)
        measure_all(options, options.data or folder)


if __name__ == "__main__":
    main()
