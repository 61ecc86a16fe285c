"""Every packaged recipe trains: two steps of its smoke settings from the command line, validated, and with settings that can be run again."""
import pytest
import yaml

from fengshen.cli.recipes import read_recipe, recipe_names
from tests.training_runs import cli, here, read

FINETUNING = [name for name in recipe_names() if not name.startswith("pretrain_")]  # those run in test_pretraining.py, in one process
LONG = "wenzhong_qa_offload"  # DeepSpeed compiles its optimizer for the host, which takes minutes
EXPORTED = "demo"  # one of them is enough, and one in a process of its own: neither export nor command line depend on the recipe
OPEN = (None, "by_memory")  # what the run fills in


def settle(settings, at=()):
    "{dotted key: value} of a nested dict."
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from settle(value, (*at, key))
        else:
            yield ".".join((*at, key)), value


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == LONG)) for name in FINETUNING])
def test_the_smoke_settings_train_validate_and_are_written_down(name, tmp_path):
    run = tmp_path / "run"
    words = ["fit", "-c", name, "--smoke", "--run_dir", run]
    if name == EXPORTED:
        done = cli(*words, cwd=tmp_path)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    else:
        status, out, err = here(*words, "--export", "false")
        assert status == 0, out + err
    assert [row["step"] for row in read(run)] == [1, 2]
    assert all(row["loss"] > 0 and row["tokens"] > 0 and row["grad_norm"] > 0 for row in read(run))
    valid = read(run, "valid")
    assert len(valid) == 1 and valid[0]["step"] == 2 and valid[0]["loss"] > 0 and valid[0]["perplexity"] > 1 and 0 <= valid[0]["token_accuracy"] <= 1
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert (run / "export" / "model.safetensors").exists() == (name == EXPORTED)
    written = dict(settle(yaml.safe_load((run / "run.yaml").read_text("utf8"))))
    asked = {key: value for key, value in settle(dict(read_recipe(name, smoke=True))) if value not in OPEN}
    assert {k: written.get(k) for k in asked} == asked, "run.yaml holds what the recipe asked for"


@pytest.mark.parametrize("name", recipe_names())
def test_check_accepts_it(name):
    status, out, err = here("recipes", "check", name)
    assert status == 0, err
    assert out.splitlines()[-1].startswith(f"{name}: every key is known")


@pytest.mark.parametrize("name", recipe_names())
def test_it_says_in_one_line_what_it_is_for(name):
    about = read_recipe(name).about
    assert 20 < len(about) < 200 and "\n" not in about
