"""The wheel in an environment of its own: pinned versions, no extras, nothing of this checkout on the path; its command answers."""
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import pages

ROOT = pages.ROOT
VERBS = ["fit", "validate", "generate", "export", "recipes"]
# pip's own settings stay, for they say which index there is; what points at this checkout or another environment goes.
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}


def run(*command, cwd, **options):
    "Run a command and show its output when it fails."
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, env=CLEAN, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def index_answers(folder):
    "True where pip gets a small pinned package."
    pinned = next(line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line.startswith("six=="))
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-cache-dir", "--no-deps", "--retries", "1", "-d", folder, pinned]
    return subprocess.run(command, capture_output=True, env=CLEAN, timeout=120).returncode == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy so that the checkout stays as it is."
    folder = tmp_path_factory.mktemp("wheel")
    if not index_answers(folder):
        pytest.skip("no package index answers: the wheel's requirements cannot be installed")
    leave = shutil.ignore_patterns(".venv", ".git", "*.egg-info", "build", "runs", "_proc", "_docs", "__pycache__", ".whl")
    shutil.copytree(ROOT, folder / "tree", ignore=leave, symlinks=True)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, folder / "tree", cwd=folder)
    return next(folder.glob("fengshen-*.whl"))


def test_the_wheel_holds_the_package_and_its_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("fengshen/")}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fengshen").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert inside == here


@pytest.mark.timeout(1200)
def test_the_wheel_installs_and_its_command_answers(wheel, tmp_path):
    environment = tmp_path / "empty"
    try:
        run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
        python = environment / "bin/python"
        torch = next(line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line.startswith("torch=="))
        run(python, "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", torch, wheel, cwd=tmp_path)
        installed = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
        assert not re.search(r"^(deepspeed|ipywidgets|tensorboard|nbdev)==", installed, re.M), "installed without extras"
        shown = run(environment / "bin/fengshen", "--help", cwd=tmp_path)
        assert [verb for verb in VERBS if not re.search(rf"\b{verb}\b", shown)] == []
        where = run(python, "-c", "import fengshen; print(fengshen.__file__)", cwd=tmp_path)
        assert Path(where.strip()).is_relative_to(environment)
        run(python, "-m", "pip", "check", cwd=tmp_path)
    finally:
        shutil.rmtree(environment, ignore_errors=True)
