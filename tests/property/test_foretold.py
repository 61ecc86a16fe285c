"""After its third step a run on an accelerator says what was reserved and what the estimate gives for its settings."""
import json
import re
from types import SimpleNamespace

import pytest
import torch

from fengshen.cli.fit import fit
from fengshen.training import callbacks
from fengshen.training.memory import GIB, estimate
from tests.training_runs import tiny_config

SETTINGS = {"trainer.strategy": "auto", "trainer.precision": "32-true", "trainer.max_steps": 4, "trainer.limit_val_batches": 0, "trainer.log_every_n_steps": 2, "export": False,
            "checkpoint.at_end": False, "data.micro_batch": 1, "trainer.accumulate_grad_batches": 1}


def lines(run):
    "The record's lines."
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf8").splitlines()]


def train(folder, **changes):
    "A short run; its record."
    fit("demo", SETTINGS | {"model.config": tiny_config(folder), "run_dir": str(folder / "run")} | changes)
    return lines(folder / "run")


@pytest.fixture
def device(monkeypatch):
    "A device of 2 GiB of which half is reserved."
    monkeypatch.setattr(callbacks, "memory", lambda: dict(peak_reserved=GIB, total=2 * GIB))
    monkeypatch.setattr(callbacks, "peak_reserved", lambda: GIB)


def test_the_prediction_is_the_estimate_of_the_run(tmp_path, capsys, device):
    record = train(tmp_path)
    told = re.findall(r"memory: (\S+ \S+) reserved, (\S+ \S+) predicted", capsys.readouterr().out)
    found = estimate(tiny_config(tmp_path), precision="32-true", micro_batch=1, length=128)
    assert len(told) == 1 and told[0][0] == "1 GiB"
    assert [("predicted_gib" in line, line["step"]) for line in record] == [(False, 2), (True, 4)]
    assert record[1]["predicted_gib"] == round(float(told[0][1].split()[0]) / 1024, 3) and record[1]["memory_gib"] == 1
    assert float(told[0][1].split()[0]) == pytest.approx(found.device / 2**20, rel=0.03)


def test_a_run_is_the_same_with_and_without(tmp_path, device, monkeypatch):
    first = train(tmp_path)
    monkeypatch.setattr(callbacks, "memory", lambda: dict(peak_reserved=0, total=0))
    (tmp_path / "b").mkdir()
    second = train(tmp_path / "b", **{"model.config": tiny_config(tmp_path)})
    assert [line["loss"] for line in first] == [line["loss"] for line in second] and not any("predicted_gib" in line for line in second)


def test_what_cannot_be_predicted_does_not_end_the_run(tmp_path, capsys, device):
    "A module and a trainer of another making have not what the estimate asks for."
    recorder = callbacks.Recorder(tmp_path)
    recorder.file, recorder.first, recorder.started, recorder.last = object(), 5, 0.0, (0.0, 0, 8)
    for step in range(6, 10):
        recorder.foretell(SimpleNamespace(global_step=step), SimpleNamespace())
    told = capsys.readouterr().out
    assert told.count("not predicted") == 1 and not recorder.predicted and recorder.started > 0


def test_the_record_gives_the_word_where_there_is_a_device_to_wait_for():
    "Once a step, before its update; a CPU is not waited for, and other loaders are left alone."
    said, optimizer = [], SimpleNamespace(param_groups=[dict(lr=0.1)])
    trainer = SimpleNamespace(train_dataloader=SimpleNamespace(begin=lambda: said.append(1)))
    for device, count in (("cpu", 0), ("meta", 1)):
        callbacks.Recorder("run").on_before_optimizer_step(trainer, SimpleNamespace(device=torch.device(device)), optimizer)
        assert len(said) == count
    callbacks.Recorder("run").on_before_optimizer_step(SimpleNamespace(train_dataloader=[]), SimpleNamespace(device=torch.device("meta")), optimizer)
