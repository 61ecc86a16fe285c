"""An export is the checkpoint, whatever strategy wrote it, readable without this library; anything less is refused."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from fengshen.training import verify
from fengshen.training.checkpoint import checkpoints
from fengshen.training.export import build, export, verify_export
from fengshen.training.manifest import MANIFEST
from fengshen.training.shards import write_weights
from fengshen.training.weights import read_weights
from tests.training_runs import TINY, environment, fit, fit_here, here, tiny_config

# A process in which this library cannot be imported loads the folder and saves what it found.
OUTSIDE = """
import sys
sys.modules["fengshen"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr(), "tied"
torch.save(model.state_dict(), out)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Runs of three steps by strategy, each made once, not exported."
    folder, done = tmp_path_factory.mktemp("runs"), {}
    config = tiny_config(folder)

    def run(strategy="auto"):
        if strategy not in done:
            make = fit_here if strategy == "auto" else fit
            done[strategy] = make(folder / strategy, **{"model.config": config, "trainer.max_steps": 3, "trainer.strategy": strategy})
        return done[strategy]

    return run


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    "The export of the run on one device; not to be changed."
    return export(runs(), tmp_path_factory.mktemp("exported") / "export")


def outside(folder, tmp_path):
    "The folder's tensors as a process without this library reads them."
    (tmp_path / "outside.py").write_text(OUTSIDE)
    env = environment(PYTHONPATH=None)
    done = subprocess.run([sys.executable, "outside.py", str(folder), "found.pt"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(tmp_path / "found.pt", weights_only=True)


@pytest.mark.parametrize("strategy", ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "zero2"))])  # three processes each
def test_the_folder_is_the_checkpoint_without_this_library(runs, tmp_path, strategy):
    run = runs(strategy)
    expected = read_weights(checkpoints(run)[-1])
    found = outside(export(run, tmp_path / "export"), tmp_path)
    assert set(expected) <= set(found) and set(found) - set(expected) <= {"lm_head.weight"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])


@pytest.mark.slow
def test_bfloat16_is_the_checkpoint_rounded_once(runs, tmp_path):
    expected = read_weights(checkpoints(runs())[-1])
    found = load_file(export(runs(), tmp_path / "export", dtype="bfloat16") / "model.safetensors")
    assert set(expected) - set(found) == {"lm_head.weight"}  # tied, so it is there once
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[name].to(torch.bfloat16)) for name, tensor in found.items())


def test_a_flipped_byte_is_found(runs, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    expected = verify.probe(build(checkpoints(runs())[-1], torch.float32))
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # the lowest bits of a weight: the logits would hardly tell
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tensors changed"):
        verify_export(folder, expected)


def test_a_failed_verification_leaves_the_earlier_export(runs, exported, tmp_path, monkeypatch):
    out = Path(shutil.copytree(exported, tmp_path / "export"))
    before = (out / "model.safetensors").read_bytes()

    def refuse(folder, expected):
        raise ValueError("not the checkpoint")

    monkeypatch.setattr("fengshen.training.export.verify_export", refuse)
    with pytest.raises(ValueError, match="not the checkpoint"):
        export(runs(), out, dtype="bfloat16")
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "zero2"])
def test_a_missing_shard(runs, tmp_path, strategy):
    "Under ZeRO-3 nobody else has its weights; ZeRO-2 has the whole ones of the forward pass too, float32 in this run."
    folder = tmp_path / "checkpoints" / "step-00000003"
    shutil.copytree(checkpoints(runs(strategy))[-1], folder)
    (folder / MANIFEST).unlink()  # it would have noticed
    shards = sorted(folder.rglob("*optim_states.pt"))
    state = torch.load(shards[0], weights_only=False)
    count = state["optimizer_state_dict"]["partition_count"]
    state["optimizer_state_dict"]["partition_count"] = [2 for _ in count] if isinstance(count, list) else 2
    torch.save(state, shards[0])  # the file of the first of two processes
    if strategy == "zero2":
        expected = read_weights(checkpoints(runs(strategy))[-1])
        found = load_file(export(tmp_path) / "model.safetensors")
        tied = dict.fromkeys(expected.keys() - found.keys(), found["transformer.wte.weight"])
        assert tied.keys() <= {"lm_head.weight"} and all(torch.equal((found | tied)[name], value) for name, value in expected.items())
        return
    with pytest.raises(ValueError, match="misses shards"):
        export(tmp_path)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("file", ["state.ckpt", "config.json"])
def test_a_checkpoint_whose_bytes_changed_is_refused(runs, tmp_path, file):
    "One bit, which no comparison of source and export could see: both would have it."
    folder = tmp_path / "checkpoints" / "step-00000003"
    shutil.copytree(checkpoints(runs())[-1], folder)
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"{file} has other content"):
        export(tmp_path)


def test_a_folder_that_was_not_finished_is_not_a_checkpoint(runs, tmp_path):
    shutil.copytree(checkpoints(runs())[-1], tmp_path / "checkpoints" / "step-00000009.partial")
    assert checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match="nothing to export"):
        export(tmp_path)


