"""README.md from nbs/index.ipynb, without Quarto: python tools/readme.py

nbdev_readme needs Quarto; this draws the same page with nbconvert. Cells hidden on the site are left out, directives are removed, links
point into nbs/, and pictures are written beside the README, named by their content so that an unchanged picture stays an unchanged file.
"""
import hashlib
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs/index.ipynb"
PICTURES = "README_files"
DIRECTIVE = re.compile(r"^#\s*\|.*\n?", re.M)


def visible(nb):
    "The notebook without what the site hides: hidden cells, cells that only set nbdev up, hidden code or output."
    kept = []
    for cell in nb.cells:
        flags = set(re.findall(r"^#\s*\|\s*(\S+(?:\s+false)?)", cell.source, re.M)) if cell.cell_type == "code" else set()
        if flags & {"hide", "default_exp"}:
            continue
        cell.source = DIRECTIVE.sub("", cell.source) if cell.cell_type == "code" else cell.source
        if "output: false" in flags:
            cell.outputs = []
        if "echo: false" in flags:
            cell.metadata.setdefault("tags", []).append("no-code")
        kept.append(cell)
    nb.cells = kept
    return nb


def into_repository(text):
    "Links of a page in nbs/ as seen from the top of the repository."

    def moved(match):
        target = match.group(2)
        inside = re.match(r"[a-z]+:|#|/", target) is None
        path = (INDEX.parent / target.split("#")[0]).resolve()
        return match.group(1) + (path.relative_to(ROOT).as_posix() + target[len(target.split("#")[0]):] if inside else target) + match.group(3)

    return re.sub(r"(!?\[[^\]]*\]\()([^)\s]+)(\))", moved, text)


def exporter():
    "nbconvert's Markdown exporter, with text before pictures before HTML: a README shows no styles."
    config = Config()
    config.NbConvertBase.display_data_priority = ["text/markdown", "image/svg+xml", "image/png", "text/plain"]
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {"no-code"}
    return MarkdownExporter(config=config)


def render(path=INDEX):
    "The README's text and its pictures as {file name: bytes}."
    nb = visible(nbformat.read(path, as_version=4))
    for cell in nb.cells:
        cell.source = into_repository(cell.source) if cell.cell_type == "markdown" else cell.source
    text, resources = exporter().from_notebook_node(nb)
    pictures = {}
    for name, data in resources.get("outputs", {}).items():
        stored = f"{PICTURES}/{hashlib.sha256(data).hexdigest()[:12]}{Path(name).suffix}"
        pictures[stored] = data
        text = text.replace(f"]({name})", f"]({stored})")
    notice = "<!-- Drawn from nbs/index.ipynb by `make readme`: edit the notebook. -->\n\n"
    return notice + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", pictures


def write():
    "Write README.md and its pictures, and remove pictures that it no longer shows."
    text, pictures = render()
    (ROOT / "README.md").write_text(text, "utf-8")
    for old in (ROOT / PICTURES).glob("*"):
        if f"{PICTURES}/{old.name}" not in pictures:
            old.unlink()
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)


if __name__ == "__main__":
    write()
