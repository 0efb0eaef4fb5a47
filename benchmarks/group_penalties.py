"""One penalty per group of features in ridge regression: R2 on new data of `raybilevel.sklearn`, against one shared
penalty and random search on the same folds.

    python -m benchmarks.group_penalties

The data are those of the problem `banded_ridge`. Random search draws as himalaya does (la Tour et al. 2022): shares of
the groups from Dirichlet distributions with concentrations 0.1 and 1 in turn, each with ten scales.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold

from benchmarks.families import shown
from raybilevel.problems.banded_ridge import BandedRidge
from raybilevel.report._statistics import bootstrap
from raybilevel.sklearn import GroupPenaltyRegressor
from raybilevel.sklearn._ridge import fit_ridge

FOLDS = 5
SCALES = np.logspace(-1, 5, 10)
Array = Any


def shared(x: Array, t: Array, group: Array, seed: int) -> Any:
    return RidgeCV(np.logspace(-1, 6, 29), cv=KFold(FOLDS)).fit(x, t)


class RandomSearch:
    """Of so many draws the penalties with the lowest cross-validated error."""

    def __init__(self, draws: int, x: Array, t: Array, group: Array, seed: int) -> None:
        random = np.random.default_rng(seed)
        lowest = np.inf
        for draw in range(draws):
            shares = random.dirichlet(np.full(group.max() + 1, (0.1, 1.0)[draw % 2])).clip(1e-9)
            for scale in SCALES:
                penalty = (scale / shares)[group]
                loss = cross_validated(x, t, penalty)
                if loss < lowest:
                    lowest, (self.weights, self.intercept) = loss, fit_ridge(x, t[:, None], penalty)

    def predict(self, x: Array) -> Array:
        return (x @ self.weights + self.intercept)[:, 0]


def cross_validated(x: Array, t: Array, penalty: Array) -> float:
    squares = 0.0
    for train, held_out in KFold(FOLDS).split(x):
        weights, intercept = fit_ridge(x[train], t[train, None], penalty)
        squares += np.square((x[held_out] @ weights + intercept)[:, 0] - t[held_out]).sum()
    return squares / len(x)


METHODS: dict[str, Callable[[Array, Array, Array, int], Any]] = {
    "raybilevel": lambda x, t, group, seed: GroupPenaltyRegressor(group, cv=FOLDS).fit(x, t),
    "raybilevel, lowest F": lambda x, t, group, seed: GroupPenaltyRegressor(group, cv=FOLDS, generalise=False).fit(
        x, t
    ),
    "one shared penalty": shared,
    "random search, 30 draws": lambda x, t, group, seed: RandomSearch(30, x, t, group, seed),
}


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.group_penalties", description=__doc__.split("\n")[0])
    parser.add_argument("--groups", default="4,20", help="numbers of groups, by default %(default)s")
    parser.add_argument("--seeds", type=int, default=10, help="data sets, by default %(default)s")
    options = parser.parse_args(arguments)
    print("| groups | method | R2 on new data | CPU seconds |", "| --- | --- | --- | --- |", sep="\n")
    for groups in map(int, options.groups.split(",")):
        for name, method in METHODS.items():
            scores, seconds = [], []
            for seed in range(1, options.seeds + 1):
                problem = BandedRidge(groups=groups, seed=seed)
                (x, t), (tested, new) = (
                    [tensor.numpy() for tensor in problem.data[part]] for part in ("train", "test")
                )
                began = time.process_time()
                fitted = method(x, t, np.repeat(np.arange(groups), problem.features), seed)
                seconds.append(time.process_time() - began)
                scores.append(r2_score(new, fitted.predict(tested)))
            print(f"| {groups} | {name} | {shown(bootstrap(scores))} | {np.mean(seconds):.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
