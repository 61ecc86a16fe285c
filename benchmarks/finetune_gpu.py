"""Finetune a 3.56B GPT-2 on question-answer pairs through `fengshen fit`, a JSON line a configuration.

usage: python benchmarks/finetune_gpu.py --train FILE --tokenizer FOLDER [--out FILE] [NAME ...]

Each configuration is a process of its own: `fengshen fit` with a packaged recipe and random weights of the 3.56B shape
(30 layers, 3072 wide, 32 heads, vocabulary 50,304). Tokens are real ones, padding not counted; the speed is the median of the
logged steps after the first `WARM`. Memory is the peak that torch reserved on the device. `share` is the model's arithmetic
(6 x parameters in matrix products per token) against a bfloat16 matrix product timed in the same run.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM = 4
MATMUL_PARAMETERS = 50304 * 3072 + 30 * 12 * 3072**2
COMMON = {
    "model.path": "null",
    "model.config": "fengshen:models/gpt2_3.5b.json",
    "data.on_long": "truncate",
    "trainer.devices": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.limit_val_batches": 0,
    "export": "false",
    "checkpoint.at_end": "false",
}
CONFIGURATIONS = {
    "default": ("wenzhong_qa", {"trainer.max_steps": 20}),
    "default_single": ("wenzhong_qa", {"trainer.max_steps": 16, "trainer.strategy": "auto"}),
    "default_uncompiled": ("wenzhong_qa", {"trainer.max_steps": 14, "model.compile": "false"}),
    "default_sdpa": ("wenzhong_qa", {"trainer.max_steps": 14, "model.attention": "sdpa"}),
    "default_padded": ("wenzhong_qa", {"trainer.max_steps": 14, "data.packing": "false"}),
    "zero3": ("wenzhong_qa", {"trainer.max_steps": 14, "trainer.strategy": "zero3"}),
    "offload": ("wenzhong_qa_offload", {"trainer.max_steps": 6}),
}


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
print(2 * n**3 / statistics.median(times[5:]) / 1e9)
"""


def matmul_tflops():
    """bfloat16 8192^3 matrix products per second on this device, in TFLOP/s (median of 20)."""
    return float(subprocess.run([sys.executable, "-c", MATMUL], capture_output=True, text=True, check=True).stdout)


def measure(name, train, tokenizer, extra):
    """Run one configuration; its figures, or its error as a row."""
    recipe, settings = CONFIGURATIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        flags = COMMON | settings | {"data.train": train, "data.tokenizer": tokenizer, "run_dir": f"{folder}/run"}
        words = [sys.executable, "-m", "fengshen.cli.main", "fit", "-c", recipe, *[f"--{k}={v}" for k, v in flags.items()], *extra]
        started = time.time()
        done = subprocess.run(words, capture_output=True, text=True)
        wall = time.time() - started
        sys.stderr.write(done.stdout[-6000:] + done.stderr[-6000:])
        file = Path(folder) / "run" / "metrics.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    row = dict(name=name, recipe=recipe, settings=settings, wall_s=round(wall, 1), steps=len(records))
    if done.returncode or len(records) <= WARM:
        return row | dict(error=(done.stderr or done.stdout).strip().splitlines()[-1:])
    steady = records[WARM:]
    return row | dict(
        tokens_per_second=statistics.median(r["tokens_per_second"] for r in steady),
        tokens_per_step=round(steady[-1]["tokens"] / steady[-1]["step"]),
        gpu_gib=max(r["memory_gib"] for r in records),
        host_gib=round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 1),
        first_step_s=round(wall - records[-1]["time"] + records[0]["time"], 1),
        losses=[round(r["loss"], 4) for r in records],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", default="benchmarks/results/finetune_gpu.jsonl")
    parser.add_argument("names", nargs="*", default=["default", "offload"])
    options, extra = parser.parse_known_args()
    peak = matmul_tflops()
    for name in options.names:
        row = measure(name, options.train, options.tokenizer, extra)
        if "tokens_per_second" in row:
            row |= dict(matmul_tflops=round(peak), share=round(6 * MATMUL_PARAMETERS * row["tokens_per_second"] / 1e12 / peak, 3))
        print(json.dumps(row), flush=True)
        with open(options.out, "a", encoding="utf8") as f:
            f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
