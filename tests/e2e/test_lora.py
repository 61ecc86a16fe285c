"""LoRA through the command line: only the adapter moves, the same on every strategy, resumed to the bit, and exported merged or alone."""
import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fengshen.models.loading import from_config
from fengshen.models.lora import LoRAConfig, add_lora
from fengshen.training import verify
from fengshen.training.checkpoint import checkpoints
from fengshen.training.export import build, export
from fengshen.training.resume import find_checkpoint
from tests.training_runs import apart, fit, fit_here, here, read, series, tiny_config, weights

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
LORA = {"model.lora.r": 4, "model.lora.alpha": 16, "model.optimizer.lr": 1e-2, "trainer.max_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def config(folder):
    return tiny_config(folder, initializer_range=0.2)  # large enough logits to see a difference in


@pytest.fixture(scope="module")
def run(folder, config):
    "Four steps of an adapter on one device, on packed rows."
    return fit_here(folder / "one", **LORA, **{"model.config": config})


@pytest.fixture(scope="module")
def base(folder, config):
    "An exported model, to be finetuned."
    return export(fit_here(folder / "base", **{"model.config": config, "trainer.max_steps": 1, "model.optimizer.lr": 1e-2}))


@pytest.fixture(scope="module")
def on_base(folder, base):
    return fit_here(folder / "on_base", **LORA, **{"model.path": str(base), "model.lora.dropout": 0.1})


def test_only_the_adapter_moves(run, config):
    "The base is what the seed gives, to the bit; every matrix of the adapter has moved."
    start, end = add_lora(from_config(config, 42), LoRAConfig(r=4, alpha=16), 42).state_dict(), weights(run)
    assert set(start) == set(end) and sum(".lora_" in n for n in start) == 16
    for name, value in end.items():
        assert torch.equal(value, start[name]) == (".lora_" not in name), name
    losses = series(run, "loss")
    assert losses[-1] < losses[0]


def test_the_head_still_runs_on_scored_tokens_alone(folder, config):
    "Packed rows by document, blocks recomputed, samples drawn: nothing that peft's wrappers would have broken."
    settings = LORA | {"model.config": config, "trainer.val_check_interval": 2, "model.samples": 2, "model.gradient_checkpointing": True}
    status, out, err = here("fit", "-c", "demo", f"--run_dir={folder / 'said'}", "--trainer.strategy=auto", "--export=false", *(f"--{k}={v}" for k, v in settings.items()))
    assert status == 0, out + err
    assert "full logits" not in out and "attention = fengshen_varlen" in out and "LoRA: rank 4 on 8 layers (c_attn, c_fc, c_proj); 8,192 weights are trained" in out
    assert len((folder / "said" / "samples.jsonl").read_text().splitlines()) == 4
    assert apart(series(folder / "said", "loss"), series(fit_here(folder / "kept", **LORA, **{"model.config": config}), "loss")) < 1e-6


@pytest.mark.parametrize("strategy, launcher", [
    ("zero2", ()),
    pytest.param("zero3", (), marks=pytest.mark.slow),
    pytest.param("ddp", TORCHRUN, marks=pytest.mark.slow),
    pytest.param("zero2", TORCHRUN, marks=pytest.mark.slow),
    pytest.param("zero3", TORCHRUN, marks=pytest.mark.slow),
])
@pytest.mark.slow
def test_every_strategy_trains_the_same_adapter(run, folder, config, strategy, launcher):
    "Losses, gradient norms and all weights, frozen ones included, as on one device."
    settings = LORA | {"model.config": config, "trainer.strategy": strategy, "trainer.accelerator": "cpu"}
    if launcher:
        settings |= {"trainer.devices": 2, "data.micro_batch": 4}
        run = fit_here(folder / "eight", **LORA, **{"model.config": config, "data.micro_batch": 8, "overwrite": True})
    other = fit(folder / f"{strategy}-{len(launcher)}", launcher=launcher, **settings)
    assert apart(series(other, "loss"), series(run, "loss")) < 1e-5
    assert apart(series(other, "grad_norm"), series(run, "grad_norm")) < 1e-4
    a, b = weights(other), weights(run)
    assert set(a) == set(b) and all(torch.allclose(a[n], b[n], atol=1e-4) for n in a)
    assert all(torch.equal(a[n], b[n]) for n in a if ".lora_" not in n)
    assert export(other, folder / f"{strategy}-{len(launcher)}-export").is_dir()


@pytest.mark.parametrize("strategy", ["auto", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)])
def test_resumed_to_the_bit(folder, config, strategy):
    settings = LORA | {"model.config": config, "model.lora.dropout": 0.1, "checkpoint.every_n_steps": 2, "checkpoint.keep": 9, "trainer.strategy": strategy}
    train = fit_here if strategy == "auto" else fit
    straight = train(folder / f"straight-{strategy}", **settings)
    stopped = folder / f"stopped-{strategy}"
    shutil.copytree(straight, stopped)
    shutil.rmtree(checkpoints(stopped)[-1])
    for name in ("summary.json", "report.html"):
        (stopped / name).unlink()
    assert find_checkpoint(stopped).name == "step-00000002"
    train(stopped, **settings)
    assert series(stopped, "loss") == series(straight, "loss") and len(read(stopped)) == 4
    a, b = weights(stopped), weights(straight)
    assert all(torch.equal(a[n], b[n]) for n in b)


