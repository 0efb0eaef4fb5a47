"""A learned initialisation against a random one and against joint training, on tasks of classes that none has seen.

    python -m benchmarks.few_shot --data DIR --out DIR

From each start: the initialisation that the descent of configs/few_shot.yaml learns; the one it began from; and one
whose convolutions were trained, on the images of the same tasks, to tell all their classes apart ("joint"), with a last
layer of zeros. In every task the last layer is learned from its few examples, as near to the initialisation as
`nearness` says: that of the config for ours, for the others the best of several on the tasks to learn from. DIR gets
few_shot.json and a figure; DIR/runs has every start, and those there are not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.families import (
    arguments_parser,
    descent_method,
    dots,
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
from raybilevel.problems.few_shot import FewShot, Initialisation, Tasks
from raybilevel.report._charts import Chart
from raybilevel.report._static import write_figures
from raybilevel.report._statistics import Interval, paired_test

NEARNESSES = (1e-3, 1e-2, 1e-1, 1.0)
JOINT_EPOCHS = 10
OURS = "learned"


def joint(start: Initialisation, tasks: Tasks, seed: int) -> Initialisation:
    """The start's convolutions trained by Adam to tell all classes of the tasks apart, and a last layer of zeros."""
    images = torch.cat([tasks.x, tasks.query_x], 1).flatten(0, 1)
    labels = torch.cat([tasks.classes.gather(1, y) for y in (tasks.y, tasks.query_y)], 1).flatten()
    # The classes of all tasks, numbered from 0.
    kinds, labels = labels.unique(return_inverse=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = Initialisation(len(kinds))
    body = {name: value for name, value in start.state_dict().items() if not name.startswith("head")}
    wide.load_state_dict({**wide.state_dict(), **body})
    adam = torch.optim.Adam(wide.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(JOINT_EPOCHS):
        for rows in torch.randperm(len(images), generator=generator).split(50):
            adam.zero_grad()
            # As one task, (1, n, 14, 14).
            found: Tensor = wide.head(wide.features(images[rows][None]))[0]
            cross_entropy(found, labels[rows]).backward()
            adam.step()
    trained = Initialisation(start.head.out_features)
    body = {name: value for name, value in wide.state_dict().items() if not name.startswith("head")}
    trained.load_state_dict({**trained.state_dict(), **body})
    return trained


def at_best_nearness(problem: FewShot, start: Initialisation) -> float:
    """Accuracy on the test tasks, at the nearness that does best on the others."""
    best = max(NEARNESSES, key=lambda nearness: problem.accuracies(start, "learn", nearness).mean().item())
    return problem.accuracies(start, "test", best).mean().item()


def nearest(tasks: Tasks) -> float:
    """Accuracy of the label of the nearest example, by pixels."""
    known, asked = tasks.x.flatten(2), tasks.query_x.flatten(2)
    found = tasks.y.gather(1, torch.cdist(asked, known).argmin(2))
    return (found == tasks.query_y).double().mean().item()


def measured(config: ExperimentConfig, data: str | None, seed: int) -> dict[str, float]:
    """Test accuracy of all from one start, on tasks drawn by the same seed."""
    problem = make_problem(config.problem, {**config.options, "split_seed": seed}, data)
    assert isinstance(problem, FewShot)
    descent = BilevelDescent(problem, {"start": float(seed)}, descent_method(config))
    start: Initialisation = descent.levels.hyperparameters(descent.x.detach().clone())["upper"]
    # Before the descent, which changes `start`: it is the module that is learned.
    row = {
        "nearest example": nearest(problem.splits["test"]),
        "random": at_best_nearness(problem, start),
        "joint": at_best_nearness(problem, joint(start, problem.splits["learn"], seed)),
    }
    return {**row, OURS: run_to_end(descent).conclude()["test_accuracy"]}


def chart(accuracy: dict[str, Interval]) -> Chart:
    title = "New digits from one example of each, by initialisation"
    caption = "Means over starts with 95 % intervals; higher is better. Chance is 0.2."
    return dots("few_shot", title, caption, accuracy, "test accuracy", "mean over starts", digits=3)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = arguments_parser("few_shot", __doc__.splitlines()[0], "configs/few_shot.yaml", 3)
    given = parser.parse_args(arguments)
    config, console = read_config(given.config, given.set), wide_console()
    rows: list[dict[str, float]] = []
    for seed in range(given.seeds):
        file = given.out / "runs" / f"{seed}.json"
        row = kept(file, resolved(config), partial(measured, config, given.data, seed))
        rows.append(row)
        console.print(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()), style="dim")
    accuracy = intervals(rows)
    tests = {name: paired_test([row[OURS] for row in rows], [row[name] for row in rows]) for name in rows[0]}
    lines = [(name, shown(accuracy[name]), shown(tests[name].difference)) for name in rows[0]]
    console.print(table(("initialisation", "test accuracy", "learned less it"), lines), highlight=False)
    write_json(given.out / "few_shot.json", {"accuracy": accuracy, "paired": tests, "rows": rows})
    write_figures([chart(accuracy)], given.out / "figures")
    console.print(f"written to {given.out / 'few_shot.json'}", highlight=False)


if __name__ == "__main__":
    main()
