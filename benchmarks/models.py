"""Time and peak memory of forward and backward of the models at published sizes, beside the closest stock models of transformers: a JSON line each.

usage: python benchmarks/models.py [--only WORD ...] [--minutes N] [--padding SHARE] [--profile MODEL] [--smoke] [--device cuda] [--out FILE]

Random weights and ids, 16 texts of 512 tokens (source and target of that length where there is a decoder), a mask with every batch as a
tokenizer gives it, no optimizer. A configuration is a size, a precision and a dropout: `bf16` is the model in bfloat16, `amp` the model in
float32 under bfloat16 autocast; a dropout of 0.1 is what the published configurations say. Each is a process of its own, the important ones
first, which loads its libraries while the one before it is measured; within it one model is measured after the other:

    ours           this library's model, with the attention that its configuration gets by default
    ours compiled  the same after `compile_blocks`
    ours flex      Longformer by FlexAttention, with dropout but not of attention weights, which FlexAttention does not have
    stock          transformers' model of the same size with its default attention: MegatronBert, Longformer, T5, BART
    stock eager, stock sdpa   where it has one that is not its default
    roformer       transformers' RoFormer, which is another network of the same size

`ms` is the median of 20 steps after 5 that do not count, each waited for; `ratio` is how many times faster than `stock` of the same process;
`peak_gib` is the largest memory with weights and gradients. A model that fails says so in its row. No configuration starts after --minutes.
--only takes words that a configuration's name must contain ("longformer", "bf16", "dropout-0.1"); with several words in one argument, all of
them. --profile names one model; instead of rows the ten heaviest kernels of it are printed, for each configuration chosen.

The sizes: those of the folders where they are known. Zhouwenwang-1.3B's heads are its sister Erlangshen-MegatronBert-1.3B's, BART-759M's 24
and 24 blocks are what its file's size says.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

BERT = dict(vocab_size=12000, type_vocab_size=2, pad_token_id=0)
FAR = dict(attention_window=128, max_position_embeddings=4096)
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
BILLION = dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=8, intermediate_size=8192)
SIDES = ("encoder", "decoder")


def bart(width, blocks, heads):
    """Sizes of a BART with as many blocks on both sides."""
    both = {f"{side}_{name}": value for side in SIDES for name, value in dict(layers=blocks, attention_heads=heads, ffn_dim=4 * width).items()}
    return dict(vocab_size=50265, d_model=width, max_position_embeddings=1024) | both


SIZES = {
    "zhouwenwang-1.3b": ("roformer", BERT | BILLION),
    "longformer-330m": ("longformer", BERT | LARGE | FAR),
    "megatron-t5-770m": ("t5", dict(vocab_size=21248, d_model=1024, d_ff=4096, num_layers=24, num_heads=16)),
    "bart-139m": ("bart", bart(768, 6, 12)),
    "zhouwenwang-110m": ("roformer", BERT | BASE),
    "longformer-110m": ("longformer", BERT | BASE | FAR),
    "bart-759m": ("bart", bart(1024, 24, 16)),
}
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16,
            attention_window=8, vocab_size=99)
TINY |= {f"{side}_{name}": value for side in SIDES for name, value in dict(layers=2, attention_heads=2, ffn_dim=64).items()}
# precision, dropout and the models that are measured, by importance; "stock" comes first, since ratios are to it
ROUNDS = [
    ("bf16", 0.1, ["stock", "stock eager", "stock sdpa", "roformer", "ours", "ours compiled", "ours flex"]),
    ("bf16", 0.0, ["stock", "stock sdpa", "ours"]),
    ("amp", 0.1, ["stock", "stock sdpa", "ours"]),
]
CONFIGURATIONS = {f"{size} {precision} dropout-{dropout}": (size, precision, dropout, models)
                  for precision, dropout, models in ROUNDS for size in SIZES}


def dropouts(family, dropout, flex=False):
    """The dropout of a configuration, in the family's words."""
    if family == "t5":
        return dict(dropout_rate=dropout)
    if family == "bart":
        return dict(dropout=dropout)
    return dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0 if flex else dropout)


def classes(family):
    """(this library's configuration and model, the stock ones)."""
    import transformers as stock

    if family == "roformer":
        from fengshen.models.roformer import RoFormerConfig, RoFormerForMaskedLM

        return (RoFormerConfig, RoFormerForMaskedLM), (stock.MegatronBertConfig, stock.MegatronBertForMaskedLM)
    if family == "longformer":
        from fengshen.models.longformer import LongformerConfig, LongformerForMaskedLM

        return (LongformerConfig, LongformerForMaskedLM), (stock.LongformerConfig, stock.LongformerForMaskedLM)
    if family == "t5":
        from fengshen.models.megatron_t5 import T5Config, T5ForConditionalGeneration

        return (T5Config, T5ForConditionalGeneration), (stock.T5Config, stock.T5ForConditionalGeneration)
    from fengshen.models.bart import BartForTextInfill, BartTextInfillConfig

    return (BartTextInfillConfig, BartForTextInfill), (stock.BartConfig, stock.BartForConditionalGeneration)


