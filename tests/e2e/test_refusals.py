"""Every mistake a user can make gets one line and exit status 2; what a command prints can be run again; a run is never lost by accident."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training_runs import QUIET, cli, environment, fit_here, flags, here, read, series, tiny_config, weights, weights_apart

STEPS = {"trainer.max_steps": 2, "trainer.strategy": "auto"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Every test works in a folder of its own: runs/ would land in the checkout."
    monkeypatch.chdir(tmp_path)


def refused(*words):
    "The refusal of a command: exit status 2 and one line that is no traceback."
    status, out, err = here(*words)
    assert status == 2, (status, out[-500:], err[-500:])
    assert "Traceback" not in out + err and len(err.strip().splitlines()) == 1, err
    assert not Path("runs").exists(), "a refused command leaves no run behind"
    return err


def recipe(**sections):
    "The path of a recipe of one's own: the demo's, with sections laid over it."
    from fengshen.cli.recipes import merge, read_recipe

    Path("mine.yaml").write_text(yaml.safe_dump(merge(dict(read_recipe("demo")), sections), allow_unicode=True), "utf8")
    return "mine.yaml"


# Mistakes


@pytest.mark.parametrize("flag, nearest", [
    ("--trainer.max_step", "trainer.max_steps"), ("--model.optimizer.learning_rat", "model.optimizer"), ("--model.optimizer.l", "model.optimizer.lr"),
    ("--data.micro_batchs", "data.micro_batch"), ("--run_dirr", "run_dir"), ("--checkpoint.every_n_step", "checkpoint.every_n_steps"),
    ("--model.schedule.warmup_stepps", "model.schedule.warmup_steps"), ("--model.lora.alpa", "model.lora.alpha"),
])
@pytest.mark.parametrize("joined", [True, False])
def test_an_unknown_flag(flag, nearest, joined):
    err = refused("fit", "-c", "demo", *flags(STEPS | QUIET), *([f"{flag}=3"] if joined else [flag, "3"]))
    assert flag.removeprefix("--") in err and nearest in err


@pytest.mark.parametrize("sections, key, nearest", [
    (dict(trainers=dict(max_steps=2)), "trainers.max_steps", "trainer.max_steps"),
    (dict(epochs=3), "epochs", None),
    (dict(trainer=dict(max_step=2)), "trainer.max_step", "trainer.max_steps"),
    (dict(model=dict(optimizer=dict(lrr=1e-3))), "model.optimizer.lrr", "model.optimizer.lr"),
    (dict(model=dict(schedule=dict(warmup=3))), "model.schedule.warmup", "model.schedule.warmup"),
    (dict(model=dict(attn="sdpa")), "model.attn", None),
    (dict(data=dict(micro_batchs=3)), "data.micro_batchs", "data.micro_batch"),
    (dict(checkpoint=dict(keeps=3)), "checkpoint.keeps", "checkpoint.keep"),
])
def test_an_unknown_key(sections, key, nearest):
    err = refused("fit", "-c", recipe(**sections))
    assert f"'{key}'" in err and (nearest is None or f"did you mean '{nearest}" in err)


@pytest.mark.parametrize("key, value", [
    ("trainer.max_steps", "many"), ("model.optimizer.lr", "fast"), ("data.micro_batch", "[1, 2]"), ("data.packing", "perhaps"),
    ("model.optimizer.betas", "[0.9]"), ("model.lora.r", "many"), ("data.length_warmup.start", "[1]"), ("model.gradient_checkpointing", "perhaps"), ("overwrite", "maybe"), ("model.metrics", "token_accuracy")])
def test_a_value_of_the_wrong_type(key, value):
    err = refused("fit", "-c", "demo", f"--{key}={value}")
    assert key in err and "Subtypes" not in err


@pytest.mark.parametrize("settings, named", [
    ({"model.optimizer.lr": -1}, "optimizer.lr"), ({"model.schedule.kind": "cosin"}, "cosine"), ({"model.optimizer.kind": "adam"}, "adamw"),
    ({"model.lora.r": 0}, "lora.r is out of range: got 0, expected"), ({"model.lora.quantize": "nf3"}, "expected nf4"), ({"model.lora": {"dropout": 1}}, "lora.dropout is"),
    ({"model.activation_budget": 2}, "model.activation_budget is"), ({"model.activation_budget": -0.1}, "a share from 0 to 1"), ({"data.on_long": "cut"}, "on_long"), ({"model.attention": "flash"}, "attention"), ({"data.micro_batch": 0}, "micro_batch"),
    ({"trainer.strategy": "zero4"}, "zero3"), ({"trainer.accelerator": "abacus"}, "abacus"),
    ({"model.loss": "fengshen.losses.crossentropy"}, "cross_entropy"),
    ({"model.metrics": {"acc": "fengshen.metric.Accuracy"}}, "fengshen.metric"), ({"loggers": ["tensorbord"]}, "tensorboard"),
    ({"module": "fengshen.training.module.CausalLM"}, "CausalLM"), ({"trainer.precision": "half"}, "half"), ({"data.template": "no place"}, "answer")])
def test_a_value_out_of_range(settings, named):
    err = refused("fit", "-c", "demo", *flags(STEPS | {"run_dir": "run"} | settings))
    assert named in err and "LoRAConfig" not in err


@pytest.mark.parametrize("settings, named", [
    ({"data.train": "absent.jsonl"}, "absent.jsonl"), ({"data.tokenizer": "./absent"}, "absent"), ({"model.config": "absent.json"}, "absent.json"),
    ({"model.config": None, "model.path": "./absent"}, "absent"), ({"trainer.strategy": "absent.json"}, "absent.json"),
    ({"data.train": "fengshen:qa_demo/trian.jsonl"}, "fengshen:qa_demo/train.jsonl"),
    ({"resume": "runs/absent/checkpoints/step-00000001"}, "absent")])
def test_a_file_that_is_not_there(settings, named):
    err = refused("fit", "-c", "demo", *flags(STEPS | {"run_dir": "run"} | settings))
    assert named in err


@pytest.mark.parametrize("content", ["{", "[]", "{\"model_type\": \"no_such_model\"}", "{\"vocab_size\": 10}"])
def test_a_model_config_that_is_none(content):
    Path("config.json").write_text(content)
    assert "config.json" in refused("fit", "-c", "demo", *flags(STEPS | {"run_dir": "run", "model.config": "config.json"}))


def test_a_model_folder_without_a_model():
    Path("folder").mkdir()
    settings = STEPS | {"run_dir": "run", "model.config": None, "model.path": "./folder"}
    assert "folder" in refused("fit", "-c", "demo", *flags(settings))


@pytest.mark.parametrize("content, why", [("a: [", "not YAML"), ("- a\n- b", "not a recipe"), ("trainer: 5", "trainer"), ("model: [1]", "model")])
def test_a_recipe_that_is_none(content, why):
    Path("broken.yaml").write_text(content)
    assert why in refused("fit", "-c", "broken.yaml")


def test_no_tokenizer_and_no_data():
    assert "set data.tokenizer" in refused("fit", "-c", "demo", *flags(STEPS | {"run_dir": "run", "data.tokenizer": None}))
    assert "set data.train" in refused("fit", "-c", "demo", *flags(STEPS | {"run_dir": "run", "data.train": None}))
    err = refused("fit", "-c", "medical_qa", "--run_dir", "run")
    assert "data.t" in err


def test_rows_longer_than_the_models_context():
    "A packed row may end in padding longer than the model has positions; it is refused before a step is taken."
    err = refused("fit", "-c", "demo", *flags(STEPS | QUIET | {"run_dir": "run", "data.max_length": 1024}))
    assert "max_length" in err and "128" in err


def test_a_deepspeed_json_with_a_second_optimizer():
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}))
    err = refused("fit", "-c", "demo", *flags(STEPS | {"trainer.strategy": "ds.json"}))
    assert "optimizer" in err and "model.optimizer" in err and "optimizer_from_config" in err
    Path("ds.json").write_text("{")
    assert "not JSON" in refused("fit", "-c", "demo", *flags(STEPS | {"trainer.strategy": "ds.json"}))


@pytest.mark.parametrize("words", [["export", "absent"], ["export", "."], ["generate", "./absent", "--prompt", "问"], ["recipes", "cat", "absent"],
                                   ["recipes", "cp", "absent"], ["recipes", "check", "absent"], ["generate", ".", "--prompt", "问"]])
def test_other_verbs_refuse_in_a_line(words):
    assert refused(*words)


def test_in_a_process_of_its_own_a_mistake_is_a_line_too(tmp_path):
    done = cli("fit", "-c", "demo", "--trainer.maxsteps", "3", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "'trainer.maxsteps'" in done.stderr and "'trainer.max_steps'" in done.stderr


# Light commands


def test_help_is_quick_and_loads_no_torch(tmp_path):
    script = """