class Payload:
    "Runs a command when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("strategy, file", [("auto", "state.ckpt"), ("zero3", "*model_states.pt")])
def test_a_checkpoint_with_a_program_in_it_is_not_run(runs, tmp_path, strategy, file):
    folder = tmp_path / "checkpoints" / "step-00000003"
    shutil.copytree(checkpoints(runs(strategy))[-1], folder)
    (folder / MANIFEST).unlink()  # whoever writes such a file can write a manifest too
    torch.save({"state_dict": {"model.x": torch.zeros(1)}, "module": Payload(tmp_path / "ran")}, next(folder.rglob(file)))
    with pytest.raises(ValueError, match="could run a program"):
        export(tmp_path)
    assert not (tmp_path / "ran").exists()


def published(folder, tokenizer, **changes):
    "A folder as old published models are: weights of the body in float16 with a mask in every layer, vocab files, no word on the class."
    folder.mkdir()
    model = GPT2LMHeadModel(GPT2Config(**({k: v for k, v in TINY.items() if k != "model_type"} | changes))).half()
    model.config.save_pretrained(folder)
    state = {n.removeprefix("transformer."): v for n, v in model.state_dict().items() if n != "lm_head.weight"}
    torch.save(state | {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).half() for i in range(2)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for path in Path(tokenizer).glob("tokenizer*"):
        shutil.copy(path, folder)
    return model


@pytest.mark.slow
def test_a_published_folder_through_the_command_line(exported, tmp_path):
    "float16 stays float16 unless asked, and what comes out needs neither this library nor old names."
    model = published(tmp_path / "wenzhong", exported)
    status, out, err = here("export", tmp_path / "wenzhong")
    assert status == 0, err
    assert "left out: 2 buffers" in out and "dtype = float16" in out
    found = load_file(tmp_path / "wenzhong-export" / "model.safetensors")
    assert all(torch.equal(found[n], v) for n, v in model.state_dict().items() if n != "lm_head.weight")
    assert "Converted with FengShen" in (tmp_path / "wenzhong-export" / "README.md").read_text()


@pytest.mark.slow
def test_a_checkpoint_without_config_and_tokenizer(exported, tmp_path):
    "Each is asked for by its flag, before anything is written; a tokenizer of another model is refused."
    model = published(tmp_path / "model", exported)
    torch.save({"state_dict": {f"model.{n}": v for n, v in model.float().state_dict().items()}, "epoch": 1}, tmp_path / "last.ckpt")
    status, _, err = here("export", tmp_path / "last.ckpt")
    assert status == 2 and "no config.json" in err and "--config" in err
    status, _, err = here("export", tmp_path / "last.ckpt", "--config", tmp_path / "model")
    assert status == 2 and "no tokenizer" in err and "--tokenizer" in err
    small = tmp_path / "small.json"
    small.write_text(json.dumps(TINY | dict(vocab_size=100)))
    published(tmp_path / "hundred", exported, vocab_size=100)
    status, _, err = here("export", tmp_path / "hundred")
    assert status == 2 and "more tokens than the embedding has rows" in err
    assert not list(tmp_path.glob("*export*"))
    status, _, err = here("export", tmp_path / "last.ckpt", "--config", tmp_path / "model", "--tokenizer", tmp_path / "model", "--out", tmp_path / "out")
    assert status == 0, err
    found = load_file(tmp_path / "out" / "model.safetensors")  # whether others read it was tried by the export itself
    assert all(torch.equal(found[n], v) for n, v in model.state_dict().items() if n != "lm_head.weight")


def test_an_export_never_replaces_its_source(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    for out in (folder, tmp_path):
        with pytest.raises(ValueError, match="replace what it is made from"):
            export(folder, out)
    assert (folder / "model.safetensors").exists()


def test_what_is_written_is_what_transformers_would_write(exported, runs, tmp_path):
    "The same tensors under the same names, the same config and generation settings; split into files it loads too."
    model = build(checkpoints(runs())[-1], torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    mine, theirs = (load_file(f / "model.safetensors") for f in (exported, tmp_path / "theirs"))
    assert set(mine) == set(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((exported / name).read_text()) == json.loads((tmp_path / "theirs" / name).read_text()), name
    layout = {n: (tuple(v.shape), v.dtype) for n, v in mine.items()}
    write_weights(tmp_path / "split", iter(mine.items()), layout, limit=200_000)
    shutil.copy(exported / "config.json", tmp_path / "split")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    found = GPT2LMHeadModel.from_pretrained(tmp_path / "split").state_dict()
    assert all(torch.equal(found[n], v) for n, v in mine.items())


def test_a_weight_that_float16_cannot_hold_is_refused(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    for value, dtype, words in ((1e6, "float16", "does not fit into torch.float16.*bfloat16"), (float("nan"), "float32", "NaN or infinite")):
        state["transformer.h.0.mlp.c_fc.bias"][3] = value
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words):
            export(folder, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
