"""The recipes for pretraining: two steps of each, sizes that are what their names say, and what `global_batch` and `max_tokens` make of a machine."""
import re

import pytest
import yaml

from fengshen.cli import lightning
from fengshen.cli.recipes import read_recipe, recipe_names
from fengshen.models import auto
from fengshen.models.auto import AutoModelForCausalLM
from fengshen.training.kinds import KINDS
from fengshen.training.memory import GIB, config_of, count, empty_model
from fengshen.utils.core import load_name
from tests.training_runs import here, read

PRETRAINING = [name for name in recipe_names() if name.startswith("pretrain_")]
ALIKE = ("pretrain_llama", "pretrain_pegasus", "pretrain_megatron_t5", "pretrain_bart")  # what others show too
SIZES = [(name, size) for name in PRETRAINING for size in read_recipe(name).sizes]
VOCABULARY = dict(pretrain_gpt2=50257, pretrain_llama=6400, pretrain_t5=32596, pretrain_bart=40000, pretrain_pegasus=50000)  # of the published models; others have about 21,128


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in PRETRAINING])
def test_two_steps(name, tmp_path):
    status, out, err = here("fit", "-c", name, "--smoke", "--run_dir", tmp_path / "run", "--export", "false")
    assert status == 0, err
    run = tmp_path / "run"
    assert [row["step"] for row in read(run)] == [1, 2] and all(row["loss"] > 0 and row["grad_norm"] > 0 for row in read(run))
    assert [row["step"] for row in read(run, "valid")] == [2], "valid_every counts optimizer steps"
    written = yaml.safe_load((run / "run.yaml").read_text("utf8"))
    batches = written["data"]["micro_batch"] * written["trainer"]["accumulate_grad_batches"]
    assert batches == written["global_batch"] == 4 and written["trainer"]["strategy"] == "auto" and written["model"]["gradient_checkpointing"] is False
    unknown = re.search(r"\(([\d.]+)%\) are unknown", out)
    assert unknown is None, unknown


@pytest.mark.slow
@pytest.mark.parametrize("name, size", SIZES)
def test_a_size_is_what_its_name_says(name, size):
    "Parameters, with a published vocabulary, are within a quarter of the name."
    recipe = read_recipe(name, size=size)
    objective = recipe["data"].get("objective")
    asked = dict(class_path=objective, init_args={}) if isinstance(objective, str) else objective
    kind = "causal" if objective is None else next(load_name(f"{place}.{asked['class_path']}")(**asked["init_args"]).model for place in
                                                   (["fengshen.data.cbart_dataloader"] if asked["class_path"] == "Infill" else ["fengshen.data.masking"]))
    vocab = 6400 if size in ("7m", "26m") else 32000 if name == "pretrain_llama" else VOCABULARY.get(name, 21128)
    config = config_of(recipe["model"]["config"] | dict(vocab_size=vocab))
    wanted = float(size[:-1]) * dict(m=1e6, b=1e9)[size[-1]]
    found = count(empty_model(config, auto=getattr(auto, KINDS[kind].auto))).all
    assert 0.75 < found / wanted < 1.25, f"{found:,}"


def parsed(*words):
    "The settings of a `fengshen fit` after everything that follows has been filled in."
    return lightning_config("pretrain_gpt2", *words)


def lightning_config(name, *words):
    from fengshen.cli.fit import make_cli, split_args

    return make_cli(*split_args(["-c", name, "--size", "7m", "--data.train", "x", "--trainer.accelerator", "cpu", *words])).config


