"""What recycling Krylov subspaces saves on the two experiments of Ehrhardt, Gazzola & Scott, arXiv:2412.08264.

    python -m benchmarks.recycling --data DIR --out DIR

Fields-of-experts filters are learned for (a) inpainting an MNIST digit, (b) deblurring a crop of a photograph, each
with every strategy and three criteria that end a linear solve: the relative residual, the estimated error of the
hypergradient, and its true error, which needs the solution and so is a measurement only, in which all strategies are
equally accurate.

`recycling.json` has the figures at equal true error, both experiments together: iterations in all, and means of the
relative hypergradient error and of the test images' PSNR. DIR/runs has every run; those there are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from raybilevel._linear.krylov import KrylovMemory
from raybilevel._lower.levels import Levels
from raybilevel._lower.variables import ModuleVariables, set_weights, weights_of
from raybilevel.hypergradient import LinearSystem, MinimalResidual, Selection, solve_lower
from raybilevel.problems.imaging import FieldsOfExperts
from raybilevel.report._charts import Chart, Series
from raybilevel.report._static import write_figures

BASELINE = "none_warm_started"
CRITERIA = ("true error", "residual", "estimated error")


@dataclass(frozen=True)
class Experiment:
    """A filter learning problem, and a bilevel descent on it.

    options:   of `FieldsOfExperts`.
    steps, rate: of Adam on the filters and weights.
    residual:  relative residual that ends a solve by that criterion.
    accuracy:  relative error of the hypergradient that ends a solve by the others.
    dimension: of the recycled space; most_vectors: Krylov vectors it is chosen from.
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


