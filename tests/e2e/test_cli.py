"""The command line: what is wrong is said in a line with exit status 2, and what a run wrote down runs again."""
import json
import subprocess
import sys

import pytest
import yaml

from tests.training_runs import QUIET, environment, fit, fit_here, flags, here, read, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    "A config.json of a tiny model."
    return tiny_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, config):
    "The folder of a run of two steps, exported."
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = {"model.config": config, "trainer.max_steps": 2, "export": True, "trainer.val_check_interval": 2}
    return fit_here(folder, **settings)


def refused(*words):
    "What a refused command said: status 2, text on stderr, no traceback."
    status, out, err = here(*words)
    assert status == 2 and err.strip() and "Traceback" not in err, (status, out, err)
    return err


def refused_fit(tmp_path, recipe="demo", **settings):
    "What a refused `fit` said; no run may be left behind."
    settings = QUIET | {"run_dir": str(tmp_path / "run"), "trainer.strategy": "auto", "trainer.max_steps": 1} | settings
    said = refused("fit", "-c", recipe, *flags(settings))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    return said


def recipe_file(tmp_path, **changes):
    "The demo's recipe with whole sections changed, as a file."
    from fengshen.cli.recipes import merge, read_recipe

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(merge(dict(read_recipe("demo")), changes), allow_unicode=True), "utf8")
    return path


@pytest.mark.parametrize("wrong, right", [
    ("trainer.max_step", "trainer.max_steps"), ("model.optimizer.weight_decai", "model.optimizer.weight_decay"),
    ("data.micro_bach", "data.micro_batch"), ("run_dirr", "run_dir"),
])
def test_an_unknown_flag_names_the_nearest_key(tmp_path, wrong, right):
    said = refused_fit(tmp_path, **{wrong: 1})
    assert wrong in said and right in said


@pytest.mark.parametrize("changes, wrong, right", [
    (dict(trainer=dict(max_step=1)), "max_step", "trainer.max_steps"),
    (dict(model=dict(optimizer=dict(learning_rate=1e-3))), "learning_rate", ""),
    (dict(model=dict(schedule=dict(warmup_ration=0.1))), "warmup_ration", "model.schedule.warmup_ratio"),
    (dict(data=dict(micro_bach=1)), "micro_bach", "data.micro_batch"),
    (dict(overwrit=True), "overwrit", "overwrite"),
    (dict(trainers=dict(max_steps=1)), "trainers", "trainer"),
])
def test_an_unknown_yaml_key_names_the_nearest_key(tmp_path, changes, wrong, right):
    said = refused_fit(tmp_path, recipe_file(tmp_path, **changes))
    assert wrong in said and right in said


@pytest.mark.parametrize("key, value", [("trainer.max_steps", "many"), ("model.optimizer.lr", "fast"), ("data.micro_batch", "two"), ("overwrite", "perhaps")])
def test_a_value_of_another_type_is_refused_with_its_key(tmp_path, key, value):
    said = refused_fit(tmp_path, **{key: value})
    assert key.rsplit(".", 1)[-1] in said and value in said


def test_a_missing_data_file_is_named(tmp_path):
    assert "nowhere.jsonl" in refused_fit(tmp_path, **{"data.train": str(tmp_path / "nowhere.jsonl")})


@pytest.mark.parametrize("words, shown", [
    (["fit", "-c", "demmo"], "demo"), (["recipes", "cat", "medical-qa"], "medical_qa"), (["fitt"], "fit"), (["recipes", "list"], "ls"),
    (["fit", "-c", "nowhere.yaml"], "nowhere.yaml"),
])
def test_an_unknown_recipe_or_verb(words, shown):
    assert shown in refused(*words)


@pytest.mark.parametrize("text", ["- a\n- list\n", "trainer: [1\n", "just words"])
def test_a_file_that_is_no_recipe(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text, "utf8")
    assert "broken.yaml" in refused("fit", "-c", path)


def test_printed_settings_train(tmp_path, config):
    settings = QUIET | {"run_dir": str(tmp_path / "run"), "model.config": config, "trainer.strategy": "auto", "trainer.max_steps": 1}
    status, out, err = here("fit", "-c", "demo", *flags(settings), "--print_config")
    assert status == 0 and not (tmp_path / "run").exists(), err
    (tmp_path / "printed.yaml").write_text(out, "utf8")
    status, out, err = here("fit", "-c", tmp_path / "printed.yaml")
    assert status == 0, err
    assert [row["step"] for row in read(tmp_path / "run")] == [1]


