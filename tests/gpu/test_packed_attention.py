"""Packed equals padded on the device, document by document: flex, sdpa and eager to 1e-5 in float32, the fused kernel in bfloat16."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from fengshen.data.batch import pad_rows
from fengshen.data.packing import pack, pack_rows
from fengshen.utils import device
from fengshen.utils.kernels.attention import FLASH, FLEX, NAME, choose_attention, flex_mask, model_inputs, register_attention, why_not_here
from fengshen.utils.kernels.compile import compile_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(device.device_kind() == "cpu", reason="no accelerator here")]

VOCAB, ROW, PAD = 61, 256, 0  # rows of two blocks of flex attention
LENGTHS = [256, 140, 116, 1, 127, 128, 200, 30, 26]  # four rows without padding
SMALL = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=ROW)
CONFIGS = dict(
    gpt2=GPT2Config(vocab_size=VOCAB, n_positions=ROW, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    llama=LlamaConfig(**SMALL),
    qwen2=Qwen2Config(**SMALL),
    qwen3=Qwen3Config(**SMALL, head_dim=16),
)


def model_of(arch, attention, dtype=torch.float32):
    register_attention()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[arch]), attn_implementation=attention).train()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(3)  # attention far from uniform
    return model.to(device.device_kind(), dtype)


def batches(seed=0):
    "The same documents padded, and packed in the order of the rows, on the device."
    gen, samples = torch.Generator().manual_seed(seed), []
    for n in LENGTHS:
        ids = torch.randint(2, VOCAB, (n,), generator=gen)
        samples.append(dict(input_ids=ids.numpy(), labels=torch.where(torch.arange(n) < n // 3, -100, ids).numpy()))
    rows = pack(LENGTHS, ROW)
    assert all(sum(LENGTHS[i] for i in row) == ROW for row in rows)
    both = pad_rows([samples[i] for i in rows.order], PAD), pack_rows([[samples[i] for i in row] for row in rows], ROW, PAD)
    for batch in both:
        batch.update({k: v.to(device.device_kind()) for k, v in batch.items() if torch.is_tensor(v)})
    return both


def losses(model, inputs, labels, bounds):
    "The loss of each document, of a flat sequence of tokens cut at `bounds`."
    logits = model(**inputs).logits.flatten(0, 1).float()
    labels = torch.cat([labels.flatten()[1:], labels.new_tensor([-100])])
    labels[bounds[1:] - 1] = -100
    each = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return torch.stack([each[a:b].sum() for a, b in zip(bounds.tolist(), bounds[1:].tolist())])


def both_sides(arch, attention, dtype):
    "(losses, gradients of a weighted sum of them), packed and padded."
    padded, packed = batches()
    ends = torch.arange(len(LENGTHS) + 1) * padded.shape[1], packed["cu_seq_lens"].unique().long().cpu()
    kinds = "eager" if attention == "eager" else "sdpa", attention
    out = []
    for batch, bounds, kind in zip((padded, packed), ends, kinds):
        model = model_of(arch, kind, dtype)
        each = losses(model, model_inputs(batch, kind), batch["labels"], bounds)
        (each @ torch.linspace(-1, 2, len(each), device=each.device)).backward()
        out.append((each.detach(), {name: p.grad for name, p in model.named_parameters()}))
    return out


@pytest.mark.parametrize("attention", [FLEX, "sdpa", "eager"])
@pytest.mark.parametrize("arch", CONFIGS)
def test_packed_is_padded_in_float32(arch, attention):
    (want, true), (got, grads) = both_sides(arch, attention, torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    floor = 0.01 * max(float(g.abs().max()) for g in true.values())
    worst = {name: float((grads[name] - g).abs().max()) / max(float(g.abs().max()), floor) for name, g in true.items()}
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.parametrize("arch", CONFIGS)
def test_packed_is_padded_in_the_fused_kernel(arch):
    (want, true), (got, grads) = both_sides(arch, NAME, torch.bfloat16)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0.5)
    apart = {name: float((grads[name].float() - g.float()).norm() / g.float().norm().clamp(min=1e-3)) for name, g in true.items() if "k_proj.bias" not in name}
    assert max(apart.values()) < 0.1, apart


@pytest.mark.parametrize("attention,dtype", [(FLEX, torch.float32), (FLEX, torch.bfloat16), ("sdpa", torch.float32), ("eager", torch.float32), (NAME, torch.bfloat16)])
def test_a_document_notices_nothing_of_another(attention, dtype):
    "To the last bit; and with the mask taken out (positions still restart) it does."
    batch, model = batches()[1], model_of("llama", attention, dtype)
    bounds = batch["cu_seq_lens"].unique().long().cpu()
    first = int((bounds % ROW == 0).nonzero()[1, 0])  # opens the second row

    def leak(change):
        with torch.no_grad():
            before = losses(model, change(batch), batch["labels"], bounds)
            other = copy.deepcopy(batch)
            other["input_ids"].view(-1)[bounds[first] : bounds[first + 1]] = 7
            after = losses(model, change(other), other["labels"], bounds)
        others = torch.arange(len(before), device=before.device) != first
        return float((before - after)[others].abs().max())

    assert leak(lambda b: model_inputs(b, attention)) == 0.0
    if attention == FLEX:
        whole = torch.arange(ROW, device=batch["input_ids"].device).expand_as(batch["input_ids"])
        assert leak(lambda b: model_inputs(b, attention) | dict(block_mask=flex_mask(whole))) > 1e-3


def test_flex_in_compiled_blocks_is_compiled_once():
    model, plain = model_of("llama", FLEX), model_of("llama", FLEX)
    compile_blocks(model)
    graphs = []
    for seed in range(4):
        batch = batches(seed)[1]
        batch["position_ids"] = batch["position_ids"].roll(seed, dims=0)
        inputs = model_inputs(batch, FLEX)
        got, want = model(**inputs).logits, plain(**inputs).logits
        got.sum().backward()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1], graphs


def test_what_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match="has no dropout"):
        choose_attention(GPT2Config(), "flex")
    assert choose_attention(CONFIGS["qwen2"], "flex") == FLEX
    refusal = why_not_here(FLASH, CONFIGS["llama"], torch.bfloat16)
    assert refusal == "" or "flash_attn" in refusal
