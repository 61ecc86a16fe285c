"""The trainers that a user could pick instead, one configuration a process: what `benchmarks/gpu.py` compares with.

usage: python benchmarks/gpu_peers.py '{"trainer": "hf", "model": "gpt2_3b6", "batch": "packed", "data": FOLDER, ...}'

`trainer` is hf (transformers' Trainer), trl (its SFTTrainer), unsloth (its kernels, in the same SFTTrainer) or lightning (DeepSpeed ZeRO-3,
weights and optimizer on the host). `batch` says how documents become rows: packed (several a row of 1,024, `position_ids` tell them apart),
flat (the same rows as one, and attention by document), padded (to the longest of a batch, batches by length), windows (of a corpus, 1,024
tokens, no padding), masked and spans (random ids, as many as a row has, for BERT and T5). Rows are packed as this library packs them, and
questions are not scored, so that both sides learn the same. Peers that are compiled are compiled block by block, as one program takes
minutes. The last line on stdout is `RESULT` and JSON.
"""

import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

if '"unsloth"' in "".join(sys.argv[1:]):  # it changes torch, transformers, TRL and PEFT, and has to be imported first
    os.environ |= dict(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_COMPILE_LOCATION=f"{tempfile.gettempdir()}/unsloth_compiled")
    importlib.import_module("unsloth")

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from gpu_data import ROW, documents, shape_of
from torch.utils.data import Dataset
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, Trainer, TrainerCallback, TrainingArguments

from fengshen.data.packing import pack

os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
VARLEN = "by_document"
DEFAULTS = dict(
    trainer="hf",
    batch="packed",
    lengths="zh",
    rows=16,
    accumulate=1,
    steps=8,
    warm=4,
    compile=True,
    lora=False,
    four_bit=False,
    checkpointing=False,
    smoke=False,
)


# ------------------------------------------------------------------------------------------------------------------ data
def tensors(row, labels=None):
    return dict(input_ids=torch.from_numpy(row), labels=torch.from_numpy(row.copy() if labels is None else labels))


class Documents(Dataset):
    """Documents as they are: ids, labels of the answer, tokens."""

    def __init__(self, case):
        ids, lengths, prompts = documents(case["data"], case["lengths"])
        self.ids, self.lengths, self.prompts = np.asarray(ids, np.int64), np.asarray(lengths, np.int64), prompts
        self.starts = np.cumsum(self.lengths) - self.lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        ids = self.ids[self.starts[i] : self.starts[i] + self.lengths[i]]
        labels = ids.copy()
        labels[: self.prompts[i]] = -100
        return tensors(ids, labels) | dict(tokens=len(ids))


