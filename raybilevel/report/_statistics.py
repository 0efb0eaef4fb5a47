"""Intervals over seeds, ranks over problems, and paired tests by scipy, with Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % percentile bootstrap interval. Low and high are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def ends(self) -> tuple[float, float]:
        """Low and high. For a single value both are that value."""
        return (self.mean if self.low is None else self.low, self.mean if self.high is None else self.high)


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean over seeds and its bootstrap interval (Efron 1979). Its seed is fixed, so the result is reproducible.

    With few seeds such an interval is too narrow. For two seeds it is the two values themselves.
    """
    found = np.asarray(values, dtype=float)
    mean = float(found.mean())
    if len(found) < 2:
        return Interval(mean, None, None, len(found))
    if np.ptp(found) == 0:
        return Interval(mean, mean, mean, len(found))
    result = stats.bootstrap(
        (found,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Interval(mean, float(result.low), float(result.high), len(found))


@dataclass(frozen=True)
class Ranks:
    """The mean rank of each method over blocks. A block is a problem with a seed, and rank 1 is best.

    wins:     the number of blocks in which a method is first.
    blocks:   the number of blocks that have every method.
    friedman: p of Friedman's test that all methods are alike; None with fewer than three methods or two blocks.
    """

    mean: dict[str, float]
    wins: dict[str, int]
    blocks: int
    friedman: float | None


def rank(blocks: Sequence[Mapping[str, float]]) -> Ranks:
    """The ranks of methods by a loss, over the blocks that have all methods. Ties share their mean rank."""
    methods = list(dict.fromkeys(method for block in blocks for method in block))
    whole = [block for block in blocks if len(block) == len(methods)]
    if not whole:
        return Ranks({}, {}, 0, None)
    values = np.array([[block[method] for method in methods] for block in whole])
    ranks = stats.rankdata(values, axis=1)
    wins = {method: int((ranks[:, i] == ranks.min(axis=1)).sum()) for i, method in enumerate(methods)}
    friedman = None
    # Where all tie in every block, Friedman's statistic is 0 / 0.
    if len(methods) >= 3 and len(whole) >= 2 and np.ptp(ranks) > 0:
        p = float(stats.friedmanchisquare(*values.T).pvalue)
        friedman = p if math.isfinite(p) else None
    return Ranks(dict(zip(methods, ranks.mean(axis=0).tolist(), strict=True)), wins, len(whole), friedman)


@dataclass(frozen=True)
class PairedTest:
    """Two methods on the same seeds.

    difference: mean loss of the first minus that of the second; negative if the first is better.
    p:          of the two-sided sign-flip permutation test; None for a single pair.
    least:      the smallest p that n pairs can give, 2 / 2^n.
    """

    difference: Interval
    p: float | None
    least: float | None


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Test whether the losses of two methods differ. `first` and `second` have the same seeds in the same order."""
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    interval = bootstrap(differences.tolist())
    if len(differences) < 2:
        return PairedTest(interval, None, None)
    # Exact for up to 13 pairs, of which there are no more than 9999 sign flips.
    result = stats.permutation_test(
        (np.asarray(first, dtype=float), np.asarray(second, dtype=float)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples", vectorized=True, n_resamples=9999, rng=np.random.default_rng(0),
    )  # fmt: skip
    # The least p: of 2^n sign flips the observed one and its mirror image are as extreme.
    return PairedTest(interval, float(result.pvalue), 2.0 / 2 ** len(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values by Holm's step-down correction (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for step, index in enumerate(order):
        # At least as large as the one before: adjusted values must keep the order of the raw ones.
        largest = max(largest, min(1.0, (len(p_values) - step) * p_values[index]))
        adjusted[index] = largest
    return adjusted
