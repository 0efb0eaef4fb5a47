"""Weights of the terms of physics-informed losses: tuned, balanced while training, or all 1.

    python -m benchmarks.physics --out DIR [--equations burgers helmholtz] [--seeds N] [--cost N]

Each seed draws points, noise and initial weights anew. Searches have the same cost in trainings, and their result is
the training with the lowest F; raybilevel's is the one that it returns. The error is that on a grid, relative to u = 0.
DIR gets physics.json; DIR/runs has every run, and those there are not run again.

Two heuristics set the weights while the network trains, before each call of L-BFGS: by the largest gradient of the
residual over the mean gradient of a term ("gradient norms", Wang, Teng & Perdikaris 2021, Algorithm 1), or by traces of
the neural tangent kernel (Wang, Yu & Perdikaris 2022, J. Comput. Phys. 449). They weigh the measurements, too. Both
begin at weights of 1.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks import peers
from benchmarks.families import intervals, kept, shown, table, wide_console, write_json
from benchmarks.objective import BudgetSpent, Objective
from benchmarks.ours import bilevel
from raybilevel.problems.physics import EQUATIONS, PhysicsInformed, Points
from raybilevel.report._statistics import paired_test

OURS = "raybilevel"
MEASURED = "measured"
"""The term of the measurements, beside those that have weights."""
MEMORY = 0.1
"""Of gradient norms: the share of the new weights in the running mean; the paper's alpha is 1 less this."""
Terms = Mapping[str, Tensor]


def losses(problem: PhysicsInformed, model: nn.Module, points: Points) -> dict[str, Tensor]:
    return {**problem.losses(model, points), MEASURED: problem.upper_loss(model, points)}


def by_gradient_norms(
    problem: PhysicsInformed, model: nn.Module, points: Points, before: Mapping[str, float]
) -> dict[str, float]:
    gradients = {
        name: parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)).abs()
        for name, loss in losses(problem, model, points).items()
    }
    largest = gradients["residual"].max()
    wanted = {name: float(largest / (before[name] * g.mean())) for name, g in gradients.items() if name != "residual"}
    return {"residual": 1.0, **{name: (1 - MEMORY) * before[name] + MEMORY * new for name, new in wanted.items()}}


def by_tangent_kernel(
    problem: PhysicsInformed, model: nn.Module, points: Points, before: Mapping[str, float]
) -> dict[str, float]:
    outputs = {
        "residual": problem.residuals(model, points.inside),
        **{name: model(at) for name, at in points.edges.items()},
        MEASURED: model(points.at),
    }
    # The trace of a term's kernel: the squared gradients of all its outputs, here per output, as terms are means.
    traces = {name: squared_gradients(model, values) / len(values) for name, values in outputs.items()}
    total = sum(traces.values())
    return {name: total / trace for name, trace in traces.items()}


def squared_gradients(model: nn.Module, outputs: Tensor) -> float:
    parts = torch.autograd.grad(
        outputs.flatten(), list(model.parameters()), torch.eye(outputs.numel(), dtype=outputs.dtype),
        is_grads_batched=True, materialize_grads=True,
    )  # fmt: skip
    return sum(part.square().sum().item() for part in parts)


Rule = Callable[[PhysicsInformed, nn.Module, Points, Mapping[str, float]], dict[str, float]]


def balanced(rule: Rule, problem: PhysicsInformed, seed: int) -> dict[str, float]:
    """One training whose weights follow a rule."""
    torch.manual_seed(seed)
    model, points = problem.model().to(problem.dtype), problem.data["lower"]
    weights = dict.fromkeys(("residual", *points.edges, MEASURED), 1.0)
    for _ in range(problem.epochs):
        weights = rule(problem, model, points, weights)
        optimizer = problem.optimizer(model)

        def closure(optimizer: Any = optimizer, weights: Mapping[str, float] = weights) -> float:
            optimizer.zero_grad()
            terms = losses(problem, model, points)
            # Scaled, so that the first step of L-BFGS is of the usual length.
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum() / max(weights.values())
            loss.backward()
            return loss.item()

        optimizer.step(closure)
    with torch.no_grad():
        upper = problem.upper_loss(model, problem.data["upper"]).item()
    return {"upper_loss": upper, **problem.evaluate(model)}


def searched(
    search: Callable[[Objective, int], Any], cost: float, problem: PhysicsInformed, seed: int
) -> dict[str, float]:
    """What the result of a search has reported."""
    objective = Objective(problem, problem.space, seed, cost)
    with contextlib.suppress(BudgetSpent):
        search(objective, seed)
    observations = objective.observations()
    best = observations[observations[-1].incumbent]
    assert best.upper_loss is not None
    return {"upper_loss": best.upper_loss, **best.metrics}


def equal(objective: Objective, seed: int) -> None:
    objective.value(torch.full((objective.space.dimension,), 0.5, dtype=torch.double))  # 1, the middle of the box


def methods(cost: float) -> dict[str, Callable[[PhysicsInformed, int], dict[str, float]]]:
    ours = partial(bilevel, method="default", settings={})
    searches: dict[str, Callable[[Objective, int], Any]] = {
        "one shared weight": peers.diagonal,
        "random": peers.random,
        "TPE": peers.optuna_tpe,
        OURS: ours,
    }
    return {
        "all 1": partial(searched, equal, 1),
        "gradient norms": partial(balanced, by_gradient_norms),
        "tangent kernel": partial(balanced, by_tangent_kernel),
        **{name: partial(searched, search, cost) for name, search in searches.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.physics", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--equations", nargs="+", choices=EQUATIONS, default=[*EQUATIONS])
    parser.add_argument("--seeds", type=int, default=5, help="how many, by default %(default)s")
    parser.add_argument("--cost", type=float, default=20, help="of a search, in trainings, by default %(default)s")
    given = parser.parse_args(arguments)
    console, result = wide_console(), {}
    torch.set_num_threads(1)  # the networks are small
    for equation in given.equations:
        rows: list[dict[str, dict[str, float]]] = []
        for seed in range(given.seeds):
            problem = PhysicsInformed(equation, data_seed=100 + seed)
            found = {}
            for name, method in methods(given.cost).items():
                file = given.out / "runs" / f"{equation}-{seed}-{name.replace(' ', '-')}.json"
                found[name] = kept(file, f"cost {given.cost:g}", partial(method, problem, seed))
                console.print(f"{equation} {seed} {name}: {found[name]['relative_error']:.3g}", style="dim")
            rows.append(found)
        errors = [{name: one["relative_error"] for name, one in row.items()} for row in rows]
        means = intervals(errors)
        upper = intervals([{name: one["upper_loss"] for name, one in row.items()} for row in rows])
        tests = {name: paired_test([e[name] for e in errors], [e[OURS] for e in errors]) for name in means}
        lines = [
            (name, shown(means[name]), shown(upper[name], 4), "" if name == OURS else shown(tests[name].difference))
            for name in means
        ]
        console.print(equation)
        console.print(table(("weights", "relative error", "F", f"error less that of {OURS}"), lines), highlight=False)
        result[equation] = {"relative_error": means, "upper_loss": upper, "paired": tests, "rows": rows}
    write_json(given.out / "physics.json", {"seeds": given.seeds, "cost": given.cost, **result})
    console.print(f"written to {given.out / 'physics.json'}", highlight=False)


if __name__ == "__main__":
    main()
