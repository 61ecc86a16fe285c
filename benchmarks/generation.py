"""Continuing many prompts in batches by length, against `model.generate` one by one: a JSON line a row.

usage: python benchmarks/generation.py [--models NAME ...] [--ways NAME ...] [--prompts N] [--singles N] [--new N] [--device cpu]
       [--data FOLDER] [--out FILE]

On the accelerator if there is one (bfloat16), else or with `--device cpu` in float32. Models have random weights and no end of text, so
every text has --new tokens and both sides write equally many. Prompts are questions of the Chinese `medical_qa` under the GPT-2
tokenizer where --data has them (`medical_qa/` and `tokenizers/gpt2/`), else random tokens of log-normal lengths like theirs (median 190);
each row states which, with quartiles. --prompts of them are continued in batches; `one by one` takes --singles, evenly by length, since a
rate needs no more. Seconds are medians of three rounds of all ways in turn (on a CPU with one thread: of the processor's time, which
others on the machine do not lengthen), after a run that is not counted: `first_s`, with what is compiled. `equal` is the share
of the singles that get the same tokens in a batch; in bfloat16 near ties fall either way. `pays_after` is the number of steps from which
compiling has paid: what the first run took longer, over what a step is faster than with the same cache uncompiled.
"""

import argparse
import gc
import json
import lzma
import math
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fengshen.models.generation import budget_of, continue_ids, groups_of
from fengshen.utils.device import device_kind, device_name, memory, release_cached_memory, reset_peak_memory, seeded, synchronize

NO_ENDS = dict(bos_token_id=None, eos_token_id=None)
GPT2 = dict(vocab_size=50304, n_positions=1024) | NO_ENDS
MODELS = {
    "gpt2-26m": (GPT2LMHeadModel, GPT2Config, GPT2 | dict(n_embd=320, n_layer=8, n_head=5)),
    "gpt2-110m": (GPT2LMHeadModel, GPT2Config, GPT2 | dict(n_embd=768, n_layer=12, n_head=12)),
    "llama-1.2b": (LlamaForCausalLM, LlamaConfig, NO_ENDS | dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192, tie_word_embeddings=True)),
    "gpt2-tiny": (GPT2LMHeadModel, GPT2Config, GPT2 | dict(n_embd=32, n_layer=2, n_head=2)),
}
WAYS = {
    "one by one": None,
    "batched, dynamic cache": dict(cache="dynamic"),
    "batched, static cache": dict(cache="static", compile=False),
    "batched, static cache, compiled": dict(cache="static", compile=True),
}