@dataclass(frozen=True)
class Run:
    """A whole bilevel descent with one strategy and criterion.

    iterations: of the Krylov method, all solves; products with the Hessian, and jacobians with the Jacobian: those that
        recycling itself takes included.
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
)


def strategies(experiment: Experiment) -> dict[str, MinimalResidual]:
    def recycled(strategy: Any, end: Any) -> MinimalResidual:
        selection = Selection(strategy, end, experiment.dimension, experiment.most_vectors)
        return MinimalResidual(experiment.residual, limit=5000, selection=selection)

    plain = MinimalResidual(experiment.residual, limit=5000, selection=None)
    return {
        "none_cold_started": MinimalResidual(experiment.residual, limit=5000, warm_start=False, selection=None),
        BASELINE: plain,
        "ritz": recycled("ritz", "smallest"),
        "harmonic_ritz": recycled("harmonic_ritz", "smallest"),
        "ritz_generalized_singular": recycled("ritz_generalized_singular", "largest"),
        "ritz_generalized_singular_mixed": recycled("ritz_generalized_singular", "mixed"),
    }


def run(experiment: Experiment, data: str, strategy: str, criterion: str) -> Run:
    """One bilevel descent."""
    solver = strategies(experiment)[strategy]
    if criterion == "estimated error":
        solver = MinimalResidual(experiment.residual, "error", limit=5000, selection=solver.selection)
    problem = FieldsOfExperts(data, **experiment.options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, module = problem.model().to(problem.dtype), problem.upper_variables().to(problem.dtype)
    variables = ModuleVariables(module, {})
    functions = Levels(problem, model, variables)
    x = nn.Parameter(parameters_to_vector(module.parameters()).detach().clone())
    y, adam = weights_of(model), torch.optim.Adam([x], lr=experiment.rate)
    memory: KrylovMemory | None = None
    reference: KrylovMemory | None = None
    # Solves with a memory of its own, `reference`, so that it does not help the solver that is measured.
    exact = MinimalResidual(1e-9, limit=5000, selection=None)
    norm = 0.0
    errors: list[float] = []
    ratios: list[float] = []
    per_step: list[int] = []
    products = jacobians = 0
    seconds = 0.0
    for _ in range(experiment.steps):
        y = solve_lower(functions, x.detach(), y, experiment.lower_tolerance).y
        upper, linear = functions.upper(x.detach(), y), functions.linearise(x.detach(), y)
        # What measures the error is not counted.
        solution, reference = exact.solve(LinearSystem(linear.hessian, upper.in_y, linear.mixed), reference)
        truth = upper.in_x - linear.mixed(solution.solution)
        scale = truth.norm().item()

        def error(q: Tensor, upper: Any = upper, linear: Any = linear, truth: Tensor = truth) -> float:
            return float((upper.in_x - linear.mixed(q) - truth).norm()) / float(truth.norm())

        accept = (lambda q, error=error: error(q) <= experiment.accuracy) if criterion == "true error" else None
        started = time.perf_counter()
        # `norm` is of the step before, as a descent has it. It is 0 in the first, which then ends by the residual.
        system = LinearSystem(linear.hessian, upper.in_y, linear.mixed, experiment.accuracy * norm, accept)
        found, memory = solver.solve(system, memory)
        seconds += time.perf_counter() - started
        per_step.append(found.iterations)
        products += found.products
        jacobians += found.jacobians
        errors.append(error(found.solution))
        if found.error is not None:
            # The estimate is absolute, the error relative.
            ratios.append(found.error / (errors[-1] * scale))
        norm = scale
        x.grad = upper.in_x - linear.mixed(found.solution)
        adam.step()
    y = solve_lower(functions, x.detach(), y, experiment.lower_tolerance).y
    set_weights(model, y)
    metrics = problem.evaluate(model, functions.hyperparameters(x.detach()))
    return Run(
        experiment.name, strategy, criterion, sum(per_step), products, jacobians, mean(errors),
        functions.upper(x.detach(), y).value, metrics["test_psnr"], seconds,
        geometric_mean(ratios) if ratios else 1.0, per_step, x.tolist(),
    )  # fmt: skip


def run_all(experiments: Sequence[Experiment], data: str, out: Path, console: Console) -> list[Run]:
    """Every run, from `out` where it is there for the same experiment."""
    runs: list[Run] = []
    out.mkdir(parents=True, exist_ok=True)
    for criterion in CRITERIA:
        for experiment in experiments:
            settings = {**asdict(experiment), "options": dict(experiment.options)}
            for strategy, solver in strategies(experiment).items():
                selection = solver.selection
                estimates = isinstance(selection, Selection) and selection.estimates_error
                if criterion == "estimated error" and not estimates:
                    continue
                if criterion != "true error" and strategy.endswith(("_mixed", "_cold_started")):
                    continue
                file = out / f"{experiment.name}-{criterion}-{strategy}.json".replace(" ", "_")
                saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
                if saved.get("experiment") == settings:
                    runs.append(Run(**saved["run"]))
                    continue
                record = run(experiment, data, strategy, criterion)
                document = json.dumps({"experiment": settings, "run": asdict(record)})
                file.write_text(document, encoding="utf-8")
                runs.append(record)
                console.print(
                    f"{experiment.name}, {criterion}, {strategy}: {record.iterations} iterations, error "
                    f"{record.hypergradient_error:.2g}", highlight=False, style="dim",
                )  # fmt: skip
    return runs


def table(runs: Sequence[Run]) -> Table:
    shown = Table(box=None, pad_edge=False)
    for column in ("experiment", "ends by", "strategy"):
        shown.add_column(column)
    for column in (
        "iterations",
        "saved",
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
            f"{one.products}", f"{one.jacobians}", f"{one.hypergradient_error:.2g}", estimated,
            f"{one.upper_loss:.4g}", f"{one.psnr:.2f}", f"{distance:.1%}",
        )  # fmt: skip
    return shown


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """At equal true error, by strategy, over both experiments."""
    names = (BASELINE, "ritz", "harmonic_ritz", "ritz_generalized_singular")
    chosen = {n: [r for r in runs if r.strategy == n and r.criterion == "true error"] for n in names}
    return {
        "iterations": {n: sum(r.iterations for r in part) for n, part in chosen.items()},
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
                f"recycling_{experiment.lower().replace(' ', '_')}",
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
        experiments = tuple(Experiment(**{**vars(e), "steps": given.steps}) for e in EXPERIMENTS)
    console = Console(width=200)  # a table in a file keeps its columns
    runs = run_all(experiments, given.data, given.out / "runs", console)
    assert all(math.isfinite(r.upper_loss) for r in runs)
    console.print(table(runs), highlight=False)
    (given.out / "recycling.json").write_text(json.dumps(summary(runs), indent=2) + "\n", encoding="utf-8")
    write_figures(figures(runs), given.out / "figures")
    console.print(f"written to {given.out / 'recycling.json'}")


if __name__ == "__main__":
    main()
