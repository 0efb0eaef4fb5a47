"""One experiment as a YAML file: problem, space, search, resources. It is read once and checked completely."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from raybilevel._config.files import Checked, apply_override, read_mapping, validated
from raybilevel._config.resources import ResourcesConfig
from raybilevel._config.space import read_space
from raybilevel._metric_bounds import read_bounds
from raybilevel._objectives import read_others
from raybilevel._own_problem import file_of, located
from raybilevel.errors import ConfigError
from raybilevel.space import Parameter, Space, flatten


class SearchConfig(Checked):
    """The settings of the search.

    trainings:      the budget in lower-level trainings. For method "hypergradient": the number of descents, each from
        its own start.
    method:         "auto" is "hypergradient" if x is a module or has more than 100 hyperparameters, else "default".
    settings:       of the method, where they differ from its defaults.
    seed:           of initial weights, the order of batches and all random numbers of the search.
    points_to_evaluate: hyperparameters to train first, nested like the space.
    constraints:    bounds on what the problem's `evaluate` returns, e.g. {latency_ms: "<= 5"}. The result is the best
        training that keeps them all.
    other_objectives: what `evaluate` returns that is to be weighed against F, e.g. {latency_ms: min}. The result is a
        Pareto front.
    priors:         where the optimum is expected, nested like the space. Of a number [value, standard deviation], in
        decades on a logarithmic scale and else in its own unit. Of a choice a weight for each value, {a: 3, b: 1}.
    max_concurrent: limit of concurrent trainings and upper-level steps. The default is as many trainings as fit into
        the cluster, but at most 16, or a quarter of all trainings if that is more.
    epoch_time_limit, step_time_limit: timeouts in seconds. An epoch of a training, or an upper-level step, that takes
        longer is treated as hung and its worker killed.
    max_failures:   retries of a training that fails or whose node is lost, each from its last checkpoint.
    """

    trainings: int = Field(ge=1)
    method: str = "auto"
    settings: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    max_concurrent: int | None = Field(default=None, ge=1)
    points_to_evaluate: list[dict[str, Any]] = Field(default_factory=list)
    constraints: dict[str, str] = Field(default_factory=dict)
    other_objectives: dict[str, str] = Field(default_factory=dict)
    priors: dict[str, Any] = Field(default_factory=dict)
    epoch_time_limit: float | None = Field(default=None, gt=0)
    step_time_limit: float | None = Field(default=None, gt=0)
    max_failures: int = Field(default=0, ge=-1)

    @field_validator("constraints")
    @classmethod
    def bounds(cls, constraints: dict[str, str]) -> dict[str, str]:
        read_bounds(constraints)
        return constraints

    @field_validator("other_objectives")
    @classmethod
    def others(cls, objectives: dict[str, str]) -> dict[str, str]:
        read_others(objectives)
        return objectives


class ExperimentConfig(Checked):
    """A config file.

    problem: one of `raybilevel problems`, or one of your own: `package.module:Class`, or `folder/file.py:Class` with a
        path relative to the config.
    options: arguments of its constructor, and `device`.
    space:   nested. A domain is {loguniform: [low, high]}, {quniform: [low, high, step]} and so on. Lists may have
        domains in them, and the options of a choice may be dicts with domains. All other entries are constants. Without
        a domain the upper level is the problem's `upper_variables`.
    """

    problem: str
    options: dict[str, Any] = Field(default_factory=dict)
    space: dict[Any, Any] = Field(default_factory=dict)
    search: SearchConfig
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("space")
    @classmethod
    def readable(cls, tree: dict[Any, Any]) -> dict[Any, Any]:
        read_space(tree)  # as a validator, so that pydantic reports its mistakes beside those of other keys
        return tree

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The hyperparameters to search."""
        return () if self.box is None else self.box.parameters

    @property
    def box(self) -> Space | None:
        """The space to search, None where there is no domain in it."""
        return self._split_space[0]

    @property
    def constants(self) -> dict[str, Any]:
        """The rest of the space, nested."""
        return self._split_space[1]

    @cached_property
    def _split_space(self) -> tuple[Space | None, dict[str, Any]]:
        return read_space(self.space)

    @property
    def on_gpu(self) -> bool:
        """Whether trainings and upper-level steps run on a GPU."""
        return str(self.options.get("device")).startswith("cuda")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a config file, with overrides such as "search.trainings=40".

    Raises:
        ConfigError: the file is missing or not YAML, or keys are unknown, missing or wrong. There is one line for each
            mistake, with file and key.
    """
    raw = read_mapping(path)
    if "problem" not in raw and {"problems", "methods", "budget"} & raw.keys():
        raise ConfigError(f"{path}: a config of a comparison; use `raybilevel compare {path}`")
    # Before the check, so that overrides are checked like the file.
    for override in overrides:
        apply_override(raw, override)
    if isinstance(raw.get("problem"), str):
        raw["problem"] = located(raw["problem"], Path(path).parent)
    return validated(ExperimentConfig, raw, path)


def resolved(config: ExperimentConfig) -> str:
    """The config with every default filled in, as YAML."""
    text: str = yaml.safe_dump(config.model_dump(), sort_keys=False)
    return text


MAY_CHANGE = {"trainings", "max_concurrent", "epoch_time_limit", "step_time_limit", "max_failures"}
"""Keys of `search` that decide how far a run goes and how it is run, and not what is known. So do `resources`."""
ABSENT = "not there"


def resume_differences(begun: ExperimentConfig, now: ExperimentConfig) -> list[str]:
    """What keeps a config from going on with a run that began with another one, each key with both values."""
    theirs, ours = (
        flatten(
            {
                **config.model_dump(exclude={"search": MAY_CHANGE, "resources": True}),
                "problem": file_of(config.problem),  # the file may lie elsewhere on another machine
            }
        )
        for config in (begun, now)
    )
    return [
        f"{'.'.join(path)} was {theirs.get(path, ABSENT)!r} and is {ours.get(path, ABSENT)!r}"
        for path in dict.fromkeys([*theirs, *ours])
        if path not in theirs or path not in ours or theirs[path] != ours[path]
    ]
