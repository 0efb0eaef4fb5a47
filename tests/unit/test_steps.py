"""When failed steps end a search."""

from __future__ import annotations

import pytest

from raybilevel.methods._base import UpperResult
from raybilevel.search_state import StepRecord
from raybilevel.tune._steps import MAX_FAILED_STEPS, StepFailures


def found(*targets: int, unreadable: tuple[int, ...] = ()) -> UpperResult:
    hypergradients = {index: () if index in unreadable else (0.1,) for index in targets}
    return UpperResult(StepRecord(0, 0, 1.0), None, hypergradients, unreadable=dict.fromkeys(unreadable, "gone"))


def test_three_failures_in_a_row_are_too_many_and_a_success_begins_anew() -> None:
    failures = StepFailures()
    for _ in range(MAX_FAILED_STEPS - 1):
        failures.failed(())
    assert not failures.too_many
    failures.succeeded(found())
    failures.failed(())
    assert not failures.too_many
    for _ in range(MAX_FAILED_STEPS - 1):
        failures.failed(())
    assert failures.too_many


def test_a_training_at_which_steps_failed_before_is_named() -> None:
    failures = StepFailures()
    assert failures.failed((1, 2)) == []
    failures.succeeded(found(3))
    assert failures.failed((2, 4)) == [2]


def test_steps_that_read_no_checkpoint_are_too_many_though_steps_without_targets_succeed() -> None:
    failures = StepFailures()
    for number in range(MAX_FAILED_STEPS):
        assert not failures.too_many
        failures.succeeded(found(number, unreadable=(number,)))
        failures.succeeded(found())  # it had nothing to read
    assert failures.too_many


@pytest.mark.parametrize("unreadable", [(), (1,)])
def test_one_checkpoint_that_is_read_is_enough(unreadable: tuple[int, ...]) -> None:
    failures = StepFailures()
    for _ in range(MAX_FAILED_STEPS - 1):
        failures.succeeded(found(0, unreadable=(0,)))
    failures.succeeded(found(1, 2, unreadable=unreadable))
    failures.succeeded(found(0, unreadable=(0,)))
    assert not failures.too_many