@pytest.fixture(scope="module")
def merged(run, folder):
    "The run as a plain model; not to be changed."
    return export(run, folder / "merged")


def test_merged_equals_unmerged(run, merged, folder):
    "The exported model against the checkpoint's own, adapter beside its layers: another matrix product, the same logits."
    ids = torch.randint(0, 1280, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one = AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits
        two = build(checkpoints(run)[-1], torch.float32)(input_ids=ids).logits
        without = from_config(folder / "tiny.json", 42).eval()(input_ids=ids).logits
    assert (one - two).abs().max() < 1e-5 < 1e-2 < (one - without).abs().max()
    assert not (merged / "adapter_config.json").exists()


@pytest.mark.slow
def test_merged_in_bfloat16_is_rounded_once(run, merged, folder):
    half = export(run, folder / "half", dtype="bfloat16")
    a, b = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (merged, half))
    assert all(torch.equal(a[n].bfloat16(), b[n]) for n in a)


@pytest.fixture(scope="module")
def alone(on_base, folder):
    "The adapter by itself; not to be changed."
    return export(on_base, folder / "alone", adapter="alone")


@pytest.mark.slow
def test_alone_it_fits_on_its_base(on_base, base, alone):
    "A folder that names its base; peft puts them together, and they are the checkpoint."
    settings = json.loads((alone / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base.resolve()) and settings["lora_alpha"] == 16
    assert sum(p.stat().st_size for p in alone.glob("*.safetensors")) < (base / "model.safetensors").stat().st_size / 10
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), alone).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert (model(input_ids=ids).logits - build(checkpoints(on_base)[-1], torch.float32)(input_ids=ids).logits).abs().max() < 1e-5


def described(folder):
    "What the process that verifies finds in an adapter's folder."
    model, tensors = verify.load(folder, "float32")
    return dict(logits=verify.logits(model), tensors=verify.digests(tensors))


def flip(path, place, bit):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["nothing", "a bit", "the alpha", "the base"])
def test_an_adapter_that_is_not_the_checkpoints_is_found(on_base, base, alone, tmp_path, what):
    expected = dict(logits=verify.logits(build(checkpoints(on_base)[-1], torch.float32)), tensors=described(alone)["tensors"])
    bad, other = shutil.copytree(alone, tmp_path / "bad"), shutil.copytree(base, tmp_path / "other")
    settings = json.loads((bad / "adapter_config.json").read_text())
    if what == "a bit":
        flip(bad / "adapter_model.safetensors", -6, 1)
    if what == "the alpha":
        settings |= dict(lora_alpha=15)
    if what == "the base":
        flip(other / "model.safetensors", -1, 0x40)
        settings |= dict(base_model_name_or_path=str(other))
    (bad / "adapter_config.json").write_text(json.dumps(settings))
    if what == "nothing":
        return verify.compare(expected, described(bad))
    with pytest.raises(ValueError, match="tensors changed" if what == "a bit" else "logits differ"):
        verify.compare(expected, described(bad))


def test_adapters_that_cannot_stand_alone(run, base, on_base, folder, tmp_path):
    status, _, err = here("export", run, "--adapter", "alone", "--out", tmp_path / "out")
    assert status == 2 and "no base to be loaded onto" in err and not (tmp_path / "out").exists()
    status, _, err = here("export", folder / "base", "--adapter", "alone", "--out", tmp_path / "out")
    assert status == 2 and "no adapter in this checkpoint" in err
    status, _, err = here("export", run, "--adapter", "apart")
    assert status == 2 and "unknown adapter" in err and "merged, alone" in err
    status, _, err = here("fit", "-c", "demo", f"--run_dir={tmp_path / 'run'}", f"--model.path={base}", '--model.lora={"targets": ["c_atn"]}', "--trainer.strategy=auto")
    assert status == 2 and "did you mean 'c_attn'" in err
