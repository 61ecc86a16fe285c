"""Corruption of batches of 256 rows of 512 tokens on one core: a JSON line each.

usage: python benchmarks/masking.py [--shared FOLDER] [--rounds N] [--only WORD] [--out FILE]

Rows are stretches of Chinese laws (FOLDER/data/corpus/zh_laws.jsonl.xz) under FOLDER/data/tokenizers/bert_base_chinese with 100
sentinels added. Speeds are tokens of the result's rows a second of CPU time, medians of the rounds; `load` is the machine's. `batch` is an
objective's whole batch, as training gets it; `corrupt` is the function on arrays. Beside them:

  transformers   DataCollatorForLanguageModeling on the same rows, special tokens and padding included
  per sample     T5's span corruption written for one text at a time in NumPy, its results padded into tensors
"""

import argparse
import json
import lzma
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import DataCollatorForLanguageModeling  # noqa: E402

from fengshen.data.masking import T5, Bart, Bert, Pegasus, UniLM, bert_corrupt, t5_corrupt  # noqa: E402
from fengshen.tokenizer.load import load_tokenizer  # noqa: E402

ROWS, LENGTH, SEED = 256, 512, 0


def stream(folder, tokenizer, tokens):
    """int64 [tokens]: the beginning of a corpus."""
    found = []
    with lzma.open(folder / "data/corpus/zh_laws.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            found += tokenizer(max((v for v in record.values() if isinstance(v, str)), key=len), add_special_tokens=False, verbose=False)["input_ids"]
            if len(found) >= tokens:
                return np.array(found[:tokens])
    raise SystemExit(f"the corpus has only {len(found):,} tokens")


def divided(total, parts, rng):
    """Lengths of `parts` stretches of `total` tokens."""
    cuts = np.sort(rng.choice(np.arange(1, total), parts - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]))


def t5_per_sample(ids, sentinels, end, rng, rate=0.15, mean_span=3.0):
    """(input, target) of one text."""
    hidden = round(len(ids) * rate)
    spans = round(hidden / mean_span)
    source, target, at = [], [], 0
    for k, (seen, gone) in enumerate(zip(divided(len(ids) - hidden, spans, rng), divided(hidden, spans, rng))):
        source += [ids[at : at + seen], sentinels[k : k + 1]]
        target += [sentinels[k : k + 1], ids[at + seen : at + seen + gone]]
        at += seen + gone
    return np.concatenate([*source, [end]]), np.concatenate([*target, [end]])


def t5_batch(rows, sentinels, end):
    """A batch of texts, one after the other."""
    pairs = [t5_per_sample(row, sentinels, end, np.random.default_rng([SEED, i])) for i, row in enumerate(rows)]
    return [torch.nn.utils.rnn.pad_sequence([torch.from_numpy(pair[k]) for pair in pairs], True) for k in (0, 1)]


def speed(function, rounds):
    """Tokens of a second of CPU time, the median of the rounds."""
    function()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return ROWS * LENGTH / statistics.median(seconds)


def cases(tokenizer, flat):
    """[(what, who, function)]"""
    index, objectives = np.arange(ROWS), {
        "Bert(whole_word=False)": Bert(whole_word=False), "Bert()": Bert(), "Bert(ngrams=3)": Bert(ngrams=3),
        "Bert(sentence_order=True)": Bert(sentence_order=True), "Bert(jieba=True)": Bert(jieba=True),
        "T5()": T5(), "Bart()": Bart(), "Pegasus()": Pegasus(), "UniLM()": UniLM()}
    for name, objective in objectives.items():
        bound = objective.bind(tokenizer)
        texts = flat[: ROWS * bound.source_length(LENGTH)].reshape(ROWS, -1)
        yield name, "batch", lambda: bound.batch(texts, ROWS, LENGTH, SEED, 0, index)
    texts = flat[: ROWS * (LENGTH - 2)].reshape(ROWS, -1)
    whole = np.pad(texts, ((0, 0), (1, 1)))
    whole[:, 0], whole[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    yield "Bert(whole_word=False)", "corrupt", lambda: bert_corrupt(whole, SEED, index, 0, bound.pieces, whole_word=False)
    collate, samples = DataCollatorForLanguageModeling(tokenizer, seed=SEED), [dict(input_ids=row) for row in whole.tolist()]
    yield "Bert(whole_word=False)", "transformers", lambda: collate(samples)
    fast = [dict(input_ids=torch.from_numpy(row), special_tokens_mask=torch.from_numpy(np.isin(row, tokenizer.all_special_ids))) for row in whole]
    yield "Bert(whole_word=False)", "transformers, tensors and their masks made before", lambda: collate([dict(sample) for sample in fast])
    long = flat[: ROWS * T5().bind(tokenizer).source_length(LENGTH)].reshape(ROWS, -1)
    sentinels = np.array(tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)]))
    yield "T5()", "corrupt", lambda: t5_corrupt(long, SEED, index, 0, bound.pieces)
    yield "T5()", "per sample", lambda: t5_batch(long, sentinels, tokenizer.sep_token_id)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(asked.shared / "data/tokenizers/bert_base_chinese")
    tokenizer.add_special_tokens(dict(additional_special_tokens=[f"<extra_id_{i}>" for i in range(100)]))
    flat = stream(asked.shared, tokenizer, ROWS * 600)
    for what, who, function in cases(tokenizer, flat):
        if asked.only in what:
            line = json.dumps(dict(what=what, who=who, tokens_per_second=round(speed(function, asked.rounds)), load=round(os.getloadavg()[0], 1)))
            print(line, flush=True)
            if asked.out:
                with asked.out.open("a", encoding="utf-8") as out:
                    out.write(line + "\n")


if __name__ == "__main__":
    main()
