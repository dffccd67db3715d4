"""The architecture as a test: imports run one way, and top-level folders stay out of ``sys.modules``."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from cbm_lightning import bottlenecks

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "cbm_lightning"

# a file may import from its own layer and from those before it
LAYERS = [
    ("types", "concepts", "configurable", "registry", "modes", "randomness", "labels"),
    ("interventions", "sparsity", "saliency", "metrics"),
    ("backbones", "bottlenecks", "heads", "losses"),
    (
        "phases",
        "head_solver",
        "preflight",
        "optimization",
        "batches",
        "data_facts",
        "reporting",
        "explanation",
        "checkpoints",
        "training",
        "module",
        "contrastive",
    ),
    ("posthoc",),
    ("data",),
    ("callbacks",),
    ("recipes", "cli"),
]
# module, training, callbacks, command line: what every method shares
SHARED = {*LAYERS[3], "callbacks", "cli"}
# what several methods share, and words that are also plain English
SHARED_BOTTLENECK_FILES = {
    "__init__",
    "base",
    "activation",
    "draws",
    "scalar",
    "linear",
    "embedding",
    "similarity",
    "autoregressive",
}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def sources() -> list[Path]:
    folders = [PACKAGE, REPOSITORY / "callbacks", REPOSITORY / "recipes"]
    return [path for folder in folders for path in sorted(folder.rglob("*.py")) if "symlink" not in str(path)]


def part_of(path: Path) -> str | None:
    relative = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else REPOSITORY)
    return None if relative == Path("__init__.py") else relative.parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    for_typing = {id(inner) for node in hints for inner in ast.walk(node)}
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_typing:
            assert node.level == 0, f"{path} imports relatively, which type checkers cannot follow through the symlinks"
            if node.module == "cbm_lightning":
                parts |= {alias.name for alias in node.names if alias.name in LEVEL}
            elif (node.module or "").startswith("cbm_lightning."):
                parts.add(node.module.split(".")[1])
    return parts


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    if part is None:
        return
    assert part in LEVEL, f"{part} has no layer: add it to LAYERS"
    upward = {other for other in imported_parts(path) if LEVEL[other] > LEVEL[part]}
    assert not upward, f"{path.name} ({part}) imports from later layers: {upward}"


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources()}
    assert not {str(path): n for path, n in lengths.items() if n > 400}
    assert lengths[PACKAGE / "module.py"] <= 300


def test_every_package_is_shipped() -> None:
    import tomllib

    shipped = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(init.parent.relative_to(REPOSITORY).parts) for init in PACKAGE.rglob("__init__.py")}
    assert shipped == found | {"cbm_lightning.callbacks", "cbm_lightning.recipes"}


def test_no_second_copy_of_the_callbacks_is_ever_loaded() -> None:
    import cbm_lightning.callbacks
    import cbm_lightning.recipes  # noqa: F401

    assert not {"callbacks", "recipes"} & set(sys.modules)


def test_shared_code_names_no_method() -> None:
    """A method that shared code must know by name is a hole in the contract; the default one is the exception."""
    methods = {path.stem for path in (PACKAGE / "bottlenecks").glob("*.py")} - SHARED_BOTTLENECK_FILES
    classes = {name for name in vars(bottlenecks) if name.endswith("Bottleneck")} - {"Bottleneck", "LinearBottleneck"}
    assert {"ecbm", "intcem"} <= methods
    assert {"EnergyBottleneck", "SlotBottleneck"} <= classes
    shared = [path for path in sources() if part_of(path) in SHARED and "recipes" not in path.parts]
    assert {"module.py", "cli.py", "intervention_evaluation.py"} <= {path.name for path in shared}
    words = {path: set(re.findall(r"\w+", without_docstrings(path))) for path in shared}
    named = {(path.name, name) for path, found in words.items() for name in (methods | classes) & found}
    assert named == set()


def without_docstrings(path: Path) -> str:
    """The code of a file; docstrings may well say where a default comes from."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
