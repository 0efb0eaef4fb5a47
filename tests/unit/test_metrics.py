"""Whose a name in a trial's result is, and what `evaluate` may return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ray.tune import result as tune_result
from torch import nn

from raybilevel._lower.training import train
from raybilevel._metrics import OF_TUNE, RESERVED, check_metrics, problem_metrics
from raybilevel.errors import ProblemError
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.problems.ridge import Ridge
from raybilevel.search import check_problem

CONFIG = {"decay": {"g0": 1e-2, "g1": 1e-2}}


class Evaluated(Ridge):
    """A problem whose `evaluate` returns what it is told to."""

    def __init__(self, returned: Any) -> None:
        super().__init__(groups=2)
        self.returned = returned

    def evaluate(self, model: nn.Module) -> Any:
        return self.returned


@pytest.mark.parametrize("name", ["upper_loss", "lower_loss", "lower_passes", "lower_gradient/decay", "gpus"])
def test_a_name_that_raybilevel_reports_is_refused_where_the_training_runs(name: str) -> None:
    # Else {"upper_loss": -7} would be F.
    with pytest.raises(ProblemError, match=rf"Evaluated\.evaluate returns '{name}', which raybilevel reports.*rename"):
        train(Evaluated({name: -7.0}), CONFIG)


def test_it_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ProblemError, match=r"'upper_loss'.*rename"):
        check_problem(Evaluated({"upper_loss": -7.0}), Ridge(2).space)
    elsewhere = Evaluated({"upper_loss": -7.0})
    elsewhere.device = "meta"  # which this machine lacks: tried on the CPU
    with pytest.raises(ProblemError, match=r"'upper_loss'.*rename"):
        check_problem(elsewhere, Ridge(2).space)


@pytest.mark.parametrize("name", ["training_iteration", "time_total_s", "done", "config/decay", "pid"])
def test_a_name_that_tune_adds_is_refused(name: str) -> None:
    with pytest.raises(ProblemError, match=f"returns '{name}', which Ray Tune adds.*rename the metric"):
        check_metrics("Evaluated", {name: 1.0})


def test_a_descent_refuses_them_too() -> None:
    descent = BilevelDescent(Evaluated({"lower_residual": 0.0}), CONFIG, HypergradientDescent(steps=1), Ridge(2).space)
    descent.run_step()
    with pytest.raises(ProblemError, match=r"Evaluated\.evaluate returns 'lower_residual'"):
        descent.conclude()


def test_names_that_only_look_like_tunes_are_the_problems() -> None:
    mine = {"training_accuracy": 0.9, "time_to_beat": 3.0, "hypergradient_cosine": 0.1, "iterations_of_mine": 4.0}
    trained, _ = train(Evaluated(mine), CONFIG)
    assert trained.metrics == mine
    assert problem_metrics(dict.fromkeys(RESERVED, 1.0) | mine) == mine


def test_metrics_are_plain_numbers() -> None:
    assert check_metrics("Evaluated", {"a": torch.tensor(2.0), "top/5": 1}) == {"a": 2.0, "top/5": 1.0}
    for returned, words in (
        ({"a": torch.ones(2)}, "the metric 'a' must be a number"),
        ({"a": "high"}, "the metric 'a' must be a number, got 'high'"),
        ({3: 1.0}, "must be strings, got 3"),
        (0.5, "must return a dict of names to numbers, got float"),
    ):
        with pytest.raises(ProblemError, match=words):
            check_metrics("Evaluated", returned)


def test_a_result_holds_more_than_the_problems_metrics() -> None:
    result = {"a": 1.0, "count": 3, "flag": True, "lost": float("nan"), "words": "no", "nested": {"b": 1.0}}
    assert problem_metrics(result) == {"a": 1.0, "count": 3.0}


def test_every_name_that_the_installed_tune_adds_is_reserved() -> None:
    added = {*tune_result.AUTO_RESULT_KEYS, *tune_result.DEBUG_METRICS, *tune_result.DEFAULT_EXPERIMENT_INFO_KEYS}
    assert added | {tune_result.DONE, tune_result.SHOULD_CHECKPOINT, tune_result.TIMESTEPS_THIS_ITER} <= OF_TUNE
