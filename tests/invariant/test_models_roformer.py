"""What is RoFormer's own: token types that say which way a text is read, prompts, folders under other names. What holds for every model is in test_models.py."""
import json

import pytest
import torch
import transformers
from transformers import MegatronBertConfig, MegatronBertForMaskedLM

import fengshen.models.roformer as family
from fengshen.models.loading import fit_vocabulary, init_weights
from fengshen.models.lora import linear_layers
from fengshen.models.roformer import RoFormerForCausalLM, RoFormerForMaskedLM, RoFormerForSequenceClassification, RoFormerModel
from fengshen.utils.kernels.attention import NAME
from tests.model_table import CASES

VOCAB, LENGTH = 60, 9
HEADS = ["Model", "ForPreTraining", "ForCausalLM", "ForMaskedLM", "ForNextSentencePrediction", "ForSequenceClassification", "ForMultipleChoice",
         "ForTokenClassification", "ForQuestionAnswering"]
TYPES = dict(read=[0] * LENGTH, written=[1] * LENGTH, both=[0] * 4 + [1] * 5, begun=[0] + [1] * 8, alternating=[0, 1, 0, 1, 1, 0, 0, 1, 0])


def config(**changes):
    case = CASES["roformer-Model"]
    return case.config(**case.sizes | changes)


def model_of(head="Model", attention="sdpa", **changes):
    return CASES[f"roformer-{head}"].make(attention, **changes)


def ids_of(rows, length=LENGTH, seed=0):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


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
@torch.no_grad()
def test_a_step_with_a_cache_and_padding_before_the_text(attention):
    model, ids = model_of("ForCausalLM", attention), ids_of(2)
    mask = torch.tensor([[1] * LENGTH, [0, 0] + [1] * (LENGTH - 2)])
    types = torch.ones_like(ids)
    whole, cache, start, steps = model(ids, mask, types).logits, None, 0, []
    for count in (4, 1, 1, 3):
        part = slice(start, start + count)
        out = model(ids[:, part], mask[:, : part.stop], types[:, part], past_key_values=cache, use_cache=True)
        cache, start, steps = out.past_key_values, part.stop, steps + [out.logits]
    torch.testing.assert_close(torch.cat(steps, 1)[mask.bool()], whole[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3)], ids=["greedy", "beams"])
def test_a_prompt_of_zeros_is_read_in_both_directions(options):
    "With a cache as without, and otherwise than a prompt of ones."
    model, ids = model_of("ForCausalLM"), ids_of(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    options = dict(attention_mask=mask, max_new_tokens=7, pad_token_id=0, do_sample=False, **options)
    read, plain = (model.generate(ids * mask, **options, **types) for types in (dict(token_type_ids=torch.zeros_like(ids)), {}))
    assert torch.equal(read, model.generate(ids * mask, token_type_ids=torch.zeros_like(ids), use_cache=False, **options)) and not torch.equal(read, plain)


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


def test_a_prefix_cannot_be_packed_by_the_kernel():
    bounds, types = torch.tensor([0, 4, 6, 9], dtype=torch.int32), torch.tensor([TYPES["both"]])
    with pytest.raises(ValueError, match="cannot read a prefix"):
        model_of(attention=NAME)(ids_of(1), token_type_ids=types, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=4, max_length_k=4)


@pytest.mark.parametrize("kind", ["roformer", "megatron-bert"])
@torch.no_grad()
def test_loaded_under_a_published_type(kind, tmp_path, monkeypatch):
    "In silence."
    warned = []
    monkeypatch.setattr(transformers.configuration_utils.logger, "warning", lambda text, *args: warned.append(text))
    model, ids = model_of("ForPreTraining"), ids_of(2)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(written, model_type=kind)))
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not warned, info
    torch.testing.assert_close(again(ids).prediction_logits, model(ids).prediction_logits)


@torch.no_grad()
def test_a_body_takes_another_head(tmp_path):
    full, ids = model_of("ForPreTraining"), ids_of(2)
    full.save_pretrained(tmp_path)
    for head in HEADS:
        model, info = getattr(family, f"RoFormer{head}").from_pretrained(tmp_path, output_loading_info=True)
        assert all("classifier" in name or "qa_outputs" in name for name in info["missing_keys"])
        body = model if head == "Model" else model.bert
        torch.testing.assert_close(body(ids).last_hidden_state, full.bert(ids).last_hidden_state)


def test_stock_models_are_refused(tmp_path):
    same = {k: v for k, v in config().to_dict().items() if k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    MegatronBertForMaskedLM(MegatronBertConfig(**same)).save_pretrained(tmp_path / "megatron")
    with pytest.raises(ValueError, match="not those of a RoFormerForMaskedLM.*position_embeddings"):
        RoFormerForMaskedLM.from_pretrained(tmp_path / "megatron")
    transformers.RoFormerForMaskedLM(transformers.RoFormerConfig(**same)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not those of a RoFormerModel"):
        RoFormerModel.from_pretrained(tmp_path / "other")


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
