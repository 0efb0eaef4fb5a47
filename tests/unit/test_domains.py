from __future__ import annotations

import pytest
from ray import tune

from raybilevel.errors import SpaceError
from raybilevel.space import DOMAINS, Parameter, Space
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
    arguments = {"low": 0.5, "high": 2.0, "step": 0.5}
    box = Space(
        tuple(
            Parameter.of(("deep", name), name, [arguments[a] for a in domain.arguments])
            for name, domain in DOMAINS.items()
        )
    )
    constants = {"deep": {"kept": 7}, "name": "text"}
    assert split_param_space(to_param_space(box, constants)) == (box, constants)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "no hyperparameter"),
        ({"a": [tune.uniform(0, 1)]}, "a: domains inside a list"),
        ({"a": tune.uniform(0, 1), "b": ("__ref_ph", "hash")}, "b: an object"),
        ({"a": {"b": {"grid_search": [1, 2]}}}, "a/b: grid_search"),
        ({"a": tune.qrandint(1, 9, 2)}, "a: tune.randint"),
        ({"a": {1: tune.uniform(0, 1)}}, "a/1: the key 1 is no text; write '1'"),
    ],
)
def test_what_cannot_be_searched_is_named(space: dict[str, object], words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        split_param_space(space)
