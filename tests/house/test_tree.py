"""What is committed: no paths of the machine it was made on, nothing large, versions that agree, code that ruff accepts."""
import os
import re
import subprocess
import sys
from importlib.metadata import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tools import pages

ROOT = pages.ROOT
LARGEST, WHOLE = 1_000_000, 20_000_000
# Written in pieces, so that this file does not find itself.
MACHINE = re.compile("|".join([r"(?<![\w.~})-])/(wo" + r"rk|ro" + r"ot|fa" + r"rm)/", r"(?<![\w.])/ho" + r"me/\w+/", "/t" + r"mp/\w",
                               "cognitive" + "_comp", "site-" + r"packages/\w+/\w+\.py"]))
HOSTS = re.compile("|".join([r"py" + r"pi\.org", "python" + r"hosted\.org", r"registry\.np" + r"mjs", r"deb\.deb" + r"ian\.org"]))


def files():
    "The files of the repository: committed ones, and new ones that git would take."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def matches(pattern):
    "path:line of every line of text in the repository that matches."
    found = []
    for path in files():
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    return found


def test_no_paths_of_one_machine():
    found = matches(MACHINE)
    assert not found, "\n".join(found[:20])


def test_no_registry_hosts():
    found = matches(HOSTS)
    assert not found, "\n".join(found[:20])


def test_nothing_large():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in files()}
    large = {name: size for name, size in sizes.items() if size > LARGEST}
    assert not large, large
    assert sum(sizes.values()) < WHOLE


def requirements(*keys):
    "The requirements under these keys of settings.ini."
    return [Requirement(word) for key in keys for word in pages.settings()[key].split()]


def pins():
    "{package: version} of constraints.txt."
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in (line.split("==") for line in lines)}


INSTALLED = [f"{extra}_requirements" for extra in ("deepspeed", "widgets", "log", "fast", "dev")]


@pytest.mark.parametrize("requirement", requirements("requirements", *INSTALLED), ids=str)
def test_every_requirement_is_pinned_to_a_version_it_accepts(requirement):
    pinned = pins()[re.sub(r"[-_.]+", "-", requirement.name).lower()]
    assert pinned in requirement.specifier


def test_metadata_carries_ranges_and_the_pins_do_not_leak():
    "What a user's pip sees are ranges; exact versions are for this repository's own environment."
    pinned = [str(requirement) for requirement in requirements("requirements") if any(spec.operator == "==" for spec in requirement.specifier)]
    assert not pinned, pinned
    torch = next(line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line.startswith("torch=="))
    assert "+" not in torch, "a local label would tie everyone to one index"


def test_one_version_and_one_minimum():
    cfg = pages.settings()
    assert f'"{cfg["version"]}"' in (ROOT / "fengshen/__init__.py").read_text("utf-8")
    assert f'requires-python = ">={cfg["min_python"]}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert f"MINIMUM = ({cfg['min_python'].replace('.', ', ')})" in (ROOT / "tools/install.py").read_text("utf-8")
    assert cfg["version"] in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_installed_package_has_the_metadata():
    installed = metadata("fengshen")
    names = {Requirement(line).name for line in installed.get_all("Requires-Dist")}
    assert {"torch", "transformers", "pytorch-lightning", "deepspeed", "ipywidgets"} <= names
    assert installed["Requires-Python"] == f">={pages.settings()['min_python']}"


def test_ruff():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hooks_and_targets_exist():
    "Every make target that a document or a hook names is in the Makefile."
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    texts = [ROOT / ".ci/run", ROOT / ".pre-commit-config.yaml", ROOT / "CONTRIBUTING.md", *ROOT.glob("README*.md")]
    named = {word for path in texts for line in re.findall(r"\bmake ((?:[a-z-]+ ?)+)[`\n]", path.read_text("utf-8")) for word in line.split()}
    assert named <= targets, named - targets
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert all(repo["repo"] == "local" for repo in hooks), "a hook from elsewhere is another version of a tool than the pinned one"
    assert os.access(ROOT / ".ci/run", os.X_OK)
