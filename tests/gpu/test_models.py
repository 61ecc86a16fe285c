"""The models on an accelerator: FlexAttention forward and backward, documents in the fused kernel, 16 bits, generation, compiled blocks, checkpointing with dropout."""
import pytest
import torch

from fengshen.utils import device
from fengshen.utils.device import seeded
from fengshen.utils.kernels.attention import NAME
from fengshen.utils.kernels.compile import compile_blocks
from tests.model_table import CASES, FAMILIES, WRITERS, answers, ids_of, loss_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(device.device_kind() == "cpu", reason="no accelerator here")]
LENGTH, TARGET = 200, 150
# heads of 64, which the fused kernels take, and texts of several of their blocks
WIDE = dict(hidden_size=128, num_attention_heads=2, intermediate_size=256, max_position_embeddings=LENGTH, initializer_range=0.1)
TALL = dict(d_model=128, max_position_embeddings=LENGTH)
SIZES = dict(roformer=WIDE, longformer=WIDE, megatron_t5=TALL | dict(d_kv=64, num_heads=2, d_ff=256, num_decoder_layers=2, initializer_factor=4.0),
             bart=TALL | dict(encoder_attention_heads=2, decoder_attention_heads=2, init_std=0.1))
DROPOUT = dict(roformer=dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1), longformer=dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
               megatron_t5=dict(dropout_rate=0.1), bart=dict(dropout=0.1, attention_dropout=0.1))
every_family = pytest.mark.parametrize("family", FAMILIES)


def family_of(name):
    return name.partition("-")[0]


def model_of(name, attention="sdpa", dtype=torch.float32, **changes):
    "The same random weights on the device for every form of attention."
    return CASES[name].make(attention, device=device.device_kind(), dtype=dtype, **SIZES[family_of(name)] | changes)


def there(batch):
    return {key: t.to(device.device_kind()) for key, t in batch.items()}


def batch_of(name, rows=2, masks=True):
    "Inputs and labels; the second row is padded."
    case = CASES[name]
    batch = case.batch(rows, LENGTH, TARGET, masks=False)
    for mask, length, ids in (("attention_mask", 150, "input_ids"), ("decoder_attention_mask", 90, "decoder_input_ids")):
        if masks and ids in batch:
            batch[mask] = torch.ones_like(batch[ids])
            batch[mask][1:, length:] = 0
    text, written = (ids_of(rows, n, 5) for n in (LENGTH, TARGET))
    return there(batch | {label: text % 3 if label == "encoder_labels" else written if case.two else text for label in case.labels})


def results(name, batch, **how):
    "(scores, gradients) of a model that is made for it."
    model = model_of(name, **how).train()
    out = model(**batch)
    loss_of(model, out).backward()
    return out.logits.detach().float(), {key: p.grad.float() for key, p in model.named_parameters() if p.grad is not None}


def apart(grads, goal):
    "Distance of all gradients together, relative."
    assert set(grads) == set(goal)
    one, two = (torch.cat([each[name].flatten() for name in goal]) for each in (grads, goal))
    return float((one - two).norm() / two.norm())


def behind(row, half):
    "Token types: read, written, or a prefix that is read."
    return dict(read=torch.zeros_like(row), written=torch.ones_like(row), both=(torch.arange(row.shape[1], device=row.device) > half).long().expand_as(row))


@pytest.mark.parametrize("name, types", [("roformer-ForCausalLM", "written"), ("roformer-ForMaskedLM", "both"), ("longformer-ForMaskedLM", None),
                                         ("megatron_t5-T5ForConditionalGeneration", None), ("bart-classes", None)])
