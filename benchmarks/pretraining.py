"""From raw text to a small pretrained model of every kind, by the commands a user would type; a JSON line each.

usage: python benchmarks/pretraining.py TEXTS [--work FOLDER] [--only NAME ...] [--steps 200] [--megabytes 20] [--out FILE]

TEXTS is a file with one document a line ({"text": ...}), perhaps compressed. Of its beginning two tokenizers are trained (WordPiece, byte-level
BPE; 8,192 tokens), the text is written out under each, and every recipe `pretrain_*` is trained at its size `7m` on a CPU. Each is trained twice:
once whole, and once killed (SIGKILL) after half of the steps and begun again with the same command. A line says

  valid          the loss of held-out text at the end, in nats a scored token
  baseline       what the objective's labels cost under their own frequencies in training (one added to each): the unigram
  second         the same pair for the second loss, where there is one: the order of two parts, the edits
  apart          the largest difference between the two curves, at any step; 0 where the second run computed the first's numbers

The held-out text is the last hundredth of the corpus, its masks are those of epoch 0. Losses are those that `fengshen fit` logged.
"""

import argparse
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np  # noqa: E402

from fengshen.cli.fit import make_cli, split_args  # noqa: E402
from fengshen.cli.recipes import recipe_names  # noqa: E402

HELD_OUT = 25  # validation batches
SECOND = dict(sentence_labels="sentence_loss", encoder_labels="edit_loss")
LONG = ("pretrain_longformer",)  # rows of four windows; all others 64 tokens
BYTES = ("pretrain_gpt2", "pretrain_llama")  # byte-level BPE; all others WordPiece


def command(*words):
    """`fengshen WORDS` in a process of its own; ends this one where it fails."""
    done = subprocess.run([sys.executable, "-m", "fengshen.cli.main", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fengshen {' '.join(map(str, words))}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def beginning(texts, target, megabytes):
    """The first megabytes of a file, whole lines."""
    if target.exists():
        return target
    left = megabytes * 10**6
    with (lzma.open if texts.suffix == ".xz" else open)(texts, "rt", encoding="utf8") as lines, target.open("w", encoding="utf8") as out:
        for line in lines:
            left -= len(line.encode())
            if left < 0:
                break
            out.write(line)
    return target


def corpora(texts, work):
    """{kind: (tokenizer's folder, corpus)}; what is there already stays."""
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    found = {}
    for kind, marks in dict(wordpiece=["--marks", *sentinels], byte_bpe=[]).items():
        tokenizer, corpus = work / f"tokenizer_{kind}", work / f"corpus_{kind}"
        if not tokenizer.exists():
            command("tokenizer", "train", texts, "--preset", kind, "--vocab_size", 8192, *marks, "--out", tokenizer)
        if not corpus.exists():
            command("preprocess", texts, "--out", corpus, "--tokenizer", tokenizer, "--append_eod")
        found[kind] = tokenizer, corpus
    return found


def words_of(name, place, run, steps):
    """The command line of a run."""
    tokenizer, corpus = place
    settings = {
        "size": "7m", "data.train": corpus, "data.tokenizer": tokenizer, "run_dir": run, "trainer.max_steps": steps,
        "global_batch": 2 if name in LONG else 8, "data.max_length": 256 if name in LONG else 64, "valid_every": steps,
        "checkpoint.every_n_steps": steps // 4, "export": "false",
        "trainer.accelerator": "cpu", "trainer.limit_val_batches": HELD_OUT, "model.samples": 0}
    return ["-c", name, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def records(run, split):
    """Lines of a run's record; a step that was computed twice counts once."""
    with suppress(FileNotFoundError):
        return [row for row in map(json.loads, (run / "metrics.jsonl").read_text("utf8").splitlines()) if row["split"] == split]
    return []


def killed_halfway(words, run, steps):
    """Start a run, and end it by SIGKILL once its record holds half of the steps."""
    command = [sys.executable, "-m", "fengshen.cli.main", "fit", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(records(run, "train")) < steps // 2:
            time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself: fengshen fit {' '.join(words)}")
        process.send_signal(signal.SIGKILL)


def counted(batches, vocabulary, key):
    """How often each label is scored in batches."""
    counts = np.zeros(vocabulary, np.int64)
    for batch in batches:
        labels = batch[key].numpy().astype(np.int64).reshape(-1) if key != "labels" else batch[key][:, 1:].numpy().reshape(-1)
        counts += np.bincount(labels[labels >= 0], minlength=vocabulary)[:vocabulary]
    return counts


def unigram(train, valid):
    """Nats a label of `valid` under the frequencies of `train`, one added to each."""
    return float(-(valid * np.log((train + 1) / (train.sum() + len(train)))).sum() / valid.sum())


def baselines(words, steps):
    """{key of labels: unigram} of the objective of a run, from the batches it saw and was validated on."""
    cli = make_cli(*split_args(words))
    cli.datamodule.trainer = cli.trainer
    cli.trainer.strategy.connect(cli.model)
    cli.datamodule.setup("fit")
    train = [batch for batch, _ in zip(cli.datamodule.train_dataloader(), range(steps * cli.trainer.accumulate_grad_batches))]
    valid = [batch for batch, _ in zip(cli.datamodule.val_dataloader(), range(HELD_OUT))]
    size = len(cli.datamodule.tokenizer)
    kinds = {key: count for key, count in dict(labels=size, sentence_labels=2, encoder_labels=8).items() if key in train[0]}
    return {key: unigram(counted(train, count, key), counted(valid, count, key)) for key, count in kinds.items()}


def measure(name, place, work, steps):
    """One recipe's line."""
    whole, broken = work / f"{name}_whole", work / f"{name}_killed"
    start = time.monotonic()
    command("fit", *words_of(name, place, whole, steps))
    seconds = time.monotonic() - start
    killed_halfway(words_of(name, place, broken, steps), broken, steps)
    at = len(records(broken, "train"))
    command("fit", *words_of(name, place, broken, steps))
    curves = [[row["loss"] for row in records(run, "train")] for run in (whole, broken)]
    if [len(curve) for curve in curves] != [steps, steps]:
        raise SystemExit(f"{name}: {[len(curve) for curve in curves]} steps are recorded, not {steps}")
    valid, again = (records(run, "valid")[-1] for run in (whole, broken))
    base = baselines(words_of(name, place, work / f"{name}_baseline", steps), steps)
    second = {field: dict(valid=round(valid[field], 4), baseline=round(base[key], 4)) for key, field in SECOND.items() if key in base}
    apart = max(abs(a - b) for a, b in zip([*curves[0], valid["loss"]], [*curves[1], again["loss"]]))
    tokens = records(whole, "train")[-1]["tokens"]
    return dict(recipe=name, steps=steps, tokens=tokens, valid=round(valid.get("token_loss", valid["loss"]), 4), baseline=round(base["labels"], 4),
                second=second, killed_at=at, apart=apart, seconds=round(seconds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/pretraining"))
    parser.add_argument("--only", nargs="+", default=[name for name in recipe_names() if name.startswith("pretrain_")])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    places = corpora(beginning(asked.texts, asked.work / "texts.jsonl", asked.megabytes), asked.work)
    for name in asked.only:
        found = measure(name, places["byte_bpe" if name in BYTES else "wordpiece"], asked.work, asked.steps)
        line = json.dumps(found | dict(load=round(os.getloadavg()[0], 1)))
        print(line, flush=True)
        if asked.out:
            with asked.out.open("a", encoding="utf8") as out:
                out.write(line + "\n")


if __name__ == "__main__":
    main()
