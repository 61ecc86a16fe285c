"""How the package hangs together: imports go down only, no module knows a device, none is long, and importing the root is light."""
import ast
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from fengshen.utils.core import EXTRAS
from tools import pages

ROOT = pages.ROOT
PACKAGE = ROOT / "fengshen"
# The one place that says what may import what: a layer sees the layers to its right; packages between commas do not see each other.
LAYERS = "examples > cli, widgets > pipelines > training > data, models > tokenizer, losses, metric > utils"
# Inside utils the same rule holds between these modules.
UTILS = "utils.kernels > utils.device > utils.core"
DEVICE_MODULE = "fengshen.utils.device"
DEVICES = {"cuda", "mps", "npu", "xpu", "hpu", "mlu"}
LONGEST = 600
SELF_AND_STANDARD = sys.stdlib_module_names | {"fengshen"}


def modules():
    "Every module of the package with its dotted name and parsed source."
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "_modidx":
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path, ast.parse(path.read_text("utf-8"))


MODULES = list(modules())
NAMES = {name for name, _, _ in MODULES}


def imports(name, path, tree, whole=True):
    "The dotted names a module imports: everywhere, or (whole=False) only when it is itself imported."
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from package import module` imports the module, `from module import name` the module only.
            yield from (f"{module}.{alias.name}" if f"{module}.{alias.name}" in NAMES else module for alias in node.names)


def rank(name, order):
    "(layer number, member of the layer) of a module in an order such as LAYERS; None for a module it does not speak of."
    for number, layer in enumerate(reversed(order.split(" > "))):
        for member in layer.split(", "):
            if f"{name}.".startswith(f"fengshen.{member}."):
                return number, member
    return None


def allowed(importer, imported, order):
    "True where `importer` may import `imported`: same package, or a lower layer."
    here, there = rank(importer, order), rank(imported, order)
    return here is None or there is None or here[1] == there[1] or there[0] < here[0]


def test_every_package_has_a_layer():
    homeless = {name for name in NAMES if name != "fengshen" and rank(name, LAYERS) is None}
    assert not homeless, f"put these into LAYERS (and CONTRIBUTING.md): {sorted(homeless)}"


def test_imports_go_down_only():
    wrong = [f"{name} imports {other}" for name, path, tree in MODULES for other in imports(name, path, tree)
             if name != "fengshen" and other.startswith("fengshen.") and not (allowed(name, other, LAYERS) and allowed(name, other, UTILS))]
    assert not wrong, "\n".join(wrong)


def test_the_root_is_imported_by_nobody_below():
    "The root offers `fengshen.fit`; a module that imports the root reaches up. Its version is the exception."
    wrong = [name for name, _, tree in MODULES if name != "fengshen" for node in ast.walk(tree)
             if (isinstance(node, ast.Import) and any(alias.name == "fengshen" for alias in node.names))
             or (isinstance(node, ast.ImportFrom) and node.module == "fengshen" and not node.level
                 and any(alias.name != "__version__" and f"fengshen.{alias.name}" not in NAMES for alias in node.names))]
    below = [name for name in wrong if rank(name, LAYERS)[0] < rank("fengshen.cli", LAYERS)[0]]
    assert not below, below


def test_modules_do_not_import_each_other_in_circles():
    graph = {name: {other for other in imports(name, path, tree, whole=False) if other in NAMES and other != name} for name, path, tree in MODULES}
    done, trail = set(), []

    def visit(name):
        assert name not in trail, " -> ".join(trail[trail.index(name):] + [name])
        if name not in done:
            trail.append(name)
            for other in graph[name]:
                visit(other)
            trail.pop()
            done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("importer, imported, fine", [
    ("fengshen.training.module", "fengshen.data.batch", True),
    ("fengshen.data.batch", "fengshen.training.module", False),
    ("fengshen.data.batch", "fengshen.models.auto", False),
    ("fengshen.data.sampler", "fengshen.data.batch", True),
    ("fengshen.examples.demo", "fengshen.utils.core", True),
])
def test_the_rule_itself(importer, imported, fine):
    assert allowed(importer, imported, LAYERS) is fine


def test_contributing_shows_the_same_layers():
    assert LAYERS in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def device_words(tree):
    "Device names in a module: attributes (`torch.cuda`, `.cuda()`) and strings that name a device, docstrings aside."
    docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in DEVICES:
            yield node.lineno, f".{node.attr}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and DEVICES & set(ast.unparse(node).replace(".", " ").split()):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if re.search(rf"\b({'|'.join(DEVICES)})\b", node.value):
                yield node.lineno, repr(node.value)


def test_one_module_knows_devices():
    wrong = [f"{name}:{line} {word}" for name, _, tree in MODULES if name != DEVICE_MODULE for line, word in device_words(tree)]
    assert not wrong, "\n".join(wrong)
    assert list(device_words(ast.parse("x.cuda(); torch.device('cuda:0'); import torch.mps"))), "the check must see what it looks for"


def test_recipes_name_no_device():
    wrong = [path.name for path in (PACKAGE / "recipes").rglob("*.yaml") if re.search(rf"\b({'|'.join(DEVICES)})\b", path.read_text("utf-8"))]
    assert not wrong, wrong


def test_a_module_is_one_idea():
    long = [f"{path.relative_to(ROOT)}: {lines} lines" for _, path, _ in MODULES if (lines := len(path.read_text("utf-8").splitlines())) > LONGEST]
    assert not long, "\n".join(long)


def test_importing_the_root_is_light():
    code = "import fengshen, sys; print(*[m for m in ('torch', 'deepspeed', 'ipywidgets', 'transformers', 'pytorch_lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


def test_what_is_imported_is_declared():
    "A package that a module imports stands in settings.ini, or is asked for with `need`, which says how to install it."
    cfg = pages.settings()
    keys = ["requirements", *(f"{extra}_requirements" for extra in cfg["extras"].split() if extra != "dev")]
    declared = {Requirement(word).name.lower().replace("-", "_") for key in keys for word in cfg[key].split()}
    used = {other.split(".")[0]: name for name, path, tree in MODULES for other in imports(name, path, tree)}
    declared |= {"yaml", "lightning_fabric", "triton"}  # what pyyaml and pytorch-lightning are imported as, beside their own names; what torch brings for an accelerator
    declared |= {node.args[0].value for _, _, tree in MODULES for node in ast.walk(tree)
                 if isinstance(node, ast.Call) and ast.unparse(node.func) == "need" and isinstance(node.args[0], ast.Constant)}
    missing = {f"{package} ({used[package]})" for package in used if package.lower() not in declared | SELF_AND_STANDARD}
    assert not missing, f"not in settings.ini: {sorted(missing)}"


def test_a_missing_package_is_explained_with_an_extra_that_has_it():
    cfg = pages.settings()
    for package, extra in EXTRAS.items():
        assert package in {Requirement(word).name for word in cfg[f"{extra}_requirements"].split()}, f"fengshen[{extra}] does not bring {package}"


def test_light_modules_need_no_extra():
    "Extras are imported inside the functions that use them, so that every module can be imported without any."
    cfg = pages.settings()
    extras = {Requirement(word).name for extra in cfg["extras"].split() if extra != "dev" for word in cfg[f"{extra}_requirements"].split()}
    wrong = [f"{name} imports {other}" for name, path, tree in MODULES for other in imports(name, path, tree, whole=False)
             if other.split(".")[0] in extras]
    assert not wrong, "\n".join(wrong)


def test_package_folders_are_packages():
    "A folder with modules but no __init__.py would be left out of the wheel."
    bare = {path.parent.relative_to(ROOT).as_posix() for _, path, _ in MODULES if not (path.parent / "__init__.py").exists()}
    assert not bare, sorted(bare)


