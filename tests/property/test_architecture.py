"""Published weights under the original's names find the right class; what is left out is said, what does not fit is refused or, when told, passed over."""
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from fengshen.models.longformer import LongformerConfig, LongformerForSequenceClassification
from fengshen.models.roformer import RoFormerConfig, RoFormerForMaskedLM, RoFormerForPreTraining
from fengshen.training.export import build, model_card, open_source, pick_dtype

SIZES = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32)
DIV_TERM = "bert.encoder.layer.{}.attention.self.rope_emb.div_term"


def published(folder, state, config, **changes):
    "A folder as the original published it."
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(dict(config, architectures=None) | changes))
    return folder


@pytest.fixture
def zhouwenwang(tmp_path):
    "(weights of a RoFormer with both heads under the original's names in 16 bits, its config)."
    torch.manual_seed(0)
    model = RoFormerForPreTraining(RoFormerConfig(**SIZES)).half()
    state = model.state_dict() | {DIV_TERM.format(i): torch.ones(4) for i in range(2)} | {"bert.embeddings.position_ids": torch.arange(32)[None]}
    return state, dict(model.config.to_dict(), model_type="megatron-bert")


@pytest.mark.parametrize("case, left", [
    ("roformer/masked_lm", "rope_emb.div_term (2)"), ("roformer/pretraining", "position_ids"), ("longformer/masked_lm", "longformer.embeddings.position_embeddings.weight"),
    ("longformer/seq_cls", "rope_emb.div_term (2)"), ("megatron_t5/cond_gen_gelu", "shared.position_ids"), ("bart/text_infill_cls", "model.decoder.embed_tokens.weight"),
])
def test_published_weights_find_their_class(shared, tmp_path, capsys, case, left):
    "The class that wrote them, every number in its place, and by name what was left out."
    source, about = shared / "parity" / case, json.loads((shared / "parity" / case / "meta.json").read_text())
    weights = load_file(source / "weights.safetensors")
    folder = published(tmp_path / "model", {n: t.half() if t.is_floating_point() else t for n, t in weights.items()}, json.loads((source / "config.json").read_text()))
    model = build(open_source(folder), torch.float16)
    assert type(model).__name__ == about["model_class"].rpartition(".")[2] and model.config.model_type.startswith("fengshen-")
    assert left in capsys.readouterr().out
    assert all(torch.equal(t, weights[n].half()) for n, t in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["model.", "bert_encoder.", "module.model."])
def test_a_lightning_file_of_the_original(tmp_path, zhouwenwang, capsys, prefix):
    state, config = zhouwenwang
    torch.save({"state_dict": {prefix + n: t for n, t in state.items()}, "epoch": 1, "global_step": 7}, tmp_path / "last.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build(open_source(tmp_path / "last.ckpt"), torch.float16)
    assert type(model) is RoFormerForPreTraining and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    out = capsys.readouterr().out
    assert f"{prefix}bert.encoder.layer.N.attention.self.rope_emb.div_term (2)" in out and f"{prefix}bert.embeddings.position_ids" in out


def test_what_does_not_fit_is_refused_by_name_unless_told(tmp_path, zhouwenwang, capsys):
    state, config = zhouwenwang
    extra = {n: t for n, t in state.items() if "seq_relationship" not in n} | {"adapter.weight": torch.ones(3).half()}
    folder = published(tmp_path / "model", extra, config)
    with pytest.raises(ValueError, match=r"missing.*cls.seq_relationship.weight.*left_over.*adapter.weight.*--strict false"):
        open_source(folder, architecture="RoFormerForPreTraining")
    capsys.readouterr()
    models = [build(open_source(folder, strict=False, architecture="RoFormerForPreTraining"), torch.float16) for _ in range(2)]
    out = capsys.readouterr().out
    assert "missing: 2 weights, passed over because strict is false: cls.seq_relationship.weight, cls.seq_relationship.bias" in out
    assert "left over: 1 weights, passed over because strict is false: adapter.weight" in out
    drawn = [m.cls.seq_relationship.weight for m in models]
    assert torch.equal(*drawn) and drawn[0].std() > 0, "drawn anew, the same every time"
    assert torch.equal(models[0].bert.pooler.dense.weight, state["bert.pooler.dense.weight"])


def test_a_weight_of_another_shape_is_refused_even_then(tmp_path, zhouwenwang):
    state, config = zhouwenwang
    folder = published(tmp_path / "model", state, config, vocab_size=41)
    with pytest.raises(ValueError, match=r"shapes \(found, expected\).*\(40, 16\), \(41, 16\)"):
        open_source(folder, strict=False)


def test_a_class_may_be_named(tmp_path, zhouwenwang):
    state, config = zhouwenwang
    short = {n: t for n, t in state.items() if "seq_relationship" not in n and "pooler" not in n}
    folder = published(tmp_path / "model", short, config)
    assert open_source(folder).kind is RoFormerForMaskedLM
    assert open_source(folder, architecture="RoFormerForCausalLM").kind.__name__ == "RoFormerForCausalLM"
    with pytest.raises(ValueError, match="unknown architecture.*did you mean 'RoFormerForCausalLM'"):
        open_source(folder, architecture="RoformerForCausalLM")


def test_transformers_own_keep_their_classes(tmp_path):
    "A real BERT with a head, a real T5: no family of ours."
    for model in (BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)), T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))):
        folder = published(tmp_path / model.config.model_type, model.state_dict(), model.config.to_dict())
        assert open_source(folder).kind is type(model)


def test_heads_of_equal_names_are_told_by_shape(tmp_path):
    config = LongformerConfig(**SIZES, attention_window=4, num_labels=3)
    model = LongformerForSequenceClassification(config)
    folder = published(tmp_path / "model", model.state_dict(), config.to_dict(), model_type="longformer")
    assert open_source(folder).kind is LongformerForSequenceClassification


def test_the_card_says_how_it_is_loaded(tmp_path):
    assert "`from fengshen.models.roformer import RoFormerForMaskedLM`" in model_card(tmp_path, {}, kind=RoFormerForMaskedLM)
    assert "pipeline_tag" not in model_card(tmp_path, {}, kind=RoFormerForMaskedLM) and "pipeline_tag: text-generation" in model_card(tmp_path, {})


def test_a_buffer_that_is_left_out_says_nothing_of_the_dtype(tmp_path, zhouwenwang):
    state, config = zhouwenwang
    source = open_source(published(tmp_path / "model", state, config))
    assert source.weights.dtypes[DIV_TERM.format(0)] == torch.float32 and pick_dtype("auto", source.weights, source.names) == torch.float16
