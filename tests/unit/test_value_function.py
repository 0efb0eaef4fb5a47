from __future__ import annotations

import math

import pytest
import torch

from raybilevel._models.value_function import fit_value_function, nearest, thinned
from raybilevel.search_state import Proposal, Training
from raybilevel.space import sobol_points
from tests.problems_for_tests import vector


def bowl(*unit: float) -> float:
    return sum((u - 0.3) ** 2 for u in unit)


def trainings(count: int) -> list[Training]:
    """Trainings whose value is a bowl, with its exact gradient."""
    made = []
    for i, unit in enumerate(sobol_points(2, count, 1).tolist()):
        gradient = tuple(2 * (u - 0.3) for u in unit)
        made.append(Training(i, Proposal(tuple(unit), "start"), "done", i, bowl(*unit), 0.0, gradient, 1.0))
    return made


def rows(count: int, gradients: bool, max_rows: int) -> int:
    v = fit_value_function(trainings(count), vector(0.5, 0.5), gradients, max_rows)
    return len(v.process.model.train_inputs[0])


def test_nearest_by_hand():
    x = torch.tensor([[0.0], [0.9], [0.4], [0.6]], dtype=torch.double)
    assert nearest(x, vector(0.5), 2) == [2, 3]
    assert nearest(x, vector(0.0), 3) == [0, 2, 3]
    assert nearest(x, vector(0.5), 99) == [0, 1, 2, 3]
    assert nearest(x, vector(0.5), 0) == nearest(x, vector(0.5), -2) == []


def test_ties_go_to_the_first():
    x = torch.tensor([[0.4], [0.6]], dtype=torch.double)
    assert nearest(torch.cat([x, x]), vector(0.4), 1) == [0]


@pytest.mark.parametrize(
    ("gradients", "max_rows", "expected"),
    [
        (False, 100, 5),
        (True, 100, 15),
        (True, 11, 11),  # 5 values and 3 gradients of 2
        (True, 10, 9),  # half a gradient is none
        (True, 4, 4),  # half of the rows are values
    ],
)
def test_how_many_rows_are_kept(gradients: bool, max_rows: int, expected: int):
    assert rows(5, gradients, max_rows) == expected


def test_the_gradients_kept_are_the_nearest():
    near = vector(0.9, 0.1)
    made = trainings(6)
    v = fit_value_function(made, near, True, 6 + 3 * 2)
    derivative = v.process.model.train_inputs[0][6:]
    by_distance = sorted(made, key=lambda t: sum((a - b) ** 2 for a, b in zip(t.unit, near.tolist(), strict=True)))
    closest = sorted(by_distance[:3], key=lambda t: t.index)
    assert derivative[:, :2].tolist() == [list(t.unit) for t in closest for _ in range(2)]
    assert derivative[:, 2:].tolist() == [[0, 1, 0], [0, 0, 1]] * 3


def test_thinned_keeps_the_nearest_and_some_of_all_others():
    made = trainings(100)
    near = vector(0.9, 0.1)
    kept = thinned(made, near, 11)
    by_distance = sorted(made, key=lambda t: sum((a - b) ** 2 for a, b in zip(t.unit, near.tolist(), strict=True)))
    assert len(kept) == 11 and [t.index for t in kept] == sorted(t.index for t in kept)
    assert {t.index for t in by_distance[:6]} <= {t.index for t in kept}
    far = [t.index for t in kept if t not in by_distance[:6]]
    assert min(far) < 10 and max(far) > 90
    assert thinned(made, near, 100) is made
    assert thinned(made, near, 1) == by_distance[:1]
    assert list(thinned(made, near, 0)) == []


def test_mean_gradient_and_deviation_of_a_bowl():
    v = fit_value_function(trainings(6), vector(0.5, 0.5), True, 100)
    at = vector(0.45, 0.7).requires_grad_(True)
    mean = v.mean(at)
    (gradient,) = torch.autograd.grad(mean, at)
    # a quadratic is not in the span of a few RBFs; the deviation claims some 1e-2
    assert mean.item() == pytest.approx(bowl(0.45, 0.7), abs=0.01)
    assert gradient.tolist() == pytest.approx([0.3, 0.8], abs=0.05)
    assert 0 <= v.deviation(at).item() < 0.05


def test_trained_points_are_known_best():
    made = trainings(6)
    v = fit_value_function(made, vector(0.5, 0.5), True, 100)
    known = max(v.deviation(torch.tensor(t.unit, dtype=torch.double)).item() for t in made)
    corners = [v.deviation(vector(a, b)).item() for a in (0.0, 1.0) for b in (0.0, 1.0)]
    assert known < min(corners)
    assert all(math.isfinite(corner) for corner in corners)
