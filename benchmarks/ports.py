"""What a port of examples/scripts to raybilevel takes: lines of code, and which hyperparameters it searches how.

A port imports the script's own loop, model and data. Its new lines are those that the script does not have, in whatever
order; blank lines, comments and docstrings are none. Its Optuna twin is the script with OptunaSearch.

Both are counted once more as changes of a script that is not tuned yet. Such a script has constants where the tuned one
has domains, no report and no Tuner: every statement, and every entry of the space, that names `tune` is a change for
both. To this OptunaSearch adds its own lines. A port adds those that it would have if it stood in the script's file,
where it need not import the script, and a `return` of the trained model. Both take for granted that data, model, loss
and loop are functions of a config.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ray.tune.search.sample import Domain
from ray.tune.utils import flatten_dict

from raybilevel import BilevelProblem, BilevelSearch

FOLDER = Path(__file__).parents[1] / "examples" / "scripts"
PORTED = tuple(sorted(path.stem.removesuffix("_bilevel") for path in FOLDER.glob("*_bilevel.py")))
OPTUNA_LINES = 3
"""Two imports and `search_alg`, as search_algorithms.py has them."""
HARNESS = ("functools", "search_algorithms")
"""What a port imports to run its script's `main` from another file."""


@dataclass(frozen=True)
class Port:
    """lines: new ones.
    untuned, untuned_twin: changed ones of a script that is not tuned yet, of the port and of its Optuna twin.

    The others are names of hyperparameters, by how they are searched.
    """

    script: str
    lines: int
    untuned: int
    untuned_twin: int
    with_gradients: tuple[str, ...]
    by_values: tuple[str, ...]
    refused: tuple[str, ...]


def port_of(script: str) -> Port:
    """Of a script whose folder is on the path. Nothing is trained."""
    port, space = importlib.import_module(f"{script}_bilevel"), importlib.import_module(script).SPACE
    source, ported = ((FOLDER / f"{name}.py").read_text() for name in (script, f"{script}_bilevel"))
    new, for_tuning = lines_of(ported) - lines_of(source), lines_for_tuning(source)
    in_place = new - lines_of_imports(ported, {script, *HARNESS})
    searched = BilevelSearch(problem_of(port), space, metric="val_loss").space.parameters
    given = [name for name, entry in flatten_dict(space).items() if isinstance(entry, Domain)]
    smooth = tuple(name for name in given if any(p.name == name and p.smooth for p in searched))
    accepted = {p.name for p in searched}
    return Port(
        script,
        new.total(),
        for_tuning + in_place.total() + returns_of("fit", source),
        for_tuning + OPTUNA_LINES,
        smooth,
        tuple(name for name in given if name in accepted and name not in smooth),
        tuple(name for name in given if name not in accepted),
    )


def problem_of(port: ModuleType) -> BilevelProblem:
    """That of a port: what an adapter has made, which is its trainable, or of the class that it defines."""
    if isinstance(port.trainable, BilevelProblem):
        return port.trainable
    (kind,) = (
        entry
        for entry in vars(port).values()
        if inspect.isclass(entry) and issubclass(entry, BilevelProblem) and entry.__module__ == port.__name__
    )
    problem: BilevelProblem = kind()
    return problem


def lines_of(source: str) -> Counter[str]:
    """Lines of code, without their indentation."""
    docstrings = set[int]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= span(node)
    lines = ((number, line.strip()) for number, line in enumerate(source.splitlines(), start=1))
    return Counter(line for number, line in lines if line and not line.startswith("#") and number not in docstrings)


def lines_for_tuning(source: str) -> int:
    """Lines of statements that name `tune`, the module; of those with a block in them the header, and of a dict that is
    assigned, which is the space, the entries."""
    found = set[int]()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt):
            continue
        parts: list[ast.AST] = [node]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            parts = list(node.value.values)
        elif hasattr(node, "body"):
            parts = [part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.stmt)]
        for part in filter(names_tune, parts):
            found |= span(part)
    return len(found)


def names_tune(part: ast.AST) -> bool:
    return any("tune" in (getattr(node, "id", None), getattr(node, "name", None)) for node in ast.walk(part))


def lines_of_imports(source: str, modules: Collection[str]) -> Counter[str]:
    """Lines that import from these modules."""
    lines, found = source.splitlines(), Counter[str]()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            found.update(lines[number - 1].strip() for number in span(node))
    return found


def returns_of(function: str, source: str) -> int:
    """The `return` statements of a function of the script; 0 where it has no such function."""
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == function)
    return sum(isinstance(node, ast.Return) for found in functions for node in ast.walk(found))


def span(node: Any) -> set[int]:
    """Numbers of its lines."""
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


COLUMNS = (
    "port", "new lines", "of Optuna's twin", "of an untuned script", "by Optuna's twin", "ratio", "with gradients",
    "by values", "refused",
)  # fmt: skip


def rows(ports: Sequence[Port]) -> Iterator[tuple[str, ...]]:
    for port in ports:
        counts = (port.with_gradients, port.by_values, port.refused)
        ratio = port.untuned / port.untuned_twin
        yield (
            port.script, str(port.lines), str(OPTUNA_LINES), str(port.untuned), str(port.untuned_twin), f"{ratio:.2f}",
            *(str(len(names)) for names in counts),
        )  # fmt: skip
