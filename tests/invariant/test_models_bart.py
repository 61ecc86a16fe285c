"""What is BartForTextInfill's own: the stock backbone, weights of edits, and rounds that never lose a word which has to stay. What holds for every model is in test_models.py."""
import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BartConfig, BartForConditionalGeneration, BartForSequenceClassification, BartModel, BertTokenizer

from fengshen.models.bart import BartForTextInfill, BartTextInfillConfig, Draft, Sampling, Signs, infill, refine, write_around
from fengshen.models.bart.refinement import FREE, JOINED, KEPT, keyword_draft, opened, permitted, signs_of, spelled, text_draft
from fengshen.models.loading import fit_vocabulary, init_weights
from fengshen.models.lora import linear_layers
from fengshen.utils.device import seeded

VOCAB, LENGTH, AHEAD = 60, 9, 7
KINDS = dict(classes=dict(encoder_loss_type=0), number=dict(encoder_loss_type=1))
SIGNS = Signs(begin=0, end=2, mask=4, pad=1, words=50, banned=[3])
SIZES = dict(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
             decoder_ffn_dim=48, max_position_embeddings=40, init_std=0.2, dropout=0.0)


def model_of(kind="classes", attention="sdpa", seed=1, **changes):
    "A model whose every parameter is random, biases and norms too."
    with seeded(seed):
        model = BartForTextInfill(BartTextInfillConfig(**SIZES | KINDS[kind] | dict(num_labels=4) | changes)).eval()
        for p in model.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)
        model.final_logits_bias.normal_()
    model.set_attn_implementation(attention)
    return model


def ids_of(rows, length=LENGTH, seed=0):
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch_of(rows=3):
    "A batch with padding in both texts, and labels where there is none."
    ids, ahead = ids_of(rows), ids_of(rows, AHEAD, 1)
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [5], [3]][:rows])).long()
    ahead_mask = (torch.arange(AHEAD) < torch.tensor([[4], [AHEAD], [2]][:rows])).long()
    edits = torch.where(mask == 1, ids % 4, -100)
    return dict(input_ids=ids, attention_mask=mask, decoder_input_ids=ahead, decoder_attention_mask=ahead_mask, encoder_labels=edits,
                labels=torch.where(ahead_mask == 1, ids_of(rows, AHEAD, 2), -100))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_is_of_tokens_and_the_encoder_may_run_alone(kind):
    "Padding has no part in the loss, whatever it is, and a mask may be numbers; edits asked for alone are those of the whole."
    model, batch = model_of(kind), batch_of()
    read, write = batch["attention_mask"], batch["decoder_attention_mask"]
    whole = model(**batch)
    other = model(**batch | dict(input_ids=torch.where(read == 1, batch["input_ids"], 7), decoder_input_ids=torch.where(write == 1, batch["decoder_input_ids"], 7)))
    for got in (other, model(**batch | dict(attention_mask=read.float()))):
        torch.testing.assert_close(got.loss, whole.loss, rtol=0, atol=0)
    states, edits = model.get_encoder_logits(batch["input_ids"], read)
    torch.testing.assert_close(edits, whole.encoder_logits)
    again = model(encoder_outputs=states, attention_mask=read, decoder_input_ids=batch["decoder_input_ids"])
    torch.testing.assert_close(again.logits[write == 1], whole.logits[write == 1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_edit_depends_on_the_whole_text():
    model, ids = model_of(), ids_of(1)
    first = model(ids).encoder_logits
    for place in range(LENGTH):
        other = ids.clone()
        other[0, place] = 5 + (ids[0, place] == 5)
        assert ((model(other).encoder_logits - first).abs().amax(-1) > 0).all()


@torch.no_grad()
def test_the_backbone_is_the_stock_one():
    model, batch = model_of(), batch_of()
    stock = BartForConditionalGeneration(BartConfig(**SIZES)).eval()
    left = stock.load_state_dict(model.state_dict(), strict=False)
    assert left.missing_keys == ["lm_head.weight"] and all(name.startswith(("label_weights", "classification_head")) for name in left.unexpected_keys)
    stock.tie_weights()
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels")
    got, want = model(**batch), stock(**{name: batch[name] for name in names})
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.decoder_loss, want.loss)


def test_weights_of_edits_are_a_mean_with_weights():
    model, batch = model_of(), batch_of()
    scores, labels = model(**batch).encoder_logits, batch["encoder_labels"]
    losses, real = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none"), labels.flatten() >= 0
    for weights in ([1.0, 1, 1, 1], [0.1, 2, 5, 1]):
        model.label_weights.copy_(torch.tensor(weights))
        each = model.label_weights[labels.flatten()[real]]
        out = model(**batch)
        torch.testing.assert_close(out.encoder_loss, (losses[real] * each).sum() / each.sum())
    model.config.loss_weight = 3.0
    torch.testing.assert_close(model(**batch).loss, 3 * out.encoder_loss + out.decoder_loss)
    for name in ("labels", "encoder_labels"):
        assert model(**batch | {name: None}).loss is None
    numbers = model_of("number")
    numbers.label_weights.zero_()
    whole = numbers(**batch)
    torch.testing.assert_close(whole.encoder_loss, (whole.encoder_logits - labels)[labels >= 0].square().mean())
    torch.testing.assert_close(numbers(**batch | dict(encoder_labels=labels.float())).loss, whole.loss)
    assert numbers(batch["input_ids"]).encoder_logits.shape == (3, LENGTH, 1)


@torch.no_grad()
def test_loaded_under_the_published_type(tmp_path, monkeypatch, capsys):
    "In silence, weights of edits included."
    warned = []
    monkeypatch.setattr(transformers.configuration_utils.logger, "warning", lambda text, *args: warned.append(text))
    model, batch = model_of(), batch_of()
    model.label_weights.copy_(torch.tensor([0.1, 1, 2, 3]))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(written, model_type="bart")))
    again, info = BartForTextInfill.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss)
    told = capsys.readouterr().out
    assert not warned and "label_weights" not in told and "edit head" not in told


