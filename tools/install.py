"""Make .venv and install FengShen into it, with the pinned versions.

`make setup` calls this with the system's Python, so it uses the standard library only.
"""
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
MINIMUM = (3, 11)
TORCH = next(line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line.startswith("torch=="))
EXTRAS = "deepspeed,widgets,log,qlora,fast,gigatoken,jieba,sentencepiece,metric,dev"


def refuse(wrong, do):
    "Stop with what is wrong and what to do about it."
    sys.exit(f"make setup: {wrong}\n  {do}")


def check_machine():
    "What pip cannot install: a new enough Python with venv, and a C++ compiler for DeepSpeed's CPU ops."
    if sys.version_info < MINIMUM:
        have, need = (".".join(map(str, v)) for v in (sys.version_info[:3], MINIMUM))
        refuse(f"{sys.executable} is Python {have}, and FengShen needs {need} or newer.", "Name a newer one: make setup PYTHON=python3.12")
    try:
        import ensurepip  # noqa: F401  Debian ships it apart from Python
    except ImportError:
        refuse(f"{sys.executable} cannot make virtual environments (no ensurepip).", "On Debian and Ubuntu: apt-get install python3-venv")
    if not any(shutil.which(name) for name in filter(None, (os.environ.get("CXX"), "g++", "c++"))):
        refuse("no C++ compiler is on PATH; DeepSpeed compiles its CPU Adam and its CPU communication on first use.",
               "On Debian and Ubuntu: apt-get install g++")


def install(log):
    "Run pip with its output in `log`, and say every few seconds what it is doing."
    # Compiling all of torch and transformers to bytecode takes longer than installing them; Python does it on import for the modules used.
    command = [VENV / "bin/python", "-m", "pip", "install", "--no-compile", "--progress-bar", "off", "--disable-pip-version-check",
               "-c", "constraints.txt", TORCH, "-e", f".[{EXTRAS}]"]
    start = said = time.monotonic()
    with open(log, "w", encoding="utf-8") as out:
        pip = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        while pip.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"  {said - start:4.0f} s  {last_words(log)}", flush=True)
    if pip.returncode:
        sys.stderr.write(log.read_text("utf-8")[-3000:])
        refuse(f"pip failed (its whole output is in {log.relative_to(ROOT)}).", "Check the network and PIP_INDEX_URL, then run make setup again.")
    return time.monotonic() - start


def last_words(log):
    "The last thing pip reported, shortened to a line."
    lines = [line.strip() for line in log.read_text("utf-8").splitlines() if line.strip()]
    last = lines[-1] if lines else "starting pip"
    return last if len(last) < 80 else last[:77] + "..."


if __name__ == "__main__":
    check_machine()
    print("make setup: installing FengShen and its pinned requirements into .venv; pip downloads for a minute or two (1.6 GB on disk).", flush=True)
    if not (VENV / "bin/pip").exists():
        venv.create(VENV, with_pip=True, symlinks=True)
    seconds = install(VENV / "setup.log")
    print(f"make setup: ready in {seconds:.0f} s; .venv/bin/python is the one to use.")
