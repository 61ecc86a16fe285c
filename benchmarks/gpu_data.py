"""What the two sides of `benchmarks/gpu.py` share: the same documents for both, the shapes of the models, their arithmetic.

usage: python benchmarks/gpu_data.py --out FOLDER [--qa ../shared/data/medical_qa] [--laws ../shared/data/corpus/zh_laws.jsonl.xz]
       [--tokenizers ../shared/data/tokenizers] [--zh_tokens N] [--en_tokens N] [--law_tokens N]

The folder is small enough to be carried to a machine without internet:

    zh.jsonl, en.jsonl        a sample of the Chinese questions and answers, and of MedQuAD: what `fengshen fit` reads
    zh_ids.npy ...            the same documents as the library's own data module cuts them (1,024 tokens): ids, lengths, and how many tokens of
                              each are the question, which no side is scored on; what the peers read
    gpt2/, bert/              the tokenizers
    gpt2_corpus/              zh.jsonl and en.jsonl as a tokenised corpus for pretraining (`fengshen preprocess`), 16 bits a token
    bert_corpus/, t5_corpus/  laws under the BERT tokenizer, and with T5's sentinels; sentences kept apart
"""

import argparse
import itertools
import json
import lzma
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROW = 1024  # tokens of a row
MODELS = {
    "gpt2_3b6": dict(
        model_type="gpt2", vocab_size=50304, n_positions=1024, n_embd=3072, n_layer=30, n_head=32, bos_token_id=50256, eos_token_id=50256
    ),
    "gpt2_110m": dict(
        model_type="gpt2", vocab_size=50304, n_positions=1024, n_embd=768, n_layer=12, n_head=12, bos_token_id=50256, eos_token_id=50256
    ),
    "qwen3_4b": dict(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=2560,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    "bert_base": dict(
        model_type="bert",
        vocab_size=21128,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=512,
    ),
    "t5_base": dict(
        model_type="t5",
        vocab_size=21248,
        d_model=768,
        d_ff=2048,
        d_kv=64,
        num_layers=12,
        num_decoder_layers=12,
        num_heads=12,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    ),
    "megatron_bert_1b3": dict(
        model_type="megatron-bert",
        vocab_size=21128,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=8,
        intermediate_size=8192,
        max_position_embeddings=512,
    ),
}
TINY = dict(
    gpt2=dict(vocab_size=4096, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
    qwen3=dict(
        vocab_size=4096,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=64,
    ),
    bert=dict(vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64),
    t5=dict(vocab_size=4096, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_decoder_layers=2, num_heads=2),
)
TINY["megatron-bert"] = TINY["bert"]


def shape_of(name, smoke=False):
    """The config of a model, as a dict; tiny for a smoke run."""
    model = MODELS[name]
    return model | TINY[model["model_type"]] if smoke else model


def matrices(c):
    """(parameters that take part in matrix products with a token, forward and backward, head included; width of attention x blocks)"""
    if c["model_type"] == "gpt2":
        return c["vocab_size"] * c["n_embd"] + 12 * c["n_layer"] * c["n_embd"] ** 2, c["n_layer"] * c["n_embd"]
    width, layers = c["hidden_size"], c["num_hidden_layers"]
    if c["model_type"] == "qwen3":
        query, key = (c[name] * c["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
        return c["vocab_size"] * width + layers * width * (2 * query + 2 * key + 3 * c["intermediate_size"]), layers * query
    return c["vocab_size"] * width + width**2 + layers * width * (4 * width + 2 * c["intermediate_size"]), layers * width


def arithmetic(config, lengths, adapter=False):
    """Floating-point operations of training, per real token: 6 a parameter in a product (4 under an adapter, whose base has no gradients),
    and attention inside each document, half of it where it is causal. None for encoder-decoders, whose two sides have different tokens."""
    if config["model_type"] == "t5":
        return None
    parameters, attention = matrices(config)
    seen = float((np.asarray(lengths, np.float64) ** 2).sum() / np.asarray(lengths).sum())
    return (4 if adapter else 6) * parameters + (6 if config["model_type"] in ("gpt2", "qwen3") else 12) * attention * seen


def documents(folder, name):
    """(ids, lengths, prompts): flat ids of all documents, and how many tokens each has, and how many of them are the question."""
    return tuple(np.load(Path(folder, f"{name}_{part}.npy"), mmap_mode="r") for part in ("ids", "lengths", "prompts"))


def write_questions(folder, name, records, tokenizer, length):
    """The records as JSONL, and as the library's data module cuts them."""
    from fengshen.data.task_dataloader.datamodule import ConversationDataModule

    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(dict(question=r["question"], answer=r["answer"]), ensure_ascii=False) + "\n" for r in records), "utf8")
    module = ConversationDataModule(str(path), tokenizer=str(tokenizer), max_length=length, on_long="truncate")
    module.setup("fit")
    found = module.sets["train"]
    samples = [found[i] for i in range(len(found))]
    np.save(folder / f"{name}_ids.npy", np.concatenate([s["input_ids"] for s in samples]).astype(np.uint16))
    np.save(folder / f"{name}_lengths.npy", np.array([len(s["input_ids"]) for s in samples], np.uint16))
    np.save(folder / f"{name}_prompts.npy", np.array([(s["labels"] == -100).sum() for s in samples], np.uint16))
    return path


def preprocess(files, out, tokenizer, *words):
    """`fengshen preprocess`, in a process."""
    command = [
        sys.executable,
        "-m",
        "fengshen.cli.main",
        "preprocess",
        *map(str, files),
        "--out",
        str(out),
        "--tokenizer",
        str(tokenizer),
        "--workers",
        "1",
        *words,
    ]
    subprocess.run(command, check=True)


def write_sentinels(source, out):
    """A tokenizer with T5's hundred sentinels behind its own tokens."""
    from fengshen.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(source))
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)]})
    tokenizer.save_pretrained(out)


