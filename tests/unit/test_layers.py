"""Dependencies point one way: the core knows no Ray."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import raybilevel

PACKAGE = Path(raybilevel.__file__).parent
CORE = [
    "acquisition.py",
    "augmented_lagrangian.py",
    "errors.py",
    "gaussian_process.py",
    "levels.py",
    "local.py",
    "lower_level.py",
    "optimizer.py",
    "problem.py",
    "search_state.py",
    "space.py",
    "state_file.py",
    "trust_region.py",
    "upper_level.py",
    "value_function.py",
    "methods/__init__.py",
    "methods/base.py",
    "methods/default.py",
    "methods/paper.py",
]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("name", CORE)
def test_a_core_module_imports_neither_ray_nor_what_does(name: str):
    with_ray = {"ray", "raybilevel.searcher", "raybilevel.trainable", "raybilevel.domains"}
    found = {module for module in imported(PACKAGE / name) if module in with_ray or module.startswith("ray.")}
    assert not found


def test_the_public_names_are_there():
    assert sorted(raybilevel.__all__) == raybilevel.__all__
    assert all(hasattr(raybilevel, name) for name in raybilevel.__all__)
