"""A small training of each family on real text, from random weights: the loss falls, and what is left is a folder of the family's own type."""
import json
import lzma

import pytest

from fengshen.models import auto
from fengshen.models.megatron_t5 import T5Tokenizer
from tests.training_runs import fit_here, here, series

pytestmark = pytest.mark.slow
BERT = dict(vocab_size=12800, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            max_position_embeddings=256, pad_token_id=0)
SIDES = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in dict(layers=2, attention_heads=2, ffn_dim=128).items()}
FAMILIES = {  # objective: (configuration, tokenizer, class)
    "roformer": ("UniLM", dict(model_type="fengshen-roformer", **BERT), "erlangshen", auto.AutoModelForCausalLM),
    "longformer": ("Bert", dict(model_type="fengshen-longformer", attention_window=32, **BERT), "erlangshen", auto.AutoModelForMaskedLM),
    "megatron-t5": ("T5", dict(model_type="fengshen-megatron-t5", vocab_size=21248, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, max_position_embeddings=256,
                               dropout_rate=0.0), "t5", auto.AutoModelForSeq2SeqLM),
    "bart": ("Infill", dict(model_type="fengshen-bart", vocab_size=12800, d_model=64, max_position_embeddings=256, pad_token_id=0, bos_token_id=2, eos_token_id=3,
                            decoder_start_token_id=3, forced_eos_token_id=3, dropout=0.0, **SIDES), "erlangshen", auto.AutoModelForTextInfill),
}


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    "Chinese law as two corpora, one for each tokenizer."
    folder = tmp_path_factory.mktemp("families")
    with lzma.open(shared / "data/corpus/zh_laws.jsonl.xz", "rt", encoding="utf8") as f:
        (folder / "laws.jsonl").write_text("".join(line for line, _ in zip(f, range(120))), "utf8")
    T5Tokenizer.from_pretrained(shared / "data/tokenizers/bert_base_chinese").save_pretrained(folder / "t5")
    for name, place in dict(t5=folder / "t5", erlangshen=shared / "data/tokenizers/erlangshen_12800").items():
        status, out, err = here("preprocess", folder / "laws.jsonl", "--out", folder / f"corpus_{name}", "--tokenizer", place, "--workers", 1, "--append_eod")
        assert status == 0, err
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_law(shared, folder, tmp_path, family):
    objective, config, tokenizer, cls = FAMILIES[family]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf8")
    place = folder / "t5" if tokenizer == "t5" else shared / "data/tokenizers/erlangshen_12800"
    run = fit_here(tmp_path / "run", **{
        "model.config": str(tmp_path / "config.json"), "model.optimizer.lr": 2e-3, "data.train": str(folder / f"corpus_{tokenizer}"), "data.valid": None, "data.split": "90,10",
        "data.tokenizer": str(place), "data.objective": objective, "data.max_length": 128, "data.micro_batch": 8, "trainer.max_steps": 60, "trainer.val_check_interval": 20,
        "trainer.check_val_every_n_epoch": None, "trainer.limit_val_batches": 4, "export": True})
    losses = series(run, "loss", "valid")
    assert losses == sorted(losses, reverse=True) and losses[-1] < series(run, "loss")[0] - 1.5, losses
    saved = json.loads((run / "export/config.json").read_text("utf8"))
    assert saved["model_type"] == f"fengshen-{family}" and type(cls.from_pretrained(run / "export")).__name__ == saved["architectures"][0]
