"""An export is the checkpoint, whatever strategy wrote it, readable without this library; anything less is refused."""
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fengshen.training import verify
from fengshen.training.checkpoint import checkpoints, read_weights
from fengshen.training.export import build, export, verify_export
from tests.training_runs import environment, fit, fit_here, tiny_config

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


@pytest.mark.parametrize("strategy", ["auto", "zero3", pytest.param("zero2", marks=pytest.mark.slow)])  # three processes each
def test_the_folder_is_the_checkpoint_without_this_library(runs, tmp_path, strategy):
    run = runs(strategy)
    expected = read_weights(checkpoints(run)[-1])
    found = outside(export(run, tmp_path / "export"), tmp_path)
    assert set(expected) <= set(found) and set(found) - set(expected) <= {"lm_head.weight"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])


def test_bfloat16_is_the_checkpoint_rounded_once(runs, tmp_path):
    expected = read_weights(checkpoints(runs())[-1])
    found = outside(export(runs(), tmp_path / "export", dtype="bfloat16"), tmp_path)
    assert all(found[name].dtype == torch.bfloat16 and torch.equal(found[name], value.to(torch.bfloat16)) for name, value in expected.items())


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


@pytest.mark.parametrize("strategy", ["zero3", pytest.param("zero2", marks=pytest.mark.slow)])  # needs that run
def test_a_missing_shard_is_refused(runs, tmp_path, strategy):
    folder = tmp_path / "checkpoints" / "step-00000003"
    shutil.copytree(checkpoints(runs(strategy))[-1], folder)
    shards = sorted(folder.rglob("*optim_states.pt"))
    state = torch.load(shards[0], weights_only=False)
    count = state["optimizer_state_dict"]["partition_count"]
    state["optimizer_state_dict"]["partition_count"] = [2 for _ in count] if isinstance(count, list) else 2
    torch.save(state, shards[0])  # the file of the first of two processes
    with pytest.raises(ValueError, match="misses shards"):
        export(tmp_path)
    assert not (tmp_path / "export").exists()


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
    torch.save({"state_dict": {"model.x": torch.zeros(1)}, "module": Payload(tmp_path / "ran")}, next(folder.rglob(file)))
    with pytest.raises(pickle.UnpicklingError):
        read_weights(folder)
    assert not (tmp_path / "ran").exists()
