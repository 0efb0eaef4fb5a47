"""The border between public and private: what `__all__` says is what documents and examples use."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import raybilevel

ROOT = Path(__file__).parents[2]
PUBLIC = (
    "raybilevel",
    "raybilevel.errors",
    "raybilevel.folds",
    "raybilevel.functional",
    "raybilevel.hypergradient",
    "raybilevel.lightning",
    "raybilevel.loop",
    "raybilevel.methods",
    "raybilevel.problem",
    "raybilevel.problems",
    "raybilevel.report",
    "raybilevel.search",
    "raybilevel.search_state",
    "raybilevel.sklearn",
    "raybilevel.skorch",
    "raybilevel.space",
    "raybilevel.storage",
    "raybilevel.transformers",
    "raybilevel.tune",
)


def test_the_top_level_names_are_what_can_be_imported() -> None:
    names = {
        "BilevelProblem",
        "BilevelSearch",
        "CrossValidated",
        "LargeUpperLevel",
        "__version__",
        "conclude",
        "data_parallel_trainable",
        "fold_parallel_trainable",
        "hypergradient_trainable",
        "lower_level_trainable",
        "refit",
        "summarise",
    }
    assert set(raybilevel.__all__) == set(dir(raybilevel)) == names
    with pytest.raises(AttributeError, match="no attribute 'BilevelSearcher'"):
        raybilevel.BilevelSearcher  # noqa: B018


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__, key=order)
    assert all(getattr(module, public) is not None for public in module.__all__)


def order(name: str) -> tuple[int, str]:
    """Constants, classes, functions: the order in which the linter sorts `__all__`."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_modules_without_an_underscore_are_public() -> None:
    folder = ROOT / "raybilevel"
    found = {"raybilevel"} | {
        f"raybilevel.{path.stem}"
        for path in folder.iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    assert found == {*PUBLIC, "raybilevel.cli"}


def imports(code: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import from raybilevel in a program."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "raybilevel":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "raybilevel")


def code_of(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [text]
    if path.suffix == ".ipynb":
        return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in blocks]


DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
    *sorted((ROOT / "examples").glob("**/*.py")),
    *(ROOT / "examples").glob("*.ipynb"),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_and_examples_use_public_names(path: Path) -> None:
    for code in code_of(path):
        for name, public in imports(code):
            assert not any(part.startswith("_") for part in name.split(".")), name
            module = importlib.import_module(name)
            if public:
                assert public in names_of(module), f"{name}.{public}"


def names_of(module: ModuleType) -> list[str]:
    """`__all__`; of the shipped problems' own modules, what they define."""
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    return list(module.__all__) if hasattr(module, "__all__") else [name for name in own if not name.startswith("_")]


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("raybilevel, raybilevel.cli", "torch, ray"),  # a usage error is said at once
        ("raybilevel.search, raybilevel.methods, raybilevel.problems, raybilevel.sklearn", "ray"),  # the core
        ("raybilevel.lightning, raybilevel.transformers, raybilevel.skorch", "lightning, transformers, skorch"),
        ("raybilevel.tune._trainable", "gpytorch, botorch"),  # a worker that only trains
    ],
)
def test_modules_import_no_more_than_they_need(modules: str, absent: str) -> None:
    code = f"import sys, {modules}\nassert not set({absent.split(', ')!r}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