def test_the_settings_a_run_wrote_down_train_to_the_same_losses(tmp_path, finished):
    status, out, err = here("fit", "-c", finished / "run.yaml", "--run_dir", tmp_path / "again", "--export", "false")
    assert status == 0, err
    assert [r["loss"] for r in read(tmp_path / "again")] == [r["loss"] for r in read(finished)]


def test_a_finished_run_is_kept_unless_asked(tmp_path, config):
    settings = {"model.config": config, "trainer.max_steps": 1}
    run = fit_here(tmp_path / "run", **settings)
    before = (run / "metrics.jsonl").read_text("utf8")
    said = refused("fit", "-c", "demo", *flags(QUIET | settings | {"run_dir": str(run), "trainer.strategy": "auto"}))
    assert "finished" in said and "--overwrite" in said and (run / "metrics.jsonl").read_text("utf8") == before
    fit_here(run, **settings | {"overwrite": True, "trainer.max_steps": 2})
    assert [row["step"] for row in read(run)] == [1, 2]
    assert yaml.safe_load((run / "run.yaml").read_text("utf8"))["overwrite"] is False, "the settings overwrite nothing when they run again"
    (run / "summary.json").unlink()
    assert "did not finish" in refused("fit", "-c", run / "run.yaml", "--resume", "never")


OWNED = dict(optimizer=dict(type="AdamW", params=dict(lr=1e-3)), scheduler=dict(type="WarmupLR"), gradient_accumulation_steps=4, fp16=dict(enabled=True))


@pytest.mark.parametrize("key", OWNED)
def test_a_deepspeed_file_may_not_set_what_the_recipe_sets(tmp_path, key):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: OWNED[key]}))
    said = refused_fit(tmp_path, **{"trainer.strategy": str(path)})
    assert key in said and "remove it" in said and ("optimizer_from_config" in said) == (key == "optimizer")


def test_a_deepspeed_file_trains(tmp_path, config):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    run = fit(tmp_path / "run", **{"model.config": config, "trainer.max_steps": 1, "trainer.strategy": str(path)})
    assert len(read(run)) == 1


def test_the_model_comes_from_one_place(tmp_path, finished):
    assert "model.path" in refused_fit(tmp_path, **{"model.path": str(finished / "export"), "model.config": "fengshen:models/gpt2_demo.json"})
    assert "model.config" in refused_fit(tmp_path, **{"model.config": None})


def test_no_tokenizer_is_refused_with_the_remedy(tmp_path):
    assert "data.tokenizer" in refused_fit(tmp_path, **{"data.tokenizer": None})


def test_validate_generate_and_export(tmp_path, finished):
    words = flags({"model.path": str(finished / "export"), "model.config": None, "trainer.strategy": "auto", "model.samples": 1, "model.max_new_tokens": 4})
    status, out, err = here("validate", "-c", "demo", *words)
    assert status == 0, err
    found = json.loads(next(line for line in out.splitlines() if line.startswith('{"loss"')))
    assert found["loss"] == pytest.approx(read(finished, "valid")[-1]["loss"], rel=1e-4), "the exported model is the one that was validated"
    status, out, err = here("generate", finished / "export", "--prompt", "你好", "--max_new_tokens", 4)
    assert status == 0, err
    status, out, err = here("export", finished, "--out", tmp_path / "half", "--dtype", "bfloat16")
    assert status == 0 and (tmp_path / "half" / "model.safetensors").exists(), err
    assert "bfloat16" in refused("export", finished, "--out", tmp_path / "x", "--dtype", "bfloat61")
    assert "nothing to export" in refused("export", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no weights in this folder" in refused("export", tmp_path / "empty")


def test_recipes_are_listed_shown_and_copied(tmp_path):
    assert all(name in here("recipes", "ls")[1] for name in ("demo", "medical_qa", "wenzhong_qa"))
    assert "deepspeed/zero3.json" in here("recipes", "ls", "--files")[1]
    assert yaml.safe_load(here("recipes", "cat", "demo")[1])["trainer"]["strategy"] == "zero3"
    assert here("recipes", "cp", "demo", tmp_path)[0] == 0 and (tmp_path / "demo.yaml").exists()
    assert "exists" in refused("recipes", "cp", "demo", tmp_path)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recipes", "ls"], ["fitt"]])
def test_help_does_not_wait_for_torch(words, tmp_path):
    program = f"import sys\nfrom fengshen.cli.main import main\nmain({words})\nsys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]
