"""What is Longformer's own: a token sees what its window and the global tokens say. What holds for every model is in test_models.py."""
import json

import pytest
import torch
import transformers

import fengshen.models.longformer as family
from fengshen.models.loading import fit_vocabulary, init_weights
from fengshen.models.longformer import LongformerForMaskedLM, LongformerForSequenceClassification, LongformerModel
from fengshen.models.lora import linear_layers
from fengshen.models.transformer_utils import any_of, dense, global_tokens, window
from fengshen.utils.kernels.attention import NAME
from tests.model_table import CASES, SEP, VOCAB, ids_of
from tests.model_table import SOURCE as LENGTH

HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering"]


def config(**changes):
    case = CASES["longformer-Model"]
    return case.config(**case.sizes | changes)


def model_of(head="Model", attention="sdpa", **changes):
    return CASES[f"longformer-{head}"].make(attention, **changes)


@pytest.mark.parametrize("attention, sparse", [("sdpa", True), ("eager", True), ("sdpa", False), ("eager", False)])
@pytest.mark.parametrize("places", [[], [0], [3, 9]])
def test_a_token_sees_what_the_rule_says(places, attention, sparse):
    "Change one token: in one block, those that move are those that see it."
    model = model_of(attention=attention, num_hidden_layers=1, attention_window=4, use_sparse_attention=sparse)
    wide = torch.zeros(1, LENGTH).bool()
    wide[0, places] = True
    rule = dense(any_of(window(2), global_tokens(wide)), 1, LENGTH, LENGTH, "cpu")[0, 0]
    ids = ids_of(1)
    for place in range(LENGTH):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % VOCAB
        with torch.no_grad():
            one, two = (model(x, global_attention_mask=wide.long()).last_hidden_state for x in (ids, other))
        moved = ((one - two).abs().amax(-1) > 0)[0]
        assert torch.equal(moved, rule[:, place] if sparse else torch.ones(LENGTH).bool())


@pytest.mark.parametrize("sparse", [True, False])
def test_forms_of_attention_agree_with_global_tokens(sparse):
    "One of them padding, which then sees nothing and is not seen."
    ids, mask = ids_of(2), (torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]])).long()
    wide = torch.zeros_like(ids)
    wide[0, 0] = wide[1, 5] = wide[1, 12] = 1
    for given in (None, mask):
        with torch.no_grad():
            one, two = (model_of(attention=name, use_sparse_attention=sparse)(ids, given, wide).last_hidden_state for name in ("sdpa", "eager"))
        real = torch.ones(2, LENGTH).bool() if given is None else mask.bool()
        torch.testing.assert_close(one[real], two[real], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_flex_attention_agrees_on_a_cpu_with_global_tokens():
    ids, mask = ids_of(2), (torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]])).long()
    wide = torch.zeros_like(ids)
    wide[0, 0] = wide[1, 5] = 1
    with torch.no_grad():
        one, two = (model_of(attention=name)(ids, mask, wide).last_hidden_state for name in ("sdpa", "flex_attention"))
    torch.testing.assert_close(one[mask.bool()], two[mask.bool()], rtol=1e-4, atol=1e-4)


def test_modes_agree_within_a_window():
    for length in (1, 3, 5):
        ids = ids_of(2, length)
        with torch.no_grad():
            sparse, dense_ = (model_of(attention_window=8, use_sparse_attention=on)(ids).last_hidden_state for on in (True, False))
        torch.testing.assert_close(sparse, dense_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sparse", [True, False])
def test_packed_is_unpacked(sparse):
    "One row of three documents, with a global token in one: told by positions or by boundaries, and in dense mode by boundaries in the kernel."
    lengths = [9, 2, 12]
    parts = [ids_of(1, n, seed) for seed, n in enumerate(lengths)]
    row, bounds = torch.cat(parts, 1), torch.tensor([0, 9, 11, 23], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    wide = torch.zeros_like(row)
    wide[0, 11] = 1
    by_boundaries = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=12, max_length_k=12)
    with torch.no_grad():
        alone = torch.cat([model_of(use_sparse_attention=sparse)(part, global_attention_mask=far).last_hidden_state
                           for part, far in zip(parts, wide.split(lengths, 1))], 1)
        for attention, extra in (("sdpa", {}), ("eager", {}), ("sdpa", by_boundaries), (NAME, by_boundaries)):
            model = model_of(attention=attention, use_sparse_attention=sparse)
            got = model(row, global_attention_mask=wide, position_ids=positions, **extra).last_hidden_state
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)