import sys, time
started = time.monotonic()
from fengshen.cli.main import main
assert main(["--help"]) == 0 and main(["recipes", "ls"]) == 0 and main(["recipes", "cat", "demo"]) == 0 and main(["--version"]) == 0
heavy = {"torch", "transformers", "pytorch_lightning", "deepspeed", "ipywidgets", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
print("CPU", time.process_time())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "usage: fengshen VERB" in done.stdout and float(done.stdout.split()[-1]) < 2


def test_every_verb_explains_itself():
    for verb in ("fit", "validate", "export", "generate", "recipes"):
        status, out, err = here(verb, "--help")
        assert status == 0 and "usage: fengshen " + verb in out.replace("\n", " "), (verb, out[:200], err[:200])


def test_check_finds_a_mistake_in_a_recipe():
    assert "trainer.max_steps" in refused("recipes", "check", recipe(trainer=dict(max_step=3)))


# What is printed can be run


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A finished run of two steps, exported."
    folder = tmp_path_factory.mktemp("done")
    settings = {"model.config": tiny_config(folder), "export": True, "trainer.val_check_interval": 2, "model.samples": 2}
    return fit_here(folder / "run", **STEPS, **settings)


def test_a_run_leaves_what_it_promised(done):
    left = {p.name for p in done.iterdir()}
    assert {"run.yaml", "metrics.jsonl", "checkpoints", "samples.jsonl", "export", "report.html", "summary.json"} <= left
    assert not {p for p in left if p.endswith(".partial")}
    keys = {"step", "split", "loss", "lr", "grad_norm", "tokens", "time"}
    assert all(keys <= set(row) for row in read(done))
    valid = read(done, "valid")[-1]
    assert {"loss", "perplexity", "token_accuracy"} <= set(valid) and valid["tokens"] == read(done)[-1]["tokens"]
    samples = [json.loads(line) for line in (done / "samples.jsonl").read_text("utf8").splitlines()]
    assert len(samples) == 2 and all(set(row) == {"step", "question", "reference", "answer"} for row in samples)
    page = (done / "report.html").read_text("utf8")
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_nothing_is_left_beside_the_run(done):
    assert {p.name for p in done.parent.iterdir()} == {"run", "tiny.json"}


def test_the_default_folder_is_named_after_the_recipe():
    settings = STEPS | QUIET | {"model.config": tiny_config(".")}
    status, out, err = here("fit", "-c", recipe(), *flags(settings))
    assert status == 0, err
    assert sorted(p.name for p in Path("runs").iterdir()) == ["mine"]


def test_run_yaml_runs_again(done, tmp_path):
    err = refused("fit", "-c", str(done / "run.yaml"))
    assert "finished run" in err and "--overwrite" in err and "--run_dir" in err
    settings = {"run_dir": "again", "export": False}
    status, out, err = here("fit", "-c", str(done / "run.yaml"), *flags(settings))
    assert status == 0, err
    assert series("again", "loss") == series(done, "loss") and weights_apart(weights("again"), weights(done)) == 0
    before, after = (yaml.safe_load((Path(run) / "run.yaml").read_text("utf8")) for run in (done, "again"))
    assert after == before | settings


def test_print_config_runs_again():
    words = ["-c", "demo", *flags(QUIET | STEPS | {"model.config": tiny_config("."), "run_dir": "printed"})]
    status, text, err = here("fit", *words, "--print_config")
    assert status == 0 and not Path("printed").exists(), err
    Path("full.yaml").write_text(text, "utf8")
    assert here("fit", "-c", "full.yaml")[0] == 0 and here("fit", *words, "--run_dir", "typed")[0] == 0
    assert series("printed", "loss") == series("typed", "loss")
    assert here("recipes", "check", "full.yaml")[0] == 0


def test_two_recipes_are_laid_over_each_other():
    Path("over.yaml").write_text(yaml.safe_dump(dict(trainer=dict(max_steps=1), model=dict(optimizer=dict(lr=1e-5)))))
    text = here("fit", "-c", "demo", "-c", "over.yaml", "--model.optimizer.eps", "1e-7", "--print_config")[1]
    config = yaml.safe_load(text)
    assert config["trainer"]["max_steps"] == 1 and config["trainer"]["strategy"] == "zero3"
    assert config["model"]["optimizer"]["lr"] == 1e-5 and config["model"]["optimizer"]["eps"] == 1e-7 and config["run_dir"] == "runs/over"


# Runs are not lost by accident


def test_a_finished_run_is_kept(done):
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*")}
    for overwrite in ({}, {"overwrite": False}):
        assert "finished run" in refused("fit", "-c", "demo", *flags(STEPS | {"run_dir": str(done)} | overwrite))
    assert {p: p.stat().st_mtime_ns for p in done.rglob("*")} == before


def test_a_run_is_replaced_when_asked():
    settings = {"model.config": tiny_config(".")} | STEPS
    run = fit_here("run", **settings)
    (run / "note.txt").write_text("old")
    fit_here("run", **settings | {"overwrite": True, "trainer.max_steps": 1})
    assert len(read("run")) == 1 and not (run / "note.txt").exists()
    assert yaml.safe_load((run / "run.yaml").read_text("utf8"))["overwrite"] is False, "run.yaml fed back does not delete by itself"


def test_an_unfinished_run_is_refused_and_taken_up_again():
    "A run that was killed after its checkpoint: not overwritten by accident, and continued it ends where an undisturbed one does."
    settings = {"model.config": tiny_config("."), "trainer.max_steps": 6, "checkpoint.every_n_steps": 3, "checkpoint.keep": 5}
    straight = fit_here("straight", **settings)
    killed = fit_here("killed", **settings)
    (killed / "summary.json").unlink()
    last = killed / "checkpoints" / "step-00000006"
    last.rename(last.with_name("step-00000006.partial"))
    lines = (killed / "metrics.jsonl").read_text("utf8").splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:20], "utf8")  # it was writing when it died
    err = refused("fit", "-c", str(killed / "run.yaml"), "--resume", "never")
    assert "did not finish" in err and "--resume auto" in err
    status, out, err = here("fit", "-c", str(killed / "run.yaml"))
    assert status == 0, err
    assert weights_apart(weights(killed), weights(straight)) < 1e-6
    from fengshen.training.run import Run

    resumed = {r["step"]: r for r in Run(killed).records("train")}
    assert sorted(resumed) == [1, 2, 3, 4, 5, 6]
    for row in read(straight)[3:]:
        assert abs(resumed[row["step"]]["loss"] - row["loss"]) < 1e-6 and resumed[row["step"]]["lr"] == row["lr"]
        assert resumed[row["step"]]["tokens"] == row["tokens"], "real tokens since the start of the run"


