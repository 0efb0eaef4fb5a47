"""A deep-equilibrium classifier: its accuracy against a plain network, and what its gradient holds in memory.

    python -m benchmarks.equilibrium --config configs/equilibrium.yaml --out DIR

Accuracy: the network of the config against the same without its recurrent weights (contraction 0), from the same
starts. Memory: bytes that autograd saves for one gradient of F, the data not counted, by differentiating through the
iterations z <- g(z) from zero (unrolled), and by the implicit function theorem at the z they end at; with the error of
either gradient, relative to that at a fixed point found to 1e-7. DIR gets equilibrium.json and figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.families import (
    arguments_parser,
    descend,
    descent_method,
    intervals,
    shown,
    table,
    wide_console,
    write_json,
)
from raybilevel._config.experiment import read_config
from raybilevel._lower.functions import BothLevels
from raybilevel._lower.levels import Levels
from raybilevel._lower.variables import ModuleVariables
from raybilevel.errors import ConfigError
from raybilevel.hypergradient import AndersonAcceleration, Equilibrium
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.problem import LargeUpperLevel, leaves
from raybilevel.problems import make_problem
from raybilevel.report._charts import Chart, Series
from raybilevel.report._static import write_figures
from raybilevel.report._statistics import paired_test

ITERATIONS = (2, 5, 10, 20, 40, 80)


@dataclass(frozen=True)
class Gradient:
    """One gradient of F in x after some evaluations of g: bytes that autograd saved, and its relative error."""

    way: str
    iterations: int
    saved_bytes: int
    error: float


class SavedBytes:
    """Counts what autograd saves inside the block: each storage once, and none of those that were there before.

    before: tensors that were.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        self.storages: dict[int, int] = {}
        self._before = {tensor.untyped_storage().data_ptr() for tensor in before}
        self._kept: list[Tensor] = []  # so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self.storages and address not in self._before:
            self._kept.append(tensor)
            self.storages[address] = storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def unrolled(
    functions: BothLevels, x: Tensor, y: Tensor, iterations: int, data: Sequence[Tensor]
) -> tuple[Tensor, int]:
    """The gradient of F(x, g(g(... y))) by differentiating through all of it, and the bytes saved."""
    x = x.detach().requires_grad_(True)
    with SavedBytes(data) as saved:
        for _ in range(iterations):
            y = functions.mapped(x, y).flatten()
        value = functions.loss_at("upper", x, y)
    return torch.autograd.grad(value, x)[0], saved.total


def implicit(
    functions: BothLevels, x: Tensor, y: Tensor, iterations: int, data: Sequence[Tensor]
) -> tuple[Tensor, int]:
    """The same by the implicit function theorem, with as many iterations forward and at most as many back."""
    with torch.no_grad():
        for _ in range(iterations):
            y = functions.mapped(x, y).flatten()
    with SavedBytes(data) as saved:
        found = Equilibrium(1e-7, limit=iterations)(functions, x, y)
    return found.gradient, saved.total


def gradients(problem: LargeUpperLevel, x: Tensor) -> list[Gradient]:
    """Of both ways, after several numbers of iterations."""
    module = problem.upper_variables()
    model = problem.model().to(problem.dtype)
    functions = Levels(problem, model, ModuleVariables(module.to(problem.dtype), {}))
    zero = torch.zeros(sum(part.numel() for part in model.parameters()), dtype=problem.dtype)
    rows = len(functions.mapped(x, zero))
    exact = AndersonAcceleration(1e-7, 500).solve(lambda z: functions.mapped(x, z.flatten()), zero.view(rows, -1))
    truth = Equilibrium(1e-7, limit=500)(functions, x, exact.y.flatten()).gradient
    data = list(leaves(list(problem.batches("lower", None))))
    ways: dict[str, Callable[..., tuple[Tensor, int]]] = {"unrolled": unrolled, "implicit": implicit}
    found = []
    for way, gradient_of in ways.items():
        for iterations in ITERATIONS:
            gradient, saved = gradient_of(functions, x, zero, iterations, data)
            error = float((gradient - truth).norm() / truth.norm())
            found.append(Gradient(way, iterations, saved, error))
    return found


def charts(found: Sequence[Gradient]) -> list[Chart]:
    made = []
    for name, title, label in (
        ("saved_bytes", "Memory of one gradient", "MiB saved for the way back"),
        ("error", "Error of one gradient", "relative error"),
    ):
        series = []
        for number, way in enumerate(("unrolled", "implicit")):
            points = [one for one in found if one.way == way]
            values = [one.saved_bytes / 2**20 if name == "saved_bytes" else one.error for one in points]
            series.append(Series(way, "line", [one.iterations for one in points], values, colour=number))
        alt = "; ".join(f"{one.name}: from {one.y[0]:.2g} to {one.y[-1]:.2g}" for one in series)
        made.append(
            Chart(f"equilibrium_{name}", title, "By iterations z <- g(z).", alt, "iterations", label, tuple(series),
                  x_log=True, y_log=True)
        )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = arguments_parser("equilibrium", __doc__.splitlines()[0], "configs/equilibrium.yaml", 5)
    given = parser.parse_args(arguments)
    config = read_config(given.config, given.set)
    method, console = descent_method(config), wide_console()
    console.print("accuracy from several starts ...", style="dim")
    # With contraction 0 the map does not read its states.
    networks = {"equilibrium": config.options, "plain": {**config.options, "contraction": 0.0}}
    accuracy: dict[str, list[float]] = {
        name: [
            descend(make_problem(config.problem, options, given.data), method, start)["test_accuracy"]
            for start in range(given.seeds)
        ]
        for name, options in networks.items()
    }
    found = intervals([dict(zip(accuracy, row, strict=True)) for row in zip(*accuracy.values(), strict=True)])
    test = paired_test(accuracy["equilibrium"], accuracy["plain"])
    rows = [(name, shown(interval, 4)) for name, interval in found.items()]
    rows.append(("difference", shown(test.difference, 4)))
    console.print(table(("network", "test accuracy"), rows), highlight=False)

    problem = make_problem(config.problem, config.options, given.data)
    if not isinstance(problem, LargeUpperLevel):
        raise ConfigError(f"{given.config}: {config.problem} has no upper_variables(); give an equilibrium network")
    # In single precision rounding would hide errors of 1e-7.
    problem.dtype = torch.float64
    descent = BilevelDescent(problem, {"start": 0.0}, method)
    for _ in range(min(20, method.steps)):
        descent.run_step()
    measured = gradients(problem, descent.x.detach())
    lines = [(one.way, f"{one.iterations}", f"{one.saved_bytes / 2**20:.2f}", f"{one.error:.1e}") for one in measured]
    console.print(table(("gradient", "iterations", "MiB saved", "relative error"), lines), highlight=False)
    result = {"accuracy": found, "difference": test, "gradients": [asdict(one) for one in measured]}
    write_json(given.out / "equilibrium.json", result)
    write_figures(charts(measured), given.out / "figures")
    console.print(f"written to {given.out / 'equilibrium.json'}", highlight=False)


if __name__ == "__main__":
    main()
