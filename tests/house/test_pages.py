"""The documentation holds together without Quarto: every page is in the navigation, every link leads somewhere, every page can be processed."""
import html
import json
import os
import re
import subprocess
import sys

import pytest

from tools import pages, readme

ROOT, NBS = pages.ROOT, pages.NBS
PAGES = pages.notebooks()
LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)


def test_every_page_is_in_the_navigation_once():
    listed = [page for section in pages.navigation().values() for page in section]
    assert sorted(set(PAGES) - set(listed)) == [], "add these to _quarto.yml"
    assert sorted(set(listed) - set(PAGES)) == [], "_quarto.yml names notebooks that are not there"
    assert len(listed) == len(set(listed)), "a page is listed twice"


def test_the_site_reads_the_configuration_at_the_top():
    assert (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_the_style_file_is_there():
    styles = re.findall(r"css: *(\S+)", (ROOT / "_quarto.yml").read_text("utf-8"))
    assert styles and all((NBS / name).is_file() for name in styles)


def anchor(heading):
    "The id that Quarto and GitHub give a heading."
    plain = re.sub(r"[`*_]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(path):
    "The anchors of a page or Markdown file."
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
    return {anchor(heading) for heading in re.findall(r"^#+ +(.+?)(?: *\{.*\})?$", text, re.M)} | set(re.findall(r"\{#([\w-]+)\}", text))


def broken(text, path):
    "Links in Markdown that lead nowhere, seen from the file they stand in."
    for target in LINK.findall(FENCE.sub("", text)):
        file, _, fragment = html.unescape(target).partition("#")
        there = (path.parent / file).resolve() if file else path
        if re.match(r"[a-z]+:", target):
            continue
        if not there.exists() or (fragment and there.suffix in (".md", ".ipynb") and fragment not in anchors(there)):
            yield target


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages(page):
    text = "\n\n".join(re.sub(r"`[^`\n]*`", "", source) for kind, source, _ in pages.cells(page) if kind == "markdown")
    assert list(broken(text, NBS / page)) == []


@pytest.mark.parametrize("name", ["README.md", "README_zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "llms.txt"])
def test_links_from_the_top(name):
    assert list(broken((ROOT / name).read_text("utf-8"), ROOT / name)) == []


def test_a_broken_link_is_seen():
    text = "[a](nowhere.ipynb) [b](CONTRIBUTING.md#no-such-heading) [c](https://example.invalid) [d](CONTRIBUTING.md#layers)"
    assert list(broken(text, ROOT / "README.md")) == ["nowhere.ipynb", "CONTRIBUTING.md#no-such-heading"]


def test_every_page_can_be_made_a_page_of_the_site(tmp_path):
    "nbdev's processing for the site, in two processes of its own: imports and exported cells run, signatures and parameter tables are drawn."
    env = dict(os.environ, OMP_NUM_THREADS="1", IN_TEST="1")
    halves = [subprocess.Popen([sys.executable, "tools/pages.py", "process", str(tmp_path), str(part), "2"], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, env=env) for part in range(2)]
    for half in halves:
        said = half.communicate()[1]
        assert half.returncode == 0, said[-3000:]
    made = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.ipynb"))
    assert made == PAGES
    silent = [name for name in made if "Call self as a function." in (tmp_path / name).read_text("utf-8")]
    assert not silent, f"an export without a docstring: {silent}"


def test_llms_txt_is_in_step():
    assert (ROOT / "llms.txt").read_text("utf-8") == pages.llms(), "run make llms"


def test_readme_is_the_index_page():
    text, pictures = readme.render()
    assert (ROOT / "README.md").read_text("utf-8") == text, "run make readme"
    kept = {f"{readme.PICTURES}/{path.name}": path.read_bytes() for path in (ROOT / readme.PICTURES).glob("*")}
    assert kept == pictures, "run make readme"


def code_and_tables(text):
    "What a translation must not change: code blocks (comments in them may be translated) and the figures in tables."
    code = [(language, re.sub(r"\s*(#|//) .*", "", body)) for _, language, body in FENCE.findall(text)]
    rows = [line for line in FENCE.sub("", text).splitlines() if line.lstrip().startswith("|")]
    figures = [sorted(re.findall(r"`[^`]+`|\d[\d.,]*", row)) for row in rows]  # the order within a row is the language's
    return code, figures


def test_the_chinese_readme_is_the_same_page():
    english, chinese = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README_zh.md"))
    assert code_and_tables(chinese) == code_and_tables(english)
    levels = [[len(mark) for mark in re.findall(r"^(#+) ", FENCE.sub("", text), re.M)] for text in (english, chinese)]
    assert levels[0] == levels[1], "the two pages have the same headings"
    pictures = [re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text) for text in (english, chinese)]
    assert pictures[0] == pictures[1], "the two pages show the same pictures"
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > 300, "README_zh.md is Chinese"
