"""Architectures found by a continuous relaxation against random ones of the same space, at equal cost.

    python -m benchmarks.architecture --out DIR                                        digits
    python -m benchmarks.architecture --config configs/architecture_cifar.yaml --data DIR --out DIR

For each seed (of the split, the weights and the draws): a descent of the config, whose architecture is then trained
from random weights; and random architectures, each trained the same way. Cost is in trainings of one architecture,
counted in two ways: a gradient of the mixed network over the training images costs as much as one of a single
architecture; or as many times more as it has multiply-adds. For as much as search and training cost by either count,
random search trains so many architectures, rounded up, and takes the one with the lowest validation loss.

DIR gets architecture.json, a figure, and runs/, a file for each measurement; those that are there are not made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import mean
from typing import Any

import torch

from benchmarks.families import (
    arguments_parser,
    descent_method,
    intervals,
    kept,
    run_to_end,
    shown,
    table,
    wide_console,
    write_json,
)
from raybilevel._config.experiment import ExperimentConfig, read_config, resolved
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.problems import make_problem
from raybilevel.problems.architecture import OPERATIONS, Architecture, edges, genotype, random_genotype
from raybilevel.report._charts import Chart, Series
from raybilevel.report._static import write_figures
from raybilevel.report._statistics import paired_test

NAMES = {
    "learned": "learned by a descent",
    "random_mean": "random, mean",
    "random_by_gradients": "random, best of as many gradients",
    "random_by_operations": "random, best of as many multiply-adds",
    "largest": "3x3 convolution on every edge",
}


def problem_of(config: ExperimentConfig, data: str | None, seed: int) -> Architecture:
    problem = make_problem(config.problem, {**config.options, "split_seed": seed}, data)
    assert isinstance(problem, Architecture)
    return problem


def learned(problem: Architecture, config: ExperimentConfig, seed: int) -> dict[str, Any]:
    """A descent, what became of it, and what it cost in trainings of one architecture: by gradients, and by
    multiply-adds of a mean random architecture."""
    descent = run_to_end(BilevelDescent(problem, {"start": float(seed)}, descent_method(config)))
    gradients = descent.passes / problem.training_epochs
    found = descent.conclude()
    count = len(edges(problem.nodes))
    # Of the stem alone, and with every operation on every edge.
    none, mixed = (problem.multiply_adds([few] * count) for few in ((), tuple(OPERATIONS)))
    random = none + (mixed - none) / len(OPERATIONS)  # the mean: an edge has each operation as often
    chosen = descent.levels.hyperparameters(descent.best[1])["upper"]
    return {
        **found,
        "architecture": list(genotype(chosen)),
        # One for the training of the architecture that was found.
        "cost_gradients": 1 + gradients,
        "cost_operations": 1 + gradients * mixed / random,
    }


def single(problem: Architecture, operations: Sequence[str], seed: int) -> dict[str, Any]:
    return {**problem.trained(tuple(operations), seed), "architecture": list(operations)}


def best(trained: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return min(trained, key=lambda one: one["validation_loss"])


def chart(rows: Sequence[dict[str, Any]], source: str) -> Chart:
    """Random search by cost, and the descent at its own."""
    counts = list(range(1, min(len(row["random"]) for row in rows) + 1))
    searched = [
        intervals([{"accuracy": best(row["random"][:count])["test_accuracy"]} for row in rows])["accuracy"]
        for count in counts
    ]
    ours = intervals([row["test"] for row in rows])["learned"]
    costs = [mean(row["learned"][name] for row in rows) for name in ("cost_gradients", "cost_operations")]
    return Chart(
        f"architecture_{source}",
        f"Architectures on {source}: test accuracy by cost",
        "Random search by its number of trainings; the descent at its cost, counted in gradients (left point) and in "
        "multiply-adds (right point). Means over seeds with 95 % intervals.",
        f"Random search ends at {searched[-1].mean:.3f} after {counts[-1]} trainings; the descent has "
        f"{ours.mean:.3f} at a cost of {costs[0]:.1f} or {costs[1]:.1f}.",
        "cost, in trainings of one architecture",
        "test accuracy",
        (
            Series(
                "random search", "line", counts, [one.mean for one in searched],
                low=[one.ends[0] for one in searched], high=[one.ends[1] for one in searched],
                colour=7,
            ),
            Series("learned by a descent", "points", costs, [ours.mean] * 2, strong=True),
        ),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = arguments_parser("architecture", __doc__.splitlines()[0], "configs/architecture.yaml", 3)
    given = parser.parse_args(arguments)
    config, console = read_config(given.config, given.set), wide_console()
    settings = resolved(config)
    rows: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        problem = problem_of(config, given.data, seed)
        name = f"{problem.source}-{seed}"
        ours = kept(given.out / "runs" / f"{name}.json", settings, partial(learned, problem, config, seed))
        console.print(f"seed {seed}: {', '.join(ours['architecture'])}: {ours['test_accuracy']:.3f}", style="dim")
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for number in range(math.ceil(ours["cost_operations"])):
            one = random_genotype(problem.nodes, generator)
            file = given.out / "runs" / f"{name}-random-{number}.json"
            drawn.append(kept(file, settings, partial(single, problem, one, seed)))
        all_same = ("convolution_3",) * len(edges(problem.nodes))
        largest = kept(given.out / "runs" / f"{name}-largest.json", settings, partial(single, problem, all_same, seed))
        test = {
            "learned": ours["test_accuracy"],
            "random_mean": mean(one["test_accuracy"] for one in drawn),
            # The first of those drawn: by gradients the cost is lower, as the mixed network has more multiply-adds.
            "random_by_gradients": best(drawn[: math.ceil(ours["cost_gradients"])])["test_accuracy"],
            "random_by_operations": best(drawn)["test_accuracy"],
            "largest": largest["test_accuracy"],
        }
        rows.append({"seed": seed, "test": test, "learned": ours, "random": drawn, "largest": largest})
    means = intervals([row["test"] for row in rows])
    lines = []
    for key, name in NAMES.items():
        less = paired_test([row["test"]["learned"] for row in rows], [row["test"][key] for row in rows]).difference
        lines.append((name, shown(means[key]), "" if key == "learned" else shown(less)))
    console.print(table(("architecture", "test accuracy", "learned less this"), lines), highlight=False)
    gradients, operations = (
        mean(row["learned"][f"cost_{count}"] for row in rows) for count in ("gradients", "operations")
    )
    said = f"search and training cost {gradients:.1f} trainings by gradients, {operations:.1f} by multiply-adds"
    console.print(said, highlight=False)
    write_json(
        given.out / "architecture.json", {"seeds": given.seeds, "settings": settings, "means": means, "rows": rows}
    )
    write_figures([chart(rows, problem.source)], given.out / "figures")
    console.print(f"written to {given.out / 'architecture.json'}", highlight=False)


if __name__ == "__main__":
    main()
