"""Hyper-cleaning of MNIST with 5,000 weights, by the published protocol: ours and V-PBGD.

    python -m benchmarks.example_weights --data DIR --out DIR [--hidden 300] [--seeds N] [--iterations N]

5,000 training examples, half of them with wrong labels, 5,000 clean ones and the 10,000 test images. Scores are the
test accuracy and the F1 of finding the examples with right labels (weight above a half). Published scores are those of
the step that is best on test data, so both are given: there, and at the result. Ours is at the x with the lowest F,
with weights trained from scratch, V-PBGD's at its last iteration, whose weights descend on clean examples as well.

V-PBGD is Shen & Chen 2023 (arXiv:2302.05185), with the step sizes, penalties and iterations of the authors' code.
"equal weights" is the same model on all training examples, "clean examples alone" on the 5,000 of F. A refit of the
linear model has the training examples with their weights and the clean ones with 1.

DIR gets example_weights.json; DIR/runs has every run, and those there are not run again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.families import (
    arguments_parser,
    descent_method,
    intervals,
    kept,
    shown,
    table,
    wide_console,
    write_json,
)
from raybilevel._config.experiment import read_config, resolved
from raybilevel.hypergradient import DescentSettings
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.problem import make_model
from raybilevel.problems.example_weights import ExampleWeights, Weights

LEARNING_RATE, INNER_RATE, MOST_PENALTY, GROWING = 0.1, 0.01, 0.2, 30_000
"""Of V-PBGD: of x and y, of the lower level's own weights, of the penalty, and iterations in which it grows from 0."""
ITERATIONS = 40_000
LOOKS = 200
"""Iterations of V-PBGD between two looks at the test data."""
SCORES = ("test_accuracy", "f1")
Scores = dict[str, float]


class Best:
    """The scores that are best by test accuracy, of all steps."""

    def __init__(self) -> None:
        self.scores: Scores = dict.fromkeys(SCORES, 0.0)

    def see(self, scores: Mapping[str, float]) -> None:
        if scores["test_accuracy"] > self.scores["test_accuracy"]:
            self.scores = {name: scores[name] for name in SCORES}


def ours(problem: ExampleWeights, settings: DescentSettings, seed: int) -> Scores:
    descent, best, seconds = BilevelDescent(problem, {"start": 0.0}, settings, seed=seed), Best(), 0.0
    while not descent.finished:
        begun = time.perf_counter()
        descent.run_step()
        seconds += time.perf_counter() - begun
        best.see(descent.metrics())
    begun = time.perf_counter()
    found = descent.conclude()
    seconds += time.perf_counter() - begun
    weights = descent.levels.hyperparameters(descent.x.detach())["upper"](torch.arange(problem.train))
    return told({**found, **refitted(problem, weights)}, best, seconds)


def vpbgd(problem: ExampleWeights, iterations: int, seed: int) -> Scores:
    (x, y), (above, labels) = problem.splits["lower"], problem.splits["upper"]
    torch.manual_seed(seed)
    model, lower, best, seconds = make_model(problem, {}), make_model(problem, {}), Best(), 0.0
    lower.load_state_dict(model.state_dict())
    weights, every = Weights(problem.train), torch.arange(problem.train)
    optimizer = torch.optim.SGD([*weights.parameters(), *model.parameters()], lr=LEARNING_RATE)
    inner = torch.optim.SGD(lower.parameters(), lr=INNER_RATE)

    def scores() -> Scores:
        with torch.no_grad():
            return problem.evaluate(model, {"upper": weights})

    for step in range(iterations):
        begun = time.perf_counter()
        inner.zero_grad()
        (weights(every).detach() * cross_entropy(lower(x), y, reduction="none")).mean().backward()
        inner.step()
        penalty = min(MOST_PENALTY, MOST_PENALTY * step / GROWING)
        with torch.no_grad():
            value = cross_entropy(lower(x), y, reduction="none")
        gap = (weights(every) * (cross_entropy(model(x), y, reduction="none") - value)).mean()
        optimizer.zero_grad()
        # The authors divide by the penalty where it is above 1, which it is not.
        (cross_entropy(model(above), labels) + penalty * gap).backward()
        optimizer.step()
        seconds += time.perf_counter() - begun
        if step % LOOKS == LOOKS - 1:
            best.see(scores())
    return told({**scores(), **refitted(problem, weights(every).detach())}, best, seconds)


