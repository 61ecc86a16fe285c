"""What the pages of the site are: the navigation, each page's title and promise, cells that do not run, and llms.txt.

python tools/pages.py llms            write llms.txt
python tools/pages.py cells           list the cells that do not run when notebooks are tested
python tools/pages.py process FOLDER [PART PARTS]  process every notebook, or a part of them, as the site does, short of Quarto
"""
import json
import re
import sys
import warnings
from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def settings():
    "The values of settings.ini."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def notebooks():
    "Every notebook as a path relative to nbs/, sorted."
    paths = (path.relative_to(NBS) for path in NBS.rglob("*.ipynb"))
    return sorted(path.as_posix() for path in paths if not any(part.startswith(("_", ".")) for part in path.parts[:-1]))


def cells(page):
    "The cells of a page as (kind, source, outputs)."
    stored = json.loads((NBS / page).read_text("utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"]), cell.get("outputs", [])) for cell in stored]


def directives(source):
    "The words of a cell's `#|` lines, such as {'export': '', 'eval:': 'false'}."
    lines = re.findall(r"^#\s*\|\s*(\S+)[ \t]*(.*)$", source, re.M)
    return {name: value.strip() for name, value in lines}


def title_and_promise(page):
    "H1 and the `> ` line of a page's first cell; None for one that is missing."
    kind, source, _ = cells(page)[0]
    title, promise = re.match(r"# +(.+)", source), re.search(r"^> *(.+)$", source, re.M)
    return tuple(found.group(1).strip() if found and kind == "markdown" else None for found in (title, promise))


def navigation():
    "The site's sidebar as {section: [page, ...]}; nested sections are named 'API / Data'."
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text("utf-8"))["website"]
    found = {}

    def walk(items, section):
        for item in items:
            if isinstance(item, dict) and "section" in item:
                inner = f"{section} / {item['section']}" if section else item["section"]
                walk([item["href"]] if "href" in item else [], inner)
                walk(item["contents"], inner)
            else:
                found.setdefault(section, []).append(item["href"] if isinstance(item, dict) else item)

    walk(site["sidebar"]["contents"], "")
    return found


def not_run():
    "Cells that a test of the notebooks leaves out, as (page, cell number, flag), and the number of all code cells."
    left_out, total = [], 0
    for page in notebooks():
        for number, (kind, source, _) in enumerate(cells(page)):
            if kind == "code":
                total += 1
                found = directives(source)
                flags = [name for name in ("slow", "gpu") if name in found] + ["eval: false"] * (found.get("eval:", "").lower() == "false")
                left_out += [(page, number, " ".join(flags))] if flags else []
    return left_out, total


def llms():
    "llms.txt: what the project is, then every page with its promise, in the order of the navigation."
    lines = ["# FengShen", "", f"> {settings()['description']}", ""]
    lines += ["Each page is a notebook: the explanation, the code and checked examples. `fengshen/` is exported from them.", ""]
    for section, pages in navigation().items():
        lines += [f"## {section}", ""] if section else []
        for page in pages:
            title, promise = title_and_promise(page)
            lines.append(f"- [{title}](nbs/{page}): {promise}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def process(folder, part=0, parts=1):
    "Notebooks as Quarto would get them, written to `folder`: exported cells and imports run, signatures and tables of parameters drawn."
    from execnb.nbio import read_nb, write_nb
    from nbdev.processors import FilterDefaults

    sys.path.insert(0, str(ROOT))
    sys.argv = ["nbdev_docs"]  # cells must not see this tool's arguments
    warnings.filterwarnings("error", "Found cells containing imports")
    for page in notebooks()[part::parts]:
        nb = read_nb(NBS / page)
        try:
            FilterDefaults()(nb)
        except Exception as error:
            raise RuntimeError(f"nbs/{page} cannot be made a page of the site") from error
        (Path(folder) / page).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, Path(folder) / page)


def print_not_run():
    "The cells that do not run, one a line, and their share."
    left_out, total = not_run()
    print(f"{len(left_out)} of {total} code cells do not run in a plain test:")
    for page, number, flags in left_out:
        print(f"  nbs/{page} cell {number}: {flags}")


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or [""]
    if verb == "llms":
        (ROOT / "llms.txt").write_text(llms(), "utf-8")
    elif verb == "cells":
        print_not_run()
    elif verb == "process" and rest:
        process(rest[0], *map(int, rest[1:]))
    else:
        sys.exit(__doc__)
