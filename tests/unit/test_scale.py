"""What a search costs, where that is no matter of time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.scale import drive, simulate, slots


def test_slots_are_hardly_idle_when_there_are_many() -> None:
    idle, training = simulate(256, share=0.2, trainings=3 * 256)
    assert idle < 0.1
    assert training > 0.7  # the rest are steps, which take a fifth of a training
    assert slots([4])


def test_a_search_is_driven_to_as_many_observations_as_it_is_asked_for() -> None:
    calls: list[str] = []
    search = drive(150, lambda name, seconds: calls.append(name))
    assert len(search.state.done) == 150
    assert calls.count("on_trial_complete") == 100  # the last ones
    assert set(calls) == {"suggest", "step's result", "on_trial_complete"}
    with pytest.raises(ZeroDivisionError):
        drive(101, lambda name, seconds: 1 / 0)


def test_memory_stays_small_at_ten_thousand_observations() -> None:
    """In a process of its own, whose peak is that of the search."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", "memory"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10000 observations" in done.stdout and "MISSED" not in done.stdout