def test_a_step_is_the_same_in_as_many_pieces_as_it_takes(capsys):
    config = parsed("--global_batch", "48", "--data.max_length", "512")
    assert (config["data"]["micro_batch"], config["trainer"]["accumulate_grad_batches"]) == (4, 12)
    config = parsed("--global_batch", "48", "--data.micro_batch", "6", "--max_tokens", "1e6", "--valid_every", "10", "--trainer.accumulate_grad_batches", "3")
    assert config["trainer"]["accumulate_grad_batches"] == 8 and config["trainer"]["max_steps"] == 163 and config["trainer"]["val_check_interval"] == 80
    assert "trainer.accumulate_grad_batches 3 is not used" in capsys.readouterr().out
    config = parsed("--global_batch", "null", "--data.micro_batch", "6", "--trainer.strategy", "auto", "--max_tokens", "null")
    assert config["model"]["gradient_checkpointing"] is False and config["trainer"]["accumulate_grad_batches"] == 1, "what is open is filled in, and nothing else"


@pytest.mark.parametrize("words, wrong", [
    (["--global_batch", "10", "--data.micro_batch", "4"], "10 rows a process, 4 at once"),
    (["--global_batch", "null"], "no global_batch"),
    (["--global_batch", "0"], "cannot be shared by the processes: got 0"),
    (["--max_tokens", "0"], "max_tokens is too small"),
    (["--valid_every", "0"], "valid_every is too small"),
    (["--global_batch", "3", "--trainer.devices", "2"], "cannot be shared by the processes: got 3"),
    (["--size", "8m"], "no such size: got '8m', expected one of 7m, 110m, 3.5b"),
    (["--model.config", "{model_type: gpt2, n_layers: 2}"], "no field of this name: got 'n_layers'.*did you mean 'n_layer'"),
])
def test_what_does_not_go_together_is_refused(words, wrong):
    with pytest.raises(ValueError, match=wrong):
        parsed(*words)


def test_the_plan_follows_the_memory_of_the_devices(monkeypatch):
    "A model of 1.6 billion: alone on a large card, its float32 weights on the host on a smaller one, all of it on the host on a small one, over ZeRO on eight."
    found = {}
    for room, devices in ((140, 1), (24, 1), (6, 1), (24, 8)):
        monkeypatch.setattr(lightning, "room", lambda: room * GIB)
        monkeypatch.setattr(lightning, "world_of", lambda trainer: devices)
        config = lightning_config("pretrain_llama", "--trainer.accelerator", "auto", "--global_batch", "64", "--data.max_length", "1024", "--trainer.precision", "bf16-mixed",
                                  "--model.config.hidden_size", "4096", "--model.config.num_hidden_layers", "8", "--model.config.intermediate_size", "11008")
        found[room, devices] = config["trainer"]["strategy"], config["data"]["micro_batch"] * config["trainer"]["accumulate_grad_batches"] * devices, config["model"]["optimizer"]["kind"]
    assert found[140, 1] == ("auto", 64, "auto") and found[24, 1] == ("auto", 64, "host_adamw") and found[6, 1] == ("zero3_offload", 64, "auto")
    assert found[24, 8][0] in ("zero1", "zero2", "zero3") and found[24, 8][1] == 64


def test_a_configuration_that_is_written_out_is_a_causal_model_of_that_shape():
    config = config_of(dict(model_type="gpt2", n_embd=64, n_layer=1, n_head=2))
    assert empty_model(config, auto=AutoModelForCausalLM).config.n_layer == 1


@pytest.mark.slow
def test_a_checkpoint_is_gone_on_with(tmp_path):
    "The exported folder in place of a size's shape: its weights, its tokenizer, the same objective."
    words = ["fit", "-c", "pretrain_bert", "--smoke", "--model.samples", "0"]
    status, out, err = here(*words, "--run_dir", tmp_path / "first", "--export", "true")
    assert status == 0, err
    status, out, err = here(*words, "--run_dir", tmp_path / "second", "--export", "false", "--model.path", tmp_path / "first/export", "--data.tokenizer", "null")
    assert status == 0, err
    assert yaml.safe_load((tmp_path / "second/run.yaml").read_text("utf8"))["model"]["config"] is None
    assert read(tmp_path / "second")[0]["loss"] < read(tmp_path / "first")[0]["loss"]
