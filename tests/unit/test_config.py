from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raybilevel._config.experiment import ExperimentConfig, read_config, resolved
from raybilevel._config.files import parse_yaml
from raybilevel._config.resources import ResourcesConfig
from raybilevel._config.space import read_space, write_space
from raybilevel.errors import ConfigError, SpaceError
from raybilevel.space import Parameter, Space

MINIMAL = """
problem: digits
space:
  decay: {loguniform: [1e-6, 1.0]}
  nested: {a: {quniform: [0, 1, 0.25]}, constant: 1e-3}
search: {trainings: 3}
"""


def config_file(folder: Path, text: str = MINIMAL) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_domains_become_the_box_and_the_rest_constants(tmp_path: Path) -> None:
    config = read_config(config_file(tmp_path))
    assert config.parameters == (
        Parameter(("decay",), 1e-6, 1.0, log=True),
        Parameter(("nested", "a"), 0.0, 1.0, step=0.25),
    )
    assert config.constants == {"nested": {"constant": 1e-3}}
    assert read_space(write_space(Space(config.parameters))) == (Space(config.parameters), {})


@pytest.mark.parametrize(
    "tree",
    [
        {"weights": [{"uniform": [0.0, 1.0]}, {"uniform": [0.0, 1.0]}]},
        {"optimizer": {"choice": [{"name": "sgd"}, {"name": "adam", "beta": {"uniform": [0.5, 1.0]}}]}},
    ],
)
def test_only_a_box_is_written_as_a_config(tree: dict[str, Any]) -> None:
    space, _ = read_space(tree)
    assert space is not None
    with pytest.raises(SpaceError, match=r"own space has lists, alternatives or functions.* as its `space`"):
        write_space(space)


def test_lists_and_parts_of_a_choice_may_have_domains_in_them(tmp_path: Path) -> None:
    tree = """
weights: [{uniform: [0, 1]}, {uniform: [0, 1]}, 3]
group: {weights: [{uniform: [0, 1]}]}
optimizer:
  choice: [{name: sgd, momentum: {uniform: [0, 0.9]}}, {name: adam}, none]
"""
    space, constants = read_space(parse_yaml(tree))
    assert space is not None and constants == {}
    assert space.names == ("weights/0", "weights/1", "group/weights/0", "optimizer", "optimizer/momentum")
    assert space.parameters[4].when == (((3, 0),),)
    with pytest.raises(SpaceError, match="weights/1: the lower bound must be below"):
        read_space({"weights": [1.0, {"uniform": [1, 0]}]})


def test_a_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    config = read_config(config_file(tmp_path))
    again = ExperimentConfig.model_validate(parse_yaml(resolved(config)))
    assert again == config
    assert resolved(again) == resolved(config)


def test_overrides_reach_nested_keys(tmp_path: Path) -> None:
    config = read_config(
        config_file(tmp_path), ["search.trainings=9", "search.settings.decrease=0.1", "options={a: 2}"]
    )
    assert config.search.trainings == 9
    assert config.search.settings == {"decrease": 0.1}
    assert config.options == {"a": 2}


