"""RoFormer computes what the original computed: every run with the original's mask, and with a mask that hides those runs in which nothing is to be hidden."""
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import configuration_utils

import fengshen.models.roformer as family

CASES = ["masked_lm", "pretraining"]
TOLERANCE = dict(atol=1e-4, rtol=1e-4)


def stored(folder):
    "(description, {run: arguments}, {run: outputs}) of a case."
    tables = []
    for name in ("inputs", "outputs"):
        runs = {}
        for key, tensor in load_file(folder / f"{name}.safetensors").items():
            run, _, part = key.partition("/")
            runs.setdefault(run, {})[part] = tensor
        tables.append(runs)
    return json.loads((folder / "meta.json").read_text()), *tables


def published(folder, to):
    "The case as a folder that was published: its config.json, and the weights under their names."
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    (to / "model.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    return to


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_every_run_with_the_original_mask(shared, tmp_path, case, attention, monkeypatch):
    warned = []
    monkeypatch.setattr(configuration_utils.logger, "warning", lambda text, *args: warned.append(text))
    folder = shared / "parity" / "roformer" / case
    about, inputs, outputs = stored(folder)
    cls = getattr(family, about["model_class"].rpartition(".")[2])
    model, info = cls.from_pretrained(published(folder, tmp_path / "model"), legacy_mask=True, attn_implementation=attention, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not warned
    hiding = cls.from_pretrained(tmp_path / "model", attn_implementation=attention).eval()
    for run, wanted in outputs.items():
        given = inputs[run]
        plain = not given.get("token_type_ids", torch.zeros(1)).any() and bool(given.get("attention_mask", torch.ones(1)).all())
        for one in (model.eval(), hiding) if plain else (model.eval(),):
            got = one(**given, **about["runs"][run]["non_tensor_kwargs"])
            for name, value in wanted.items():
                torch.testing.assert_close(got[name], value, **TOLERANCE, msg=lambda m, run=run, name=name: f"{run}/{name}: {m}")


HEADS = dict(causal_lm="ForCausalLM", masked_lm="ForMaskedLM", model="Model", multiple_choice="ForMultipleChoice", nsp="ForNextSentencePrediction",
             pretraining="ForPreTraining", qa="ForQuestionAnswering", seq_cls="ForSequenceClassification", token_cls="ForTokenClassification")


@pytest.mark.parametrize("case", HEADS)
def test_every_head_has_the_original_names_and_shapes(shared, case):
    wanted = {name: tuple(shape) for name, shape in json.loads((shared / "parity" / "keys" / f"roformer.{case}.json").read_text())}
    base = "" if case == "model" else "bert."
    vocabulary, width = wanted[f"{base}embeddings.word_embeddings.weight"]
    angles, = wanted[f"{base}encoder.layer.0.attention.self.rope_emb.div_term"]
    labels = wanted.get("classifier.bias", (2,))[0]
    sizes = dict(vocab_size=vocabulary, hidden_size=width, num_attention_heads=width // angles // 2, num_hidden_layers=2, num_labels=labels,
                 intermediate_size=wanted[f"{base}encoder.layer.0.intermediate.dense.bias"][0])
    model = getattr(family, f"RoFormer{HEADS[case]}")(family.RoFormerConfig(**sizes))
    computed = {name for name in wanted if name.endswith(("rope_emb.div_term", "embeddings.position_ids"))}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {name: wanted[name] for name in wanted if name not in computed}