def test_a_stock_bart_gets_a_new_head_and_says_so(tmp_path, capsys):
    batch = batch_of()
    for number, cls in enumerate((BartForConditionalGeneration, BartModel)):
        stock = cls(BartConfig(**SIZES)).eval()
        stock.save_pretrained(tmp_path / str(number))
        model, info = BartForTextInfill.from_pretrained(tmp_path / str(number), num_labels=5, output_loading_info=True)
        assert "the edit head is new" in capsys.readouterr().out
        assert {name for name in info["missing_keys"] if "head" in name} == {f"classification_head.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}
        assert model.label_weights.tolist() == [1] * 5 and not model.final_logits_bias.any()
        assert model.classification_head.out_proj.weight.std() > 0.05 and not model.classification_head.dense.bias.any()
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
        torch.testing.assert_close(model(**given).encoder_last_hidden_state, stock(**given).encoder_last_hidden_state)
    state = stock.state_dict()
    del state["decoder.layers.1.encoder_attn.k_proj.weight"]
    stock.save_pretrained(tmp_path / "hole", state_dict=state)
    with pytest.raises(ValueError, match="missing.*encoder_attn.k_proj"):
        BartForTextInfill.from_pretrained(tmp_path / "hole")


def test_weights_of_edits_that_nobody_set(tmp_path, capsys):
    model = model_of()
    model.label_weights.zero_()
    model.save_pretrained(tmp_path)
    assert BartForTextInfill.from_pretrained(tmp_path).label_weights.tolist() == [1] * 4
    assert "label_weights" in capsys.readouterr().out


def test_another_kind_of_edits_is_refused(tmp_path):
    model_of().save_pretrained(tmp_path)
    for changes in (dict(num_labels=5), dict(encoder_loss_type=1)):
        with pytest.raises(ValueError, match="out_proj"):
            BartForTextInfill.from_pretrained(tmp_path, **changes)


def test_bad_configurations():
    for changes in (dict(num_labels=1), dict(encoder_loss_type=2)):
        with pytest.raises(ValueError, match="num_labels|encoder_loss_type"):
            model_of(**changes)


def test_attention_weights_come_from_plain_attention():
    model, batch = model_of(), batch_of()
    out = model(**batch, output_attentions=True, output_hidden_states=True)
    assert [w.shape for w in out.encoder_attentions] == [(3, 4, LENGTH, LENGTH)] * 2 and [w.shape for w in out.cross_attentions] == [(3, 4, AHEAD, LENGTH)] * 2
    assert [w.shape for w in out.decoder_attentions] == [(3, 4, AHEAD, AHEAD)] * 2 and len(out.decoder_hidden_states) == len(out.encoder_hidden_states) == 3
    assert model.config._attn_implementation == "sdpa"
    assert isinstance(model(**batch, return_dict=False), tuple)


def test_what_training_does_to_a_model():
    "Seeded initialisation, a longer vocabulary, adapters."
    one, two = model_of(), model_of(seed=2)
    for model in (one, two):
        init_weights(model, 4)
        model.tie_weights()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters())) and one.label_weights.tolist() == [1] * 4
    fit_vocabulary(one, range(VOCAB + 3))
    assert one(torch.tensor([[VOCAB + 2]])).logits.shape == (1, 1, VOCAB + 3)
    assert one.model.shared.weight is one.model.encoder.embed_tokens.weight is one.model.decoder.embed_tokens.weight
    assert {name.rpartition(".")[2] for name in linear_layers(two)} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "dense"}


def holds(ids, words):
    "Whether the words are in the ids, each in one piece and in order."
    place = 0
    for word in words:
        while ids[place : place + len(word)] != word:
            place += 1
            if place > len(ids):
                return False
        place += len(word)
    return True