# The other verbs at work


def test_validate_says_what_training_said(done):
    last = read(done, "valid")[-1]
    settings = STEPS | {"model.config": str(done.parent / "tiny.json"), "model.samples": 1}
    model = {"model.config": None, "model.path": str(done / "export")}
    checkpoint = {"resume": str(next((done / "checkpoints").iterdir()))}
    for source in (model, checkpoint):
        status, out, err = here("validate", "-c", "demo", *flags(settings | source))
        assert status == 0, err
        said = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert abs(said[0]["loss"] - last["loss"]) < 1e-5 and abs(said[0]["token_accuracy"] - last["token_accuracy"]) < 1e-6
        assert {"question", "reference", "answer"} == set(said[1])
    assert not Path("runs").exists() and not Path("lightning_logs").exists()


@pytest.mark.slow
def test_a_strategy_from_a_json_and_from_yaml():
    "The same DeepSpeed settings three ways: a preset, a JSON of one's own, a strategy in the recipe. One process, so the runs are equal."
    zero = {"zero_optimization": {"stage": 1, "overlap_comm": True, "contiguous_gradients": True}}
    Path("mine.json").write_text(json.dumps(zero))
    strategy = dict(class_path="fengshen.training.deepspeed.AnyDeviceDeepSpeedStrategy", init_args=dict(config=zero))
    common = QUIET | {"model.config": tiny_config("."), "trainer.max_steps": 2}
    runs = [("demo", common | {"run_dir": "preset", "trainer.strategy": "zero1"}),
            ("demo", common | {"run_dir": "json", "trainer.strategy": "mine.json"}),
            (recipe(trainer=dict(strategy=strategy)), common | {"run_dir": "yaml"}), ("yaml/run.yaml", {"run_dir": "fed_back"})]
    program = "import json, sys\nfrom fengshen.cli.fit import fit\nfor recipe, settings in json.loads(sys.argv[1]):\n    fit(recipe, settings)"
    done = subprocess.run([sys.executable, "-c", program, json.dumps(runs)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert len({tuple(series(name, "loss")) for name in ("preset", "json", "yaml", "fed_back")}) == 1