class Packed(Dataset):
    """Rows of several documents."""

    def __init__(self, case):
        self.row = 64 if case["smoke"] else ROW
        self.documents = Documents(case)
        rows = pack(self.documents.lengths, self.row)
        self.rows = [rows[i] for i in np.random.RandomState(1).permutation(len(rows))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        found = [self.documents[d] for d in self.rows[i]]
        tokens = sum(d["tokens"] for d in found)
        lengths = [d["tokens"] for d in found] + [self.row - tokens]
        for d in found:
            d["labels"][0] = -100
        out = {
            name: F.pad(torch.cat([d[name] for d in found]), (0, self.row - tokens), value=value)
            for name, value in (("input_ids", 0), ("labels", -100))
        }
        return out | dict(position_ids=torch.cat([torch.arange(n) for n in lengths]), tokens=tokens)


class Flat(Packed):
    """`rows` rows one after the other, with the borders of their documents; as many borders every time, so that nothing changes its shape."""

    def __init__(self, case):
        super().__init__(case)
        self.together = case["rows"]

    def __len__(self):
        return len(self.rows) // self.together

    def __getitem__(self, i):
        found = [super(Flat, self).__getitem__(i * self.together + j) for j in range(self.together)]
        out = {name: torch.cat([row[name] for row in found])[None] for name in ("input_ids", "labels", "position_ids")}
        borders = torch.full((32 * self.together + 2,), out["input_ids"].shape[1], dtype=torch.int32)
        starts = (out["position_ids"][0] == 0).nonzero().flatten().int()
        borders[: len(starts)] = starts
        return out | dict(
            cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=self.row, max_length_k=self.row, tokens=sum(row["tokens"] for row in found)
        )


class Windows(Dataset):
    """Windows of a corpus."""

    def __init__(self, case):
        self.row, names = 64 if case["smoke"] else ROW, ("zh", "en")
        self.parts = [np.load(Path(case["data"], f"{name}_ids.npy"), mmap_mode="r") for name in names]
        self.windows = [(part, start) for part in self.parts for start in range(0, len(part) - self.row, self.row)]

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        part, start = self.windows[i]
        return tensors(part[start : start + self.row].astype(np.int64)) | dict(tokens=self.row)


class Drawn(Dataset):
    """Random ids: masked words (15% are labels), or an input and the spans that it lacks."""

    def __init__(self, case):
        self.row, self.spans = 32 if case["smoke"] else 512, case["batch"] == "spans"
        self.vocabulary = shape_of(case["model"], case["smoke"])["vocab_size"]

    def __len__(self):
        return 1 << 16

    def __getitem__(self, i):
        draw = np.random.RandomState(i)
        ids = draw.randint(5, self.vocabulary, self.row)
        labels = draw.randint(5, self.vocabulary, self.row // 5 + 12) if self.spans else np.where(draw.rand(self.row) < 0.15, ids, -100)
        return tensors(ids, labels) | dict(tokens=self.row + len(labels) * self.spans)


BATCHES = dict(packed=Packed, flat=Flat, padded=Documents, windows=Windows, masked=Drawn, spans=Drawn)


def stack(items):
    """Rows of one length as a batch."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "tokens"} | dict(
        tokens=torch.tensor(sum(item["tokens"] for item in items))
    )


def pad(items):
    """Documents as a batch, as long as the longest."""
    longest = max(item["tokens"] for item in items)
    parts = [dict(item, attention_mask=torch.ones(item["tokens"], dtype=torch.long)) for item in items]
    fill = dict(input_ids=0, labels=-100, attention_mask=0)
    return stack(
        [
            {name: F.pad(part[name], (0, longest - part["tokens"]), value=value) for name, value in fill.items()} | dict(tokens=part["tokens"])
            for part in parts
        ]
    )


def one(items):
    """A batch that is already whole."""
    return items[0] | dict(tokens=torch.tensor(items[0]["tokens"]))


COLLATE = dict(padded=pad, flat=one)


# ---------------------------------------------------------------------------------------------------------------- models
def by_document(module, query, key, value, mask, dropout=0.0, scaling=None, cu_seq_lens_q=None, **rest):
    """Attention inside each document of one flattened row: torch's own kernel, through transformers' attention interface."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    borders = cu_seq_lens_q.flatten()
    if CUDA:
        q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
        return torch.ops.aten._flash_attention_forward(q, k, v, borders, borders, ROW, ROW, dropout, True, False, scale=scaling)[0][None], None
    number = torch.searchsorted(borders[1:].contiguous(), torch.arange(len(q), dtype=torch.int32), right=True)
    seen = (number[:, None] == number[None]).tril()
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling).transpose(1, 2), None


AttentionInterface.register(VARLEN, by_document)
AttentionMaskInterface.register(VARLEN, lambda *args, **settings: None)
AUTO = dict(
    gpt2="AutoModelForCausalLM",
    qwen3="AutoModelForCausalLM",
    bert="AutoModelForMaskedLM",
    t5="AutoModelForSeq2SeqLM",
    **{"megatron-bert": "AutoModelForMaskedLM"},
)


def build(case, dtype=torch.float32, device=DEVICE):
    """The model with random weights, drawn where it will be trained; where the strategy says, without a device."""
    shape = dict(shape_of(case["model"], case["smoke"]))
    kind = shape.pop("model_type")
    config = AutoConfig.for_model(kind, use_cache=False, **shape)
    asked = VARLEN if case["batch"] == "flat" or case["trainer"] == "trl" else case.get("attention")
    with torch.device(device) if device else nullcontext():
        model = getattr(transformers, AUTO[kind]).from_config(config, dtype=dtype, **(dict(attn_implementation=asked) if asked else {}))
    case["attention"] = model.config._attn_implementation
    if case["four_bit"]:
        quantise(model)
    return adapted(model, case["four_bit"]) if case["lora"] else model


def quantise(model):
    """Every linear layer but the head in four bits (nf4, by bitsandbytes), in place; what transformers does with weights that it loads."""
    import bitsandbytes
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if layer is head or not isinstance(layer, (torch.nn.Linear, Conv1D)):
            continue
        weight = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
        narrow = bitsandbytes.nn.Linear4bit(
            *weight.shape[::-1], bias=layer.bias is not None, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
        )
        narrow.weight = bitsandbytes.nn.Params4bit(weight.contiguous().cpu(), requires_grad=False, quant_type="nf4")
        narrow.bias = layer.bias
        model.set_submodule(name, narrow.to(DEVICE))
    model.is_loaded_in_4bit = True  # peft asks


def adapted(model, four_bit):
    """A LoRA adapter of rank 16 on every linear layer of the blocks."""
    import peft

    gpt2 = model.config.model_type == "gpt2"
    layers = ["c_attn", "c_proj", "c_fc"] if gpt2 else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(
        model,
        peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=layers, task_type="CAUSAL_LM", fan_in_fan_out=gpt2 and not four_bit),
    )