def told(scores: Mapping[str, Any], best: Best, seconds: float) -> Scores:
    at_best = {f"best_{name}": value for name, value in best.scores.items()}
    return {**{name: scores[name] for name in (*SCORES, "refit") if name in scores}, **at_best, "seconds": seconds}


def refitted(problem: ExampleWeights, weights: Tensor) -> Scores:
    """The test accuracy of a linear model on all examples, the training examples with their weights."""
    if problem.hidden:
        return {}
    (x, y), (above, labels) = problem.splits["lower"], problem.splits["upper"]
    return {
        "refit": linear(problem, torch.cat([x, above]), torch.cat([y, labels]), torch.cat([weights, 1 + 0 * labels]))
    }


def linear(problem: ExampleWeights, x: Tensor, y: Tensor, weights: Tensor) -> float:
    """The same model as the problem's, by scikit-learn."""
    inputs, labels = problem.splits["test"]
    # f is a mean, and scikit-learn's loss a sum.
    model = LogisticRegression(C=1 / (problem.decay * len(y)), max_iter=1000)
    model.fit(x.numpy(), y.numpy(), sample_weight=weights.numpy())
    return float(model.score(inputs.numpy(), labels.numpy()))


def equal(problem: ExampleWeights, settings: DescentSettings, seed: int) -> Scores:
    descent = BilevelDescent(problem, {"start": 0.0}, settings, seed=seed)
    descent.run_step()  # at whose weights all examples still weigh the same
    return {"test_accuracy": problem.test_metrics(descent.model)["test_accuracy"]}


def clean_alone(problem: ExampleWeights) -> Scores:
    x, y = problem.splits["upper"]
    return {"test_accuracy": linear(problem, x, y, torch.ones(len(y)))}


def row(name: str, found: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    means = intervals(found)
    keys = ("test_accuracy", "f1", "refit", "best_test_accuracy", "best_f1")
    seconds = f"{means['seconds'].mean:.0f}" if "seconds" in means else ""
    return (name, *(shown(means[key], 4) if key in means else "" for key in keys), seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = arguments_parser("example_weights", __doc__.splitlines()[0], "configs/example_weights.yaml", seeds=3)
    parser.add_argument("--hidden", type=int, default=0, help="width of a hidden layer; 0 for a linear model")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of V-PBGD, by default %(default)s")
    given = parser.parse_args(arguments)
    config = read_config(given.config, given.set)
    settings, console = descent_method(config), wide_console()
    torch.set_num_threads(1)
    found: dict[str, list[Scores]] = {}
    for seed in range(given.seeds):
        problem = ExampleWeights(given.data, hidden=given.hidden, split_seed=seed, **config.options)
        methods: dict[str, tuple[str, Any]] = {
            "raybilevel": (resolved(config), partial(ours, problem, settings, seed)),
            "equal weights": ("1", partial(equal, problem, settings, seed)),
        }
        if not given.hidden:
            methods["clean examples alone"] = ("1", partial(clean_alone, problem))
        if given.iterations:
            methods["V-PBGD"] = (str(given.iterations), partial(vpbgd, problem, given.iterations, seed))
        for name, (key, run) in methods.items():
            file = given.out / "runs" / f"{given.hidden}-{seed}-{name.replace(' ', '-')}.json"
            found.setdefault(name, []).append(kept(file, key, run))
            console.print(f"{seed} {name}: {found[name][-1]}", style="dim", highlight=False)
    heads = (
        "method",
        "test accuracy",
        "F1",
        "accuracy after a refit",
        "accuracy, best step by test",
        "F1 there",
        "seconds",
    )
    console.print(table(heads, [row(name, scores) for name, scores in found.items()]), highlight=False)
    write_json(given.out / "example_weights.json", {"hidden": given.hidden, "seeds": given.seeds, "runs": found})


if __name__ == "__main__":
    main()
