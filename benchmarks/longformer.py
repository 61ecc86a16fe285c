"""Time and peak memory of a Longformer of published size, by length, against transformers' Longformer and full attention: a JSON line each.

usage: python benchmarks/longformer.py [--lengths N ...] [--models NAME ...] [--blocks N] [--forward] [--device cuda] [--out FILE]

Random weights and ids, one text, the first token global, window 128, every model with 12 heads of 64 and one block (--blocks: a model of
12 costs 12 times that). Models: `sparse` is this library's (chunks on a CPU, FlexAttention on an accelerator), `dense` is the same with
full attention through sdpa, `hf` is transformers' LongformerModel. Float32 on a CPU, bfloat16 on an accelerator. Dropout is 0. Seconds
are those of forward and backward (with --forward: of forward), the median of three runs after one that does not count (one run where the
first took 10 seconds or more); on a CPU they are seconds of processor time, all threads together, so that neighbours do not count. Peak
memory is what the first run needs above what was there before it, weights left out; on a CPU it is the largest resident size. Each line
is measured in a process of its own. A run that fails, or takes more than 10 minutes, says so.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

SIZES = dict(vocab_size=12000, hidden_size=768, num_attention_heads=12, intermediate_size=3072, type_vocab_size=2, hidden_dropout_prob=0.0,
             attention_probs_dropout_prob=0.0, attention_window=128, pad_token_id=0)
MODELS = ("sparse", "dense", "hf")


def build(name, length, blocks):
    """The model, without a pooler."""
    import transformers

    from fengshen.models.longformer import LongformerConfig, LongformerModel

    sizes = dict(SIZES, num_hidden_layers=blocks, max_position_embeddings=length + 2)
    if name == "hf":
        return transformers.LongformerModel(transformers.LongformerConfig(**sizes), add_pooling_layer=False)
    return LongformerModel(LongformerConfig(**sizes, use_sparse_attention=name == "sparse"), add_pooling_layer=False)


class Peak:
    """The largest memory while a block of code runs, in bytes above what there was: of the device, or of the process."""

    def __init__(self, device):
        self.device = device

    def resident(self):
        """Bytes of memory this process holds."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def watch(self):
        """Look at the memory every 2 ms."""
        while not self.done.wait(0.002):
            self.most = max(self.most, self.resident())

    def __enter__(self):
        import torch

        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        self.before = self.most = self.resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        import torch

        if self.device != "cpu":
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.done.set()
        self.thread.join()
        self.bytes = self.most - self.before


def measure(name, length, blocks, device, forward):
    """One line of the record."""
    import torch

    torch.manual_seed(0)
    model = build(name, length, blocks).to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    ids = torch.randint(5, SIZES["vocab_size"], (1, length), device=device)
    far = torch.zeros_like(ids)
    far[:, 0] = 1
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids), global_attention_mask=far)

    clock = time.process_time if device == "cpu" else time.perf_counter

    def run():
        start = clock()
        with torch.set_grad_enabled(not forward):
            out = model(**given).last_hidden_state
            if not forward:
                out.float().square().mean().backward()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    with Peak(device) as peak:
        first = run()
    seconds = statistics.median(run() for _ in range(3 if first < 10 else 1))
    card = "CPU" if device == "cpu" else torch.cuda.get_device_name()
    return dict(model=name, length=length, blocks=blocks, seconds=round(seconds, 4), tokens_per_second=round(length / seconds),
                peak_mib=round(peak.bytes / 2**20, 1), passes="forward" if forward else "forward and backward", device=card,
                threads=torch.get_num_threads())


def apart(options, name, length):
    """The line, measured in a process of its own."""
    command = [sys.executable, __file__, "--one", "--models", name, "--lengths", str(length), "--blocks", str(options.blocks),
               "--device", options.device, *["--forward"] * options.forward]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return json.dumps(dict(model=name, length=length, failed="more than 10 minutes"))
    if done.returncode:
        return json.dumps(dict(model=name, length=length, failed=(done.stderr.strip().splitlines() or ["killed: no memory left"])[-1][:200]))
    return done.stdout.strip().splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--forward", action="store_true", help="measure the forward pass only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", action="store_true", help="measure here and print")
    parser.add_argument("--out", default="benchmarks/results/longformer.jsonl")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.models[0], options.lengths[0], options.blocks, options.device, options.forward)))
        return
    for length in options.lengths:
        for name in options.models:
            line = apart(options, name, length)
            print(line, flush=True)
            with Path(options.out).open("a", encoding="utf8") as f:
                f.write(line + "\n")


if __name__ == "__main__":
    main()
