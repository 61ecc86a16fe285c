"""RoFormer against itself: what must not matter does not (padding, company, cache, packing, form of attention), and what must matter does."""
import json
import shutil

import pytest
import torch
import transformers
from transformers import MegatronBertConfig, MegatronBertForMaskedLM

import fengshen.models.roformer as family
from fengshen.models.loading import fit_vocabulary, init_weights
from fengshen.models.lora import linear_layers
from fengshen.models.roformer import RoFormerConfig, RoFormerForCausalLM, RoFormerForMaskedLM, RoFormerForSequenceClassification, RoFormerModel
from fengshen.utils.device import seeded
from fengshen.utils.kernels.attention import NAME, register_attention
from fengshen.utils.kernels.compile import compile_blocks

VOCAB, LENGTH = 60, 9
HEADS = ["Model", "ForPreTraining", "ForCausalLM", "ForMaskedLM", "ForNextSentencePrediction", "ForSequenceClassification", "ForMultipleChoice",
         "ForTokenClassification", "ForQuestionAnswering"]
TYPES = dict(read=[0] * LENGTH, written=[1] * LENGTH, both=[0] * 4 + [1] * 5, begun=[0] + [1] * 8, alternating=[0, 1, 0, 1, 1, 0, 0, 1, 0])


def config(**changes):
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=40,
                 initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
    return RoFormerConfig(**sizes | changes)


def model_of(head="Model", attention="sdpa", **changes):
    "A model whose every parameter is random, biases and norms too."
    register_attention()
    cls = getattr(family, f"RoFormer{head}")
    with seeded(1):
        model = cls(config(**changes)).eval()
        for p in model.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)
    model.set_attn_implementation(attention)
    return model


def ids_of(rows, length=LENGTH, seed=0):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def results(out):
    "The tensors of an output: scores of tokens [b, l, ...] and of texts [b, ...]."
    named = {name: value for name, value in out.items() if torch.is_tensor(value) and name != "loss"}
    assert named
    return named


def of_tokens(name):
    return name in ("last_hidden_state", "prediction_logits", "start_logits", "end_logits", "logits")


def padded(ids, mask, pad, head):
    "The rows with `pad` where the mask is 0, as the head takes them."
    batch = dict(input_ids=torch.where(mask == 1, ids, pad), attention_mask=mask)
    return {name: value[:, None].repeat(1, 2, 1) for name, value in batch.items()} if head == "ForMultipleChoice" else batch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("head", HEADS)
