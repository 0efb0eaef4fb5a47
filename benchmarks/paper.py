"""The published experiment of the augmented Lagrangian scheme, by its own protocol and by ours.

    python -m benchmarks.paper --data DIR --out DIR [--sizes 1K 5K 10K] [--decays 1 2] [--seeds N]

A. Sinha, S. Gunwal & S. Kumar, arXiv:2208.12118: weight decays of a perceptron 784-100-10, one or one for each layer,
on MNIST with 1,000 examples (their own split), 5,000 and 10,000 (drawn by the seed, three of five for training). They
report the test loss at the end of each descent in (x, y), whose weights have seen the validation data. Beside it stands
what a user gets: the test loss of trained weights at the same x, and that of a refit on all data. The searches by
`default` and by random points have the cost of the scheme.

DIR gets paper.json; DIR/runs has every run, and those there are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.families import intervals, kept, shown, table, wide_console, write_json
from benchmarks.objective import BudgetSpent, Objective
from benchmarks.ours import bilevel
from raybilevel._lower.training import refit, train
from raybilevel.methods import make_method
from raybilevel.methods._base import LoadCheckpoint, Method, UpperResult, UpperStep
from raybilevel.problem import BilevelProblem, evaluate, make_model
from raybilevel.problems.mnist import Mnist, Mnist1K, MnistPerceptron
from raybilevel.search import check_problem, search
from raybilevel.search._optimizer import BilevelOptimizer
from raybilevel.space import Space

SIZES = {"1K": 1000, "5K": 5000, "10K": 10_000}
PUBLISHED = {"1K": "0.365, 0.368", "5K": "0.204", "10K": "0.171 to 0.174"}
"""Test losses with two decays, from the authors' notebooks (SGunwal/Bilevel_Hyperparameter_Optimization)."""
OURS = "raybilevel"


def problem_of(size: str, decays: int, seed: int, data: str | None) -> MnistPerceptron:
    share = "layer" if decays == 2 else "all"
    if size == "1K":
        return Mnist1K(data, share=share)  # type: ignore[arg-type]
    lower = SIZES[size] * 3 // 5
    return Mnist(data, train=lower, validation=SIZES[size] - lower, split_seed=seed, share=share)


class Watched(BilevelOptimizer):
    """A search by the scheme, and the test loss at the end of each of its descents."""

    ends: list[float]

    def run(
        self, problem: BilevelProblem, constants: Mapping[str, Any], step: UpperStep, load: LoadCheckpoint
    ) -> UpperResult:
        result = super().run(problem, constants, step, load)
        assert result.memory is not None
        end = torch.load(io.BytesIO(result.memory), weights_only=True)
        config = self.space.to_config(end["unit"])
        model = make_model(problem, config)
        model.load_state_dict(end["model"])
        self.ends.append(evaluate(problem, model.eval(), config)["test_loss"])
        return result


def published(problem: BilevelProblem, seed: int, method: Method | None = None) -> dict[str, float]:
    """The scheme: the test loss at the end of the descent that it chooses, by |c|, and the lowest of its five descents,
    and of its result what is asked of every method."""
    optimizer = Watched(space_of(problem), method or make_method("paper"), seed)
    optimizer.ends = []
    search(problem, optimizer, cost=float("inf"))
    result = optimizer.best
    assert result is not None
    found = refitted(problem, optimizer.config_of(result), seed)
    iterates = [t.index for t in optimizer.state.trainings if t.proposal.violation is not None]
    chosen = optimizer.ends[iterates.index(result.index)]
    ends = {"end_of_descent": chosen, "lowest_end": min(optimizer.ends)}
    return {**ends, "upper_loss": result.upper_loss, **found, "cost": optimizer.state.cost}


def space_of(problem: BilevelProblem) -> Space:
    assert problem.space is not None
    return check_problem(problem, problem.space)


def refitted(problem: BilevelProblem, config: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Test losses of the trained weights and of a refit."""
    trained, _ = train(problem, config, seed)
    again = refit(problem, config, seed)
    assert again is not None
    return {"test_loss": trained.metrics["test_loss"], "refit": again["test_loss"]}


def searched(method: str, problem: BilevelProblem, seed: int, cost: float) -> dict[str, float]:
    objective = Objective(problem, space_of(problem), seed, cost)
    with contextlib.suppress(BudgetSpent):
        if method == OURS:
            bilevel(objective, seed, method="default", settings={})
        else:
            peers.random(objective, seed)
    observations = objective.observations()
    best = observations[observations[-1].incumbent]
    assert best.upper_loss is not None
    unit = torch.tensor(best.unit, dtype=torch.double)
    return {"upper_loss": best.upper_loss, **refitted(problem, objective.space.to_config(unit), seed), "cost": cost}


def rows_of(name: str, found: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    means = intervals(found)
    keys = ("end_of_descent", "lowest_end", "upper_loss", "test_loss", "refit", "cost")
    return (name, *(shown(means[key]) if key in means else "" for key in keys))


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the data files")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--decays", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--seeds", type=int, default=3, help="how many, by default %(default)s")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the networks are small
    console, result = wide_console(), {}
    for size in given.sizes:
        for decays in given.decays:
            found: dict[str, list[dict[str, float]]] = {"paper": [], OURS: [], "random": []}
            for seed in range(given.seeds):
                problem = problem_of(size, decays, seed, given.data)
                folder = given.out / "runs" / f"{size}-{decays}-{seed}"
                found["paper"].append(kept(folder / "paper.json", "1", partial(published, problem, seed)))
                cost = found["paper"][-1]["cost"]
                for name in (OURS, "random"):
                    run = partial(searched, name, problem, seed, cost)
                    found[name].append(kept(folder / f"{name}.json", f"cost {cost:g}", run))
                console.print(f"{size}, {decays} decays, seed {seed}", style="dim")
            known = PUBLISHED[size] if decays == 2 else "not known"
            console.print(f"{size}, {decays} decays, {given.seeds} seeds; published test loss: {known}")
            heads = ("method", "end of a descent", "lowest of five", "F", "test loss", "after a refit", "cost")
            console.print(table(heads, [rows_of(name, runs) for name, runs in found.items()]), highlight=False)
            result[f"{size}, {decays}"] = found
    write_json(given.out / "paper.json", {"seeds": given.seeds, **result})
    console.print(f"written to {given.out / 'paper.json'}", highlight=False)


if __name__ == "__main__":
    main()
