"""A model that trains in 16 bits leaves what a float32 one leaves: float32 checkpoints and exports, exact resume, and nothing of a step that failed."""

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from fengshen.training.checkpoint import checkpoints, step_of
from fengshen.training.weights import read_weights
from tests.training_runs import back_to, fit_here, here, read, series, tiny_config, uneven_pairs, weights

SIXTEEN = {"trainer.precision": "bf16-mixed", "model.optimizer.kind": "master_adamw", "model.optimizer.lr": 3e-3, "model.schedule.kind": "constant"}


def settings(folder, **more):
    "Eight steps of four short rows, with dropout."
    config = tiny_config(folder, n_embd=32, n_layer=1, n_head=2, attn_pdrop=0.1, resid_pdrop=0.1)
    return SIXTEEN | {"model.config": config, "data.train": uneven_pairs(folder / "train.jsonl", 24), "data.micro_batch": 2, "data.packing": False,
                      "trainer.accumulate_grad_batches": 2, "trainer.max_steps": 8, "checkpoint.every_n_steps": 3, "checkpoint.keep": 9} | more


def record(run):
    "What has to be equal to the bit."
    return [{k: row[k] for k in ("step", "loss", "lr", "grad_norm", "tokens")} for row in read(run)]


def test_stopped_and_gone_on_with(tmp_path):
    given = settings(tmp_path)
    straight = fit_here(tmp_path / "straight", **given)
    end = weights(straight)
    assert all(value.dtype == torch.float32 for value in end.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in end.values()), "every bit is kept"
    for step in (3, 6):
        run = back_to(straight, step, tmp_path)
        fit_here(run, **given)
        assert record(run) == record(straight)
        assert all(torch.equal(value, end[name]) for name, value in weights(run).items())


def test_states_on_the_host_and_plain_ones_go_on_with_each_other(tmp_path):
    given = settings(tmp_path)
    device, host, plain = (fit_here(tmp_path / kind, **given | {"model.optimizer.kind": kind}) for kind in ("master_adamw", "host_adamw", "fused_adamw"))
    apart = [max(abs(a - b) for a, b in zip(series(device, "loss"), series(other, "loss"))) for other in (host, plain)]
    assert apart[0] < 1e-3 and apart[1] < 0.05, apart
    run = back_to(plain, 6, tmp_path)
    status, out, err = here("fit", "-c", "demo", *[f"--{k}={v}" for k, v in (given | {"run_dir": run, "accept_changes": True, "model.samples": 0, "export": False, "trainer.strategy": "auto", "trainer.val_check_interval": 1000000}).items()])
    assert status == 0, out + err
    assert abs(series(run, "loss")[-1] - series(plain, "loss")[-1]) < 0.05


class Spoil(Callback):
    "Make the loss of one step not a number, by its labels' weight in it."

    def on_before_backward(self, trainer, module, loss):
        if trainer.global_step == 4:
            loss.data.fill_(torch.nan)
            loss.register_hook(lambda grad: grad * torch.nan)


def test_a_step_that_is_not_finite_leaves_nothing(tmp_path):
    from fengshen.cli.fit import prepare, run_fit
    from tests.training_runs import QUIET, flags

    given = QUIET | settings(tmp_path) | {"run_dir": str(tmp_path / "run"), "trainer.strategy": "auto", "guards.on_nan": "skip", "checkpoint.every_n_steps": 1}
    cli = prepare(["-c", "demo", *flags(given)])
    cli.trainer.callbacks.insert(0, Spoil())
    run_fit(cli)
    before, after = (read_weights(path) for path in checkpoints(tmp_path / "run") if step_of(path) in (4, 5))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    state = torch.load(checkpoints(tmp_path / "run")[-1] / "state.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert {int(s["step"]) for s in state.values()} == {7} and all(s["exp_avg"].isfinite().all() for s in state.values())


def test_an_adapter_over_a_base_that_16_bits_cannot_hold(tmp_path):
    run = fit_here(tmp_path / "run", **settings(tmp_path, **{"model.lora.r": 2, "trainer.max_steps": 2}))
    found = weights(run)
    frozen = {name: value for name, value in found.items() if "lora" not in name}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in frozen.values()), "the base is what it was"


class Break(Callback):
    "An error in the middle."

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 3:
            raise RuntimeError("broken")


class Look(Callback):
    "Remember the float32 weights that a run begins with."

    def on_train_start(self, trainer, module):
        self.seen = {name: module.sixteen.whole(p).clone() for name, p in module.model.named_parameters()}


def test_after_an_error_the_same_module_goes_on_with_every_bit(tmp_path):
    from fengshen.cli.fit import prepare, run_fit
    from fengshen.training.trainer import new_trainer
    from tests.training_runs import QUIET, flags

    cli = prepare(["-c", "demo", *flags(QUIET | settings(tmp_path) | {"run_dir": str(tmp_path / "run"), "trainer.strategy": "auto"})])
    cli.trainer.callbacks.append(Break())
    with pytest.raises(RuntimeError, match="broken"):
        run_fit(cli)
    learned, look = {name: p.detach().clone() for name, p in cli.model.model.named_parameters()}, Look()
    new_trainer(tmp_path / "again", precision="bf16-mixed", accelerator="cpu", devices=1, max_steps=1, limit_val_batches=0, callbacks=[look]).fit(cli.model, cli.datamodule)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in learned.values())
    assert all(torch.equal(value, learned[name]) for name, value in look.seen.items())