def test_dropped_weights_train_in_chunks():
    model, ids = model_of("ForMaskedLM", attention_probs_dropout_prob=0.5).train(), ids_of(2)
    one, two = (model(ids, labels=ids).loss for _ in range(2))
    assert one != two
    one.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_loaded_under_the_published_type(tmp_path, monkeypatch):
    "In silence, and with a window for each block."
    warned = []
    monkeypatch.setattr(transformers.configuration_utils.logger, "warning", lambda text, *args: warned.append(text))
    model, ids = model_of("ForMaskedLM"), ids_of(2)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["attention_window"] == [4, 8]
    (tmp_path / "config.json").write_text(json.dumps(dict(written, model_type="longformer")))
    again, info = LongformerForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not warned, info
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_body_takes_another_head(tmp_path):
    full, ids = model_of("ForMaskedLM"), ids_of(2)
    full.save_pretrained(tmp_path)
    for head in HEADS:
        model, info = getattr(family, f"Longformer{head}").from_pretrained(tmp_path, output_loading_info=True)
        assert all("classifier" in name or "qa_outputs" in name or "pooler" in name for name in info["missing_keys"])
        body = model if head == "Model" else model.longformer
        torch.testing.assert_close(body(ids).last_hidden_state, full.longformer(ids).last_hidden_state)


def test_the_stock_model_is_refused(tmp_path):
    same = {k: v for k, v in config().to_dict().items() if k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    stock = transformers.LongformerForMaskedLM(transformers.LongformerConfig(**same, attention_window=8))
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not those of a LongformerForMaskedLM.*key_global"):
        LongformerForMaskedLM.from_pretrained(tmp_path)


def test_bad_configurations():
    for changes, words in ((dict(num_attention_heads=5), "heads do not fit"), (dict(attention_window=3), "attention_window"),
                           (dict(attention_window=[4]), "attention_window"), (dict(attention_window=0), "attention_window")):
        with pytest.raises(ValueError, match=words):
            LongformerModel(config(**changes))


def test_attention_weights_come_from_plain_attention():
    model, ids = model_of(), ids_of(2)
    out = model(ids, output_attentions=True, output_hidden_states=True)
    assert [w.shape for w in out.attentions] == [(2, 4, LENGTH, LENGTH)] * 2 and len(out.hidden_states) == 3
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, LENGTH))
    near = dense(window(2), 1, LENGTH, LENGTH, "cpu")
    assert not out.attentions[0].masked_select(~near).any()
    torch.testing.assert_close(out.last_hidden_state, model(ids).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert out.hidden_states[-1] is out.last_hidden_state and model.config._attn_implementation == "sdpa"
    assert isinstance(model(ids, return_dict=False), tuple)


def test_what_training_does_to_a_model():
    "Seeded initialisation, a longer vocabulary, adapters on every linear layer of the blocks."
    one, two = model_of("ForMaskedLM"), model_of("ForMaskedLM")
    for model in (one, two):
        init_weights(model, 4)
        model.tie_weights()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert not one.lm_head.bias.any() and (one.longformer.embeddings.LayerNorm.weight == 1).all()
    fit_vocabulary(one, range(VOCAB + 3))
    assert one.lm_head.decoder.weight is one.get_input_embeddings().weight and one.lm_head.decoder.bias is one.lm_head.bias
    assert one(torch.tensor([[VOCAB + 2]])).logits.shape == (1, 1, VOCAB + 3)
    names = {name.rpartition("layer.")[2].partition(".")[2] for name in linear_layers(two) if "encoder.layer" in name}
    assert names == {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"}


def test_a_classifier_takes_every_kind_of_label_and_embeddings():
    model, ids = model_of("ForSequenceClassification"), ids_of(4)
    assert model(ids, labels=torch.tensor([0, 1, 2, 0])).loss > 0 and model(ids, labels=torch.rand(4, 3)).loss > 0
    number = LongformerForSequenceClassification(config(num_labels=1))
    assert number(ids, labels=torch.rand(4)).loss > 0
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_questions_with_any_number_of_separators(count):
    "The original stopped unless there were three."
    ids = ids_of(2)
    ids[:, 2] = 9
    ids[:, [3, 6, 9][:count]] = SEP
    question = (torch.arange(LENGTH) < (3 if count else 0)).long().repeat(2, 1)
    option = (torch.arange(LENGTH) > (4 if count else LENGTH)).long().repeat(2, 1)
    answers, choice = model_of("ForQuestionAnswering"), model_of("ForMultipleChoice")
    torch.testing.assert_close(answers(ids).start_logits, answers(ids, global_attention_mask=question).start_logits)
    torch.testing.assert_close(choice(ids[None]).logits, choice(ids[None], global_attention_mask=option[None]).logits)