def pick(records, tokens, tokenizer, seed=0):
    """Records in a random order, as many as have `tokens` together when cut to a row."""
    order, picked = np.random.RandomState(seed).permutation(len(records)), []
    for chunk in np.split(order, range(500, len(order), 500)):
        for i, encoding in zip(chunk, tokenizer.encode_batch_fast([records[i]["question"] + records[i]["answer"] for i in chunk])):
            if tokens <= 0:
                return picked
            picked.append(records[i])
            tokens -= min(len(encoding.ids), ROW)
    return picked


def write_demo(folder):
    """The same folder of a few questions that the package brings, for a smoke run."""
    from fengshen.utils.resources import resource

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in dict(gpt2="tokenizer_demo", bert="wordpiece_demo", t5="wordpiece_demo").items():
        shutil.copytree(resource(f"fengshen:{source}"), folder / name, dirs_exist_ok=True)
    records = [json.loads(line) for line in resource("fengshen:qa_demo/train.jsonl").open(encoding="utf8")]
    paths = [write_questions(folder, name, records, folder / "gpt2", 64) for name in ("zh", "en")]
    preprocess(paths, folder / "gpt2_corpus", folder / "gpt2", "--field", "answer")
    for name in ("bert", "t5"):
        preprocess(paths[:1], folder / f"{name}_corpus", folder / name, "--field", "answer", "--sentences")


def write(options):
    """The folder of real data."""
    from fengshen.tokenizer import load_tokenizer

    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in dict(gpt2="gpt2", bert="bert_base_chinese").items():
        (folder / name).mkdir(exist_ok=True)
        for file in Path(options.tokenizers, source).iterdir():
            shutil.copyfile(file, folder / name / file.name)
    write_sentinels(folder / "bert", folder / "t5")
    tokenizer, paths = load_tokenizer(str(folder / "gpt2")).backend_tokenizer, []
    for name, source, tokens in (("zh", "medqa_zh_train", options.zh_tokens), ("en", "medquad_en", options.en_tokens)):
        with lzma.open(Path(options.qa, f"{source}.jsonl.xz"), "rt", encoding="utf8") as lines:
            paths.append(write_questions(folder, name, pick([json.loads(line) for line in lines], tokens, tokenizer), folder / "gpt2", ROW))
        lengths = documents(folder, name)[1]
        print(json.dumps(dict(name=name, documents=len(lengths), tokens=int(lengths.sum()), median=float(np.median(lengths)))), flush=True)
    preprocess(paths, folder / "gpt2_corpus", folder / "gpt2", "--field", "answer,question")
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf8") as f:
        with lzma.open(options.laws, "rt", encoding="utf8") as lines:
            characters = (len(f.write(line) and line) for line in lines)
            all(total < options.law_tokens for total in itertools.accumulate(characters))
        f.flush()
        for name in ("bert", "t5"):
            preprocess([f.name], folder / f"{name}_corpus", folder / name, "--sentences")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--qa", default="../shared/data/medical_qa")
    parser.add_argument("--laws", default="../shared/data/corpus/zh_laws.jsonl.xz")
    parser.add_argument("--tokenizers", default="../shared/data/tokenizers")
    parser.add_argument("--zh_tokens", type=int, default=1_300_000)
    parser.add_argument("--en_tokens", type=int, default=500_000)
    parser.add_argument("--law_tokens", type=int, default=900_000)
    write(parser.parse_args())


if __name__ == "__main__":
    main()
