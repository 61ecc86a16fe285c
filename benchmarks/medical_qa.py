"""Train the `medical_qa` recipe and hold its validation loss against n-gram models of the same answers.

usage: python benchmarks/medical_qa.py --train FILE --valid FILE --tokenizer FOLDER [--run_dir DIR] [--any.flag VALUE ...]

The unigram is the answers' token frequencies in the training file, add-one smoothed; the bigram is interpolated with it
(Witten-Bell). Both are evaluated, like the model, in nats per scored token of the validation file: the answer and its end.
"""

import argparse
import json
import math
from collections import Counter, defaultdict

from fengshen.cli.fit import fit
from fengshen.cli.recipes import read_recipe
from fengshen.data.task_dataloader.conversations import ConversationDataset
from fengshen.tokenizer import load_tokenizer


def answers(dataset):
    """Yield (previous token, token) of every scored position."""
    for i in range(len(dataset)):
        sample = dataset[i]
        ids, labels = sample["input_ids"], sample["labels"]
        for t in range(1, len(ids)):
            if labels[t] != -100:
                yield int(ids[t - 1]), int(ids[t])


def ngrams(train, valid, vocabulary):
    """Cross entropy of the validation answers, in nats per token: (unigram, bigram)."""
    one, two = Counter(), defaultdict(Counter)
    for before, token in answers(train):
        one[token] += 1
        two[before][token] += 1
    total = sum(one.values())
    totals = {k: sum(v.values()) for k, v in two.items()}
    uni = bi = n = 0
    for before, token in answers(valid):
        p = (one[token] + 1) / (total + vocabulary)
        seen, kinds = totals.get(before, 0), len(two[before]) if before in two else 0
        q = (two[before][token] + kinds * p) / (seen + kinds) if seen else p
        uni, bi, n = uni - math.log(p), bi - math.log(q), n + 1
    return uni / n, bi / n


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--run_dir", default="runs/medical_qa")
    parser.add_argument("--out", default="benchmarks/results/medical_qa.jsonl")
    options, rest = parser.parse_known_args()
    overrides = dict(pair.lstrip("-").split("=", 1) for pair in rest)
    recipe = read_recipe("medical_qa")["data"]
    tokenizer = load_tokenizer(options.tokenizer)
    settings = dict(max_length=recipe["max_length"], on_long=recipe["on_long"])
    train = ConversationDataset(options.train, tokenizer, **settings)
    valid = ConversationDataset(options.valid, tokenizer, limit=recipe["limit_valid"], **settings)
    unigram, bigram = ngrams(train, valid, len(tokenizer))
    print(f"smoothed unigram {unigram:.3f}, bigram {bigram:.3f} nats per scored token of the validation answers")
    files = {"data.train": options.train, "data.valid": options.valid, "data.tokenizer": options.tokenizer}
    run = fit("medical_qa", files | {"run_dir": options.run_dir, "overwrite": True} | overrides)
    curve = [(r["step"], round(r["loss"], 4)) for r in run.records("valid")]
    row = dict(unigram=round(unigram, 4), bigram=round(bigram, 4), valid=curve, gain_over_unigram=round(unigram - curve[-1][1], 3), **run.summary())
    row.pop("export", None)
    print(json.dumps(row))
    for sample in run.samples()[-3:]:
        print(json.dumps(sample, ensure_ascii=False))
    with open(options.out, "a", encoding="utf8") as f:
        f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
