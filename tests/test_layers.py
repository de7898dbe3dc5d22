"""Imports between the modules of potstill point in one direction only.

The order is the one of the design: `cli` at the top, `errors` at the bottom. Every import counts,
also those inside functions and under TYPE_CHECKING: knowing a type is depending on it.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "potstill"

#: From the bottom to the top. `x.*` stands for the package `x` and all modules in it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "files", "display", "process", "template", "worker", "lammps_folder"),
    ("properties", "units", "species", "isolation"),
    ("ase_bridge", "ragged", "lammps_library"),
    ("structures",),
    ("neighbors",),  # below the readers, which look for overlapping atoms with it
    ("features", "soundness"),
    ("readers.*", "store.*"),
    ("core.*", "radial", "bispectrum"),
    ("models.*",),
    ("metrics", "distill.*"),
    ("checkpoint", "contract"),
    ("teachers.*",),
    ("calculators", "testing"),
    ("sample.*",),
    ("train.*", "label", "deploy.*", "coarse.*"),
    # How numbers are shown: below the evaluations, which bring their own rows and figures.
    ("report.*",),
    ("evaluate.*",),
    ("workflows.base", "workflows.data"),  # what workflows and experiments share
    ("experiments.*",),  # below the workflows: `distill` trains by the same scheduler
    ("workflows.*",),
    ("config.*",),
    ("session",),
    ("cli.*",),
)

#: Modules that all others of their package may use, beside `x.base`: what that stands on itself.
BELOW_BASE = ("models.engines", "models.graph", "models.hyper")

#: Packages whose modules are parts of one thing rather than alternatives: these may import one
#: another, but never in a circle. Everywhere else only `x.*` -> `x.base` is legal.
ASSEMBLED = (
    "readers",
    "store",
    "core",
    "distill",
    "train",
    "coarse",
    "report",
    "evaluate",
    "experiments",
    "workflows",
    "models.gemnet_oc",
    "models.hipnn",
    "deploy.metatomic",
)


def modules_below(root: Path) -> dict[str, Path]:
    """Dotted names (without the package's own) of all modules in a package's folder.

    A package is listed under its own name, the top `__init__` under the empty one.
    """
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: set[str], package: str) -> list[tuple[str, int]]:
    """Modules of the package that a module imports, each with the line of the import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, name, path, package)
            # `from potstill import structures` names a module, `from potstill.x import f` does not.
            targets = [
                f"{base}.{alias.name}"
                if f"{base}.{alias.name}".removeprefix(f"{package}.") in known
                else base
                for alias in node.names
            ]
        elif isinstance(node, ast.Call) and _is_dynamic_import(node):
            targets = [node.args[0].value]
        else:
            continue
        for target in targets:
            if target == package or target.startswith(f"{package}."):
                found.append((target.removeprefix(package).removeprefix("."), node.lineno))
    return found


def _absolute(node: ast.ImportFrom, name: str, path: Path, package: str) -> str:
    if not node.level:
        return node.module or ""
    parents = [package, *name.split(".")] if name else [package]
    climb = node.level - 1 if path.name == "__init__.py" else node.level
    parents = parents[: len(parents) - climb]
    return ".".join([*parents, node.module] if node.module else parents)


def _is_dynamic_import(node: ast.Call) -> bool:
    called = (
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    )
    return (
        called in ("import_module", "__import__")
        and bool(node.args)
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    )


def layer_of(name: str) -> int | None:
    """Index of a module's layer; None where the table does not know it."""
    for index, layer in enumerate(LAYERS):
        for entry in layer:
            family = entry.removesuffix(".*")
            if name == entry or (entry.endswith(".*") and name.split(".")[0] == family):
                return index
    return None


def is_legal(importer: str, imported: str) -> bool:
    """Whether one module may import another, both in the table of layers.

    The package itself (`""`) holds the version: all may import it. It imports nothing but, for type
    checkers, what it offers to users (tests/test_session.py looks after that). Within a layer only
    the modules of one package meet: `x` gathers `x.*`, `x.*` may use `x.base`, and the parts of an
    assembled package may use one another.
    """
    if imported == "":
        return True
    if importer == "":
        return False
    above, below = layer_of(importer), layer_of(imported)
    if above is None or below is None or above != below:
        return above is not None and below is not None and above > below
    family = importer.split(".")[0]
    if imported.split(".")[0] != family:
        return False
    # The compiled part of a package lies below all of its modules.
    if importer == family or imported in (f"{family}.base", f"{family}._native", *BELOW_BASE):
        return True
    return any(
        f"{importer}.".startswith(f"{parts}.") and imported.startswith(f"{parts}.")
        for parts in ASSEMBLED
    )


def lines_for_type_checkers(path: Path) -> set[int]:
    """Lines of a module that stand under `if TYPE_CHECKING`."""
    blocks = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    return {line for b in blocks for line in range(b.lineno, (b.end_lineno or b.lineno) + 1)}


