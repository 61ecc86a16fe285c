"""Packing changes nothing: loss and every gradient of a packed batch are the sum of its documents, each run alone.

All models are random, float32, in training mode with dropout 0, so the code that runs is the code that trains. A gradient is compared relative to the
largest entry of its parameter's true gradient, or to 1% of the largest entry of any where a parameter's own is nearly zero (keys of one-token
documents).
"""
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from fengshen.data.batch import pad_rows
from fengshen.data.packing import pack, pack_rows
from fengshen.losses import cross_entropy
from fengshen.utils.kernels.attention import (
    FLASH,
    FLEX,
    NAME,
    block_mask,
    choose_attention,
    document_attention,
    flex_mask,
    model_inputs,
    register_attention,
)
from fengshen.utils.kernels.loss import chunked_loss

VOCAB, ROW, PAD = 61, 24, 0
TOLERANCE = 1e-5
SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=ROW)
CONFIGS = dict(
    gpt2=GPT2Config(vocab_size=VOCAB, n_positions=ROW, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    llama=LlamaConfig(**SMALL),
    qwen2=Qwen2Config(**SMALL),
    qwen3=Qwen3Config(**SMALL, head_dim=8),
    mistral=MistralConfig(**SMALL, sliding_window=5),
)
ARCHS = ("gpt2", "llama", "qwen2", "qwen3")
PAIRS = [(arch, attention) for arch in ARCHS for attention in (NAME, "sdpa", "eager")] + [("mistral", NAME)]
FORWARD = PAIRS + [(arch, FLEX) for arch in ARCHS]  # flex has no backward pass on a CPU
_models = {}


def model_of(arch, attention):
    if (arch, attention) not in _models:
        register_attention()
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[arch]), attn_implementation=attention).train()
        # five times the usual initial weights: attention is far from uniform, so looking at the wrong tokens shows
        for p in model.parameters():
            if p.dim() == 2:
                p.data.mul_(5)
        _models[arch, attention] = model
    return _models[arch, attention]


def samples_of(lengths, seed):
    g = torch.Generator().manual_seed(seed)
    out = []
    for n in lengths:
        ids = torch.randint(2, VOCAB, (n,), generator=g)
        labels = ids.clone()
        labels[: int(torch.randint(1, n + 1, (1,), generator=g))] = -100  # a question, at least one token of it
        out.append(dict(input_ids=ids.numpy(), labels=labels.numpy()))
    return out


def packed_batch(lengths, seed):
    samples = samples_of(lengths, seed)
    return samples, pack_rows([[samples[i] for i in row] for row in pack(lengths, ROW)], ROW, PAD)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def alone(arch, samples):
    "Each document by itself, in transformers' own sdpa, with the textbook loss on all logits."
    model, total = model_of(arch, "sdpa"), 0.0
    for s in samples:
        ids, labels = (torch.from_numpy(s[k])[None] for k in ("input_ids", "labels"))
        logits = model(ids, use_cache=False).logits
        total = total + F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
    return total.item(), gradients(model, total)


def packed(arch, attention, batch, inputs=None):
    model = model_of(arch, attention)
    inputs = inputs or model_inputs(batch, attention)
    hidden = model.base_model(**inputs).last_hidden_state
    labels = batch["labels"].reshape(hidden.shape[:2])
    loss = chunked_loss(hidden, labels, model.lm_head, cross_entropy, chunk=7)
    return loss.item(), gradients(model, loss)


def difference(got, want):
    "Largest relative difference of loss and gradients, as the module's docstring defines it."
    (loss, grads), (true_loss, true) = got, want
    floor = 0.01 * max(float(g.abs().max()) for g in true.values())
    worst = abs(loss - true_loss) / max(abs(true_loss), 1.0)
    for name, g in true.items():
        scale = max(float(g.abs().max()), floor, 1e-12)
        worst = max(worst, float((grads[name] - g).abs().max()) / scale)
    return worst