def sizes_of(family, name, options):
    """Fields of the configuration for one model of a size."""
    sizes = dict(SIZES[options.size][1])
    if options.smoke:
        sizes |= {field: value for field, value in TINY.items() if field in sizes} | (dict(d_kv=16) if family == "t5" else {})
    if family == "longformer" and name.startswith("stock"):
        sizes |= dict(max_position_embeddings=sizes["max_position_embeddings"] + 2)  # its positions begin behind the padding's
    if family == "t5":
        sizes |= dict(decoder_start_token_id=1)
    return sizes


def build(name, options):
    """The model by its name in the table above, or None where the size has no such model."""
    import torch
    import transformers

    family = SIZES[options.size][0]
    ours, stock = classes(family)
    wanted = name.partition(" ")[2]
    if (name == "roformer") > (family == "roformer") or (wanted == "flex") > (family == "longformer"):
        return None
    config_class, model_class = ours if name.startswith("ours") else stock
    if name == "roformer":
        config_class, model_class = transformers.RoFormerConfig, transformers.RoFormerForMaskedLM
    config = config_class(**sizes_of(family, name, options), **dropouts(family, options.dropout, wanted == "flex"))
    with torch.device(options.device):
        model = model_class._from_config(config)
        if wanted in ("eager", "sdpa") and (model.config._attn_implementation == wanted or not model_class._supports_sdpa):
            return None
        model.to(torch.float32 if options.precision == "amp" else torch.bfloat16)
    if wanted in ("eager", "sdpa", "flex"):
        model.set_attn_implementation("flex_attention" if wanted == "flex" else wanted)
    return compiled(model, options) if wanted == "compiled" else model.train()


def compiled(model, options):
    """The model with compiled blocks; for a smoke run without the compiler behind it."""
    from fengshen.utils.kernels.compile import compile_blocks

    for block in compile_blocks(model):
        if options.smoke:
            block.compile(dynamic=False, backend="eager")
    return model.train()


def inputs(options, size):
    """The batch, as every model of a family takes it."""
    import torch

    family = SIZES[options.size][0]
    rows, length = (2, 16) if options.smoke else (16, 512)
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(5, size, (rows, length), generator=generator) for _ in range(2))
    real = (length * (1 - options.padding * torch.linspace(0, 2, rows))).long().clamp(min=1)
    mask = (torch.arange(length) < real[:, None]).long()
    batch = dict(input_ids=ids * mask, attention_mask=mask, labels=torch.where(mask == 1, labels, -100))
    if family == "longformer":
        batch["global_attention_mask"] = torch.nn.functional.one_hot(torch.zeros(rows, dtype=torch.long), length)
    if family in ("longformer", "roformer"):
        batch["token_type_ids"] = torch.zeros_like(ids)
    if family == "bart":
        batch["decoder_input_ids"] = labels.roll(1, 1)
    return {name: t.to(options.device) for name, t in batch.items()}


def step_of(model, batch, options):
    """A function that runs forward and backward once and waits."""
    import torch

    kind = options.device.partition(":")[0]
    if type(model).__name__.startswith("RoFormerForMaskedLM") or SIZES[options.size][0] != "longformer":
        batch = {name: t for name, t in batch.items() if name != "global_attention_mask"}

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast(kind, torch.bfloat16, enabled=options.precision == "amp"):
            out = model(**batch)
        loss = out.loss if out.loss is not None else out.decoder_loss
        loss.backward()
        if kind != "cpu":
            torch.accelerator.synchronize()
        return loss.detach()

    return step


def measured(name, options):
    """The figures of one model, or None where there is no such model."""
    import torch

    model = build(name, options)
    if model is None:
        return None
    batch = inputs(options, model.config.vocab_size)
    step = step_of(model, batch, options)
    warm, count = (1, 2) if options.smoke else (5, 20)
    start = time.perf_counter()
    loss = float(step())
    first = time.perf_counter() - start
    for _ in range(warm - 1):
        step()
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    peak = 0 if options.device == "cpu" else torch.cuda.max_memory_allocated() / 2**30
    middle, millions = statistics.median(times), sum(p.numel() for p in model.parameters()) / 1e6
    return dict(attention=model.config._attn_implementation, parameters_m=round(millions, 1), loss=round(loss, 3), ms=round(1000 * middle, 2),
                spread=round((max(times) - min(times)) / middle, 3), first_s=round(first, 1),
                tokens_per_second=round(int(batch["attention_mask"].sum()) / middle), peak_gib=round(peak, 2))


