"""The published experiment: what the scheme reports, and what a user of its result gets."""

from __future__ import annotations

import pytest

from benchmarks.paper import OURS, problem_of, published, searched
from raybilevel.methods import Paper
from raybilevel.problems.digits import DigitsLogistic
from raybilevel.problems.mnist import Mnist


def small() -> DigitsLogistic:
    problem = DigitsLogistic(groups=2, train=60, validation=60)
    problem.epochs, problem.iterations = 1, 20
    return problem


def test_the_end_of_a_descent_is_not_the_result_of_a_training() -> None:
    method = Paper(iterations=2, steps=10, learning_rates=(0.1,), momenta=(0.5,))
    found = published(small(), 0, method)
    assert 0 < found["lowest_end"] <= found["end_of_descent"] != found["test_loss"]
    # The start design and an iterate for each descent, beside which descents are charged.
    assert found["cost"] > 25 + 2
    again = searched("random", small(), 0, cost=3.0)
    assert again["cost"] == 3.0 and {"upper_loss", "test_loss", "refit"} <= set(again)
    assert searched(OURS, small(), 0, cost=3.0)["upper_loss"] > 0


@pytest.mark.parametrize(("decays", "share"), [(1, "all"), (2, "layer")])
def test_three_of_five_examples_are_for_training(decays: int, share: str) -> None:
    problem = problem_of("5K", decays, 3, "folder")
    assert isinstance(problem, Mnist)
    assert (problem.train, problem.validation, problem.split_seed, problem.share) == (3000, 2000, 3, share)