def violations(root: Path, package: str = "potstill") -> list[str]:
    """One line per import that points the wrong way, and per module missing from the table."""
    modules = modules_below(root)
    known = set(modules)
    found = [f"{name} is in no layer" for name in known if name and layer_of(name) is None]
    for name, path in modules.items():
        imports = imports_of(name, path, known, package)
        if not name:
            offered = lines_for_type_checkers(path)
            imports = [entry for entry in imports if entry[1] not in offered]
        for imported, line in imports:
            # `from potstill.x import f` may name what is no module at all: a stale import.
            if not is_legal(name, imported):
                found.append(f"{name or package} (line {line}) imports {imported}")
    for family in (*ASSEMBLED, "models"):
        found.extend(circles(modules, family, package))
    return sorted(found)


def test_the_core_stands_on_little():
    modules = modules_below(SOURCE)
    allowed = {"errors", "properties", "species", "structures", "units"}
    for name in ("core", "core.base", "core.hipnn"):
        imported = {
            target for target, _ in imports_of(name, modules[name], set(modules), "potstill")
        }
        assert {t for t in imported if t.split(".")[0] != "core"} <= allowed


def circles(modules: dict[str, Path], family: str, package: str) -> list[str]:
    """Name the modules of a package that cannot be put in an order, because they form a circle."""
    graph = {
        name: {target for target, _ in imports_of(name, path, set(modules), package)}
        for name, path in modules.items()
        if name.startswith(f"{family}.")
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"circle: {' -> '.join(error.args[1])}"]
    return []


def test_the_source_keeps_the_layers():
    assert len(modules_below(SOURCE)) > 10
    assert violations(SOURCE) == []


@pytest.fixture
def tree(tmp_path):
    """A small legal package; a test plants its own import into it."""
    files = {
        "__init__": "__version__ = '0'",
        "errors": "",
        "structures": "from potstill import __version__\nimport potstill.errors",
        "models/__init__": "from potstill.models.base import Base\nfrom . import hipnn",
        "models/base": "from potstill.structures import Structures",
        "models/hipnn": "from .base import Base\nfrom potstill.models import base",
        "models/gemnet_oc/__init__": "from potstill.models.gemnet_oc.model import Model",
        "models/gemnet_oc/graphs": "",
        "models/gemnet_oc/model": "from potstill.models.gemnet_oc.graphs import f",
        "train/__init__": "",
        "train/loop": "def f():\n    from potstill.models import build_model",
    }
    root = tmp_path / "potstill"
    for name, text in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_legal_tree_passes(tree):
    assert violations(tree) == []
    (tree / "train/state.py").write_text("from potstill.train.loop import train")
    assert violations(tree) == []


def test_a_circle_is_found(tree):
    (tree / "train/state.py").write_text("from potstill.train.loop import train")
    (tree / "train/loop.py").write_text("def f():\n    from potstill.train import state")
    (found,) = violations(tree)
    assert found.startswith("circle: ")
    assert {"train.loop", "train.state"} <= set(found.removeprefix("circle: ").split(" -> "))


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("structures", "import potstill.models.base", "structures (line 1) imports models.base"),
        ("structures", "from potstill import models", "structures (line 1) imports models"),
        (
            "models/base",
            "def f():\n    from potstill.train.loop import train",
            "models.base (line 2) imports train.loop",
        ),
        (
            "models/base",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from potstill import train",
            "models.base (line 3) imports train",
        ),
        (
            "models/ani",
            "from potstill.models.hipnn import HIPNN",
            "models.ani (line 1) imports models.hipnn",
        ),
        ("models/ani", "from .hipnn import HIPNN", "models.ani (line 1) imports models.hipnn"),
        ("models/ani", "from . import build_model", "models.ani (line 1) imports models"),
        (
            "models/ani",
            "from potstill.models.gemnet_oc.graphs import f",
            "models.ani (line 1) imports models.gemnet_oc.graphs",
        ),
        (
            "models/gemnet_oc/graphs",
            "from potstill.models.hipnn import HIPNN",
            "models.gemnet_oc.graphs (line 1) imports models.hipnn",
        ),
        ("label", "from potstill.train.loop import train", "label (line 1) imports train.loop"),
        (
            "errors",
            "from importlib import import_module\nimport_module('potstill.label')",
            "errors (line 2) imports label",
        ),
        ("__init__", "from potstill.errors import X", "potstill (line 1) imports errors"),
        (
            "__init__",
            "def f():\n    from potstill.train.loop import train",
            "potstill (line 2) imports train.loop",
        ),
        ("train/state", "from potstill.train import train", "train.state (line 1) imports train"),
        ("novelty", "", "novelty is in no layer"),
    ],
)
def test_a_planted_violation_is_found(tree, module, text, expected):
    (tree / f"{module}.py").write_text(text)
    assert violations(tree) == [expected]
