"""What every test shares: where the repository is, and larger data that a checkout may have beside it."""
import atexit
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the user's cache stays as it is; processes that a test starts write here too
os.environ["FENGSHEN_CACHE"] = tempfile.mkdtemp(prefix="fengshen-tests-")
atexit.register(shutil.rmtree, os.environ["FENGSHEN_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def root():
    "The top of the repository."
    return ROOT


@pytest.fixture(scope="session")
def shared():
    "The folder with larger test data: FENGSHEN_SHARED, or ../shared beside the checkout; the test is skipped where there is none."
    folder = Path(os.environ.get("FENGSHEN_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no test data in {folder.name}/ beside the checkout (FENGSHEN_SHARED names another place)")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 8 MB; only root can make one."
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no small file system to be had here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)])
