"""README's commands are the tested ones: what a reader would type is typed here, from the README itself."""
import re
import shlex
import subprocess

import pytest

from tests.training_runs import environment
from tools import pages

ROOT = pages.ROOT
README = ROOT / "README.md"


def commands(text):
    "The lines of a page's shell blocks, continued lines joined, comments removed."
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").strip() for line in lines) if line]


COMMANDS = commands(README.read_text("utf-8"))
FENGSHEN = [line for line in COMMANDS if shlex.split(line)[0] in ("fengshen", "python")]


def test_there_are_commands():
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in FENGSHEN])
def test_every_other_command_is_known(line):
    "make targets exist, extras exist, and nothing else is asked of a reader but a clone."
    first, *rest = shlex.split(line)
    assert first in ("make", "pip", "git", "cd", "source"), f"{line}: not a command that a test runs"
    if first == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
        assert {word for word in rest if "=" not in word} <= targets
    if first == "pip":
        assert rest[0] == "install"
        extras = {extra for word in rest for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")}
        assert extras <= set(pages.settings()["extras"].split())


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_fengshen_commands_run_one_after_the_other(tmp_path):
    "In an empty folder, in the order of the page, exactly as written."
    for line in FENGSHEN:
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=environment(HF_HUB_OFFLINE="1"))
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
