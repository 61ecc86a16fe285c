"""What objectives cost: corruption of batches of 256 rows of 512 tokens, and learning a tokenizer, on one core; a JSON line each.

usage: python benchmarks/objectives.py [--shared FOLDER] [--rounds N] [--only WORD ...] [--out FILE]

Rows are stretches of Chinese laws (FOLDER/data/corpus/zh_laws.jsonl.xz) under FOLDER/data/tokenizers/bert_base_chinese with 100
sentinels added. `tokens_per_second` counts tokens of the result's rows, `seconds` what a training took; both are CPU time, medians of
rounds in which all rivals take turns; `load` is the machine's. `batch` is an objective's whole batch, as training gets it; `corrupt` is the
function on arrays. Beside them:

  transformers   DataCollatorForLanguageModeling on the same rows, special tokens and padding included: from lists, and from tensors and
                 masks that were made before; with whole_word_mask from offsets that were made before, in PyTorch and in NumPy
  nanoT5 style   a mask of spans for each row in NumPy, sentinels and targets for the batch at once, padding of one length
  per sample     span corruption written for one text at a time in NumPy, its results padded into tensors
  raw            the trainer of tokenizers or sentencepiece itself, on the same texts, with the same settings and as many threads

Tokenizers of 8,000 tokens are learned from the first 10 MB of the laws, with one thread of tokenizers; SentencePiece has the number of
threads that fengshen gives it. The lines `target` are ratios of these numbers beside what they are meant to be. A line replaces that of an
earlier run.
"""

import argparse
import io
import json
import lzma
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402
from transformers import DataCollatorForLanguageModeling  # noqa: E402

from fengshen.data.masking import T5, Bart, Bert, Pegasus, UniLM, bert_corrupt, t5_corrupt  # noqa: E402
from fengshen.data.masking.pieces import word_starts  # noqa: E402
from fengshen.tokenizer.load import load_tokenizer  # noqa: E402
from fengshen.tokenizer.presets import choose_preset  # noqa: E402
from fengshen.tokenizer.spm import spm_settings  # noqa: E402
from fengshen.tokenizer.train import train  # noqa: E402

ROWS, LENGTH, SEED = 256, 512, 0
TRAINING, VOCABULARY = 10_000_000, 8_000


def laws(folder):
    """Their texts."""
    with lzma.open(folder / "data/corpus/zh_laws.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield max((value for value in json.loads(line).values() if isinstance(value, str)), key=len)


def stream(folder, tokenizer, tokens):
    """int64 [tokens]: the beginning of the corpus."""
    found = []
    for text in laws(folder):
        found += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(found) >= tokens:
            return np.array(found[:tokens])
    raise SystemExit(f"the corpus has only {len(found):,} tokens")


def beginning(folder):
    """The first texts, of so many bytes."""
    texts, left = [], TRAINING
    for text in laws(folder):
        texts.append(text)
        left -= len(text.encode())
        if left <= 0:
            return texts
    raise SystemExit(f"the corpus lacks {left:,} bytes")


# the peers


def divided(total, parts, rng):
    """Lengths of `parts` stretches of `total` tokens."""
    cuts = np.sort(rng.choice(np.arange(1, total), parts - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]))


def per_sample(ids, sentinels, end, rng, rate=0.15, mean_span=3.0):
    """(input, target) of one text."""
    hidden = round(len(ids) * rate)
    spans = round(hidden / mean_span)
    source, target, at = [], [], 0
    for k, (seen, gone) in enumerate(zip(divided(len(ids) - hidden, spans, rng), divided(hidden, spans, rng))):
        source += [ids[at : at + seen], sentinels[k : k + 1]]
        target += [sentinels[k : k + 1], ids[at + seen : at + seen + gone]]
        at += seen + gone
    return np.concatenate([*source, [end]]), np.concatenate([*target, [end]])


def per_sample_batch(rows, sentinels, end):
    """A batch of texts, one after the other."""
    pairs = [per_sample(row, sentinels, end, np.random.default_rng([SEED, i])) for i, row in enumerate(rows)]
    return [torch.nn.utils.rnn.pad_sequence([torch.from_numpy(pair[k]) for pair in pairs], True) for k in (0, 1)]


def shuffled_parts(total, parts):
    """Lengths of `parts` stretches of `total` tokens, by shuffling where they begin."""
    begins = np.arange(total - 1) < parts - 1
    np.random.shuffle(begins)
    return np.unique(np.cumsum(np.pad(begins, [[1, 0]])), return_counts=True)[1]


def noise_mask(length, rate=0.15, mean_span=3.0):
    """bool [length]: hidden tokens of one text."""
    hidden = round(length * rate)
    spans = round(hidden / mean_span)
    gone, seen = shuffled_parts(hidden, spans), shuffled_parts(length - hidden, spans)
    starts = np.cumsum(np.stack([seen, gone], 1).reshape(-1))[:-1]
    begins = np.zeros(length, np.int8)
    begins[starts] = True
    return np.equal(np.cumsum(begins) % 2, 1)


