"""BartForTextInfill computes what the original computed, from its folder as it was published."""
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import configuration_utils

import fengshen.models.bart as family

CASES = ["text_infill_cls"]
TOLERANCE = dict(atol=1e-4, rtol=1e-4)


def stored(folder, name):
    "{run: {argument or output: tensor}} of a case."
    runs = {}
    for key, tensor in load_file(folder / f"{name}.safetensors").items():
        run, _, part = key.partition("/")
        runs.setdefault(run, {})[part] = tensor
    return runs


def flat(out):
    "An output, or what get_encoder_logits gives, with the names of the stored tensors."
    if isinstance(out, tuple):
        return {"encoder_last_hidden_state": out[0].last_hidden_state, "encoder_logits": out[1]}
    named = {}
    for name, value in out.items():
        named.update({name: value} if torch.is_tensor(value) else {f"{name}.{i}": one for i, one in enumerate(value or ())})
    return named


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_every_run(shared, tmp_path, case, attention, monkeypatch):
    warned = []
    monkeypatch.setattr(configuration_utils.logger, "warning", lambda text, *args: warned.append(text))
    folder = shared / "parity" / "bart" / case
    about, inputs, outputs = json.loads((folder / "meta.json").read_text()), stored(folder, "inputs"), stored(folder, "outputs")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    cls = getattr(family, about["model_class"].rpartition(".")[2])
    model, info = cls.from_pretrained(tmp_path, attn_implementation=attention, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not warned
    for run, wanted in outputs.items():
        call = getattr(model.eval(), about["runs"][run]["call"])
        got = flat(call(**inputs[run], **about["runs"][run]["non_tensor_kwargs"]))
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, **TOLERANCE, msg=lambda m, run=run, name=name: f"{run}/{name}: {m}")