@pytest.mark.parametrize("arch,attention", PAIRS)
@given(lengths=st.lists(st.integers(1, ROW), min_size=1, max_size=9), seed=st.integers(0, 10**6))
@example(lengths=[1], seed=0)
@example(lengths=[1, 1, 1, 1], seed=1)
@example(lengths=[ROW, ROW], seed=2)
@example(lengths=[23, 1, 12, 12, 5], seed=3)
@settings(max_examples=12, deadline=None)
def test_packed_is_the_sum_of_its_documents(arch, attention, lengths, seed):
    samples, batch = packed_batch(lengths, seed)
    assert difference(packed(arch, attention, batch), alone(arch, samples)) < TOLERANCE


def unmasked(batch, attention):
    "The same packed call with the document mask taken out: causal over the whole row, positions still restarting."
    ids, positions = batch["input_ids"], batch["position_ids"]
    inputs = model_inputs(batch, attention)
    if attention == FLEX:
        return inputs | dict(block_mask=flex_mask(torch.arange(ids.shape[1]).expand_as(ids)))
    if attention == NAME:
        rows = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
        return inputs | dict(cu_seq_lens_q=rows, cu_seq_lens_k=rows)
    mask = block_mask(torch.arange(ids.shape[1]).expand_as(ids), attention=attention)
    return dict(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("arch,attention", PAIRS)
def test_without_the_document_mask_it_fails(arch, attention):
    samples, batch = packed_batch([9, 8, 7, 6, 10, 3], seed=4)
    want = alone(arch, samples)
    assert difference(packed(arch, attention, batch), want) < TOLERANCE
    assert difference(packed(arch, attention, batch, unmasked(batch, attention)), want) > 1e-3


# Document by document: what each one loses, packed and padded, and whether it notices its neighbours.


def document_losses(model, inputs, labels, bounds):
    "The loss of each document, summed over its scored tokens, of a flat sequence of tokens cut at `bounds`."
    with torch.compiler.set_stance("force_eager"):  # transformers would compile flex, for half a minute
        logits = model(**inputs).logits.flatten(0, 1)
    labels = torch.cat([labels.flatten()[1:], torch.tensor([-100])])
    labels[bounds[1:] - 1] = -100  # a document's last token predicts nothing
    losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return torch.stack([losses[a:b].sum() for a, b in zip(bounds, bounds[1:])])


def packed_losses(arch, attention, batch, inputs=None):
    inputs = model_inputs(batch, attention) if inputs is None else inputs
    return document_losses(model_of(arch, attention), inputs, batch["labels"], batch["cu_seq_lens"].unique().long())


def pair_of_batches(lengths, seed):
    "The same documents padded, and packed in the order of the rows."
    samples = samples_of(lengths, seed)
    rows = pack(lengths, ROW)
    assert all(sum(lengths[i] for i in row) == ROW for row in rows), "no padding: document number k of one batch is that of the other"
    return pad_rows([samples[i] for i in rows.order], PAD), pack_rows([[samples[i] for i in row] for row in rows], ROW, PAD)


@pytest.mark.parametrize("arch,attention", [case for case in FORWARD if case[0] != "mistral"])
def test_each_document_loses_what_it_loses_padded(arch, attention):
    "And so do the gradients of any weighted sum of them."
    lengths = [24, 11, 13, 1, 9, 14, 20, 4]
    padded, batch = pair_of_batches(lengths, seed=11)
    kind = "eager" if attention == "eager" else "sdpa"
    length = padded.shape[1]
    with torch.set_grad_enabled(attention != FLEX):
        want = document_losses(model_of(arch, kind), model_inputs(padded, kind), padded["labels"], torch.arange(len(lengths) + 1) * length)
        got = packed_losses(arch, attention, batch)
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)
    if attention != FLEX:
        weights = torch.linspace(-1, 2, len(lengths))
        true = (want @ weights).item(), gradients(model_of(arch, kind), want @ weights)
        assert difference(((got @ weights).item(), gradients(model_of(arch, attention), got @ weights)), true) < TOLERANCE