# ------------------------------------------------------------------------------------------------------------- measuring
class Clock:
    """Marks on the device's time line, one before each optimizer step and one after the last; real tokens and losses between them."""

    def __init__(self, started):
        self.started, self.marks, self.tokens, self.losses, self.first = started, [], [], [], None

    def mark(self):
        if CUDA:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())
        if len(self.marks) == 2:
            if CUDA:
                torch.cuda.synchronize()
            self.first = time.time() - self.started
        self.tokens.append(0)
        self.losses.append(0)

    def add(self, tokens, loss):
        """One micro-batch; tensors are read at the end."""
        self.tokens[-1] = self.tokens[-1] + tokens
        self.losses[-1] = self.losses[-1] + loss.detach().float()

    def figures(self, warm):
        """What is reported."""
        if CUDA:
            torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1000 if CUDA else b - a for a, b in zip(self.marks, self.marks[1:])]
        tokens, losses = [int(n) for n in self.tokens[:-1]], [round(float(x), 4) for x in self.losses[:-1]]
        rates = [n / s for n, s in zip(tokens, seconds)]
        peaks = dict(reserved=torch.cuda.max_memory_reserved() / 2**30, allocated=torch.cuda.max_memory_allocated() / 2**30) if CUDA else {}
        return dict(
            tokens_per_second=statistics.median(rates[warm:]),
            mean_tokens_per_second=sum(tokens[warm:]) / sum(seconds[warm:]),
            steps=len(rates),
            tokens_per_step=round(statistics.mean(tokens)),
            first_step_s=round(self.first, 1),
            losses=losses,
            **{f"{name}_gib": round(value, 2) for name, value in peaks.items()},
        )


class Marks(TrainerCallback):
    def __init__(self, clock):
        self.clock = clock

    def on_step_begin(self, *args, **settings):
        self.clock.mark()

    def on_train_end(self, *args, **settings):
        self.clock.mark()


class Measured:
    """Mixed into a Trainer: real tokens and the loss of each micro-batch."""

    clock = None

    def training_step(self, model, inputs, *args, **settings):
        tokens = inputs.pop("tokens")
        loss = super().training_step(model, inputs, *args, **settings)
        self.clock.add(tokens, loss)
        return loss


# -------------------------------------------------------------------------------------------------------------- trainers
def settings(case, folder):
    """What is the same in every Trainer."""
    whole = case["batch"] == "flat"
    return dict(
        output_dir=folder,
        per_device_train_batch_size=1 if whole else case["rows"],
        gradient_accumulation_steps=case["accumulate"],
        max_steps=case["warm"] + case["steps"],
        optim="adamw_torch_fused" if CUDA else "adamw_torch",
        bf16=CUDA,
        use_cpu=not CUDA,
        torch_compile=case["compile"] and CUDA,
        learning_rate=1e-5,
        weight_decay=0.1,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=2 if CUDA else 0,
        remove_unused_columns=False,
        gradient_checkpointing=case["checkpointing"],
        gradient_checkpointing_kwargs=dict(use_reentrant=False),
    )


def hf(case, clock, folder):
    """transformers' Trainer."""

    class Timed(Measured, Trainer):
        pass

    Timed.clock = clock
    more = dict(train_sampling_strategy="group_by_length") if case["batch"] == "padded" else {}
    model = build(case, torch.bfloat16 if case["lora"] and CUDA else torch.float32)
    Timed(
        model=model,
        args=TrainingArguments(**settings(case, folder), **more),
        train_dataset=BATCHES[case["batch"]](case),
        data_collator=COLLATE.get(case["batch"], stack),
        callbacks=[Marks(clock)],
    ).train()


def sft(case, clock, folder, model, **more):
    """TRL's SFTTrainer with its own packing (best fit), padding-free."""
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    class Timed(Measured, SFTTrainer):
        pass

    Timed.clock = clock
    documents = Documents(case)
    found = [documents[i] for i in range(len(documents))]
    table = Table.from_list([dict(input_ids=d["input_ids"].tolist(), completion_mask=(d["labels"] != -100).int().tolist()) for d in found])
    config = SFTConfig(
        **settings(case, folder) | dict(remove_unused_columns=True),
        packing=True,
        packing_strategy="bfd",
        max_length=64 if case["smoke"] else ROW,
        completion_only_loss=True,
        dataset_kwargs=case.get("dataset_kwargs"),
        shuffle_dataset=True,
        **more,
    )
    trainer = Timed(model=model, args=config, train_dataset=table, processing_class=tokenizer_of(case), callbacks=[Marks(clock)])
    collate = trainer.data_collator
    trainer.data_collator = lambda items: collate(items) | dict(tokens=torch.tensor(sum(len(item["input_ids"]) for item in items)))
    trainer.train()


def tokenizer_of(case):
    """The tokenizer of the documents."""
    from fengshen.tokenizer import load_tokenizer

    return load_tokenizer(str(Path(case["data"], "gpt2")))


