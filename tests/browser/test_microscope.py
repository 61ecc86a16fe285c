"""The microscope in a browser: JupyterLab, a kernel, clicks, both themes. Needs a Python with jupyterlab and playwright, and chromium."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = os.environ.get("FENGSHEN_BROWSER", sys.executable)  # the Python that has jupyterlab and playwright
NEEDED = "import jupyterlab, playwright"
CELL = """from fengshen.data.task_dataloader.datamodule import ConversationDataModule
from fengshen.widgets import Microscope
data = ConversationDataModule("qa.jsonl", tokenizer="fengshen:tokenizer_demo", max_length=64, on_long="truncate")
microscope = Microscope(data)
microscope.view.to_html("page.html")
microscope"""


@pytest.fixture
def browser():
    "The Python to drive the browser with; skipped with what is missing."
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no chromium on this machine")
    if subprocess.run([PYTHON, "-c", NEEDED], capture_output=True).returncode:
        pytest.skip("no jupyterlab and playwright (FENGSHEN_BROWSER names a Python that has them)")
    if subprocess.run([sys.executable, "-c", "import ipykernel"], capture_output=True).returncode:
        pytest.skip("no ipykernel in this Python")
    return PYTHON


def prepare(folder):
    "Data, a kernel and two notebooks."
    pairs = [dict(question=f"第{i}个问题：感冒怎么办？", answer="多喝水，多休息。") for i in range(5)]
    pairs += [dict(question="糖尿病怎么办？", answer="少吃糖。\n多运动。"), dict(question="糖尿病人能吃什么？", answer="请先问医生，再决定吃什么。" * 12), pairs[0]]
    (folder / "qa.jsonl").write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs), "utf8")
    kernel = folder / "jupyter/kernels/fengshen"
    kernel.mkdir(parents=True)
    root = str(Path(__file__).resolve().parents[2])
    spec = dict(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], display_name="fengshen", language="python", env=dict(PYTHONPATH=root))
    (kernel / "kernel.json").write_text(json.dumps(spec))
    cell = dict(cell_type="code", id="a", metadata={}, source=CELL, execution_count=None, outputs=[])
    notebook = dict(cells=[cell], metadata=dict(kernelspec=dict(name="fengshen", display_name="fengshen", language="python")), nbformat=4, nbformat_minor=5)
    for theme in ("light", "dark"):
        (folder / f"{theme}.ipynb").write_text(json.dumps(notebook))


@pytest.mark.slow
def test_clicks_in_both_themes(browser, tmp_path):
    prepare(tmp_path)
    done = subprocess.run([browser, Path(__file__).with_name("drive.py"), tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "dark_compare.png").stat().st_size > 10_000