def leak(arch, attention, make=model_inputs):
    "How far the others' losses move when one document says something else."
    _, batch = pair_of_batches([8, 7, 9, 10, 14], seed=12)
    with torch.no_grad():
        before = packed_losses(arch, attention, batch, make(batch, attention))
        bounds = batch["cu_seq_lens"].unique().long()
        changed = 1 + int((bounds[1:-1] % ROW == 0).nonzero()[0, 0])  # the first of the second row: others are before and behind it
        inside = slice(bounds[changed], bounds[changed + 1])
        batch["input_ids"].view(-1)[inside] = 2 + batch["input_ids"].view(-1)[inside] % 50
        after = packed_losses(arch, attention, batch, make(batch, attention))
    assert before[changed] != after[changed]
    others = torch.arange(len(before)) != changed
    return float((before - after)[others].abs().max())


@pytest.mark.parametrize("arch,attention", FORWARD)
def test_a_document_notices_nothing_of_another(arch, attention):
    "To the last bit; and with the mask taken out (positions still restart) this test fails."
    assert leak(arch, attention) == 0.0
    assert leak(arch, attention, unmasked) > 1e-3


@pytest.mark.slow
def test_compiled_flex_is_the_same():
    "What users' machines run: the kernel that transformers compiles."
    _, batch = pair_of_batches([8, 7, 9, 10, 14], seed=12)
    with torch.no_grad():
        got = model_of("llama", FLEX)(**model_inputs(batch, FLEX)).logits
        want = model_of("llama", "sdpa")(**model_inputs(batch, "sdpa")).logits
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE * float(want.abs().max()))


def test_what_cannot_train_here_is_refused_before_it_does():
    with pytest.raises(ValueError, match="cannot be 'flex' here.*no backward pass on a CPU"):
        choose_attention(CONFIGS["llama"], "flex")
    with pytest.raises(ValueError, match="flash_attn is not installed"):
        choose_attention(CONFIGS["llama"], FLASH)


def test_flex_without_a_block_mask_is_sdpa_and_a_lost_one_is_noticed():
    ids = left_padded(1)[0]
    with torch.no_grad():
        assert torch.equal(model_of("qwen2", FLEX)(ids).logits, model_of("qwen2", "sdpa")(ids).logits)
    inputs = model_inputs(packed_batch([9, 8], seed=9)[1], FLEX)
    del inputs["block_mask"]
    with pytest.raises(ValueError, match="did not reach the attention layer"):
        model_of("gpt2", FLEX)(**inputs)


@pytest.mark.parametrize("attention", [NAME, "sdpa", "eager"])
def test_padding_adds_nothing(attention):
    "The padding tail is a document nobody scores: longer rows give the same loss and gradients."
    samples = samples_of([5, 4], seed=6)
    short, long = (pack_rows([samples], capacity, PAD) for capacity in (9, ROW))
    assert difference(packed("gpt2", attention, long), packed("gpt2", attention, short)) < TOLERANCE


@pytest.mark.parametrize("arch,attention", PAIRS)
def test_empty_batch_adds_nothing_and_reaches_every_parameter(arch, attention):
    batch = pack_rows([], ROW, PAD)
    model = model_of(arch, attention)
    loss, grads = packed(arch, attention, batch)
    assert loss == 0.0 and not any(g.any() for g in grads.values())
    assert all(p.grad is not None for p in model.parameters())


def test_gradient_checkpointing_passes_the_boundaries_on():
    samples, batch = packed_batch([9, 8, 7, 6], seed=7)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]), attn_implementation=register_attention()).train()
    model.load_state_dict(model_of("llama", "sdpa").state_dict())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    loss = chunked_loss(model.base_model(**model_inputs(batch, NAME)).last_hidden_state, batch["labels"].reshape(1, -1), model.lm_head, cross_entropy)
    assert difference((loss.item(), gradients(model, loss)), alone("llama", samples)) < TOLERANCE


# Without boundaries the same function must be plain sdpa: generation and padded batches depend on it.


