"""The project's own tools: the README drawn from a notebook, notebooks run with their outputs kept, wheels chosen for another machine."""
import base64
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import gpu_wheels, pages, readme

ROOT = pages.ROOT
PIXEL = base64.b64encode(b"\x89PNG not a real picture").decode()


def test_the_readme_leaves_out_what_the_site_hides(tmp_path):
    shown = new_output("execute_result", {"text/html": "<b>styled</b>", "text/plain": "plain words"})
    picture = new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    nb = new_notebook(cells=[
        new_markdown_cell("# 封神\n\n> 一句话\n\n[core](api/utils/core.ipynb#layers) [outside](https://example.invalid/x) [here](#标题)"),
        new_code_cell("#| default_exp nothing"),
        new_code_cell("#| hide\nsecret = 1"),
        new_code_cell("import fengshen", outputs=[shown]),
        new_code_cell("#| echo: false\ndraw()", outputs=[picture]),
        new_code_cell("#| output: false\nlong()", outputs=[new_output("stream", text="unwanted\n")]),
    ])
    path = tmp_path / "index.ipynb"
    nbformat.write(nb, path)
    text, pictures = readme.render(path)
    assert "secret" not in text and "#|" not in text and "default_exp" not in text and "unwanted" not in text
    assert "plain words" in text and "<b>" not in text, "a README shows no styles"
    assert "draw()" not in text and "long()" in text
    assert "(nbs/api/utils/core.ipynb#layers)" in text and "(https://example.invalid/x)" in text and "(#标题)" in text
    (name,) = pictures
    assert f"]({name})" in text and name.startswith("README_files/")
    assert readme.render(path) == (text, pictures), "drawn twice, it is the same"


def run(path, *flags):
    "tools/run_nbs.py on one notebook, and the notebook afterwards."
    done = subprocess.run([sys.executable, ROOT / "tools/run_nbs.py", *flags, path], cwd=ROOT, capture_output=True, text=True)
    return done, nbformat.read(path, as_version=4)


def test_running_a_notebook_keeps_outputs_and_skips_what_is_marked(tmp_path):
    path = tmp_path / "page.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("6 * 7"), new_code_cell("#| eval: false\n1 / 0"), new_code_cell("#| slow\n'slow ran'")]), path)
    done, nb = run(path)
    assert done.returncode == 0, done.stderr
    assert nb.cells[0].outputs[0].data["text/plain"] == "42"
    assert not nb.cells[1].outputs and not nb.cells[2].outputs
    assert run(path, "--flags", "slow")[1].cells[2].outputs


def test_outputs_show_no_place_of_this_machine(tmp_path):
    path = tmp_path / "page.ipynb"
    source = "import pathlib, tempfile, fengshen\nfolder = tempfile.mkdtemp()\nprint(folder + '/a', fengshen.__file__)\npathlib.PurePosixPath(folder)"
    nbformat.write(new_notebook(cells=[new_code_cell(source)]), path)
    printed, value = run(path)[1].cells[0].outputs
    assert printed.text == "TMP/a fengshen/__init__.py\n"
    assert value.data["text/plain"] == "PurePosixPath('TMP')"


def test_a_cell_that_raises_fails_and_changes_nothing(tmp_path):
    path = tmp_path / "page.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("6 * 7"), new_code_cell("colour = {}\ncolour['红']")]), path)
    before = path.read_bytes()
    done, _ = run(path)
    assert done.returncode != 0
    assert "KeyError" in done.stderr and "page.ipynb" in done.stderr and "colour" in done.stderr
    assert path.read_bytes() == before


def test_wheels_for_another_machine(tmp_path):
    "What the other machine has is not brought, with all it needs; an extra that its package lacks is."
    have = tmp_path / "have.txt"
    have.write_text("# pip list\ntorch==2.11.0\nTransformers==5.17.0\npytorch_lightning==2.6.6\ntorchmetrics==1.9.0\n", "utf-8")
    names = gpu_wheels.names_in(have)
    assert names == {"torch", "transformers", "pytorch-lightning", "torchmetrics"}
    missing = gpu_wheels.missing(names, ["deepspeed"])
    assert {"deepspeed", "jsonargparse", "docstring-parser", "typeshed-client"} <= set(missing)
    assert not {"torch", "transformers", "ipywidgets"} & set(missing)


def test_known_gpu_machine_lacks_little():
    missing = gpu_wheels.missing(gpu_wheels.names_in(ROOT / "tools/gpu_machine.txt"), ["deepspeed"])
    assert len(missing) < 15, missing
    assert all(name in gpu_wheels.pins() for name in missing)


@pytest.mark.parametrize("source, words", [
    ("#| export\ndef f(): pass", {"export": ""}),
    ("#|eval: false\nx", {"eval:": "false"}),
    ("x = 1  #| not a directive", {}),
])
def test_directives(source, words):
    assert pages.directives(source) == words
