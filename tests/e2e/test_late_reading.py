"""A step's figures read while the next step is computed, as on a GPU: whatever a run writes, decides and saves is what it is when each step is waited for."""
import json

import pytest
import torch

from fengshen.training.callbacks import Recorder
from fengshen.training.module import LanguageModelModule
from fengshen.training.totals import Totals
from tests.poison import marked_pairs
from tests.training_runs import QUIET, fit_here, flags, here, read, same, series, tiny_config

BAD, STEPS = 8, 11  # as in test_guards
CLOCK = ("time", "tokens_per_second", "memory_gib", "eta_seconds", "data_wait")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("late")


@pytest.fixture(scope="module")
def settings(folder):
    base = {"model.config": tiny_config(folder), "model.optimizer.eps": 1e-6, "model.optimizer.kind": "master_adamw", "data.train": marked_pairs(folder / "train.jsonl"), "data.packing": False, "data.micro_batch": 2,
            "trainer.accumulate_grad_batches": 2, "trainer.max_steps": STEPS, "trainer.accelerator": "cpu", "trainer.precision": "bf16-mixed", "checkpoint.every_n_steps": 2, "checkpoint.keep": 100}
    return lambda loss=None, **more: base | ({"model.loss": f"tests.poison.{loss}"} if loss else {}) | more


@pytest.fixture
def late(monkeypatch):
    "Reading is late from now on, as it is where the device is a GPU; the value counts what was late."
    seen = []

    def when_read(self, then, late):
        seen.append(then)
        self.waiting.append(then)

    return lambda: monkeypatch.setattr(Totals, "when_read", when_read) or seen


def timeless(run):
    "All lines of the record, without what the clock says."
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf8").splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def events(run):
    path = run / "guards.jsonl"
    return path.read_text("utf8") if path.exists() else ""


def states(run):
    found = {p.parent.name: torch.load(p, weights_only=True) for p in sorted((run / "checkpoints").glob("*/state.ckpt"))}
    return {name: {k: state[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "tokens")} for name, state in found.items()}


@pytest.mark.parametrize("name, loss, more", [
    ("plain", None, {"trainer.val_check_interval": 6}),
    ("skip", "nan_loss", {"guards.on_nan": "skip"}),
    ("gradient", "nan_gradient", {"guards.on_nan": "skip", "checkpoint.every_n_steps": 1}),
    ("rollback", "nan_loss", {"guards.on_nan": "rollback"}),
])
def test_runs_are_the_same(folder, settings, late, name, loss, more):
    keys = settings(loss, **more)
    at_once = fit_here(folder / f"{name}-at-once", **keys)
    seen = late()
    later = fit_here(folder / f"{name}-late", **keys)
    assert len(seen) == 3 * STEPS, "the count, the line and the judgement of each step"
    assert timeless(at_once) == timeless(later) and len(read(later)) == STEPS
    assert events(at_once) == events(later) and (not loss or json.loads(events(later).splitlines()[0])["step"] == BAD)
    assert len(states(later)) >= 5 and same(states(at_once), states(later))


def test_a_run_stops_at_the_same_step(folder, settings, late):
    keys, said = settings("nan_loss"), []
    for name in ("stops-at-once", "stops-late"):
        run = folder / name
        status, _, err = here("fit", "-c", "demo", *flags(QUIET | {"run_dir": str(run), "trainer.strategy": "auto"} | keys))
        assert status == 2 and f"step {BAD} is not finite" in err and [p.name for p in sorted((run / "checkpoints").glob("step-*[0-9]"))][-1] == f"step-{BAD - 2:08d}"
        said.append(err.replace(name, "RUN"))
        assert series(run, "step") == list(range(1, BAD + 1)) and series(run, "loss")[-1] is None
        late()
    assert said[0] == said[1] and events(folder / "stops-at-once") == events(folder / "stops-late")


@pytest.mark.parametrize("error, lines", [(ValueError, 4), (KeyboardInterrupt, 4), (RuntimeError, 3)])
def test_what_ends_a_run_does_not_take_the_last_line_with_it(folder, settings, late, monkeypatch, error, lines):
    "A device that failed is not asked any more; whatever else happens, the line is written."
    late()
    plain = LanguageModelModule.losses

    def losses(self, batch, observe=None):
        if self.trainer.global_step == 4:
            raise error("tests.late")
        return plain(self, batch, observe)

    monkeypatch.setattr(LanguageModelModule, "losses", losses)
    run = folder / f"ends-{error.__name__}"
    try:
        here("fit", "-c", "demo", *flags(QUIET | {"run_dir": str(run), "trainer.strategy": "auto"} | settings(**{"checkpoint.every_n_steps": 0})))
    except BaseException as e:  # noqa: BLE001, the command line explains what is a user's, and lets the rest pass
        assert "tests.late" in str(e) or error is KeyboardInterrupt
    assert series(run, "step") == list(range(1, lines + 1))


def test_a_pause_shows_the_step_before_it():
    from types import SimpleNamespace

    from fengshen.training.callbacks import Steering

    totals, seen = Totals(), []
    totals.when_read(lambda: seen.append("line"), late=True)
    control = SimpleNamespace(paused=True, stopping=False, wait_if_paused=lambda: seen.append("paused") or 0.0, take_lr=lambda: None)
    Steering(control).on_train_batch_end(SimpleNamespace(accumulate_grad_batches=1, callbacks=[], world_size=1), SimpleNamespace(totals=totals), None, None, 0)
    assert seen == ["line", "paused"]


def test_the_record_closes_without_a_start(tmp_path):
    from types import SimpleNamespace

    Recorder(tmp_path).on_train_end(None, SimpleNamespace(totals=Totals()))
