"""What a port of examples/scripts to raybilevel takes: lines of code, and which hyperparameters it searches how.

A port imports the script's own loop, model and data. Its new lines are those that the script does not have, in whatever
order; blank lines, comments and docstrings are none. That the script's loop is a function which returns the model is
not counted. Its Optuna twin is the script with OptunaSearch.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ray.tune.search.sample import Domain
from ray.tune.utils import flatten_dict

from raybilevel import BilevelProblem, BilevelSearch

FOLDER = Path(__file__).parents[1] / "examples" / "scripts"
PORTED = tuple(sorted(path.stem.removesuffix("_bilevel") for path in FOLDER.glob("*_bilevel.py")))
OPTUNA_LINES = 3
"""Two imports and `search_alg`, as search_algorithms.py has them."""


@dataclass(frozen=True)
class Port:
    """lines: new ones. The others are names of hyperparameters, by how they are searched."""

    script: str
    lines: int
    with_gradients: tuple[str, ...]
    by_values: tuple[str, ...]
    refused: tuple[str, ...]


def port_of(script: str) -> Port:
    """Of a script whose folder is on the path. Nothing is trained."""
    port, space = importlib.import_module(f"{script}_bilevel"), importlib.import_module(script).SPACE
    source, ported = (lines_of((FOLDER / f"{name}.py").read_text()) for name in (script, f"{script}_bilevel"))
    searched = BilevelSearch(problem_of(port), space, metric="val_loss").space.parameters
    given = [name for name, entry in flatten_dict(space).items() if isinstance(entry, Domain)]
    smooth = tuple(name for name in given if any(p.name == name and p.smooth for p in searched))
    accepted = {p.name for p in searched}
    return Port(
        script,
        (ported - source).total(),
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
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = ((number, line.strip()) for number, line in enumerate(source.splitlines(), start=1))
    return Counter(line for number, line in lines if line and not line.startswith("#") and number not in docstrings)


COLUMNS = ("port", "new lines", "of Optuna's twin", "with gradients", "by values", "refused")


def rows(ports: Sequence[Port]) -> Iterator[tuple[str, ...]]:
    for port in ports:
        counts = (port.with_gradients, port.by_values, port.refused)
        yield (port.script, str(port.lines), str(OPTUNA_LINES), *(str(len(names)) for names in counts))
