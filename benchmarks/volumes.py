"""What each process sends in an optimizer step, counted at the collective operations of a run on CPUs: a JSON line a strategy.

usage: python benchmarks/volumes.py [--processes N ...] [--only STRATEGY ...] [--accumulate N ...] [--out FILE]
       python benchmarks/volumes.py --table [--out FILE]

A GPT-2 of some three million parameters trains under bfloat16 in N processes (gloo). Every collective that DeepSpeed asks for is counted with its
data: `data` is bytes of the whole tensor by operation, `sent` what a ring sends of it from each process ((n - 1) / n of what is gathered or
scattered, twice that of what is summed everywhere), and `per_parameter` the same by 2 bytes of each parameter, which is the unit of the page
on scaling. DDP is counted at its buckets. Two steps after the first are averaged; what a step sends besides tensors of the model (its figures,
the overflow flag) is in `small` (operations of less than 1,024 numbers) and not in the rest. ZeRO-3 keeps weights between their uses while they
are below limits made for billions; `zero3` has these limits a thousandth as large, as the model is a thousandth of 3.5 billion, and `zero3_kept`
has them as they are.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_kept")
LIMITS = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold")
SHAPE = dict(model_type="gpt2", vocab_size=512, n_positions=128, n_embd=256, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
WARM, STEPS, SMALL = 1, 2, 1024
SUMMED = ("all_reduce", "all_reduce_coalesced", "inference_all_reduce")  # everywhere; the rest is gathered, scattered, or goes to or from one process
LARGEST = dict(all_gather_into_tensor=0, all_gather=0, reduce_scatter_tensor=1, reduce_scatter=1)  # which argument is the whole tensor


def nbytes(value):
    """Bytes of a tensor, or of the tensors of a list."""
    return sum(nbytes(v) for v in value) if isinstance(value, (list, tuple)) else value.numel() * value.element_size()


class Meter:
    """Bytes by operation while it is on."""

    def __init__(self):
        self.on, self.data, self.small = False, Counter(), Counter()

    def add(self, name, value):
        if self.on:
            size = nbytes(value)
            (self.small if size < 2 * SMALL else self.data)[name] += size

    def watch(self, backend):
        """Count what a class of DeepSpeed's backends is asked for."""
        for name in (*SUMMED, *LARGEST, "reduce", "broadcast", "all_to_all_single"):
            if own := getattr(backend, name, None):
                setattr(backend, name, self.counting(name, own))

    def counting(self, name, own):
        def counted(backend, *args, **kwargs):
            given = [*args, *kwargs.values()]
            self.add(name, given[LARGEST.get(name, 0)])
            return own(backend, *args, **kwargs)

        return counted


def fit(out, words):
    """A run in this process, its collectives counted into a file."""
    import pytorch_lightning as pl
    from deepspeed.comm.torch import TorchBackend
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    from fengshen.cli.fit import prepare, run_fit

    meter = Meter()
    meter.watch(TorchBackend)

    class Watch(pl.Callback):
        def on_train_start(self, trainer, module):
            def hook(state, bucket):
                meter.add("all_reduce", bucket.buffer())
                return allreduce_hook(state, bucket)

            if isinstance(trainer.strategy.model, DistributedDataParallel):
                trainer.strategy.model.register_comm_hook(None, hook)

        def on_train_batch_start(self, trainer, module, batch, number):
            meter.on = WARM <= trainer.global_step < WARM + STEPS

        def on_train_batch_end(self, trainer, module, outputs, batch, number):
            meter.on = False
            if trainer.is_global_zero and trainer.global_step == WARM + STEPS:
                trained = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
                Path(out).write_text(json.dumps(dict(parameters=trained, data=meter.data, small=meter.small)))

    cli = prepare(words)
    cli.trainer.callbacks.append(Watch())
    run_fit(cli)


def strategy_word(strategy, folder):
    """What to give as `trainer.strategy`."""
    if strategy != "zero3":
        return strategy.removesuffix("_kept")
    from fengshen.training.deepspeed import read_config

    config = read_config("zero3")
    for name in LIMITS:
        config["zero_optimization"][f"stage3_{name}"] //= 1000
    file = Path(folder, "zero3.json")
    file.write_text(json.dumps(config))
    return json.dumps(dict(class_path="fengshen.training.deepspeed.AnyDeviceDeepSpeedStrategy", init_args=dict(config=str(file))))


def measure(strategy, processes, accumulate):
    """The row of a strategy."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "bytes.json")
        flags = {
            "run_dir": f"{folder}/run",
            "model.config": json.dumps(SHAPE),
            "data.packing": "false",
            "data.micro_batch": 1,
            "trainer.accumulate_grad_batches": accumulate,
            "trainer.max_steps": WARM + STEPS + 1,
            "trainer.devices": processes,
            "trainer.accelerator": "cpu",
            "trainer.precision": "bf16-mixed",
            "trainer.strategy": strategy_word(strategy, folder),
            "trainer.limit_val_batches": 0,
            "export": "false",
            "checkpoint.at_end": "false",
        }
        here = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *here]
        words = ["-c", "demo", *[f"--{key}={value}" for key, value in flags.items()]]
        order = [sys.executable, *launch, str(HERE / "volumes.py"), "--fit", str(out), *words]
        done = subprocess.run(order, capture_output=True, text=True)
        if not out.exists():
            sys.exit(done.stdout[-2000:] + done.stderr[-6000:])
        found = json.loads(out.read_text())
    return row_of(strategy, processes, accumulate, found)


def row_of(strategy, processes, accumulate, found):
    """What was counted, a step and a parameter."""
    ring, data = (processes - 1) / processes, {name: size / STEPS for name, size in found["data"].items()}
    sent = sum((2 if name in SUMMED else 1) * ring * size for name, size in data.items())
    return dict(
        strategy=strategy,
        processes=processes,
        accumulate=accumulate,
        parameters=found["parameters"],
        data={name: round(size) for name, size in data.items()},
        small={name: round(size / STEPS) for name, size in found["small"].items()},
        sent=round(sent),
        per_parameter=round(sent / ring / (2 * found["parameters"]), 3),
    )


def table(file):
    """The newest row of each kind, as markdown."""
    rows = {(r["strategy"], r["processes"], r["accumulate"]): r for r in map(json.loads, Path(file).read_text().splitlines())}
    head = ["strategy", "processes", "micro-batches", "sent: 2 bytes a parameter, (n - 1) / n", "data by operation, MB"]
    lines = [head, ["---"] * len(head)]
    for key, row in sorted(rows.items()):
        lines.append([*map(str, key), f"{row['per_parameter']:.2f}", ", ".join(f"{name} {size / 1e6:.1f}" for name, size in row["data"].items())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main():
    if sys.argv[1:2] == ["--fit"]:
        return fit(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="*", default=[2])
    parser.add_argument("--accumulate", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--only", nargs="*", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--out", default=str(HERE / "results" / "volumes.jsonl"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        return print(table(options.out))
    for strategy in options.only:
        for processes in options.processes:
            for accumulate in options.accumulate:
                row = measure(strategy, processes, accumulate)
                print(json.dumps(row), flush=True)
                with open(options.out, "a", encoding="utf8") as f:
                    f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
