from __future__ import annotations

import pytest
import torch
from ray import tune

from raybilevel._parameter import DOMAINS
from raybilevel.errors import SpaceError
from raybilevel.space import Parameter, Space
from raybilevel.tune._domains import split_param_space, to_param_space


def test_every_supported_domain_and_nested_constants() -> None:
    space, constants = split_param_space(
        {
            "a": tune.uniform(-1, 2),
            "deep": {"b": tune.loguniform(1e-3, 1e2), "kept": 7},
            "c": tune.quniform(0, 1, 0.25),
            "d": tune.qloguniform(0.1, 10, 0.1),
            "name": "text",
        }
    )
    assert space.parameters == (
        Parameter(("a",), -1.0, 2.0),
        Parameter(("deep", "b"), 1e-3, 1e2, log=True),
        Parameter(("c",), 0.0, 1.0, step=0.25),
        Parameter(("d",), 0.1, 10.0, log=True, step=0.1),
    )
    assert constants == {"deep": {"kept": 7}, "name": "text"}


def test_a_box_becomes_tune_s_domains_and_back() -> None:
    arguments = {"low": 2.0, "high": 8.0, "step": 2.0, "mean": 1.0, "sd": 2.0}
    numbers = [
        Parameter.of(("deep", name), name, [arguments[a] for a in domain.arguments]) for name, domain in DOMAINS.items()
    ]
    box = Space((*numbers, Parameter.of_choices(("deep", "activation"), ["relu", "tanh", None])))
    constants = {"deep": {"kept": 7}, "name": "text"}
    assert split_param_space(to_param_space(box, constants)) == (box, constants)


def test_lists_and_conditions_become_tune_s_and_back() -> None:
    momentum, steps = tune.uniform(0, 0.9), tune.randint(1, 4)
    space, constants = split_param_space(
        {
            "optimizer": tune.choice(
                [
                    {"name": "sgd", "rate": momentum, "warm": tune.choice([None, {"steps": steps}])},
                    {"rate": momentum},
                    3,
                ]
            ),
            "deep": {"weights": ({"a": momentum}, 5)},
            "kept": [1, 2],
        }
    )
    again, kept = split_param_space(to_param_space(space, constants))
    assert (again.parameters, kept) == (space.parameters, constants)
    assert set(again.fixed) == set(space.fixed)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "no hyperparameter"),
        ({"a": [tune.uniform(1, 0)]}, "a/0: the lower bound must be below"),
        ({"a": tune.uniform(0, 1), "b": ("__ref_ph", "hash")}, "b: Tune has put a placeholder"),
        ({"a": {"b": tune.grid_search([{"c": 1}, {"c": 2}])}}, "a/b: grid_search needs values that are no dicts"),
        ({"a": tune.choice([{"b": tune.grid_search([1, 2])}, None])}, "a/b: grid_search inside a choice"),
        ({"a": tune.choice([{"b": tune.uniform(0, 1)}])}, "a: a choice needs at least two values"),
        ([tune.uniform(0, 1)], "expected a dict of domains and constants, or a define-by-run function, got list"),
        ({"a": tune.choice(["relu"])}, "a: a choice needs at least two values"),
        ({"a": tune.choice([1, 2, 1])}, "a: 1 is given twice"),
        ({"a": tune.randint(3, 4)}, "a: the lower bound must be below"),
        ({"a": tune.sample_from(lambda config: 1)}, "no hyperparameter"),
        ({"a": {1: tune.uniform(0, 1)}}, "a/1: the key 1 is no text; write '1'"),
    ],
)
def test_what_cannot_be_searched_is_named(space: dict[str, object], words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        split_param_space(space)


INTEGERS = {
    "randint": (tune.randint(1, 5), [1, 2, 3, 4]),
    "qrandint": (tune.qrandint(2, 9, 2), [2, 4, 6, 8]),
    "qrandint by one": (tune.qrandint(1, 4, 1), [1, 2, 3]),
    "lograndint": (tune.lograndint(1, 5), [1, 2, 3, 4]),
    "qlograndint": (tune.qlograndint(2, 8, 2), [2, 4, 6, 8]),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_whole_numbers_are_those_that_tune_draws(name: str) -> None:
    domain, values = INTEGERS[name]
    space, _ = split_param_space({"n": domain})
    units = torch.linspace(0, 1, 201, dtype=torch.double)
    found = [space.to_config(unit[None])["n"] for unit in units]
    assert sorted(set(found)) == values and all(type(value) is int for value in found)
    (levels,) = space.discrete.values()
    assert [space.to_config(torch.tensor([level]))["n"] for level in levels] == values
    assert {domain.sample() for _ in range(300)} <= set(values)


def test_whole_numbers_at_the_ends_are_as_likely_as_others() -> None:
    space, _ = split_param_space({"n": tune.randint(0, 5)})
    found = [space.to_config(torch.tensor([(i + 0.5) / 1000]))["n"] for i in range(1000)]
    assert [found.count(n) for n in range(5)] == [200] * 5


def test_choices_keep_their_values() -> None:
    given = [None, "relu", (1, 2), True, 1]
    space, _ = split_param_space({"c": tune.choice(given), "width": tune.choice([64, 16, 32])})
    activation, width = space.parameters
    assert space.unordered == (0,) and width.choices == (16, 32, 64)
    for value in given:
        again = space.to_config(space.encode({"c": value, "width": 32}))
        assert again == {"c": value, "width": 32} and type(again["c"]) is type(value)
    with pytest.raises(SpaceError, match=r"c: expected one of None, 'relu', \(1, 2\), True, 1, got 'tanh'"):
        space.encode({"c": "tanh", "width": 16})
    assert activation.smooth is False and space.smooth == (False, False)


def test_normal_domains_have_their_quantiles() -> None:
    space, _ = split_param_space({"x": tune.randn(10, 2), "y": tune.qrandn(0, 1, 0.5)})
    units = torch.arange(0.05, 1, 0.1, dtype=torch.double)
    found = torch.tensor([space.to_config(torch.stack([u, u]))["x"] for u in units])
    expected = torch.distributions.Normal(10.0, 2.0).icdf(units)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    point = torch.tensor([0.3, 0.9], dtype=torch.double, requires_grad=True)
    decoded = space.decode(point)["x"]
    (slope,) = torch.autograd.grad(decoded, point)
    assert space.parameters[0].slope(decoded.item()) == pytest.approx(slope[0].item(), rel=1e-9)
    assert space.encode(space.to_config(point.detach()))[0].item() == pytest.approx(0.3)
    assert space.to_config(point.detach())["y"] == 1.5  # of 1.28, the nearest multiple


def test_all_that_is_wrong_with_a_space_is_said_at_once() -> None:
    space = {"a": tune.uniform(2, 1), "b": {3: tune.uniform(0, 1), "c": tune.uniform(5, 4)}, "d": tune.uniform(0, 1)}
    with pytest.raises(SpaceError) as caught:
        split_param_space(space)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["a", "b/3", "b/c"]


def test_constants_that_were_meant_as_domains_are_shown() -> None:
    with pytest.raises(SpaceError, match=r"constants only, a = \(1e-05, 1\.0\), b/low = 1\.0, and no hyperparameter"):
        split_param_space({"a": (1e-5, 1.0), "b": {"low": 1.0}})
