"""Published folders of this library's architectures become folders that plain transformers opens after `import fengshen.models`."""
import json

import pytest
import torch
import transformers

from fengshen.models import auto
from fengshen.models.auto.registry import FAMILIES, config_class, model_class
from fengshen.training import export as exporting
from fengshen.training import verify

BERT = dict(vocab_size=140, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32, pad_token_id=0)
T5 = dict(vocab_size=140, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, max_position_embeddings=32, decoder_start_token_id=1)
BART = dict(vocab_size=140, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_position_embeddings=32, num_labels=3)
SIZES = dict(roformer=BERT, longformer=BERT | dict(attention_window=4), megatron_t5=T5, bart=BART)
CASES = dict(roformer=("AutoModelForMaskedLM", "megatron-bert"), longformer=("AutoModelForMaskedLM", "longformer"), megatron_t5=("AutoModelForSeq2SeqLM", "T5"),
             bart=("AutoModelForTextInfill", "bart"))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"清华大学位于北京"]


def published(folder, family):
    "A folder as the original published it, and its model."
    head, kind = CASES[family]
    torch.manual_seed(0)
    model = model_class(family, head)(config_class(family)(**SIZES[family])).eval()
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(SIZES[family] | dict(model_type=kind)), "utf8")
    (folder / "vocab.txt").write_text("\n".join(WORDS), "utf8")
    return model


def verify_here(folder, expected):
    "What the fresh process does, in this one."
    model, tensors = verify.load(folder)
    verify.compare(expected, dict(logits=verify.logits(model), tensors=verify.digests(tensors)))
    return "verified"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "verify_export", verify_here)
    model = published(tmp_path / "published", family)
    out = exporting.export(tmp_path / "published", out=tmp_path / "out")
    said = json.loads((out / "config.json").read_text("utf8"))
    assert (said["model_type"], said["architectures"]) == (FAMILIES[family].model_type, [type(model).__name__])
    again = getattr(auto, CASES[family][0]).from_pretrained(out)
    assert verify.logits(again) == pytest.approx(verify.logits(model), abs=1e-6)
    assert len(auto.AutoTokenizer.from_pretrained(out)) == len(WORDS) + (120 if family == "megatron_t5" else 0)
    assert type(transformers.AutoConfig.from_pretrained(out)) is config_class(family)


@pytest.mark.slow
def test_a_fresh_process_verifies_it(tmp_path, capsys):
    "The process knows transformers, and `fengshen.models` only because the folder says so."
    published(tmp_path / "published", "megatron_t5")
    exporting.export(tmp_path / "published", out=tmp_path / "out")
    assert "the logits of T5ForConditionalGeneration" in capsys.readouterr().out