def trl(case, clock, folder):
    """TRL, attention by document; the batch is filled to one shape."""
    model = build(case, torch.bfloat16 if case["lora"] and CUDA else torch.float32)
    sft(case, clock, folder, model, pad_to_multiple_of=(64 if case["smoke"] else ROW) * case["rows"])


def unsloth(case, clock, folder):
    """Unsloth in TRL, as its own pages show it: attention by document, through xformers where it loads (torch's flash kernel), else one SDPA call
    a document. It takes a model from a folder only, so that writing and reading one is part of its start."""
    from unsloth import FastLanguageModel

    place, checkpointing = f"{folder}/model", "unsloth" if case["checkpointing"] else False
    whole = build(case | dict(lora=False, four_bit=False), torch.bfloat16)
    whole.save_pretrained(place)
    tokenizer_of(case).save_pretrained(place)
    del whole
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, _ = FastLanguageModel.from_pretrained(
        place,
        max_seq_length=ROW,
        dtype=torch.bfloat16,
        load_in_4bit=case["four_bit"],
        full_finetuning=not case["lora"],
        use_gradient_checkpointing=checkpointing,
    )
    if case["lora"]:
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        adapter = dict(r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=layers)
        model = FastLanguageModel.get_peft_model(model, **adapter, use_gradient_checkpointing=checkpointing)
    sft(case | dict(compile=False), clock, folder, model)
    if CUDA and case["lora"]:
        case["attention"] = importlib.import_module("unsloth.utils.attention_dispatch").select_attention_backend(use_varlen=True)
    elif CUDA:  # transformers' own blocks, whose attention it takes over where it can
        calls = importlib.import_module("unsloth.utils.hf_packed_attention").HF_PACKED_ATTENTION_STATS
        case["attention"] = "varlen" if calls["fast"] or calls["compiled"] else "sdpa"


def zero3(case):
    """DeepSpeed's settings with both offloads, in Lightning."""
    from pytorch_lightning.strategies import DeepSpeedStrategy

    host = dict(device="cpu", pin_memory=True)
    stage = dict(
        stage=3,
        overlap_comm=True,
        contiguous_gradients=True,
        sub_group_size=10**9,
        stage3_max_live_parameters=10**9,
        stage3_max_reuse_distance=10**9,
        offload_optimizer=host,
        offload_param=host,
    )
    return DeepSpeedStrategy(
        remote_device="cpu",
        config=dict(
            train_micro_batch_size_per_gpu=case["rows"],
            gradient_clipping=1.0,
            zero_optimization=stage,
            zero_allow_untested_optimizer=True,
            steps_per_print=10**9,
        ),
    )


def lightning(case, clock, folder):
    """A plain LightningModule around a Hugging Face model."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = None

        def configure_model(self):
            if self.model is None:
                self.model = build(case, device=None)
                table = self.model.get_input_embeddings().weight
                if CUDA:
                    import deepspeed

                    with deepspeed.zero.GatheredParameters(table, modifier_rank=0):
                        table.data.normal_(0, 0.02)
                self.model.train()
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))

        def configure_optimizers(self):
            if CUDA:
                from deepspeed.ops.adam import DeepSpeedCPUAdam

                return DeepSpeedCPUAdam(self.parameters(), lr=1e-5, weight_decay=0.1, adamw_mode=True)
            return torch.optim.AdamW(self.parameters(), lr=1e-5, weight_decay=0.1)

        def on_train_start(self):
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

        def training_step(self, batch, number):
            if number % case["accumulate"] == 0:
                clock.mark()
            tokens = batch.pop("tokens")
            loss = self.model(**batch).loss
            clock.add(tokens, loss / case["accumulate"])
            return loss

        def on_train_end(self):
            clock.mark()

    pl.Trainer(
        accelerator="gpu" if CUDA else "cpu",
        devices=1,
        strategy=zero3(case) if CUDA else "auto",
        precision="bf16-mixed" if CUDA else "32-true",
        max_steps=case["warm"] + case["steps"],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=case["accumulate"],
        default_root_dir=folder,
    ).fit(Module(), DataLoader(Packed(case), batch_size=case["rows"], collate_fn=stack, num_workers=2 if CUDA else 0))


TRAINERS = dict(hf=hf, trl=trl, unsloth=unsloth, lightning=lightning)


def main():
    case = DEFAULTS | json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    clock = Clock(case.get("started", time.time()))
    with tempfile.TemporaryDirectory() as folder:
        TRAINERS[case["trainer"]](case, clock, folder)
    print("RESULT " + json.dumps(clock.figures(case["warm"]) | dict(attention=case.get("attention"))), flush=True)
    os._exit(0)  # DeepSpeed and compiled workers take their time to end


if __name__ == "__main__":
    main()
