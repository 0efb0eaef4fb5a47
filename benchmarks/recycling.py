"""What recycling Krylov subspaces saves on the two experiments of Ehrhardt, Gazzola & Scott, arXiv:2412.08264.

    python -m benchmarks.recycling --data DIR --out DIR

Fields-of-experts filters are learned for inpainting an MNIST digit and for deblurring a crop of a photograph, each with
every strategy and three criteria that end a linear solve: the relative residual, the estimated error of the
hypergradient, and its true error, which needs the solution and so is a measurement only, in which all strategies are
equally accurate. The strategies of an experiment take their steps in turn, in one process, so that their times can be
compared on a busy machine.

`recycling.json` has the figures at equal true error, the first two experiments together: iterations and seconds in all,
and means of the relative hypergradient error and of the test images' PSNR. DIR/runs has every run; those there are not
run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import geometric_mean, mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from raybilevel._linear.krylov import KrylovMemory
from raybilevel._lower.levels import Levels
from raybilevel._lower.variables import ModuleVariables, set_weights, weights_of
from raybilevel.hypergradient import LinearSolution, LinearSystem, MinimalResidual, Selection, solve_lower
from raybilevel.problems.imaging import FieldsOfExperts
from raybilevel.report._charts import Chart, Series
from raybilevel.report._static import write_figures

BASELINE = "none_warm_started"
AUTO = "auto"
CRITERIA = ("true error", "residual", "estimated error")


@dataclass(frozen=True)
class Experiment:
    """A filter learning problem, and a bilevel descent on it.

    options:   of `FieldsOfExperts`.
    steps, rate: of Adam on the filters and weights.
    residual:  relative residual that ends a solve by that criterion.
    accuracy:  relative error of the hypergradient that ends a solve by the others.
    dimension: of the recycled space; most_vectors: Krylov vectors it is chosen from.
    whole:     with every strategy and criterion; else a few strategies, at equal true error.
    """

    name: str
    options: Mapping[str, Any]
    steps: int
    rate: float
    residual: float
    accuracy: float
    dimension: int
    most_vectors: int = 60
    lower_tolerance: float = 1e-3
    whole: bool = True


@dataclass(frozen=True)
class Run:
    """A whole bilevel descent with one strategy and criterion.

    iterations: of the Krylov method, all solves; products with the Hessian, and jacobians with the Jacobian: those that
        recycling itself takes included. seconds: of all solves, without what measures the error.
    hypergradient_error: true, relative, mean over the steps; upper_loss: F at the end.
    estimated: estimate of the hypergradient's error over the true one, geometric mean over the steps that have one;
        1 where there is none.
    x:        filters and logarithms of weights at the end.
    """

    experiment: str
    strategy: str
    criterion: str
    iterations: int
    products: int
    jacobians: int
    hypergradient_error: float
    upper_loss: float
    psnr: float
    seconds: float
    estimated: float = 1.0
    per_step: list[int] = field(default_factory=list)
    x: list[float] = field(default_factory=list)


EXPERIMENTS = (
    Experiment(
        "MNIST inpainting",
        {"task": "inpainting", "noise": 0.1},
        steps=150,
        rate=0.02,
        residual=1e-3,
        accuracy=0.01,
        dimension=30,
    ),
    Experiment(
        "BSDS deblurring",
        {
            "task": "deblurring",
            "filters": 24,
            "start_weight": 0.01,
            "noise": 0.05,
            "blur": 3.0,
            "size": 48,
            "smoothing": 0.05,
        },
        steps=50,
        rate=0.01,
        residual=1e-3,
        accuracy=0.01,
        dimension=30,
    ),
    # The size, expert, noise and step length of the authors' program, with one crop.
    Experiment(
        "BSDS 64, Lorentzian",
        {
            "task": "deblurring",
            "filters": 24,
            "start_weight": 0.1,
            "noise": 0.2,
            "blur": 3.0,
            "size": 64,
            "smoothing": 0.1,
            "expert": "lorentzian",
        },
        steps=20,
        rate=0.01,
        residual=1e-3,
        accuracy=0.01,
        dimension=30,
        whole=False,
    ),
    # A regulariser with nearly a kink: solves take a hundred iterations.
    Experiment(
        "MNIST, ill-conditioned",
        {"task": "inpainting", "noise": 0.1, "smoothing": 0.001},
        steps=12,
        rate=0.02,
        residual=1e-3,
        accuracy=0.01,
        dimension=30,
        whole=False,
    ),
)


def strategies(experiment: Experiment) -> dict[str, MinimalResidual]:
    def recycled(strategy: Any, end: Any) -> MinimalResidual:
        selection = Selection(strategy, end, experiment.dimension, experiment.most_vectors)
        return MinimalResidual(experiment.residual, limit=5000, selection=selection)

    def without(warm_start: bool) -> MinimalResidual:
        return MinimalResidual(experiment.residual, limit=5000, warm_start=warm_start, selection=None)

    return {
        "none_cold_started": without(warm_start=False),
        BASELINE: without(warm_start=True),
        AUTO: MinimalResidual(experiment.residual, limit=5000),
        "ritz": recycled("ritz", "smallest"),
        "harmonic_ritz": recycled("harmonic_ritz", "smallest"),
        "ritz_generalized_singular": recycled("ritz_generalized_singular", "largest"),
        "ritz_generalized_singular_mixed": recycled("ritz_generalized_singular", "mixed"),
    }


def ended_by(experiment: Experiment, criterion: str, strategy: str, solver: MinimalResidual) -> MinimalResidual | None:
    """The strategy with that criterion; None if it has none, or is not measured with it."""
    if criterion == "true error" and experiment.whole:
        return solver
    if strategy.endswith(("_mixed", "_cold_started")):
        return None
    if criterion == "true error":
        return None if strategy == "harmonic_ritz" else solver
    if criterion == "residual":
        return solver
    if not (isinstance(solver.selection, Selection) and solver.selection.estimates_error):
        return None
    return replace(solver, criterion="error")


class Descent:
    """A bilevel descent with one strategy and criterion, step by step."""

    def __init__(self, experiment: Experiment, data: str, criterion: str, solver: MinimalResidual) -> None:
        self.experiment, self.criterion, self.solver = experiment, criterion, solver
        self.problem = FieldsOfExperts(data, **experiment.options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model, module = self.problem.model(), self.problem.upper_variables()
        self.model, module = self.model.to(self.problem.dtype), module.to(self.problem.dtype)
        self.functions = Levels(self.problem, self.model, ModuleVariables(module, {}))
        self.x = nn.Parameter(parameters_to_vector(module.parameters()).detach().clone())
        self.y, self.adam = weights_of(self.model), torch.optim.Adam([self.x], lr=experiment.rate)
        self.memory: KrylovMemory | None = None
        # Solves with a memory of its own, so that it does not help the solver that is measured.
        self.exact = MinimalResidual(1e-8, limit=5000)
        self.reference: KrylovMemory | None = None
        self.norm = self.seconds = 0.0
        self.errors: list[float] = []
        self.ratios: list[float] = []
        self.solved: list[LinearSolution] = []

    def step(self) -> None:
        experiment, x = self.experiment, self.x.detach()
        self.y = solve_lower(self.functions, x, self.y, experiment.lower_tolerance).y
        upper, linear = self.functions.upper(x, self.y), self.functions.linearise(x, self.y)
        # What measures the error is not counted.
        system = LinearSystem(linear.hessian, upper.in_y, linear.mixed)
        solution, self.reference = self.exact.solve(system, self.reference)
        truth = upper.in_x - linear.mixed(solution.solution)
        scale = truth.norm().item()
        measuring = 0.0

        def error(q: Tensor) -> float:
            return float((upper.in_x - linear.mixed(q) - truth).norm().item() / scale)

        def accept(q: Tensor) -> bool:
            nonlocal measuring
            started = time.perf_counter()
            accepted = error(q) <= experiment.accuracy
            measuring += time.perf_counter() - started
            return accepted

        # `norm` is of the step before, as a descent has it. It is 0 in the first, which then ends by the residual.
        target, ends = experiment.accuracy * self.norm, accept if self.criterion == "true error" else None
        started = time.perf_counter()
        found, self.memory = self.solver.solve(replace(system, target=target, accept=ends), self.memory)
        self.seconds += time.perf_counter() - started - measuring
        self.solved.append(found)
        self.errors.append(error(found.solution))
        if found.error is not None:
            # The estimate is absolute, the error relative.
            self.ratios.append(found.error / (self.errors[-1] * scale))
        self.norm = scale
        self.x.grad = upper.in_x - linear.mixed(found.solution)
        self.adam.step()

    def result(self, strategy: str) -> Run:
        x, per_step = self.x.detach(), [found.iterations for found in self.solved]
        y = solve_lower(self.functions, x, self.y, self.experiment.lower_tolerance).y
        set_weights(self.model, y)
        metrics = self.problem.evaluate(self.model, self.functions.hyperparameters(x))
        return Run(
            self.experiment.name, strategy, self.criterion, sum(per_step),
            sum(found.products for found in self.solved), sum(found.jacobians for found in self.solved),
            mean(self.errors), self.functions.upper(x, y).value, metrics["test_psnr"], self.seconds,
            geometric_mean(self.ratios) if self.ratios else 1.0, per_step, x.tolist(),
        )  # fmt: skip


def run_all(experiments: Sequence[Experiment], data: str, out: Path, console: Console) -> list[Run]:
    """Every run, from `out` where it is there for the same experiment."""
    runs: list[Run] = []
    out.mkdir(parents=True, exist_ok=True)
    for criterion in CRITERIA:
        for experiment in experiments:
            if criterion != "true error" and not experiment.whole:
                continue
            file = out / f"{experiment.name}-{criterion}.json".replace(" ", "_")
            settings = {**asdict(experiment), "options": dict(experiment.options)}
            saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            if saved.get("experiment") != settings:
                found = run_together(experiment, data, criterion)
                saved = {"experiment": settings, "runs": [asdict(one) for one in found]}
                file.write_text(json.dumps(saved), encoding="utf-8")
                console.print(f"{experiment.name}, {criterion}: done", highlight=False, style="dim")
            runs += [Run(**one) for one in saved["runs"]]
    return runs


def run_together(experiment: Experiment, data: str, criterion: str) -> list[Run]:
    """All strategies of an experiment with one criterion, a step of each in turn."""
    descents = {
        strategy: Descent(experiment, data, criterion, solver)
        for strategy, start in strategies(experiment).items()
        if (solver := ended_by(experiment, criterion, strategy, start)) is not None
    }
    for _ in range(experiment.steps):
        for descent in descents.values():
            descent.step()
    return [descent.result(strategy) for strategy, descent in descents.items()]


def batched_products(experiment: Experiment, data: str, count: int = 10, repeats: int = 15) -> dict[str, float]:
    """Time of one batched product with `count` vectors, in units of that many single ones: with H and with J."""
    descent = Descent(experiment, data, "residual", MinimalResidual())
    x, y = descent.x.detach().requires_grad_(), descent.y.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(descent.functions.loss_at("lower", x, y), y, create_graph=True)
    directions = torch.randn(count, len(y), generator=torch.Generator().manual_seed(0), dtype=y.dtype)

    def seconds(wrt: Tensor, given: Sequence[Tensor], batched: bool) -> float:
        started = time.perf_counter()
        for one in given:
            torch.autograd.grad(gradient, wrt, one, retain_graph=True, is_grads_batched=batched)
        return time.perf_counter() - started

    ratios: dict[str, list[float]] = {"H": [], "J": []}
    for _ in range(repeats):
        for name, wrt in (("H", y), ("J", x)):
            ratios[name].append(seconds(wrt, [directions], True) / seconds(wrt, list(directions), False))
    return {name: median(values) for name, values in ratios.items()}


def table(runs: Sequence[Run]) -> Table:
    shown = Table(box=None, pad_edge=False)
    for column in ("experiment", "ends by", "strategy"):
        shown.add_column(column)
    for column in (
        "iterations",
        "saved",
        "seconds",
        "time",
        "H products",
        "J products",
        "error",
        "estimated",
        "F",
        "test PSNR",
        "filters",
    ):
        shown.add_column(column, justify="right")
    for one in runs:
        # The baseline has no estimate, so there it ends by the residual.
        peer = "residual" if one.criterion == "estimated error" else one.criterion
        base = next(r for r in runs if (r.experiment, r.strategy, r.criterion) == (one.experiment, BASELINE, peer))
        saved = 1 - one.iterations / base.iterations
        distance = math.dist(one.x, base.x) / math.hypot(*base.x)
        estimated = f"{one.estimated:.2f}" if one.strategy.startswith("ritz_generalized") else ""
        shown.add_row(
            one.experiment, one.criterion, one.strategy, f"{one.iterations}", f"{saved:.0%}",
            f"{one.seconds:.2f}", f"{one.seconds / base.seconds:.2f}",
            f"{one.products}", f"{one.jacobians}", f"{one.hypergradient_error:.2g}", estimated,
            f"{one.upper_loss:.4g}", f"{one.psnr:.2f}", f"{distance:.1%}",
        )  # fmt: skip
    return shown


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """At equal true error, by strategy, over the first two experiments."""
    names = (BASELINE, AUTO, "ritz", "harmonic_ritz", "ritz_generalized_singular")
    whole = {e.name for e in EXPERIMENTS if e.whole}
    equal = [r for r in runs if r.experiment in whole and r.criterion == "true error"]
    chosen = {n: [r for r in equal if r.strategy == n] for n in names}
    return {
        "iterations": {n: sum(r.iterations for r in part) for n, part in chosen.items()},
        "seconds": {n: sum(r.seconds for r in part) for n, part in chosen.items()},
        "hypergradient_error": {n: mean(r.hypergradient_error for r in part) for n, part in chosen.items()},
        "psnr": {n: mean(r.psnr for r in part) for n, part in chosen.items()},
    }


def figures(runs: Sequence[Run]) -> list[Chart]:
    """Krylov iterations so far by step, at equal true error: one chart an experiment."""
    charts = []
    for experiment in dict.fromkeys(one.experiment for one in runs):
        chosen = [one for one in runs if (one.experiment, one.criterion) == (experiment, "true error")]
        series = [
            Series(
                one.strategy.replace("_", " "), "line", list(range(1, len(one.per_step) + 1)),
                list(accumulate(one.per_step)), colour=number,
            )
            for number, one in enumerate(chosen)
        ]  # fmt: skip
        last = ", ".join(f"{one.strategy.replace('_', ' ')} {one.iterations}" for one in chosen)
        charts.append(
            Chart(
                f"recycling_{experiment.lower().replace(',', '').replace(' ', '_')}",
                f"{experiment}: Krylov iterations of all solves so far",
                "Every solve ends at the same true error of the hypergradient.",
                f"Rising lines, one a strategy; at the end: {last}.",
                "step of the bilevel descent",
                "iterations",
                tuple(series),
            )
        )
    return charts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recycling", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with mnist/ and bsds_crops.npz")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--steps", type=int, help="bilevel steps of each experiment, to try it out")
    given = parser.parse_args(arguments)
    experiments: tuple[Experiment, ...] = EXPERIMENTS
    if given.steps is not None:
        experiments = tuple(replace(e, steps=given.steps) for e in EXPERIMENTS)
    console = Console(width=200)  # a table in a file keeps its columns
    runs = run_all(experiments, given.data, given.out / "runs", console)
    assert all(math.isfinite(r.upper_loss) for r in runs)
    console.print(table(runs), highlight=False)
    for experiment in experiments:
        ratio = batched_products(experiment, given.data)
        console.print(
            f"{experiment.name}: one batched product of ten takes {ratio['H']:.2f} of ten single ones with H, "
            f"{ratio['J']:.2f} with J", highlight=False,
        )  # fmt: skip
    (given.out / "recycling.json").write_text(json.dumps(summary(runs), indent=2) + "\n", encoding="utf-8")
    write_figures(figures(runs), given.out / "figures")
    console.print(f"written to {given.out / 'recycling.json'}")


if __name__ == "__main__":
    main()