def sentinel_ids(mask_bl, first):
    """int64: a sentinel where a stretch of the mask begins, -1 in the rest of it, 0 elsewhere."""
    begins_bl = mask_bl - np.roll(mask_bl, 1, axis=-1) * mask_bl
    begins_bl[:, 0] = mask_bl[:, 0]
    numbers_bl = np.where(begins_bl != 0, np.cumsum(begins_bl, axis=-1), begins_bl)
    return np.where(numbers_bl != 0, first + numbers_bl - 1, 0) - (mask_bl - begins_bl)


def without_hidden(ids_bl, sentinels_bl, end):
    """int64: the tokens with a sentinel for each stretch of the mask, and an end."""
    full_bl = np.where(sentinels_bl != 0, sentinels_bl, ids_bl)
    return np.concatenate([full_bl[full_bl >= 0].reshape(len(ids_bl), -1), np.full((len(ids_bl), 1), end)], axis=-1)


def nano_t5_batch(ids_bl, sentinels, end):
    """input, labels and decoder input of a batch, in the steps of nanoT5's collator."""
    mask_bl = np.asarray([noise_mask(ids_bl.shape[1]) for _ in ids_bl])
    given, labels = (without_hidden(ids_bl, sentinel_ids(mask.astype(np.int8), sentinels[0]), end) for mask in (mask_bl, ~mask_bl))
    shifted = np.zeros_like(labels)
    shifted[:, 1:] = labels[:, :-1]
    return [torch.from_numpy(side) for side in (given, labels, shifted)]


def whole_word_peers(tokenizer, rows, pieces):
    """(who, function): transformers' masking of whole words, its offsets made so that words begin where ours do."""
    marks = np.isin(rows, tokenizer.all_special_ids)
    starts = np.arange(rows.shape[1]) + np.cumsum(word_starts(rows, pieces), 1)
    offsets = np.stack([starts, starts + 1], 2)
    for kind, convert in (("pt", torch.from_numpy), ("np", lambda a: a)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it replaces by the mask only, and says so
            collate = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True, seed=SEED, return_tensors=kind)
        samples = [dict(input_ids=convert(ids), offset_mapping=convert(places), special_tokens_mask=convert(special))
                   for ids, places, special in zip(rows, offsets, marks.astype(np.int64))]
        yield f"transformers, {kind}", lambda collate=collate, samples=samples: collate([dict(sample) for sample in samples])


# what is measured


def batches(tokenizer, flat, kept):
    """(what, who, function): whole batches of objectives."""
    index, objectives = np.arange(ROWS), {
        "Bert(whole_word=False)": Bert(whole_word=False), "Bert()": Bert(), "Bert(ngrams=3)": Bert(ngrams=3),
        "Bert(sentence_order=True)": Bert(sentence_order=True), "Bert(jieba=True)": Bert(jieba=True),
        "Bert(jieba=True, keep_words=FOLDER)": Bert(jieba=True, keep_words=kept),
        "T5()": T5(), "Bart()": Bart(), "Pegasus()": Pegasus(), "UniLM()": UniLM()}
    for name, objective in objectives.items():
        bound = objective.bind(tokenizer)
        texts = flat[: ROWS * bound.source_length(LENGTH)].reshape(ROWS, -1)
        yield name, "batch", lambda bound=bound, texts=texts: bound.batch(texts, ROWS, LENGTH, SEED, 0, index)


def peers(tokenizer, flat):
    """(what, who, function): the functions on arrays, and the peers."""
    index, pieces = np.arange(ROWS), T5().bind(tokenizer).pieces
    rows = np.pad(flat[: ROWS * (LENGTH - 2)].reshape(ROWS, -1), ((0, 0), (1, 1)))
    rows[:, 0], rows[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    yield "Bert(whole_word=False)", "corrupt", lambda: bert_corrupt(rows, SEED, index, 0, pieces, whole_word=False)
    collate, samples = DataCollatorForLanguageModeling(tokenizer, seed=SEED), [dict(input_ids=row) for row in rows.tolist()]
    yield "Bert(whole_word=False)", "transformers", lambda: collate(samples)
    made = [dict(input_ids=torch.from_numpy(row), special_tokens_mask=torch.from_numpy(np.isin(row, tokenizer.all_special_ids))) for row in rows]
    yield "Bert(whole_word=False)", "transformers, tensors and their masks made before", lambda: collate([dict(sample) for sample in made])
    for who, function in whole_word_peers(tokenizer, rows, pieces):
        yield "Bert()", who, function
    long = flat[: ROWS * T5().bind(tokenizer).source_length(LENGTH)].reshape(ROWS, -1)
    sentinels, end = np.array(tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])), tokenizer.sep_token_id
    yield "T5()", "corrupt", lambda: t5_corrupt(long, SEED, index, 0, pieces)
    yield "T5()", "per sample", lambda: per_sample_batch(long, sentinels, end)
    yield "T5()", "nanoT5 style", lambda: nano_t5_batch(long, sentinels, end)


def raw_byte_bpe(texts, preset):
    """tokenizers' own byte-level BPE."""
    tokenizer, cut = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=preset.vocab_size, min_frequency=preset.min_count, special_tokens=[*preset.first, *preset.last],
        initial_alphabet=cut.alphabet(), show_progress=False))
    return tokenizer.to_str()