WORDS = st.lists(st.lists(st.integers(5, 49), min_size=1, max_size=3), max_size=4)


@settings(max_examples=25, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), st.sampled_from(list(KINDS)), st.integers(0, 20), st.sampled_from([None, Sampling(top_k=5)]), st.integers(14, 40))
def test_keywords_stay_whatever_the_model_wants(rows, kind, seed, sampling, most):
    "Random models edit everything all the time; keywords, signs and the length hold, and each row is what it is alone."
    model = model_of(kind, seed=seed, num_labels=3 + seed % 3)
    drafts = [keyword_draft(words, SIGNS) for words in rows]
    out = refine(model, drafts, SIGNS, rounds=3, max_length=most, sampling=sampling)
    for row, (one, words, draft) in enumerate(zip(out, rows, drafts)):
        assert one.steps[0] == draft.ids and len(one.steps) <= 4
        for ids in one.steps:
            assert ids[0] == SIGNS.begin and ids[-1] == SIGNS.end and len(ids) <= most
            assert holds(ids, words) and all(5 <= token < SIGNS.words for token in ids[1:-1])
        if sampling is not None:
            sampling = Sampling(top_k=5, seed=row)
        assert refine(model, [draft], SIGNS, rounds=3, max_length=most, sampling=sampling)[0] == one


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([FREE, KEPT, JOINED])), min_size=1, max_size=12), st.integers(0, 12))
def test_edits_do_what_they_say(pairs, room):
    edits, locks = [e for e, _ in pairs], [k for _, k in pairs]
    ids = list(range(100, 100 + len(pairs)))
    made = permitted(edits, locks, room)
    draft = opened(Draft(ids, locks), made, mask=4)
    assert len(draft.ids) == len(draft.locks) == sum(max(e, 1) for e in made) <= len(ids) + room
    assert [i for i in draft.ids if i != 4] == [i for i, e in zip(ids, made) if e != 1]
    assert all(new == old or (new < old and old > 1) or new == 0 for new, old in zip(made, edits))
    assert all(lock == FREE for token, lock in zip(draft.ids, draft.locks) if token == 4)
    if room >= sum(edits):
        assert all(new == old for new, old, lock in zip(made, edits, locks) if lock == FREE)


def test_a_hole_in_a_text_is_filled_even_where_nothing_else_is_edited():
    model = model_of()
    model.classification_head.out_proj.weight.data.zero_()
    model.classification_head.out_proj.bias.data.copy_(torch.tensor([9.0, 0, 0, 0]))
    out, other = refine(model, [text_draft([5, SIGNS.mask, 7], SIGNS), text_draft([5, 6], SIGNS)], SIGNS)
    assert len(out.steps) == 2 and out.stable and out.steps[1][1] == 5 and out.steps[1][3] == 7
    assert SIGNS.mask not in out.steps[1] and other.steps == [[0, 5, 6, 2]] and other.stable
    with pytest.raises(ValueError, match="rounds 0"):
        refine(model, [], SIGNS, rounds=0)
    with pytest.raises(ValueError, match="model.eval"):
        refine(model.train(), [], SIGNS)
    with pytest.raises(ValueError, match="at most 3"):
        refine(model.eval(), [text_draft([5, 6], SIGNS)], SIGNS, max_length=3)
    assert refine(model, [], SIGNS) == []


def test_texts_and_tokenizers():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"春天来了公园里花开", "hello", "world"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
    assert signs_of(tokenizer) == Signs(2, 3, 4, 0, len(vocabulary), list(tokenizer.all_special_ids))
    assert spelled(tokenizer, [2, *tokenizer("春天hello world花", add_special_tokens=False).input_ids, 3]) == "春天hello world花"
    model = model_of(pad_token_id=0, bos_token_id=2, eos_token_id=3)
    one, two = write_around(model, tokenizer, [["春天", "花"], []], rounds=2, max_length=12)
    assert one.texts[0] == "春天花" and two.texts[0] == "" and "春天" in one.text and "花" in one.text.partition("春天")[2]
    assert "| round | text |" in one._repr_markdown_()
    assert "[MASK]" not in infill(model, tokenizer, ["春[MASK]来了"], rounds=1)[0].text
    with pytest.raises(ValueError, match="keyword that cannot be written"):
        write_around(model, tokenizer, [["雪"]])
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="lacks a sign"):
        infill(model, tokenizer, ["春天"])


def test_a_head_for_whole_texts_is_not_an_edit_head(tmp_path):
    BartForSequenceClassification(BartConfig(**SIZES, num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="whole texts"):
        BartForTextInfill.from_pretrained(tmp_path)
    assert BartForTextInfill.from_pretrained(tmp_path, strict=False).label_weights.tolist() == [1] * 3
