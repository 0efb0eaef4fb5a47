from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raybilevel.errors import SpaceError
from raybilevel.space import Parameter, Space, check_points, flatten, nest, sobol_points
from tests.problems_for_tests import vector

LINEAR = Parameter(("a",), -1.0, 3.0)
LOG = Parameter(("b", "c"), 0.01, 100.0, log=True)
STEPPED = Parameter(("s",), 0.0, 1.0, step=0.25)


def test_a_linear_parameter_by_hand():
    assert LINEAR.decode(vector(0.0, 0.25, 1.0)).tolist() == [-1.0, 0.0, 3.0]
    assert [LINEAR.encode(value) for value in (-1.0, 0.0, 3.0)] == [0.0, 0.25, 1.0]
    assert LINEAR.width == LINEAR.slope(0.7) == 4.0


def test_a_logarithmic_parameter_by_hand():
    # exp and log round, each to some 1e-16
    assert LOG.decode(vector(0.0, 0.5, 1.0)).tolist() == pytest.approx([0.01, 1.0, 100.0], rel=1e-14)
    assert LOG.encode(1.0) == pytest.approx(0.5, rel=1e-14)
    assert LOG.width == pytest.approx(math.log(1e4), rel=1e-14)
    assert LOG.slope(2.0) == pytest.approx(2 * math.log(1e4), rel=1e-14)


@pytest.mark.parametrize(("value", "unit"), [(-7.0, 0.0), (9.0, 1.0)])
def test_encode_clips(value: float, unit: float):
    assert LINEAR.encode(value) == unit


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_value_without_a_logarithm_is_the_lowest(value: float):
    assert LOG.encode(value) == 0.0


@pytest.mark.parametrize(("value", "rounded"), [(0.3, 0.25), (0.4, 0.5), (-3.0, 0.0), (9.0, 1.0)])
def test_steps_are_multiples_within_the_bounds(value: float, rounded: float):
    assert STEPPED.round(value) == rounded


def test_a_multiple_that_lies_outside_is_not_taken():
    # multiples of 0.4 in [0.5, 1.5] are 0.8 and 1.2
    parameter = Parameter(("s",), 0.5, 1.5, step=0.4)
    assert parameter.round(0.5) == pytest.approx(0.8, rel=1e-14)
    assert parameter.round(1.5) == pytest.approx(1.2, rel=1e-14)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": -math.inf, "high": 1.0}, "finite"),
        ({"low": 0.0, "high": math.nan}, "finite"),
        ({"low": 1.0, "high": 1.0}, "below"),
        ({"low": 2.0, "high": 1.0}, "below"),
        ({"low": 0.0, "high": 1.0, "log": True}, "positive lower bound"),
        ({"low": 0.0, "high": 1.0, "step": 0.0}, "step"),
        ({"low": 0.0, "high": 1.0, "step": -0.1}, "step"),
    ],
)
def test_a_parameter_that_cannot_be_searched_is_refused_by_name(settings: dict[str, Any], message: str):
    with pytest.raises(SpaceError, match=f"p/q: .*{message}"):
        Parameter(("p", "q"), **settings)


def test_an_empty_space_is_refused():
    with pytest.raises(SpaceError, match="no hyperparameter"):
        Space(())


def test_a_name_given_twice_is_refused():
    with pytest.raises(SpaceError, match="a/b: given twice"):
        Space((Parameter(("a", "b"), 0.0, 1.0), Parameter(("a/b",), 0.0, 1.0)))


def test_a_space_nests_its_values():
    space = Space((LINEAR, LOG, STEPPED))
    assert (space.dimension, space.names) == (3, ("a", "b/c", "s"))
    suggested = space.to_config(vector(0.5, 0.0, 0.3))
    assert suggested == {"a": 1.0, "b": {"c": pytest.approx(0.01)}, "s": 0.25}
    assert all(type(value) is float for value in flatten(suggested).values())


def test_decode_is_differentiable_and_applies_no_steps():
    unit = vector(0.5, 0.5, 0.3).requires_grad_(True)
    decoded = Space((LINEAR, LOG, STEPPED)).decode(unit)
    assert decoded["s"].item() == 0.3
    (gradient,) = torch.autograd.grad(decoded["a"] + decoded["b"]["c"] + decoded["s"], unit)
    assert gradient.tolist() == pytest.approx([4.0, math.log(1e4), 1.0], rel=1e-12)


def test_encode_ignores_other_entries():
    config = {"a": 1, "b": {"c": 1.0, "d": "text"}, "s": 0.5, "layers": [1, 2]}
    assert Space((LINEAR, LOG, STEPPED)).encode(config).tolist() == pytest.approx([0.5, 0.5, 0.5], rel=1e-14)


@pytest.mark.parametrize("config", [{}, {"b": {}}, {"b": 1.0}, {"c": 1.0}])
def test_a_missing_hyperparameter_is_named(config: dict[str, Any]):
    with pytest.raises(SpaceError, match="b/c: missing"):
        Space((LOG,)).encode(config)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1.0", None, True])
def test_what_is_not_a_finite_number_is_refused(value: Any):
    with pytest.raises(SpaceError, match="b/c: expected a finite number"):
        Space((LOG,)).encode({"b": {"c": value}})


def test_a_gradient_in_values_becomes_one_in_the_unit_cube():
    config = {"a": 0.0, "b": {"c": 10.0}}
    gradient = Space((LINEAR, LOG)).to_unit_gradient(config, {"a": 2.0, "b/c": 3.0})
    assert gradient.tolist() == pytest.approx([2 * 4.0, 3 * 10 * math.log(1e4)], rel=1e-14)


def test_nest_and_flatten_by_hand():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    flat = {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert flatten(tree) == flat
    assert nest(flat) == tree


def test_sobol_points_are_seeded_and_in_the_cube():
    points = sobol_points(3, 8, seed=5)
    assert points.shape == (8, 3) and points.dtype == torch.double
    assert bool(((points >= 0) & (points <= 1)).all())
    assert torch.equal(points, sobol_points(3, 8, seed=5))
    assert not torch.equal(points, sobol_points(3, 8, seed=6))
    assert sobol_points(3, 0, seed=5).shape == (0, 3)


def test_siblings_with_equal_bounds_and_scale_are_of_a_kind() -> None:
    def parameters(parent: tuple[str, ...], count: int, high: float = 1.0, log: bool = True) -> list[Parameter]:
        return [Parameter((*parent, f"p{high}{log}{i}"), 0.1, high, log=log) for i in range(count)]

    space = Space(
        (
            *parameters(("decay",), 4),
            *parameters(("decay",), 3, high=2.0),
            *parameters(("decay",), 4, log=False),
            *parameters(("other", "decay"), 5),
            *parameters((), 6),
        )
    )
    assert space.groups() == (tuple(range(4)), tuple(range(7, 11)), tuple(range(11, 16)))
    assert space.groups(smallest=3)[1] == (4, 5, 6)


def test_bounds_that_are_whole_numbers_are_floats_at_the_ends():
    parameter = Parameter(("decay",), 1, 10, log=True)
    assert [type(parameter.to_value(unit)) for unit in (0.0, 0.5, 1.0)] == [float] * 3
    assert parameter == Parameter(("decay",), 1.0, 10.0, log=True)


@pytest.mark.parametrize("points", [{"a": 0.5}, ["a"], [None]])
def test_points_that_are_no_list_of_dicts_are_refused(points: Any) -> None:
    with pytest.raises(SpaceError, match="points_to_evaluate: expected a list of dicts, nested like the space, got"):
        check_points(points, Space((Parameter(("a",), 0.0, 1.0),)))