@pytest.fixture(params=["gpt2", "llama", "qwen3", "mistral"])
def pair(request):
    models = [copy.deepcopy(model_of(request.param, "sdpa")).eval() for _ in range(2)]
    models[0].set_attn_implementation(register_attention())
    return models


def left_padded(batch=3):
    ids = torch.randint(2, VOCAB, (batch, 10), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def test_padding_on_the_left_is_sdpa(pair):
    ids, mask, positions = left_padded()
    ours, sdpa = (m(ids, attention_mask=mask, position_ids=positions).logits for m in pair)
    assert torch.equal(ours[mask.bool()], sdpa[mask.bool()])
    torch.testing.assert_close(ours[1, 2:], pair[1](ids[1:2, 2:]).logits[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[10], [4, 6], [4, 1, 5], [1] * 10])
def test_cache_in_chunks_is_the_whole_prompt(pair, chunks):
    "A second chunk sees all that is cached and its own past: a missing mask would let its first token see its last."
    ids, mask, positions = left_padded()
    want = pair[1](ids, attention_mask=mask, position_ids=positions).logits
    cache, start, parts = DynamicCache(config=pair[0].config), 0, []
    for n in chunks:
        end = start + n
        known = dict(attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=cache)
        parts.append(pair[0](ids[:, start:end], use_cache=True, **known).logits)
        start = end
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], want[mask.bool()], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cache_in_chunks_without_a_mask(pair):
    ids = left_padded(2)[0]
    want, cache = pair[1](ids).logits, DynamicCache(config=pair[0].config)
    got = [pair[0](ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 3), (3, 9), (9, 10))]
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_sdpa(pair, beams):
    ids, mask, _ = left_padded()
    ours, sdpa = (m.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=beams, do_sample=False, pad_token_id=PAD) for m in pair)
    assert torch.equal(ours, sdpa)


@torch.no_grad()
def test_positions_that_restart_do_not_leak_without_boundaries(pair):
    "A packed row made by others (position ids, no boundaries, no cache) is masked too."
    ids = left_padded(1)[0]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    got = pair[0](ids, position_ids=positions, use_cache=False).logits[:, 4:]
    torch.testing.assert_close(got, pair[1](ids[:, 4:]).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_autocast_mixes_no_dtypes(pair):
    "Rotary models hand over float32 queries and bfloat16 values under autocast."
    _, batch = packed_batch([9, 8, 7], seed=8)
    exact = pair[0](**model_inputs(batch, NAME)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = pair[0](**model_inputs(batch, NAME)).logits
    assert (half - exact).norm() < 0.1 * exact.norm()


def test_attention_dropout_is_applied():
    q, k, v = torch.randn(2, 1, 2, 12, 8), torch.randn(1, 2, 12, 8), torch.ones(1, 2, 12, 8)
    out = document_attention(q[0], k, v, torch.tensor([0, 5, 12]), dropout=0.5)
    assert out.min() == 0 or out.std() > 0.1
    kept = document_attention(q[0], k, v, torch.tensor([0, 5, 12]))
    torch.testing.assert_close(kept, v)


def test_a_saved_model_does_not_need_fengshen(tmp_path):
    model = copy.deepcopy(model_of("gpt2", "sdpa"))
    model.set_attn_implementation(register_attention())
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_sliding_window_is_kept_or_refused():
    _, batch = packed_batch([9, 8], seed=9)
    with pytest.raises(ValueError, match="cannot hold this model's sliding window"):
        model_inputs(batch, "sdpa", sliding_window=5)
    assert model_inputs(batch, "sdpa", sliding_window=ROW)["attention_mask"].shape == (1, 1, ROW, ROW)
    assert choose_attention(CONFIGS["mistral"]) == NAME


def test_a_model_that_swallows_the_boundaries_fails_loudly():
    _, batch = packed_batch([9, 8], seed=9)
    inputs = model_inputs(batch, NAME)
    del inputs["cu_seq_lens_q"]
    with pytest.raises(ValueError, match="did not reach the attention layer"):
        model_of("gpt2", NAME)(**inputs)
