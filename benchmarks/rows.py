"""How a batch is laid out, and what that costs: a JSON line for each layout of the same data.

usage: python benchmarks/rows.py --train FILE --tokenizer FOLDER [--repeat N] [--steps N] [--out FILE] [--any.flag=VALUE ...]

The same GPT-2 of 1.1B parameters (20 layers, 2048 wide, random weights) learns the same pairs by `fengshen fit`, each layout in a process
of its own: packed rows of 1,024 tokens, packed rows of 4,096 with as many tokens in a batch, the first with flex attention, and padded
(uncompiled, for its shapes change). `tokens_per_second` is the median of the real tokens a second after the first 12 steps, over all
repetitions; `fill` the share of the computed tokens that were real.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = dict(model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=2048, n_layer=20, n_head=32,
             resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=50256, eos_token_id=50256)
COMMON = ["--data.valid", "null", "--trainer.val_check_interval", "null", "--trainer.log_every_n_steps", "1",
          "--export", "false", "--checkpoint.at_end", "false", "--overwrite", "true"]
LAYOUTS = {
    "packed, rows of 1,024": ["--data.micro_batch", "8"],
    "packed, rows of 4,096": ["--data.micro_batch", "2", "--data.row_length", "4096"],
    "packed, rows of 1,024, flex": ["--data.micro_batch", "8", "--model.attention", "flex"],
    "padded by length, uncompiled": ["--data.micro_batch", "8", "--data.packing", "false", "--model.compile", "false"],
}
WARM = 12  # steps


def measure(layout, options, folder, repetition):
    "The records of one run after its first steps."
    run = folder / f"{list(LAYOUTS).index(layout)}-{repetition}"
    words = ["-c", "medical_qa", "--model.config", str(folder / "config.json"), "--data.train", options.train, "--data.tokenizer", options.tokenizer,
             "--trainer.max_steps", str(options.steps), "--run_dir", str(run), *COMMON, *LAYOUTS[layout], *options.rest]
    subprocess.run([sys.executable, "-m", "fengshen.cli.main", "fit", *words], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf8").splitlines()][WARM:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--train", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", default="/dev/stdout")
    options, options.rest = parser.parse_known_args()
    import torch

    from fengshen.utils import device

    name = torch.cuda.get_device_name() if device.device_kind() == "cuda" else device.device_kind()
    with tempfile.TemporaryDirectory() as folder, open(options.out, "a", encoding="utf8") as out:
        folder = Path(folder)
        (folder / "config.json").write_text(json.dumps(MODEL))
        for layout in LAYOUTS:
            records = [r for n in range(options.repeat) for r in measure(layout, options, folder, n)]
            rates = [r["tokens_per_second"] for r in records]
            line = dict(layout=layout, tokens_per_second=round(statistics.median(rates)), fill=round(statistics.mean(r["fill"] for r in records), 4),
                        memory_gib=records[-1]["memory_gib"], runs=options.repeat, device=name, torch=torch.__version__)
            print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    main()
