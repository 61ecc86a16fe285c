"""The progress view in real processes: on a terminal that dies halfway, in a narrow one, and in a pipe."""
import os
import re
import subprocess
import sys

import pytest

pty = pytest.importorskip("pty", reason="pseudo-terminals exist on Unix only")
fcntl, struct, termios = (__import__(name) for name in ("fcntl", "struct", "termios"))

SCRIPT = """
import sys
from fengshen.training.progress import TerminalProgress
view = TerminalProgress(seconds=0)
view.start(dict(max_steps=200))
for step in range(1, 121):
    if step == 60:
        view.update(dict(step=step, split="valid", loss=2.5, perplexity=12.2))
        print("一行输出 [bold]", flush=True)
    view.last = None  # draw every step: the test must not depend on the machine's speed
    view.update(dict(step=step, max_steps=200, split="train", loss=7 / step, lr=1e-3, tokens_per_second=1234.5,
                     memory_gib=1.5, eta_seconds=200 - step))
    if step == 100 and "die" in sys.argv:
        raise RuntimeError("out of memory")
view.finish(dict(step=120))
"""


def on_terminal(columns, *arguments):
    "The output of the script on a pseudo-terminal of some width, as text, and its exit status."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    changes_output = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "RANK", "LOCAL_RANK")
    environment = {k: v for k, v in os.environ.items() if k not in changes_output} | dict(TERM="xterm")
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    return output.decode(), process.wait(60)


def screen(output):
    "The lines that stay: each line's last drawing, without control sequences."
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.replace("\x1b[2K", "\r"))
    return [line.rstrip("\r").rsplit("\r", 1)[-1].strip() for line in plain.split("\n")]


@pytest.mark.parametrize("arguments", [(), ("die",)])
def test_the_cursor_is_back_whatever_happens(arguments):
    output, status = on_terminal(120, *arguments)
    assert status == (1 if arguments else 0)
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    if arguments:
        assert "RuntimeError: out of memory" in output


@pytest.mark.parametrize("columns", [30, 60, 120])
def test_one_line_for_the_bar_and_lines_above_it_stay(columns):
    output, _ = on_terminal(columns)
    lines = screen(output)
    assert sum(line.startswith("step") for line in lines) == 2, "the bar's last state and the closing line"
    assert any(line.startswith("一行输出 [bold]") for line in lines)
    assert any(line.startswith("valid step 60") for line in lines)
    assert output.count("\n") <= 8, "the bar does not scroll"


def test_a_pipe_gets_plain_lines():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=dict(os.environ, COLUMNS="40"), timeout=60)
    assert done.returncode == 0 and "\x1b" not in done.stdout and "\r" not in done.stdout
    lines = done.stdout.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 121 and lines[-1].startswith("step 120/200 in 0:")
    assert "step 100/200  loss 0.0700  lr 1.00e-03  1,234 tokens/s  1.5 GiB  ETA 1:40" in lines