def test_flex_attention_forward_and_backward(name, types):
    "Against plain attention, with padding, and with global tokens where there are any."
    batch = batch_of(name)
    if types:
        batch["token_type_ids"] = behind(batch["input_ids"], 80)[types]
    if family_of(name) == "longformer":
        batch["global_attention_mask"] = (torch.arange(LENGTH, device=batch["input_ids"].device) % 70 == 0).long().expand(2, -1)
    side = "decoder_attention_mask" if CASES[name].two else "attention_mask"
    batch["labels"] = torch.where(batch[side] == 1, batch["labels"], -100)
    (want, goal), (got, grads) = (results(name, batch, attention=attention) for attention in ("eager", "flex_attention"))
    torch.testing.assert_close(got[batch[side] == 1], want[batch[side] == 1], rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    assert apart(grads, goal) < 1e-3


@pytest.mark.parametrize("name, types", [("roformer-ForMaskedLM", "read"), ("roformer-ForMaskedLM", "written"), ("longformer-ForMaskedLM-dense", "read"), ("megatron_t5-T5EncoderModel", None)])
def test_documents_in_the_fused_kernel(name, types):
    "One flattened row in 16 bits, against each document alone in float32."
    lengths, ids = [90, 1, 64, 45], ids_of(1, LENGTH).to(device.device_kind())
    ends = torch.tensor([0, 90, 91, 155, 200, 200], dtype=torch.int32, device=ids.device)
    row = dict(input_ids=ids) | (dict(token_type_ids=behind(ids, 80)[types]) if types else {})
    parts = [dict(zip(row, part)) for part in zip(*(t.split(lengths, 1) for t in row.values()))]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(ids.device)
    field = "last_hidden_state" if name.endswith("T5EncoderModel") else "logits"
    found = []
    for attention, dtype in (("sdpa", torch.float32), (NAME, torch.bfloat16)):
        model = model_of(name, attention, dtype)
        out = model(**row, position_ids=positions, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=90, max_length_k=90)[field]
        (out.float() * torch.linspace(-1, 1, out.shape[-1], device=out.device)).sum().backward()
        found.append((out.detach().float(), {key: p.grad.float() for key, p in model.named_parameters() if p.grad is not None}))
    with torch.no_grad():
        model = model_of(name)
        alone = torch.cat([model(**part)[field] for part in parts], 1)
    (exact, goal), (got, grads) = found
    torch.testing.assert_close(exact, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))
    assert (got - alone).norm() / alone.norm() < 2e-2 and apart(grads, goal) < 5e-2


@every_family
@torch.no_grad()
def test_sixteen_bits_are_close(family):
    name = FAMILIES[family]
    batch = batch_of(name)
    for field, want in answers(model_of(name)(**batch)).items():
        got = answers(model_of(name, dtype=torch.bfloat16)(**batch))[field]
        side = batch.get({LENGTH: "attention_mask", TARGET: "decoder_attention_mask"}.get(want.shape[1]))
        a, b = (value.float() if side is None else value.float()[side == 1] for value in (got, want))
        assert (a - b).norm() / b.norm() < 2e-2, field


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "bart-number"])
def test_generation_with_a_cache(name):
    model, ids = model_of(name), ids_of(3, 12).to(device.device_kind())
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@every_family
def test_recomputed_activations_drop_the_same(family):
    "Gradient checkpointing, with dropout: the second forward draws what the first drew."
    name, found = FAMILIES[family], []
    for kept in (True, False):
        model = model_of(name, **DROPOUT[family]).train()
        if not kept:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        with seeded(5):
            loss = loss_of(model, model(**batch_of(name)))
            loss.backward()
        found.append((loss.detach(), {key: p.grad for key, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert apart(found[1][1], found[0][1]) < 1e-4


@pytest.mark.parametrize("family", ["roformer", "longformer", "megatron_t5"])
def test_compiled_blocks_compute_the_same(family):
    "One block a side, in float32 without padding; BART's are transformers' own."
    name = FAMILIES[family]
    small = dict(num_layers=1, num_decoder_layers=1) if family == "megatron_t5" else dict(num_hidden_layers=1)
    small |= dict(attention_window=64) if family == "longformer" else {}
    batch = batch_of(name, masks=False)
    plain, model = (model_of(name, **small).train() for _ in range(2))
    assert len(compile_blocks(model)) == 1 + CASES[name].two
    (want, goal), (got, grads) = ((out.logits.detach(), {key: p.grad for key, p in m.named_parameters()}) for m in (plain, model) for out in [stepped(m, batch)])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    assert apart(grads, goal) < 1e-3


def stepped(model, batch):
    "The output of a forward pass behind which a backward pass has run."
    out = model(**batch)
    out.loss.backward()
    return out
