"""QLoRA through the command line: the base in 4 bits does not move, the adapter does, a stopped run goes on to the bit, and the export is what was trained."""
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

pytest.importorskip("bitsandbytes", reason="the base in 4 bits needs the extra qlora")

from fengshen.models.loading import from_config
from fengshen.models.lora import LoRAConfig, add_lora
from fengshen.training.checkpoint import checkpoints
from fengshen.training.export import build, export, open_source, write_model
from fengshen.utils.kernels.four_bit import use_four_bits
from tests.training_runs import apart, back_to, fit, fit_here, here, series, tiny_config

LORA = {"model.lora.r": 4, "model.lora.alpha": 16, "model.lora.quantize": "nf4", "model.optimizer.lr": 1e-2, "trainer.max_steps": 4,
        "checkpoint.every_n_steps": 2, "checkpoint.keep": 9}
QWEN = dict(model_type="qwen3", vocab_size=1280, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.1)


def state(checkpoint):
    "What a checkpoint's file holds."
    return torch.load(Path(checkpoint) / "state.ckpt", weights_only=True)


SIXTEEN = {"trainer.precision": "bf16-mixed", "model.optimizer.kind": "master_adamw"}


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def config(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "gpt2":
        return tiny_config(folder, initializer_range=0.2)
    (folder / "tiny.json").write_text(json.dumps(QWEN), "utf8")
    return str(folder / "tiny.json")


@pytest.fixture(scope="module")
def settings(config):
    "Qwen3 trains in 16 bits, as a GPU does."
    return LORA | {"model.config": config, "model.lora.dropout": 0.1} | (SIXTEEN if "qwen3" in config else {})


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    "Four steps over a base in 4 bits."
    return fit_here(tmp_path_factory.mktemp("run") / "one", **settings)


def test_the_base_stays_as_the_seed_gave_it(run, config):
    "Every byte of it, at every checkpoint; all of the adapter moves, and the loss falls."
    start = add_lora(from_config(config, 42), LoRAConfig(r=4, alpha=16, quantize="nf4"), 42).state_dict()
    for checkpoint in checkpoints(run):
        end = {n.removeprefix("model."): t for n, t in state(checkpoint)["state_dict"].items() if n.startswith("model.")}
        assert set(start) == set(end) and any(t.dtype == torch.uint8 for t in end.values())
        for name, value in end.items():
            assert value.dtype == start[name].dtype and torch.equal(value, start[name]) == (".lora_" not in name), name
    losses = series(run, "loss")
    assert losses[-1] < losses[0] - 0.1


def test_a_stopped_run_goes_on_to_the_bit(run, settings, tmp_path):
    stopped = back_to(run, 2, tmp_path)
    fit_here(stopped, **settings)
    assert series(stopped, "loss") == series(run, "loss") and series(stopped, "grad_norm") == series(run, "grad_norm")
    a, b = (state(checkpoints(r)[-1]) for r in (stopped, run))
    assert all(torch.equal(a["state_dict"][n], t) for n, t in b["state_dict"].items()) and a["four_bit"] == b["four_bit"]


def test_the_export_is_the_model_that_was_trained(run, config, tmp_path):
    "Stock transformers on the merged folder against the model as it was trained, its base in 4 bits; the base in full precision is another model."
    trained = add_lora(from_config(config, 42), LoRAConfig(r=4, alpha=16, quantize="nf4"), 42).eval()
    trained.load_state_dict({n.removeprefix("model."): t for n, t in state(checkpoints(run)[-1])["state_dict"].items() if n.startswith("model.")})
    write_model(open_source(checkpoints(run)[-1]), folder := tmp_path / "merged", torch.float32)
    ids = torch.randint(0, 1280, (2, 50), generator=torch.Generator().manual_seed(0))
    wide = add_lora(from_config(config, 42), LoRAConfig(r=4, alpha=16), 42).eval()
    wide.load_state_dict({n: t for n, t in trained.state_dict().items() if ".lora_" in n}, strict=False)
    with torch.no_grad():
        ours, stock, other = (m(input_ids=ids).logits for m in (trained, AutoModelForCausalLM.from_pretrained(folder), wide))
    assert (ours - stock).abs().max() < 1e-4 < 1e-2 < (other - stock).abs().max()


@pytest.mark.parametrize("config", ["gpt2"], indirect=True)
@pytest.mark.slow
def test_alone_it_is_held_against_the_original_base(config, tmp_path):
    "peft puts it onto the base in full precision; onto the base in 4 bits by bitsandbytes it is the model that was trained."
    base = export(fit_here(tmp_path / "base", **{"model.config": config, "trainer.max_steps": 1}))
    run = fit_here(tmp_path / "run", **LORA, **{"model.path": str(base)})
    assert export(run, tmp_path / "merged").is_dir()
    alone, ids = export(run, tmp_path / "alone", adapter="alone"), torch.arange(40)[None]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    use_four_bits(model)
    with torch.no_grad():
        apart = PeftModel.from_pretrained(model, alone)(input_ids=ids).logits - build(checkpoints(run)[-1], torch.float32)(input_ids=ids).logits
    assert apart.abs().max() < 1e-4


@pytest.mark.parametrize("config", ["gpt2"], indirect=True)
def test_what_it_does_not_go_together_with_is_refused(config, tmp_path, monkeypatch):
    words = ["fit", "-c", "demo", f"--run_dir={tmp_path / 'run'}", f"--model.config={config}", "--model.lora.quantize=nf4", "--trainer.max_steps=1", "--export=false"]
    status, _, err = here(*words, "--trainer.strategy=auto", "--model.fp8=tensorwise")
    assert status == 2 and "model.fp8" in err and "set model.fp8 to null" in err
    with pytest.raises(ValueError, match="DeepSpeed.*set trainer.strategy to auto"):
        LoRAConfig(quantize="nf4").building(deepspeed=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'fengshen\[qlora\]'"):
        here(*words, "--trainer.strategy=auto")


@pytest.mark.parametrize("config", ["gpt2"], indirect=True)
@pytest.mark.slow
def test_two_processes_train_the_same_adapter(config, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    settings = LORA | {"model.config": config, "trainer.accelerator": "cpu"}
    one = fit_here(tmp_path / "one", **settings, **{"data.micro_batch": 8})
    two = fit(tmp_path / "two", launcher=launcher, **settings, **{"data.micro_batch": 4, "trainer.strategy": "ddp", "trainer.devices": 2})
    assert apart(series(two, "loss"), series(one, "loss")) < 1e-5
    a, b = (state(checkpoints(r)[-1])["state_dict"] for r in (one, two))
    assert all(torch.equal(a[n], t) if t.dtype == torch.uint8 else torch.allclose(a[n], t, atol=1e-4) for n, t in b.items())