def test_padding_does_not_matter(head, attention):
    model, ids = model_of(head, attention), ids_of(3)
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [5], [3]])).long()
    with torch.no_grad():
        batch, other = (results(model(**padded(ids, mask, pad, head))) for pad in (0, 7))
        for row, count in enumerate((LENGTH, 5, 3)):
            alone = results(model(**padded(ids[row : row + 1, :count], torch.ones(1, count).long(), 0, head)))
            for name in batch:
                tokens = batch[name].ndim >= 2 and batch[name].shape[1] == LENGTH
                pick = (slice(row, row + 1), slice(count)) if tokens else (slice(row, row + 1),)
                torch.testing.assert_close(batch[name][pick], other[name][pick], rtol=0, atol=0)
                torch.testing.assert_close(batch[name][pick], alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("types", TYPES)
def test_a_token_sees_what_its_type_says(types, attention):
    "Change one token: those that move are those that see it, in every order and with padding beside it."
    model, row = model_of(attention=attention), torch.tensor([TYPES[types]])
    level = row.cumsum(-1)
    for mask in (None, (torch.arange(LENGTH) < LENGTH - 1).long()[None]):
        real = torch.ones(LENGTH).bool() if mask is None else mask[0].bool()
        for place in range(LENGTH):
            ids = ids_of(1)
            other = ids.clone()
            other[0, place] = ids[0, place] % (VOCAB - 1) + 1
            with torch.no_grad():
                one, two = (model(x, attention_mask=mask, token_type_ids=row).last_hidden_state for x in (ids, other))
            moved = ((one - two).abs().amax(-1) > 0)[0]
            sees = (level[0, place] <= level[0]) if real[place] else torch.zeros(LENGTH).bool()
            assert torch.equal(moved[real], sees[real]), (place, moved, sees)


@pytest.mark.parametrize("types", TYPES)
def test_forms_of_attention_agree(types):
    ids, row = ids_of(2), torch.tensor([TYPES[types]]).repeat(2, 1)
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [6]])).long()
    for given in (None, mask):
        with torch.no_grad():
            sdpa, eager = (model_of(attention=name)(ids, given, row).last_hidden_state for name in ("sdpa", "eager"))
        real = torch.ones(2, LENGTH).bool() if given is None else mask.bool()
        torch.testing.assert_close(sdpa[real], eager[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_of_padding_leaves_no_nan(attention, dtype):
    model, ids = model_of(attention=attention).to(dtype), ids_of(2)
    out = model(ids, torch.tensor([[0] * LENGTH, [1] * LENGTH]), torch.ones_like(ids)).last_hidden_state
    out.float().sum().backward()
    assert out.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_mask_of_ones_own_hides_in_every_form():
    "Booleans [b, 1, q, s] are what is seen, not numbers to add: adding them was the original's mistake."
    ids, seen = ids_of(1), torch.ones(1, 1, LENGTH, LENGTH).tril().bool()
    with torch.no_grad():
        want = model_of()(ids, token_type_ids=torch.ones_like(ids)).last_hidden_state
        for attention in ("sdpa", "eager"):
            model = model_of(attention=attention)
            model.embeddings.token_type_embeddings.weight[0] = model.embeddings.token_type_embeddings.weight[1]
            torch.testing.assert_close(model(ids, seen).last_hidden_state, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_flex_attention_agrees_on_a_cpu():
    ids, mask = ids_of(2), (torch.arange(LENGTH) < torch.tensor([[LENGTH], [6]])).long()
    for types in (None, torch.tensor([TYPES["written"]] * 2), torch.tensor([TYPES["both"]] * 2)):
        with torch.no_grad():
            sdpa, flex = (model_of(attention=name)(ids, mask, types).last_hidden_state for name in ("sdpa", "flex_attention"))
        torch.testing.assert_close(sdpa[mask.bool()], flex[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_step_with_a_cache_is_the_step_without(attention):
    model, ids = model_of("ForCausalLM", attention), ids_of(2)
    mask = torch.tensor([[1] * LENGTH, [0, 0] + [1] * (LENGTH - 2)])
    types = torch.ones_like(ids)
    with torch.no_grad():
        whole = model(ids, mask, types).logits
        for cuts in ([4, 1, 1, 3], [1] * LENGTH, [5, 4]):
            cache, start, steps = None, 0, []
            for count in cuts:
                part = slice(start, start + count)
                out = model(ids[:, part], mask[:, : part.stop], types[:, part], past_key_values=cache, use_cache=True)
                cache, start, steps = out.past_key_values, part.stop, steps + [out.logits]
            torch.testing.assert_close(torch.cat(steps, 1)[mask.bool()], whole[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3), dict(do_sample=True)], ids=["greedy", "beams", "sampled"])
def test_generation(options):
    "With a cache as without; a padded batch as each row alone; a prompt of zeros is read in both directions."
    model, ids = model_of("ForCausalLM"), ids_of(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    ids = ids * mask

    def written(ids, **kwargs):
        with seeded(3):
            return model.generate(ids, max_new_tokens=7, pad_token_id=0, **options, **kwargs)

    for types in ({}, dict(token_type_ids=torch.zeros_like(ids))):
        cached = written(ids, attention_mask=mask, **types)
        assert torch.equal(cached, written(ids, attention_mask=mask, use_cache=False, **types))
    if not options.get("do_sample"):
        cached = written(ids, attention_mask=mask)
        assert torch.equal(cached[:1], written(ids[:1])) and torch.equal(cached[1:, 2:], written(ids[1:, 2:]))


def test_generation_from_embeddings():
    model, ids = model_of("ForCausalLM"), ids_of(2, 5)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **options)[:, 5:], model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options))


def test_a_written_continuation_is_what_its_scores_say():
    model, prompt = model_of("ForCausalLM"), ids_of(1, 5)
    for first in (0, 1):
        whole = model.generate(prompt, token_type_ids=torch.full_like(prompt, first), max_new_tokens=6, do_sample=False)
        types = torch.cat([torch.full_like(prompt, first), torch.ones(1, whole.shape[1] - 5).long()], 1)
        with torch.no_grad():
            logits = model(whole, token_type_ids=types).logits
        assert torch.equal(logits[:, 4:-1].argmax(-1), whole[:, 5:])


@pytest.mark.parametrize("types", ["read", "written"])
def test_packed_is_unpacked(types):
    "One row of three documents: told by positions (a mask), by boundaries (a mask), and by boundaries in the kernel."
    lengths = [4, 2, 5]
    parts = [ids_of(1, n, seed) for seed, n in enumerate(lengths)]
    row = torch.cat(parts, 1)
    kinds = torch.full_like(row, types == "written")
    bounds = torch.tensor([0, 4, 6, 11, 11], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    by_boundaries = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=5, max_length_k=5)
    with torch.no_grad():
        alone = torch.cat([model_of()(part, token_type_ids=torch.full_like(part, types == "written")).last_hidden_state for part in parts], 1)
        for attention, extra in (("sdpa", {}), ("eager", {}), ("sdpa", by_boundaries), (NAME, by_boundaries), (NAME, {})):
            got = model_of(attention=attention)(row, token_type_ids=kinds, position_ids=positions, **extra).last_hidden_state
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
    if types == "read":
        with pytest.raises(ValueError, match="cannot read a prefix"):
            model_of(attention=NAME)(row, token_type_ids=(positions > 2).long(), position_ids=positions, **by_boundaries)


def labels_of(head, rows):
    ids = ids_of(rows, seed=5)
    tokens, texts = dict(labels=ids), dict(labels=torch.arange(rows) % 2)
    return {"Model": {}, "ForPreTraining": dict(labels=ids, next_sentence_label=torch.arange(rows) % 2), "ForCausalLM": tokens, "ForMaskedLM": tokens,
            "ForTokenClassification": dict(labels=ids % 3), "ForQuestionAnswering": dict(start_positions=torch.arange(rows), end_positions=torch.arange(rows) + 2),
            }.get(head, texts)


def gradients(model, head, checkpointing=False):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = ids_of(4)
    batch = dict(input_ids=ids, token_type_ids=(torch.arange(LENGTH) > 4).long().repeat(4, 1))
    if head == "ForMultipleChoice":
        batch = {name: value.view(2, 2, LENGTH) for name, value in batch.items()}
    out = model(**batch, **labels_of(head, 2 if head == "ForMultipleChoice" else 4))
    weight = torch.linspace(-1, 1, 32)
    loss = (out.last_hidden_state * weight).sum() + (out.pooler_output * weight).sum() if head == "Model" else out.loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_learns_and_checkpointing_changes_nothing(head):
    plain, kept = gradients(model_of(head), head), gradients(model_of(head), head, checkpointing=True)
    unused = {"ForNextSentencePrediction": set()}.get(head, set())
    still = {name for name, grad in plain.items() if grad is None or not grad.any()} - unused
    assert not still, still
    for name, grad in plain.items():
        torch.testing.assert_close(kept[name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_sixteen_bits_are_close(head):
    model, ids = model_of(head), ids_of(2)
    given = ids[None] if head == "ForMultipleChoice" else ids
    with torch.no_grad():
        want = results(model(given))
        got = results(model.bfloat16()(given))
    for name, value in want.items():
        assert float((got[name].float() - value).norm() / value.norm()) < 2e-2, name


@pytest.mark.parametrize("head", HEADS)
def test_saved_and_loaded(head, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(transformers.configuration_utils.logger, "warning", lambda text, *args: warned.append(text))
    model, ids = model_of(head), ids_of(2)
    ids = ids[None] if head == "ForMultipleChoice" else ids
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "fengshen-roformer"
    for kind in ("fengshen-roformer", "roformer", "megatron-bert"):
        (tmp_path / "config.json").write_text(json.dumps(dict(written, model_type=kind)))
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            for name, value in results(model(ids)).items():
                torch.testing.assert_close(again(ids)[name], value)
    assert not warned


def test_a_body_takes_another_head_and_a_hole_is_refused(tmp_path):
    full, ids = model_of("ForPreTraining"), ids_of(2)
    full.save_pretrained(tmp_path / "full")
    for head in HEADS:
        model, info = getattr(family, f"RoFormer{head}").from_pretrained(tmp_path / "full", output_loading_info=True)
        assert all("classifier" in name or "qa_outputs" in name for name in info["missing_keys"])
        body = model if head == "Model" else model.bert
        torch.testing.assert_close(body(ids).last_hidden_state, full.bert(ids).last_hidden_state)
    state = full.state_dict()
    for change in ("missing", "unexpected"):
        names = dict(state)
        if change == "missing":
            del names["bert.encoder.layer.1.attention.self.key.weight"]
        else:
            names["bert.encoder.layer.1.attention.self.gate.weight"] = torch.zeros(2)
        full.save_pretrained(tmp_path / change, state_dict=names)
        with pytest.raises(ValueError, match=f"{change}.*attention.self"):
            RoFormerForMaskedLM.from_pretrained(tmp_path / change)
        RoFormerForMaskedLM.from_pretrained(tmp_path / change, strict=False)


def test_what_belongs_to_others_is_refused(tmp_path):
    same = {k: v for k, v in config().to_dict().items() if k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    MegatronBertForMaskedLM(MegatronBertConfig(**same)).save_pretrained(tmp_path / "megatron")
    with pytest.raises(ValueError, match="not those of a RoFormerForMaskedLM.*position_embeddings"):
        RoFormerForMaskedLM.from_pretrained(tmp_path / "megatron")
    transformers.RoFormerForMaskedLM(transformers.RoFormerConfig(**same)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not those of a RoFormerModel"):
        RoFormerModel.from_pretrained(tmp_path / "other")
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="another architecture than RoFormerConfig: got 'gpt2'"):
        RoFormerModel.from_pretrained(tmp_path / "gpt2")


@pytest.mark.parametrize("dropped", [["decoder.weight", "decoder.bias"], ["predictions.bias", "decoder.weight"], ["word_embeddings.weight"]])
def test_a_tied_weight_may_stand_under_one_name(dropped, tmp_path):
    "In a pickle as the originals are, with the buffers they held."
    model, ids = model_of("ForMaskedLM"), ids_of(2)
    model.config.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(tuple(dropped))}
    state |= {"bert.embeddings.position_ids": torch.arange(40)[None], "bert.encoder.layer.0.attention.self.rope_emb.div_term": torch.ones(4)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    again, info = RoFormerForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_damaged_and_misfit_folders_are_refused(tmp_path):
    model_of("ForMaskedLM").save_pretrained(tmp_path / "good")
    with pytest.raises(ValueError, match=r"word_embeddings.weight: \[60, 32\] in the file, \[70, 32\] in the model"):
        RoFormerForMaskedLM.from_pretrained(tmp_path / "good", vocab_size=70)
    data = (tmp_path / "good/model.safetensors").read_bytes()
    for cut in (4, 200, len(data) // 2, len(data) - 1):
        shutil.copytree(tmp_path / "good", tmp_path / f"cut{cut}")
        (tmp_path / f"cut{cut}/model.safetensors").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="cannot be read"):
            RoFormerForMaskedLM.from_pretrained(tmp_path / f"cut{cut}")


@pytest.mark.parametrize("bad, words", [
    (dict(input_ids=torch.tensor([[VOCAB]])), "token ids out of range: got 60, expected 0 to 59"),
    (dict(input_ids=torch.tensor([[-1]])), "token ids out of range: got -1"),
    (dict(input_ids=torch.ones(1, 41).long()), "41 tokens.*at most 40"),
    (dict(input_ids=torch.ones(1, 2).long(), token_type_ids=torch.tensor([[0, 2]])), "token types out of range: got 2, expected 0 to 1"),
    (dict(input_ids=torch.ones(1, 2).long(), position_ids=torch.tensor([[0, 40]])), "positions out of range"),
    (dict(input_ids=torch.ones(1, 3).long(), attention_mask=torch.ones(1, 2)), "does not cover the tokens"),
    (dict(), "ids or embeddings"),
])
def test_bad_input(bad, words):
    with pytest.raises(ValueError, match=words):
        model_of()(**bad)


def test_bad_configurations():
    for changes, words in ((dict(num_attention_heads=5), "heads do not fit"), (dict(add_cross_attention=True), "no cross-attention"),
                           (dict(default_token_type=2), "default_token_type")):
        with pytest.raises(ValueError, match=words):
            RoFormerModel(config(**changes))


def test_the_configuration_may_say_that_texts_are_written(capsys):
    plain, writes = model_of("ForCausalLM"), model_of("ForCausalLM", default_token_type=1)
    ids = ids_of(2)
    with torch.no_grad():
        torch.testing.assert_close(writes(ids).logits, plain(ids, token_type_ids=torch.ones_like(ids)).logits)
        plain(ids, labels=ids)
    assert "sees the tokens it is to guess" in capsys.readouterr().out


def test_attention_weights_come_from_plain_attention(capsys):
    model, ids = model_of(), ids_of(2)
    out = model(ids, output_attentions=True, output_hidden_states=True)
    assert [w.shape for w in out.attentions] == [(2, 4, LENGTH, LENGTH)] * 2 and len(out.hidden_states) == 3
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, LENGTH))
    torch.testing.assert_close(out.last_hidden_state, model(ids).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert out.hidden_states[-1] is out.last_hidden_state and model.config._attn_implementation == "sdpa"
    assert isinstance(model(ids, return_dict=False), tuple)


@pytest.mark.parametrize("mask", [None, torch.ones(2, LENGTH).tril(6).long()])
def test_blocks_compile_without_a_break(mask):
    model, plain, ids = model_of("ForCausalLM").train(), model_of("ForCausalLM").train(), ids_of(2)
    for block in compile_blocks(model):
        block.compile(dynamic=False, fullgraph=True, backend="eager")
    got, want = (m(ids, mask, torch.ones_like(ids)).logits for m in (model, plain))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got.sum().backward()


def test_what_training_does_to_a_model():
    "Seeded initialisation, a longer vocabulary, adapters on every linear layer of the blocks."
    one, two = model_of("ForCausalLM"), model_of("ForCausalLM")
    for model in (one, two):
        init_weights(model, 4)
        model.tie_weights()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert not one.cls.predictions.bias.any() and (one.bert.encoder.ln.weight == 1).all()
    assert 0.15 < one.bert.encoder.layer[0].attention.self.query.weight.std().item() < 0.25
    fit_vocabulary(one, range(VOCAB + 3))
    assert one.cls.predictions.decoder.weight is one.get_input_embeddings().weight and one.cls.predictions.decoder.bias is one.cls.predictions.bias
    assert one(torch.tensor([[VOCAB + 2]])).logits.shape == (1, 1, VOCAB + 3)
    names = {name.rpartition("layer.")[2].partition(".")[2] for name in linear_layers(two) if "encoder.layer" in name}
    assert names == {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"}


def test_a_classifier_takes_every_kind_of_label():
    ids = ids_of(4)
    model = model_of("ForSequenceClassification")
    assert model(ids, labels=torch.tensor([0, 1, 2, 0])).loss > 0
    assert model(ids, labels=torch.rand(4, 3)).loss > 0
    number = RoFormerForSequenceClassification(config(num_labels=1))
    assert number(ids, labels=torch.rand(4)).loss > 0


def test_legacy_mask_is_for_comparison_only():
    model, ids = model_of("ForCausalLM", legacy_mask=True), ids_of(1)
    out = model(ids, use_cache=True)
    with pytest.raises(ValueError, match="comparison with the original"):
        model(ids[:, :1], past_key_values=out.past_key_values)
    assert isinstance(model, RoFormerForCausalLM)
