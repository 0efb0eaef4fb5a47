from __future__ import annotations

import os

import pytest

from raybilevel._cluster.environment import environment, waiting_trials

PENDING = "TUNE_MAX_PENDING_TRIALS_PG"


def test_a_variable_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "before")
    monkeypatch.delenv("B", raising=False)
    with environment("A", "inside"), environment("B", "inside"):
        assert os.environ["A"] == os.environ["B"] == "inside"
    assert os.environ["A"] == "before" and "B" not in os.environ
    with pytest.raises(ZeroDivisionError), environment("B", "inside"):
        _ = 1 / 0
    assert "B" not in os.environ


def test_as_many_trials_may_wait_as_there_are_slots_unless_the_user_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PENDING, raising=False)
    with waiting_trials(8):
        assert os.environ[PENDING] == "8"
    assert PENDING not in os.environ
    monkeypatch.setenv(PENDING, "3")
    with waiting_trials(8):
        assert os.environ[PENDING] == "3"
    assert os.environ[PENDING] == "3"
