"""Gather into .whl/ the wheels that FengShen needs and an offline GPU machine lacks: python -m tools.gpu_wheels --have FILE --python 3.12

FILE has one package name a line (what `pip list --format=freeze` prints there is fine). On that machine the folder is installed with
    python3 -m pip install --no-index --no-deps --target SOMEWHERE .whl/*.whl    and SOMEWHERE put on PYTHONPATH.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from tools.pages import ROOT, settings

WHEELS = ROOT / ".whl"
LIMIT = 20 * 2**20
GLIBC = (17, 24, 27, 28, 31, 34)


def plain(name):
    "A package name as indexes compare them."
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(path):
    "The package names in a file of names or `name==version` lines."
    lines = (line.split("#")[0].strip() for line in Path(path).read_text("utf-8").splitlines())
    return {plain(re.split(r"[=<>@ ;\[]", line)[0]) for line in lines if line}


def needs(name, extras):
    "What an installed package requires, as (name, extras), with environment markers applied."
    try:
        requires = distribution(name).requires or []
    except PackageNotFoundError:
        sys.exit(f"gpu-wheels: {name} is not installed here; run make setup first")
    for line in requires:
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield plain(requirement.name), frozenset(requirement.extras)


def missing(have, extras):
    "Everything FengShen with `extras` needs, directly or not, that is not in `have`."
    keys = ["requirements", *(f"{extra}_requirements" for extra in extras)]
    first = [Requirement(word) for key in keys for word in settings()[key].split()]
    todo, seen = [(plain(requirement.name), frozenset(requirement.extras)) for requirement in first], set()
    while todo:
        name, wanted = todo.pop()
        # A package that is there is complete, but an extra of it (jsonargparse[signatures]) may not be.
        if (name, wanted) not in seen and (name not in have or wanted):
            todo += needs(name, wanted)
        seen.add((name, wanted))
    return sorted({name for name, _ in seen} - have)


def pins():
    "The tested versions: {name: 'name==version'} from constraints.txt."
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    return {plain(line.split("==")[0]): line for line in lines if line and not line.startswith("#")}


def gather(pinned, python):
    "One wheel of a pinned package, for that Python on Linux; a package without wheels is built, which gives a pure one."
    platforms = [word for n in GLIBC for word in ("--platform", f"manylinux_2_{n}_x86_64")] + ["--platform", "manylinux2014_x86_64"]
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    where = ["--no-deps", "-d", WHEELS, pinned]
    asked = subprocess.run([*pip, "download", "--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms, *where],
                           capture_output=True, text=True)
    if asked.returncode:
        # DS_BUILD_OPS=0: DeepSpeed compiles its operations where it runs, so its wheel is pure Python.
        subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", WHEELS, pinned], check=True, env=dict(os.environ, DS_BUILD_OPS="0"))


def report():
    "The wheels with their sizes; refuses a wheel that is tied to this machine's Python and a folder over the limit."
    sizes = {path.name: path.stat().st_size for path in sorted(WHEELS.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"  {size / 2**20:6.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"gpu-wheels: {len(sizes)} wheels, {total / 2**20:.1f} MiB in .whl/")
    built_here = [name for name in sizes if "-linux_" in name]
    if built_here:
        sys.exit(f"gpu-wheels: built for this machine only: {', '.join(built_here)}")
    if total > LIMIT:
        sys.exit(f"gpu-wheels: got {total / 2**20:.0f} MiB, expected at most {LIMIT / 2**20:.0f}; give HAVE=FILE with what that machine has")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--have", required=True, help="file with the names of the packages that are there")
    parser.add_argument("--python", default="3.12", help="Python version there")
    parser.add_argument("--extras", default="deepspeed", help="extras wanted there, comma-separated")
    parser.add_argument("--also", default="datasets,dill,multiprocess", help="further packages to bring if they lack, without what they need")
    asked = parser.parse_args()
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir()
    have = names_in(asked.have)
    wanted = sorted({*missing(have, asked.extras.split(",")), *map(plain, asked.also.split(","))} - have)
    print(f"gpu-wheels: downloading {', '.join(wanted)} (half a minute)", flush=True)
    for wheel in wanted:
        gather(pins()[wheel], asked.python)
    report()