def test_overrides_reach_keys_of_a_saved_config_that_were_left_open(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("problem: digits\nsearch: {trainings: 1}\n")
    path.write_text(resolved(read_config(path)))
    assert read_config(path, ["resources.lower.cpu=6", "resources.upper.gpu=0.2"]).resources == ResourcesConfig(
        lower={"cpu": 6}, upper={"gpu": 0.2}
    )


@pytest.mark.parametrize(
    ("text", "override", "words"),
    [
        ("problem: digits\nspace: {}\n", None, "search: Field required"),
        (MINIMAL.replace("trainings: 3", "trainings: 0"), None, "search.trainings"),
        (MINIMAL.replace("trainings: 3", "trainings: yes"), None, "search.trainings: expected a number, got true"),
        (MINIMAL, "search.max_concurrent=true", "search.max_concurrent: expected a number, got true"),
        (MINIMAL.replace("trainings: 3", "trials: 3"), None, "search.trials: no such key; choose one of trainings, me"),
        (MINIMAL, "resources.lowr.cpu=1", "resources.lowr: no such key; choose one of lower, upper"),
        (MINIMAL, "serach.trainings=3", "serach: no such key; choose one of problem, options, space, search, resour"),
        (f"{MINIMAL}\nsearch: {{trainings: 4}}", None, "the key 'search' is given twice; leave one out"),
        ("search: {trainings: 3, seed: 1, trainings: 4}", None, "the key 'trainings' is given twice"),
        (MINIMAL.replace("loguniform", "lognormal"), None, "decay: unknown domain 'lognormal'"),
        (MINIMAL.replace("[1e-6, 1.0]", "[1e-6]"), None, r"decay: loguniform takes \[low, high\]"),
        (MINIMAL.replace("[1e-6, 1.0]", "[1, 1e-6]"), None, "decay: the lower bound"),
        (MINIMAL.replace("[1e-6, 1.0]", "[0, 1.0]"), None, "decay: .*positive lower bound"),
        (MINIMAL, "space.decay=[1e-3, 1e2]", r"space: decay: \[0.001, 100.0\] is a list, and no domain"),
        (MINIMAL, "space={group: {decay: [1e-3, 1e2]}}", "group: unknown domain 'decay'.* write decay: {loguniform"),
        (MINIMAL, "space.decay=(1e-5, 1.)", r"decay: '\(1e-5, 1.\)' is text, and no domain"),
        (MINIMAL, "space.decay={loguniform: (1e-5, 1.)}", r"decay: expected {loguniform: \[low, high\]} and nothing"),
        (MINIMAL, "space.decay={quniform: 3}", r"decay: expected {quniform: \[low, high, step\]}"),
        (MINIMAL, "space.decay={uniform: [no, 1]}", r"decay: uniform takes \[low, high\], finite numbers, got"),
        (MINIMAL, "space.nested={1: {uniform: [0, 1]}}", "nested/1: the key 1 is no text"),
        (MINIMAL, "space={2: {uniform: [0, 1]}}", "space: 2: the key 2 is no text"),
        ("problems: {}\nmethods: []\nbudget: {}", None, "a config of a comparison; use `raybilevel compare"),
        ("- a list", None, "expected keys and values"),
        ("a: [", None, "not a YAML file"),
        ("!!python/object/apply:os.system ['true']", None, "not a YAML file"),
        (MINIMAL, "search.trainings", "expected key=value"),
        (MINIMAL, "problem.name=1", "not a group of keys"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(text: str, override: str | None, words: str, tmp_path: Path) -> None:
    path = config_file(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_config(path, [override] if override else [])
    assert str(path) in str(caught.value) or "--set" in str(caught.value)


def test_each_mistake_has_a_line_of_its_own(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_config(path, ["search.trials=1", "space.decay=[1, 2]", "space.nested={a: {uniform: [2, 1]}}"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{path}: ") for line in lines)


def test_keys_that_are_merged_are_not_given_twice() -> None:
    merged = parse_yaml("{base: &base {a: 1, b: 2}, more: {<<: *base, a: 3}}")
    assert merged["more"] == {"a": 3, "b": 2}


def test_numbers_with_an_exponent_are_numbers() -> None:
    assert parse_yaml("[1e-6, 1E3, -2.5e-3, 1, 0.5, e5, 1e]") == [1e-6, 1e3, -2.5e-3, 1, 0.5, "e5", "1e"]


def test_a_constraint_that_is_no_bound_is_named_with_its_key(tmp_path: Path) -> None:
    assert read_config(config_file(tmp_path), ["search.constraints={ms: '<= 5'}"]).search.constraints == {"ms": "<= 5"}
    with pytest.raises(ConfigError, match=r"search\.constraints: .*ms: expected '<= NUMBER' or '>= NUMBER', got '5'"):
        read_config(config_file(tmp_path), ["search.constraints={ms: '5'}"])
