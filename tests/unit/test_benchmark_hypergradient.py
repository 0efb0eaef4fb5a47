"""The measurement of hypergradients: what counts, what is good, and differences against a known gradient."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import hypergradient
from benchmarks.hypergradient import Row, differences, summary
from benchmarks.trainings import KINDS, Kind, problem_of
from tests.problems_for_tests import Ridge, vector

ROW = Row("SGD", "float32", (0.5, 0.5), 1.0, (3.0, 4.0), 0.1, (6.0, 8.0), 0.2)


def test_cosine_and_length_of_an_estimate() -> None:
    assert (ROW.cosine, ROW.length, ROW.good) == (pytest.approx(1), 2, True)
    assert not replace(ROW, estimate=(6.3, 8.4)).good
    assert not replace(ROW, estimate=(4.0, 0.0)).good
    assert replace(ROW, estimate=(-6.0, -8.0)).misleading and not replace(ROW, estimate=(-1.0, -1.0)).misleading


def test_points_that_say_nothing_are_left_out() -> None:
    apart, flat = replace(ROW, disagreement=0.5), replace(ROW, upper_loss=1e3)
    assert (apart.left_out, flat.left_out) == ("differences disagree", "nearly 0")
    assert summary([ROW, apart, flat]).startswith("1 of 1 points")


def test_differences_against_the_gradient_of_the_reduced_problem() -> None:
    problem, unit = Ridge(1), vector(0.4)
    exact = torch.autograd.functional.jacobian(problem.reduced, unit)
    found = differences(problem, unit, 1e-3)
    assert list(found) == pytest.approx(exact.tolist(), rel=1e-4, abs=1e-6)  # the error of a difference is 1e-6


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_trains(kind: Kind) -> None:
    problem = problem_of(kind, epochs=1)
    problem.examples = 10
    trained, _ = hypergradient.trained(problem, vector(0.5, 0.5, 0.5))
    assert trained.lower_loss < 4  # log 10, and smoothing


def test_a_run_leaves_a_table_and_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--out", str(tmp_path), "--kinds", "tanh", "--dtypes", "float32", "--points", "1", "--epochs", "2"]
    hypergradient.main(given)
    (row,) = json.loads((tmp_path / "hypergradient.json").read_text())["rows"]
    assert row["kind"] == KINDS[0].name and len(row["differences"]) == 3
    assert KINDS[0].name in capsys.readouterr().out
