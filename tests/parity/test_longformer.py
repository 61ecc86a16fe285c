"""Longformer computes what the original computed, in chunks and by the full mask, padding rows and losses included; every head has the original's names."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import configuration_utils

import fengshen.models.longformer as family

CASES = ["masked_lm", "seq_cls"]
HEADS = dict(longformer="Model", model_windows_4_8="Model", masked_lm="ForMaskedLM", masked_lm_dense="ForMaskedLM", multiple_choice="ForMultipleChoice",
             qa="ForQuestionAnswering", seq_cls="ForSequenceClassification", token_cls="ForTokenClassification")
UNUSED = ("rope_emb.div_term", "embeddings.position_embeddings.weight")


def runs(folder, kind):
    "{run: {name: tensor}} of a case's inputs or outputs."
    found = {}
    for key, tensor in load_file(folder / f"{kind}.safetensors").items():
        run, _, name = key.partition("/")
        found.setdefault(run, {})[name] = tensor
    return found


def published(folder, to, weights):
    "The case as a folder that was published: its config.json, and the weights under their names."
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({name: tensor.clone() for name, tensor in weights.items()}, to / "model.safetensors", metadata=dict(format="pt"))
    return to


@pytest.mark.parametrize("table", ["with a position table", "without"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_every_run(shared, tmp_path, case, attention, table, monkeypatch):
    warned = []
    monkeypatch.setattr(configuration_utils.logger, "warning", lambda text, *args: warned.append(text))
    folder = shared / "parity" / "longformer" / case
    about, inputs, outputs = json.loads((folder / "meta.json").read_text()), runs(folder, "inputs"), runs(folder, "outputs")
    weights = load_file(folder / "weights.safetensors")
    if table == "without":
        del weights["longformer.embeddings.position_embeddings.weight"]
    cls = getattr(family, about["model_class"].rpartition(".")[2])
    model, info = cls.from_pretrained(published(folder, tmp_path / "model", weights), attn_implementation=attention, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not warned
    for run, wanted in outputs.items():
        got = model.eval()(**inputs[run], **about["runs"][run]["non_tensor_kwargs"])
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, atol=1e-4, rtol=1e-4, msg=lambda m, run=run, name=name: f"{run}/{name}: {m}")


@pytest.mark.parametrize("case", HEADS)
def test_every_head_has_the_original_names_and_shapes(shared, case):
    file = shared / "parity" / "keys" / ("longformer.json" if case == "longformer" else f"longformer.{case}.json")
    wanted = {name: tuple(shape) for name, shape in json.loads(file.read_text())}
    base = "longformer." if any(name.startswith("longformer.") for name in wanted) else ""
    head = HEADS[case] if case != "longformer" else "ForMaskedLM" if base else "Model"
    vocabulary, width = wanted[f"{base}embeddings.word_embeddings.weight"]
    angles, = wanted[f"{base}encoder.layer.0.attention.self.rope_emb.div_term"]
    labels = wanted.get("classifier.bias", wanted.get("classifier.out_proj.bias", (2,)))[0]
    sizes = dict(vocab_size=vocabulary, hidden_size=width, num_attention_heads=width // angles // 2, num_hidden_layers=2, num_labels=labels,
                 intermediate_size=wanted[f"{base}encoder.layer.0.intermediate.dense.bias"][0])
    model = getattr(family, f"Longformer{head}")(family.LongformerConfig(**sizes))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {n: s for n, s in wanted.items() if not n.endswith(UNUSED)}