def raw_wordpiece(texts, preset):
    """tokenizers' own WordPiece."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(lowercase=preset.lowercase), pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(
        vocab_size=preset.vocab_size, min_frequency=preset.min_count, special_tokens=[*preset.first, *preset.last],
        limit_alphabet=preset.vocab_size // 2, show_progress=False))
    return tokenizer.to_str()


def raw_spm(texts, preset):
    """SentencePiece from an iterator of lines."""
    out, lines = io.BytesIO(), (line for text in texts for line in text.splitlines() if not line.isspace())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, **spm_settings(preset), minloglevel=2)
    return out.getvalue()


def tokenizers(texts, folder):
    """(what, who, function): learning a tokenizer."""
    def ours(preset, number=iter(range(1000))):
        return train(texts, folder / f"{preset}-{next(number)}", preset, progress=False, vocab_size=VOCABULARY)

    for preset, raw in dict(byte_bpe=raw_byte_bpe, wordpiece=raw_wordpiece, unigram=raw_spm, bpe=raw_spm).items():
        yield f"tokenizer {preset}", "fengshen", lambda preset=preset: ours(preset)
        yield f"tokenizer {preset}", "raw", lambda preset=preset, raw=raw: raw(texts, choose_preset(preset, vocab_size=VOCABULARY))


def seconds(function):
    """Of CPU time."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measured(cases, rounds):
    """{(what, who): median seconds of the rounds}, after one round that is not counted where they are short."""
    found = {case[:2]: [] for case in cases}
    for round in range(-1, rounds):
        for what, who, function in cases if round % 2 else reversed(cases):  # nobody is always first
            if round >= 0 or not what.startswith("tokenizer"):
                taken = seconds(function)
                found[what, who] += [taken] * (round >= 0)
    return {case: statistics.median(taken) for case, taken in found.items()}


def targets(lines):
    """(what, at least or at most, wanted, found) of ratios whose numbers are there."""
    def best(what, who):
        return max((line["tokens_per_second"] for (a, b), line in lines.items() if a == what and b.startswith(who)), default=None)

    for what, ours, who, wanted in (
            ("Bert(), times transformers' whole words", "Bert()", "transformers", 5),
            ("Bert(jieba=True) with words kept, times transformers' whole words", "Bert(jieba=True, keep_words=FOLDER)", "transformers", 10)):
        if (mine := best(ours, "batch")) and (theirs := best("Bert()", who)):
            yield what, "at least", wanted, mine / theirs
    if (mine := best("Bert(whole_word=False)", "batch")) and (theirs := best("Bert(whole_word=False)", "transformers")):
        yield "Bert(whole_word=False), times transformers'", "at least", 5, mine / theirs
    for who in ("nanoT5 style", "per sample"):
        if (mine := best("T5()", "batch")) and (theirs := best("T5()", who)):
            yield f"T5(), times {who}", "at least", 5, mine / theirs
    for preset in ("byte_bpe", "wordpiece", "unigram", "bpe"):
        mine, theirs = (lines.get((f"tokenizer {preset}", who)) for who in ("fengshen", "raw"))
        if mine and theirs:
            yield f"tokenizer {preset}, of raw's time", "at most", 1.1, mine["seconds"] / theirs["seconds"]


def write(path, lines):
    """The file of results, targets at its end."""
    aims = [dict(target=what, wanted=f"{side} {wanted}", found=round(found, 3), met=found >= wanted if side == "at least" else found <= wanted)
            for what, side, wanted, found in targets(lines)]
    for aim in aims:
        print(json.dumps(aim))
    if path:
        path.write_text("".join(json.dumps(line) + "\n" for line in [*lines.values(), *aims]), encoding="utf-8")


def earlier(path):
    """{(what, who): line} of the file."""
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path and path.is_file() else []
    return {(line["what"], line["who"]): line for line in found if "what" in line}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["Bert", "T5", "Bart", "Pegasus", "UniLM", "tokenizer"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(asked.shared / "data/tokenizers/bert_base_chinese")
    tokenizer.add_special_tokens(dict(additional_special_tokens=[f"<extra_id_{i}>" for i in range(100)]))
    lines = earlier(asked.out)
    with tempfile.TemporaryDirectory() as folder:
        flat, texts = stream(asked.shared, tokenizer, ROWS * 600), beginning(asked.shared)
        cases = [*batches(tokenizer, flat, folder), *peers(tokenizer, flat), *tokenizers(texts, Path(folder))]
        cases = [case for case in cases if any(case[0].startswith(word) for word in asked.only)]
        for (what, who), taken in measured(cases, asked.rounds).items():
            speed = dict(seconds=round(taken, 2)) if what.startswith("tokenizer") else dict(tokens_per_second=round(ROWS * LENGTH / taken))
            lines[what, who] = dict(what=what, who=who, **speed, rounds=asked.rounds, load=round(os.getloadavg()[0], 1))
            print(json.dumps(lines[what, who]), flush=True)
    write(asked.out, lines)


if __name__ == "__main__":
    main()
