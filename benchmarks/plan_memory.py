"""Memory predicted before a run, and held against what was measured: a JSON line a configuration.

usage: python benchmarks/plan_memory.py [--out FILE]
       python benchmarks/plan_memory.py --measured FILE [FILE ...] [--out FILE]

The first form writes the predictions of `fengshen.training.memory.estimate` for one H200, whose memory torch gives as 139.8 GiB: the
peak that torch reserves, its parts, and whether that fits. FILE is a record that is committed before anything is measured. The second
form reads that record, not the formulas of today, and rows of `benchmarks/gpu.py` whose `name` is the same: `ratio` is predicted to
measured reserved memory; a row that ran out of memory has no peak, and is right where the prediction was that it would; one
that failed otherwise says nothing. Host memory is compared where the row has it.

Rows are those of `benchmarks/gpu.py`.
"""

import argparse
import json
from pathlib import Path

GIB, H200 = 2**30, 139.8
BIG, SMALL = "fengshen:models/gpt2_3.5b.json", dict(model_type="gpt2", vocab_size=50304, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
QWEN3 = dict(model_type="qwen3", vocab_size=151936, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
             head_dim=128, intermediate_size=9728, max_position_embeddings=4096, tie_word_embeddings=True)
BERT = dict(model_type="bert", vocab_size=21128, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            max_position_embeddings=512)
MEGATRON = BERT | dict(model_type="megatron-bert", hidden_size=2048, num_hidden_layers=24, num_attention_heads=8, intermediate_size=8192)
ALONE = dict(strategy="auto", optimizer="master_adamw", compiled=True)
CONFIGURATIONS = {
    "ours": dict(config=BIG, micro_batch=16, **ALONE),
    "ours_80gb": dict(config=BIG, micro_batch=8, **ALONE),
    "ours_offload_16": dict(config=BIG, micro_batch=16, strategy="zero3_offload", checkpointing=True),
    "gpt2_110m": dict(config=SMALL, micro_batch=32, **ALONE),
    "ours_32": dict(config=BIG, micro_batch=32, **ALONE),
    "ours_80gb_budget": dict(config=BIG, micro_batch=16, activation_budget=0.5, **ALONE),
    "ours_mixed": dict(config=BIG, micro_batch=16, **ALONE | dict(optimizer="adamw")),
    "ours_zero2": dict(config=BIG, micro_batch=16, strategy="zero2", compiled=True),
    **{f"ours_offload_{rows}": dict(config=BIG, micro_batch=rows, strategy="zero3_offload", checkpointing=True) for rows in (4, 8, 32, 64)},
    "gpt2_lora": dict(config=BIG, micro_batch=16, lora=16, **ALONE),
    "gpt2_lora_20gb": dict(config=BIG, micro_batch=2, lora=16, **ALONE),
    "gpt2_lora_20gb_budget": dict(config=BIG, micro_batch=4, lora=16, activation_budget=0.7, **ALONE),
    "qwen3": dict(config=QWEN3, micro_batch=16, **ALONE),
    "qwen3_lora": dict(config=QWEN3, micro_batch=16, lora=16, **ALONE),
    "qwen3_lora_20gb_budget": dict(config=QWEN3, micro_batch=4, lora=16, activation_budget=0.7, **ALONE),
    "two_110m_ddp": dict(config=SMALL, micro_batch=32, strategy="ddp", processes=2, compiled=True),
    **{f"two_{way}": dict(config=BIG, micro_batch=16, strategy=way, processes=2, compiled=True) for way in ("ddp", "zero2", "zero3")},
    "qwen3_8x2": dict(config=QWEN3, micro_batch=8, **ALONE),
    "bert": dict(config=BERT, micro_batch=128, length=512, auto="AutoModelForMaskedLM", **ALONE),
    "megatron_bert": dict(config=MEGATRON, micro_batch=32, length=512, auto="AutoModelForMaskedLM", **ALONE),
}


def predict(name):
    """The row of a configuration."""
    from fengshen.models import auto
    from fengshen.training.memory import estimate

    settings = dict(length=1024, precision="bf16-mixed") | CONFIGURATIONS[name]
    found = estimate(**settings | dict(auto=getattr(auto, settings.get("auto", "AutoModelForCausalLM"))))
    parts = {part.name: round(part.device / GIB, 3) for part in found.parts if part.device}
    peak = dict(reserved_gib=round(found.device / GIB, 2), host_gib=round(found.host / GIB, 1))
    return dict(name=name, settings=settings, **peak, card_gib=H200, fits=found.device < H200 * GIB, parts=parts)


def read(file):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(file).read_text("utf8").splitlines() if line.strip()]


def compare(predicted, measured):
    """Rows of both: the ratio of the peaks, or whether running out of memory was foreseen."""
    out = []
    for row in measured:
        known = predicted.get(row["name"])
        error = str(row.get("error", ""))
        short = "out of memory" in error.lower() or "OutOfMemory" in error
        if known is None or error and not short:
            continue
        peak = None if short else row.get("reserved_gib")
        found = dict(name=row["name"], predicted_gib=known["reserved_gib"], measured_gib=peak, right=known["fits"] != short)
        if peak:
            found["ratio"] = round(known["reserved_gib"] / peak, 3)
        if not short and row.get("host_gib"):
            found |= dict(predicted_host_gib=known["host_gib"], measured_host_gib=row["host_gib"])
        out.append(found)
    return out


def main():
    """Predict, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", nargs="+", help="rows of benchmarks/gpu.py")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "plan_predictions.jsonl"), help="the record of predictions")
    options = parser.parse_args()
    if options.measured:
        predicted = {row["name"]: row for row in read(options.out)}
        for row in compare(predicted, [row for file in options.measured for row in read(file)]):
            print(json.dumps(row))
        return
    Path(options.out).write_text("".join(json.dumps(predict(name)) + "\n" for name in CONFIGURATIONS), "utf8")


if __name__ == "__main__":
    main()
