"""The notebooks are the source: the package is what they export, they are clean, they begin with a promise, and what they export says what it is."""
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import pages

ROOT = pages.ROOT
PAGES = pages.notebooks()
ALLOWED_NOT_RUN = 0.05


def tool(name, *arguments, cwd):
    "Run one of nbdev's commands in `cwd`."
    command = [Path(sys.executable).parent / name, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=""))
    assert done.returncode == 0, done.stderr
    return done


def contents(folder, pattern):
    "{relative path: bytes} of the files in a folder that match."
    paths = (path for path in sorted(folder.rglob(pattern)) if ".ipynb_checkpoints" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the notebooks with nothing exported yet, save the root __init__, which is written by hand."
    folder = tmp_path_factory.mktemp("copy")
    (folder / "fengshen").mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "fengshen/__init__.py"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns("runs", "_proc", ".ipynb_checkpoints", "_quarto.yml"))
    return folder


def test_the_package_is_what_the_notebooks_export(copy):
    tool("nbdev_export", cwd=copy)
    first = contents(copy / "fengshen", "*.py")
    committed = contents(ROOT / "fengshen", "*.py")
    different = sorted(name for name in first.keys() | committed.keys() if first.get(name) != committed.get(name))
    assert not different, f"run make export; these differ from what the notebooks export: {different}"
    tool("nbdev_export", cwd=copy)
    assert contents(copy / "fengshen", "*.py") == first, "exporting twice gives something else"


def test_notebooks_are_clean(copy):
    before = contents(copy / "nbs", "*.ipynb")
    tool("nbdev_clean", "--fname", str(copy / "nbs"), cwd=copy)
    dirty = [name for name, data in contents(copy / "nbs", "*.ipynb").items() if before[name] != data]
    assert not dirty, f"run make export; nbdev_clean changes these: {dirty}"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_its_name_and_a_promise(page):
    title, promise = pages.title_and_promise(page)
    assert title and promise, "the first cell is Markdown: `# Name`, an empty line, `> one line that promises something`"
    assert len(promise) < 200, "a promise is one line"


@pytest.mark.parametrize("page", PAGES)
def test_stored_outputs_hold_no_error(page):
    failed = [number for number, (_, _, outputs) in enumerate(pages.cells(page)) if any(output["output_type"] == "error" for output in outputs)]
    assert not failed, f"cells {failed} show a traceback; run tools/run_nbs.py on the notebook"


def exported(page):
    "Parsed source of each exported cell of a page."
    for kind, source, _ in pages.cells(page):
        if kind == "code" and {"export", "exports"} & pages.directives(source).keys():
            yield ast.parse(source)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_exported_says_what_it_is(page):
    "Functions, classes and patched methods that users see have a docstring; without one the site says 'Call self as a function.'"
    silent = [node.name for tree in exported(page) for node in tree.body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not silent, f"no docstring: {silent}"


@pytest.mark.parametrize("page", PAGES)
def test_imports_have_cells_of_their_own(page):
    "Making the site runs every cell with an import, so such a cell must do nothing else."
    mixed = [ast.unparse(tree)[:80] for tree in exported(page)
             if any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body)
             and not all(isinstance(node, (ast.Import, ast.ImportFrom, ast.If)) for node in tree.body)]
    assert not mixed, mixed


@pytest.mark.parametrize("page", PAGES)
def test_a_script_is_not_started_by_its_notebook(page):
    "In a notebook `__name__` is '__main__' too, and the arguments are those of whatever runs it; only a file knows `__file__`."
    started = [ast.unparse(node.test) for tree in exported(page) for node in tree.body if isinstance(node, ast.If)]
    assert not [test for test in started if "__main__" in test and "__file__" not in test], "add: and '__file__' in globals()"


def test_nearly_every_cell_runs():
    left_out, total = pages.not_run()
    pages.print_not_run()
    assert len(left_out) <= ALLOWED_NOT_RUN * total, f"{len(left_out)} of {total} code cells do not run: {left_out}"


def test_lesson_cells_check_something():
    "A page of the library that never asserts teaches what nobody has checked."
    bare = [page for page in PAGES if page.startswith("api/") and any(True for _ in exported(page))
            and any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for tree in exported(page) for node in tree.body)
            and not any(re.search(r"\bassert\b|pytest\.raises|\btest_\w+\(", source) for kind, source, _ in pages.cells(page) if kind == "code")]
    assert not bare, bare