def questions(folder, longest, count):
    """([ids], what they are) of real prompts, or None where the data is not there."""
    file, tokenizer = folder / "medical_qa/medqa_zh_valid.jsonl.xz", folder / "tokenizers/gpt2"
    if not file.exists() or not tokenizer.exists():
        return None
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer.from_file(str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt"))
    with lzma.open(file, "rt", encoding="utf8") as f:
        texts = [f"Question:{json.loads(line)['question']} answer:" for line in f]
    ids = [row.ids for row in tokenizer.encode_batch(texts) if len(row.ids) <= longest]
    return ids[:count], "medical_qa, questions"


def prompts_of(options, longest):
    """([ids], what they are)."""
    found = questions(options.data, longest, options.prompts)
    if found is None:
        rng = np.random.RandomState(0)
        lengths = np.clip(rng.lognormal(5.25, 0.73, options.prompts), 33, longest).astype(int)
        found = [rng.randint(100, 50000, n).tolist() for n in lengths], "random tokens, log-normal lengths"
    return found


def one_by_one(model, ids, new):
    """The continuations, each by a call of its own."""
    found = []
    for row in ids:
        x_bl = torch.tensor([row], device=model.device)
        out_bl = model.generate(x_bl, attention_mask=torch.ones_like(x_bl), max_new_tokens=new, do_sample=False, pad_token_id=0)
        found.append(out_bl[0, len(row) :].tolist())
    return found


def timed(function, clock):
    """(result, seconds), the device waited for."""
    synchronize()
    start = clock()
    result = function()
    synchronize()
    return result, clock() - start


def works_of(model, ids, some, options):
    """{way: (prompts, batches, steps, what is run)}"""
    works = {}
    for way in options.ways:
        settings = WAYS[way]
        if settings is None:
            works[way] = some, len(some), len(some) * options.new, partial(one_by_one, model, some, options.new)
            continue
        lengths, context = [len(row) for row in ids], model.config.max_position_embeddings
        groups = groups_of(lengths, options.new, budget_of(model), context, repeat=settings.get("compile", False))
        works[way] = ids, len(groups), sum(group.new for group in groups), partial(continue_ids, model, ids, options.new, **settings)
    return works


def measured(works, some, clock):
    """{way: (figures, texts of the singles)}: a first run of each, then three rounds of all of them."""
    found, first, seconds = {}, {}, {}
    for way, (rows, _, _, work) in works.items():
        reset_peak_memory()
        try:
            texts, once = timed(work, clock)
        except Exception as e:  # a way that cannot run is a row; the others are still measured
            found[way] = dict(failed=f"{type(e).__name__}: {e}"[:200]), None
            continue
        place, peak = {id(row): text for row, text in zip(rows, texts)}, memory()["peak_allocated"] / 2**30
        first[way], seconds[way] = once, []
        found[way] = dict(prompts=len(rows), tokens=sum(map(len, texts)), peak_gib=round(peak, 2)), [place[id(row)] for row in some]
    for _ in range(3):
        for way in seconds:
            seconds[way].append(timed(works[way][3], clock)[1])
    for way, all_of_it in seconds.items():
        row, middle, (_, batches, steps, _) = found[way][0], statistics.median(all_of_it), works[way]
        spread = (max(all_of_it) - min(all_of_it)) / middle
        row |= dict(batches=batches, seconds=round(middle, 3), spread=round(spread, 3), first_s=round(first[way], 2),
                    tokens_per_second=round(row["tokens"] / middle, 1), step_ms=round(1000 * middle / steps, 3))
    return found


def built(name, device):
    """The model, in evaluation mode."""
    make, config, sizes = MODELS[name]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with seeded(0), torch.device(device):
        return make._from_config(config(**sizes), dtype=dtype).eval()


def rows_of(name, options):
    """A row a way, as they are measured."""
    device = options.device or device_kind()
    model = built(name, device)
    ids, what = prompts_of(options, min(1024, model.config.max_position_embeddings) - options.new)
    order = sorted(ids, key=len)
    some = [order[i] for i in np.linspace(0, len(order) - 1, 2 * options.singles + 1).round().astype(int)[1::2]]
    quartiles = [int(x) for x in np.percentile([len(row) for row in ids], [0, 25, 50, 75, 100])]
    shared = dict(model=name, parameters_m=round(sum(p.numel() for p in model.parameters()) / 1e6, 1), dtype=str(model.dtype).removeprefix("torch."),
                  data=what, prompt_tokens=quartiles, new=options.new, budget=budget_of(model))
    place = dict(device="CPU" if device == "cpu" else device_name(), threads=torch.get_num_threads())
    place |= dict(torch=torch.__version__, transformers=transformers.__version__)
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    found = measured(works_of(model, ids, some, options), some, clock)
    single, alone = found.get("one by one", ({}, None))
    plain = found.get("batched, static cache", ({}, None))[0]
    for way, (row, texts) in found.items():
        if row is not single and "seconds" in row and "seconds" in single:
            row |= dict(ratio=round(row["tokens_per_second"] / single["tokens_per_second"], 2), equal=sum(map(list.__eq__, alone, texts)) / len(some))
        if "compiled" in way and plain.get("step_ms", 0) > row.get("step_ms", math.inf):
            row["pays_after"] = round(1000 * (row["first_s"] - row["seconds"]) / (plain["step_ms"] - row["step_ms"]))
        yield shared | dict(way=way) | row | place


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: gpt2-26m on a CPU, else gpt2-110m and llama-1.2b")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="default: all, on a CPU without the compiled one")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--singles", type=int, default=4, help="prompts that are continued one by one")
    parser.add_argument("--new", type=int, default=64, help="tokens that each prompt is continued by")
    parser.add_argument("--device", choices=["cpu"], help="take the CPU although there is an accelerator")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parent.parent.parent / "shared/data")
    parser.add_argument("--out", default="benchmarks/results/generation.jsonl")
    options = parser.parse_args()
    cpu = options.device == "cpu" or device_kind() == "cpu"
    options.ways = options.ways or list(WAYS)[: 3 if cpu else 4]
    for name in options.models or (["gpt2-26m"] if cpu else ["gpt2-110m", "llama-1.2b"]):
        for row in rows_of(name, options):
            print(json.dumps(row), flush=True)
            with Path(options.out).open("a", encoding="utf8") as f:
                f.write(json.dumps(row) + "\n")
        gc.collect()
        release_cached_memory()


if __name__ == "__main__":
    main()
