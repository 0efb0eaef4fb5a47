"""What Tune hides from searchers behind placeholders. No cluster is needed for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from ray import tune
from ray.tune.impl.placeholder import create_resolvers_map, inject_placeholders, resolve_placeholders
from ray.tune.utils.util import merge_dicts

from raybilevel import BilevelSearch
from raybilevel._tune_changes.placeholders import TABLE, table_of_tune_run
from tests.tiny_problems import Parabola

RUN = f"""
def run(config, search):
    {TABLE} = create_resolvers_map()
    config = inject_placeholders(config, {TABLE})
    return search(config), config, {TABLE}
"""


def as_in_a_run(config: dict[str, Any], search: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any], Any]:
    """Call a function with a config as `tune.run` calls searchers."""
    names: dict[str, Any] = {
        "__name__": "ray.tune.tune",
        "create_resolvers_map": create_resolvers_map,
        "inject_placeholders": inject_placeholders,
    }
    exec(RUN, names)
    found: tuple[Any, dict[str, Any], Any] = names["run"](copy.deepcopy(config), search)
    return found


class Parabolas(Parabola):
    own_loop = True


def test_the_table_is_found_where_tune_has_it() -> None:
    assert TABLE in tune.run.__code__.co_varnames and tune.run.__module__ == "ray.tune.tune"
    assert table_of_tune_run() is None


def test_functions_and_objects_reach_the_trial_and_the_search() -> None:
    thing = Parabola()
    space = {
        "x": {"a": tune.loguniform(1e-4, 1e2)},
        "act": tune.choice([torch.relu, torch.tanh]),
        "twice": tune.sample_from(lambda config: 2 * config["x"]["a"] * config["thing"].epochs),
        "pair": [tune.sample_from(lambda config: config["act"]), thing],
        "thing": thing,
    }
    search = BilevelSearch(Parabolas(), max_concurrent=4)

    def begin(config: dict[str, Any]) -> Any:
        before = repr(config)
        assert search.set_search_properties("upper_loss", "min", config)
        assert repr(config) == before
        return search.suggest("a")

    suggestion, config, table = as_in_a_run(space, begin)
    assert "thing" not in suggestion  # a constant, which Tune puts back itself
    found = merge_dicts(config, suggestion)
    resolve_placeholders(found, table)
    assert type(found["thing"]) is Parabola and type(found["pair"][1]) is Parabola
    assert found["act"] in (torch.relu, torch.tanh) and found["pair"][0] is found["act"]
    assert found["twice"] == 2 * found["x"]["a"] * Parabola.epochs
    assert type(search.constants["thing"]) is Parabola
