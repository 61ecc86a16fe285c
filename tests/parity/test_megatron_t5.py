"""MegatronT5 gives the original's numbers, weights loaded under the original's names."""
import json

import pytest
import torch
from safetensors.torch import load_file

from fengshen.models import megatron_t5

TOLERANCE = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def family(shared):
    "The folder with this family's cases."
    folder = shared / "parity" / "megatron_t5"
    if not folder.is_dir():
        pytest.skip("no golden outputs of MegatronT5 in the shared folder")
    return folder


def published(case, place):
    "The case as a folder that `from_pretrained` reads."
    folder = place / case.name
    folder.mkdir()
    (folder / "config.json").symlink_to(case / "config.json")
    (folder / "model.safetensors").symlink_to(case / "weights.safetensors")
    return folder


def flat(name, value):
    "(name, tensor) of an output as the golden files name them."
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from flat(f"{name}.{i}", item)


def of_run(tensors, run):
    "{name: tensor} of one run in a golden file."
    return {name.split("/", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{run}/")}


def cached_step(model, input_ids, attention_mask, decoder_input_ids, next_ids):
    "Scores of the last token, with the cache of those before it."
    first = model(input_ids, attention_mask, decoder_input_ids, use_cache=True)
    return model(input_ids, attention_mask, next_ids, past_key_values=first.past_key_values, use_cache=True).logits


def test_every_output_of_every_case(family, tmp_path):
    "All named outputs of all runs; a cached step gives the whole text's last scores, which the original's did not."
    compared = 0
    for case in sorted(p for p in family.iterdir() if p.is_dir()):
        meta = json.loads((case / "meta.json").read_text())
        model = getattr(megatron_t5, meta["model_class"].rsplit(".", 1)[1]).from_pretrained(published(case, tmp_path)).eval()
        inputs, outputs = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
        for run, about in meta["runs"].items():
            given, expected = of_run(inputs, run), of_run(outputs, run)
            with torch.no_grad():
                if run == "cached_step":
                    step, whole = cached_step(model, **given), expected["logits_full"]
                    torch.testing.assert_close(step[:, 0], whole[:, -1], **TOLERANCE)
                    text = torch.cat([given["decoder_input_ids"], given["next_ids"]], dim=1)
                    torch.testing.assert_close(model(given["input_ids"], given["attention_mask"], text).logits, whole, **TOLERANCE)
                    continue
                got = dict(pair for item in model(**given, **about["non_tensor_kwargs"]).items() for pair in flat(*item))
            assert expected.keys() <= got.keys(), f"{case.name}/{run} lacks {sorted(expected.keys() - got.keys())}"
            for name, tensor in expected.items():
                torch.testing.assert_close(got[name], tensor, **TOLERANCE, msg=lambda m: f"{case.name}/{run}/{name}: {m}")
                compared += 1
    assert compared > 40


def test_the_files_names_are_the_models(family):
    "Every name of the original's state dict is ours or a position_ids buffer, with the same shape; encoder and headless model too."
    names = family.parent / "keys"
    cases = {"cond_gen_gelu": "T5ForConditionalGeneration", "model": "T5Model", "encoder": "T5EncoderModel"}
    config = megatron_t5.T5Config.from_pretrained(family / "cond_gen_gelu")
    for case, name in cases.items():
        original = {n: tuple(shape) for n, shape in json.loads((names / f"megatron_t5.{case}.json").read_text()) if not n.endswith("position_ids")}
        ours = {n: tuple(t.shape) for n, t in getattr(megatron_t5, name)(config).state_dict().items()}
        assert ours == original
