"""The notebook's live view without a browser: real threads, real clicks, a real training, and a Python without ipywidgets."""
import math
import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("ipywidgets", reason="the extra 'widgets' is not installed")

from fengshen.training.control import RunControl  # noqa: E402
from fengshen.widgets.live import WORDS, LiveView  # noqa: E402


def train_record(step, loss=2.5, **more):
    "A record as the training writes it."
    return dict(step=step, split="train", loss=loss, lr=1e-3, tokens_per_second=1234.5, memory_gib=1.5, eta_seconds=60, **more)


def eventually(condition, seconds=60):
    "Wait for a condition; a test that waits a fixed time is slow or flaky."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


NUMBERS = st.one_of(st.none(), st.floats(), st.integers(0, 10**12))
RECORDS = st.lists(st.fixed_dictionaries(
    dict(step=st.integers(0, 10**7), split=st.sampled_from(["train", "valid"])),
    optional={key: NUMBERS for key in ("loss", "lr", "tokens_per_second", "memory_gib", "eta_seconds")}), max_size=20)


@settings(max_examples=60, deadline=None)
@given(RECORDS, st.one_of(st.none(), st.integers(1, 10**7)), st.sampled_from(sorted(WORDS)))
def test_any_records_are_shown(records, max_steps, language):
    view = LiveView(language=language, every=0)
    view.start(dict(max_steps=max_steps))
    for record in records:
        view.update(record)
        assert 0 <= view.bar.value <= view.bar.max
        ET.fromstring(view.chart.value)
    view.finish(dict(step=records[-1]["step"] if records else 0))
    assert view.state in ("finished", "ended") and view.stop_button.disabled


@pytest.mark.parametrize("every, most", [(0.5, 24), (1.0, 13)])
def test_a_thousand_records_a_second_are_few_messages(every, most):
    now, messages = [0.0], []
    view = LiveView(every=every, clock=lambda: now[0])
    view.start(dict(max_steps=10_000))
    view.chart.observe(lambda change: messages.append(len(change["new"])), "value")
    for step in range(1, 10_001):
        now[0] += 0.001
        view.update(train_record(step, 7 / step))
    assert len(messages) <= most and max(messages) < 40_000
    assert len(view.series["train"]) <= 4000, "a long run does not fill the memory"
    view.finish(dict(step=10_000))
    assert view.state == "finished" and view.step_label.value == "step 10,000 / 10,000"


def test_a_loss_that_became_nan_is_seen():
    view = LiveView(every=0)
    view.start(dict(max_steps=10))
    for step, loss in enumerate([7.0, 6.0, math.nan], 1):
        view.update(train_record(step, loss))
    assert view.labels["loss"].value == "loss nan" and "<title>3: nan</title>" in view.chart.value


def test_chinese_labels_and_a_command_with_markup():
    view = LiveView(language="zh", command='fengshen fit -c 医疗.yaml --data.template "<b>{question}"', every=0)
    view.start(dict(max_steps=3))
    view.update(train_record(1))
    view.update(dict(step=1, split="valid", loss=2.0))
    assert view.labels["lr"].value.startswith("学习率") and "训练 2.5" in view.chart.value and "验证 2" in view.chart.value
    assert "医疗.yaml" in view.command.value and "<b>" not in view.command.value
    with pytest.raises(ValueError, match="expected one of en, zh"):
        LiveView(language="zh-CN")


def test_clicks_while_records_come():
    "Two threads hammer one view; neither may see the other's half-done work."
    view, wrong = LiveView(every=0), []
    view.start(dict(max_steps=400))

    def follow():
        try:
            for step in range(1, 401):
                view.update(train_record(step, 7 / step))
                view.control.wait_if_paused()
        except BaseException as e:  # handed to the test, which fails with it
            wrong.append(e)

    worker = threading.Thread(target=follow)
    worker.start()
    while worker.is_alive():
        view.pause_button.click()
    assert not wrong
    assert view.record["step"] == 400


@given(st.lists(st.sampled_from(["pause", "resume", "rest"]), max_size=30))
@settings(max_examples=30, deadline=None)
def test_no_step_is_taken_while_the_control_says_waiting(wishes):
    control, steps, end = RunControl(), [0], threading.Event()

    def loop():
        while not end.is_set():
            control.wait_if_paused()
            steps[0] += 1

    worker = threading.Thread(target=loop, daemon=True)
    worker.start()
    for wish in wishes:
        if wish != "rest":
            getattr(control, wish)()
        elif control.paused:
            eventually(lambda: control.waiting)
            before = steps[0]
            time.sleep(0.002)
            assert steps[0] == before
    end.set()
    control.stop()
    worker.join(10)
    assert not worker.is_alive()


def test_a_pause_can_be_interrupted():
    "Ctrl-C in a pause ends it, and nobody is said to be waiting afterwards."
    script = """
import _thread, signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts its children with SIGINT ignored
from fengshen.training.control import RunControl
control = RunControl()
control.pause()
threading.Timer(0.3, _thread.interrupt_main).start()
try:
    control.wait_if_paused()
except KeyboardInterrupt:
    print("interrupted", control.waiting, control)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "interrupted False RunControl(paused)", done.stderr


def test_without_ipywidgets_the_module_imports_and_the_view_says_what_to_install():
    script = """
import sys
import fengshen.widgets.live as live
assert not {"torch", "ipywidgets", "pytorch_lightning"} & sys.modules.keys(), "the view loads nothing heavy"
sys.modules["ipywidgets"] = None
try:
    live.LiveView()
except ImportError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "pip install 'fengshen[widgets]'" in done.stdout, done.stderr


def test_buttons_steer_a_real_training(tmp_path):
    "Pause, another learning rate, resume, stop: seen in the weights' owner, the trainer, and in the run's record."
    import fengshen
    from fengshen.cli.fit import fit

    control = RunControl()
    view = LiveView(control, command="fengshen fit -c demo", every=0)
    overrides = {"trainer.max_steps": 100_000, "trainer.strategy": "auto", "trainer.accelerator": "cpu", "trainer.val_check_interval": 100_000,
                 "export": False, "run_dir": str(tmp_path / "问答")}
    run = fit("demo", overrides, view, control, wait=False)
    eventually(lambda: view.record.get("step", 0) >= 3 or run.error)
    assert run.error is None and view.state == "running"
    view.pause_button.click()
    eventually(lambda: control.waiting or run.error)
    step = run.cli.trainer.global_step
    assert view.state == "paused" and view.record["step"] == step, "a pause shows the step it stands at"
    time.sleep(0.2)
    assert run.cli.trainer.global_step == step
    view.lr_field.value = "5e-4"
    view.pause_button.click()
    eventually(lambda: view.record["step"] >= step + 3 or run.error)
    assert view.record["lr"] < 6e-4
    view.stop_button.click()
    run.wait()
    assert view.state == "stopped" and view.pause_button.disabled
    losses = [r["loss"] for r in fengshen.Run(tmp_path / "问答").records("train")]
    assert len(losses) == view.record["step"] and all(map(math.isfinite, losses))
    assert re.search(r"train \d", view.chart.value)
