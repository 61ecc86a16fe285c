"""MFU: what a token needs, against the operations that PyTorch counts itself, and the line of the record on a device whose peak is known."""
import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fengshen.metric.throughput import batch_flops, in_reach, model_work
from fengshen.models.megatron_t5 import T5Config as MegatronT5Config
from fengshen.models.megatron_t5 import T5ForConditionalGeneration as MegatronT5
from fengshen.training import callbacks
from fengshen.training.callbacks import Recorder
from fengshen.training.progress import figures
from fengshen.training.totals import Totals
from fengshen.utils.device import PEAKS, peak_flops

ONE = dict(vocab_size=200, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, max_position_embeddings=64)
SIDES = {f"{side}_{name}": n for side, layers in (("encoder", 2), ("decoder", 3)) for name, n in dict(layers=layers, attention_heads=4, ffn_dim=96).items()}
T5 = dict(vocab_size=200, d_model=64, d_kv=16, num_heads=4, d_ff=96, num_layers=2, num_decoder_layers=3)
MODELS = dict(
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=64, n_layer=3, n_head=4, n_positions=64)),
    llama=lambda: LlamaForCausalLM(LlamaConfig(**ONE, num_key_value_heads=2, tie_word_embeddings=False)),
    bert=lambda: BertForMaskedLM(BertConfig(**ONE)),
    t5=lambda: T5ForConditionalGeneration(T5Config(**T5)),
    bart=lambda: BartForConditionalGeneration(BartConfig(vocab_size=200, d_model=64, max_position_embeddings=64, **SIDES)),
    megatron_t5=lambda: MegatronT5(MegatronT5Config(**T5, max_position_embeddings=64)),
)


def batch_of(model, rows=2, length=24, target=9):
    "Every token real, and every one that a head reads labelled."
    batch = dict(input_ids=torch.full((rows, length), 7))
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.full((rows, target), 7)
    return batch, dict(tokens=sum(ids.numel() for ids in batch.values()), num_labels=batch.get("decoder_input_ids", batch["input_ids"]).numel())


@pytest.mark.parametrize("name", MODELS)
def test_what_a_token_needs_is_what_pytorch_counts(name):
    model = MODELS[name]()
    model.set_attn_implementation("eager")  # computes attention over all tokens, and PyTorch counts that
    batch, counts = batch_of(model)
    with FlopCounterMode(display=False) as counter:
        out = model(**batch, use_cache=False) if model.config.is_encoder_decoder else model(**batch)
        out.logits.sum().backward()
    work, half = model_work(model), 12 * 3 * 64 * 9 / 2 * 18  # of the decoder's attention, which looks back only
    needed = batch_flops(work, model.config, batch | counts, causal=False) * counts["tokens"] + (half if model.config.is_encoder_decoder else 0)
    assert abs(needed / counter.get_total_flops() - 1) < 0.02


def test_frozen_weights_unlabelled_tokens_and_padding_need_less():
    model = MODELS["bert"]()
    batch, counts = batch_of(model)
    def needed(**changes):
        return batch_flops(model_work(model), model.config, batch | counts | changes, causal=False)

    full, few, padded = needed(), needed(num_labels=7), needed(tokens=24, num_labels=24)
    assert abs(full - few - 6 * 200 * 64 * 41 / 48) < 1 and padded < full
    model.requires_grad_(False)
    assert abs(needed() - 12 * 3 * 64 * 24 - (full - 12 * 3 * 64 * 24) * 4 / 6) < 1
    assert in_reach(SimpleNamespace(sliding_window=8), 24) == 8 and in_reach(SimpleNamespace(attention_window=[8, 16]), 24) == 12


def test_no_name_hides_a_longer_one():
    names = list(PEAKS)
    assert all(later not in earlier or names.index(earlier) < names.index(later) for earlier in names for later in names if earlier != later)
    assert all(peak_flops("bf16-mixed", f"NVIDIA {name}") == peak for name, peak in PEAKS.items())


@pytest.mark.parametrize("peak", [None, 1e9])
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_the_record_says_it_where_the_peak_is_known(name, peak, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "peak_flops", lambda precision: peak)
    model = MODELS[name]()
    batch, counts = batch_of(model)
    seen = []
    trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda sums, reduce_op: sums), is_global_zero=True, global_step=0, estimated_stepping_batches=4, precision="bf16-mixed",
                              accumulate_grad_batches=1, log_every_n_steps=1, loggers=[], train_dataloader=SimpleNamespace(waited=0.0), world_size=4)
    module = SimpleNamespace(model=model, kind="causal" if name == "gpt2" else "masked", device="cpu", totals=Totals(), when_read=lambda then: then(),
                             step_figures=lambda: dict(loss=2.0, grad_norm=1.0, tokens=1000, fill=1.0))
    view = SimpleNamespace(start=lambda info: None, update=seen.append, finish=lambda info: None)
    recorder = Recorder(tmp_path, view)
    recorder.on_train_start(trainer, module)
    recorder.on_before_optimizer_step(trainer, module, SimpleNamespace(param_groups=[{"lr": 1e-3}]))
    trainer.global_step = 1
    recorder.on_train_batch_end(trainer, module, None, batch | counts, 0)
    recorder.on_train_end(trainer, module)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert "data_wait" in line and ("mfu" in line) == (peak is not None) == ("MFU" in figures(seen[0]))
    if peak:
        right = line["tokens_per_second"] * batch_flops(model_work(model), model.config, batch | counts, causal=name == "gpt2") / (4 * peak)
        assert abs(line["mfu"] - right) < 1e-4 * (1 + right)