def profiled(name, options):
    """Print the ten heaviest kernels of three steps, in ms a step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    model = build(name, options)
    if model is None:
        return
    step = step_of(model, inputs(options, model.config.vocab_size), options)
    for _ in range(3):
        step()
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (options.device != "cpu")]
    start = time.perf_counter()
    with profile(activities=kinds) as found:
        for _ in range(3):
            step()
    seconds = time.perf_counter() - start
    field = "self_cpu_time_total" if options.device == "cpu" else "self_device_time_total"
    events = [e for e in found.key_averages() if options.device == "cpu" or e.device_type != torch.autograd.DeviceType.CPU]
    total = sum(getattr(e, field) for e in events)
    print(f"{options.one} {name}: {total / 3000:.2f} ms a step in kernels, {1000 * seconds / 3:.2f} ms a step with the profiler on")
    for e in sorted(events, key=lambda e: -getattr(e, field))[:10]:
        print(f"{getattr(e, field) / 3000:9.3f} ms {getattr(e, field) / total:6.1%} {e.count / 3:7.1f} times  {e.key[:110]}")


def measure(options):
    """Every model of a configuration, a line each."""
    import torch
    import transformers

    options.size, options.precision, options.dropout, models = CONFIGURATIONS[options.one]
    classes(SIZES[options.size][0])
    sys.stdin.readline()
    torch.manual_seed(0)
    if options.profile:
        return profiled(options.profile, options)
    card = "CPU" if options.device == "cpu" else torch.cuda.get_device_name()
    shared = dict(size=options.size, precision=options.precision, dropout=options.dropout, padding=options.padding)
    place = dict(device=card, torch=torch.__version__, transformers=transformers.__version__)
    stock = None
    for name in models:
        try:
            found = measured(name, options)
        except Exception as e:  # whatever a model dies of, the others are still measured
            found = dict(failed=f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:200])
        if found is None:
            continue
        stock = found.get("ms") if name == "stock" else stock
        ratio = dict(ratio=round(stock / found["ms"], 3)) if stock and "ms" in found else {}
        print(json.dumps(shared | dict(model=name) | found | ratio | (dict(smoke=True) if options.smoke else {}) | place), flush=True)
        torch._dynamo.reset()
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()


def started(name, options):
    """A process that loads its libraries, and measures the configuration once it is told to."""
    words = [sys.executable, __file__, "--one", name, "--device", options.device, "--padding", str(options.padding), *["--smoke"] * options.smoke]
    words += ["--profile", options.profile] if options.profile else []
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def lines_of(process, name):
    """What the process measures, now."""
    lines = process.communicate("now\n")[0].strip().splitlines()
    return lines + ([json.dumps(dict(configuration=name, failed=f"exit code {process.returncode}"))] if process.returncode else [])


def chosen(options):
    """Names of the configurations that --only leaves."""
    names = [n for n in CONFIGURATIONS if not options.only or any(all(word in n for word in group.split()) for group in options.only)]
    if not names:
        raise SystemExit(f"no configuration has {options.only} in its name; there are: {', '.join(CONFIGURATIONS)}")
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="words of configurations' names; several in one argument must all be there")
    parser.add_argument("--minutes", type=float, default=6, help="start nothing new after so long")
    parser.add_argument("--padding", type=float, default=0.0, help="mean share of padding, growing from row to row; 0 to below 0.5")
    parser.add_argument("--profile", help="print the heaviest kernels of this model instead")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--one", help="measure this configuration here and print")
    parser.add_argument("--out", default="benchmarks/results/models.jsonl")
    options = parser.parse_args()
    if options.one:
        return measure(options)
    start, names = time.monotonic(), chosen(options)
    following = started(names[0], options)
    for name, after in zip(names, [*names[1:], None]):
        if time.monotonic() - start > 60 * options.minutes:
            following.kill()
            print(f"not run, {options.minutes} minutes are over: {', '.join(names[names.index(name):])}", file=sys.stderr)
            break
        process, following = following, started(after, options) if after else None
        lines = lines_of(process, name)
        print("\n".join(lines), flush=True)
        if not options.profile:
            with Path(options.out).open("a", encoding="utf8") as f:
                f.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    main()
