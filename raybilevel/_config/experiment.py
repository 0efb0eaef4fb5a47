"""One experiment as a YAML file: problem, space, search, resources. Read once, checked whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raybilevel.errors import ConfigError, SpaceError
from raybilevel.space import STARTS, Parameter, Space, nest

DOMAINS = {"uniform": (False, 2), "loguniform": (True, 2), "quniform": (False, 3), "qloguniform": (True, 3)}
"""Name of a domain -> whether it is logarithmic, and how many numbers it takes: low, high and perhaps a step."""


class Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SearchConfig(Checked):
    """How to search.

    trainings:      lower-level trainings, the budget; with method "hypergradient" descents, each from its own start.
    method:         "auto": "hypergradient" where x is a module or has more than 100 hyperparameters, else "default".
    settings:       of the method, other than its defaults.
    seed:           of initial weights, the order of batches and everything that the search draws.
    points_to_evaluate: hyperparameters to train first, nested as the space is.
    max_concurrent: trainings and upper-level steps at once; by default as many trainings as fit into the cluster, but
        no more than 16, or a quarter of all where that is more.
    epoch_time_limit, step_time_limit: seconds after which an epoch of a training, or an upper-level step, hangs.
    max_failures:   how often a training that fails, or whose node is lost, goes on from its last checkpoint.
    """

    trainings: int = Field(ge=1)
    method: str = "auto"
    settings: dict[str, Any] = {}
    seed: int = 0
    max_concurrent: int | None = Field(default=None, ge=1)
    points_to_evaluate: list[dict[str, Any]] = []
    epoch_time_limit: float | None = Field(default=None, gt=0)
    step_time_limit: float | None = Field(default=None, gt=0)
    max_failures: int = Field(default=0, ge=-1)


class BundlesConfig(Checked):
    """A training of several processes: Ray's placement group, reserved whole.

    bundles:  resources of each ({"CPU": 1, "GPU": 1}); the training itself runs in the first.
    strategy: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
    """

    bundles: list[dict[str, float]] = Field(min_length=1)
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"


class ResourcesConfig(Checked):
    """Ray resources: cpu, gpu, fractions of them, custom ones by their names.

    lower: of a lower-level training; or bundles. By default a CPU, and a GPU where `options.device` is one.
    upper: of an upper-level step; by default a GPU where `options.device` is one, else nothing.
    """

    lower: dict[str, float] | BundlesConfig | None = None
    upper: dict[str, float] | None = None


class ExperimentConfig(Checked):
    """A config file.

    problem: one of `raybilevel problems`.
    options: arguments of its constructor, and `device`.
    space:   nested; a domain is {loguniform: [low, high]}, {quniform: [low, high, step]} and so on, the rest constants.
        Without a domain the upper level is the problem's `upper_variables`.
    """

    problem: str
    options: dict[str, Any] = {}
    space: dict[str, Any] = {}
    search: SearchConfig
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def lower_resources(self) -> dict[str, float] | BundlesConfig:
        """What a training asks for."""
        return {"cpu": 1.0, **self._own_gpu} if self.resources.lower is None else self.resources.lower

    @property
    def upper_resources(self) -> dict[str, float]:
        """What an upper-level step asks for."""
        return self._own_gpu if self.resources.upper is None else self.resources.upper

    @property
    def _own_gpu(self) -> dict[str, float]:
        return {"gpu": 1.0} if str(self.options.get("device")).startswith("cuda") else {}

    def split_space(self) -> tuple[Space, dict[str, Any]]:
        """The box that is searched, and the constants around it.

        Raises:
            SpaceError: a domain is wrong; it is named.
        """
        parameters, constants = [], {}
        for path, entry in entries(self.space).items():
            if isinstance(entry, Domain):
                parameters.append(entry.parameter(path))
            else:
                constants[path] = entry
        if not parameters and self.search.method in ("auto", "hypergradient"):
            return STARTS, nest(constants)
        return Space(tuple(parameters)), nest(constants)


class Domain(Checked):
    kind: str
    numbers: tuple[float, ...]

    def parameter(self, path: tuple[str, ...]) -> Parameter:
        log, _ = DOMAINS[self.kind]
        low, high, *step = self.numbers
        return Parameter(path, low, high, log, step[0] if step else None)


def entries(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of a space by path: domains and constants."""
    found: dict[tuple[str, ...], Any] = {}
    for key, entry in tree.items():
        path = (*prefix, str(key))
        if not isinstance(entry, Mapping) or not entry:
            found[path] = entry
        elif len(entry) == 1 and isinstance(next(iter(entry.values())), list):
            (kind, numbers) = next(iter(entry.items()))
            found[path] = domain("/".join(path), str(kind), numbers)
        else:
            found |= entries(entry, path)
    return found


def domain(name: str, kind: str, numbers: Sequence[Any]) -> Domain:
    if kind not in DOMAINS:
        raise SpaceError(f"{name}: unknown domain {kind!r}; choose one of {', '.join(DOMAINS)}")
    _, count = DOMAINS[kind]
    if len(numbers) != count or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        wanted = "[low, high, step]" if count == 3 else "[low, high]"
        raise SpaceError(f"{name}: {kind} takes {wanted}, finite numbers, got {list(numbers)}")
    return Domain(kind=kind, numbers=tuple(float(n) for n in numbers))


class Loader(yaml.SafeLoader):
    """YAML without code, in which 1e-6 is a number, as in YAML 1.2."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader)  # a SafeLoader


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked.

    Raises:
        ConfigError: it is missing, not YAML, or holds something else.
    """
    try:
        raw = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(raw).__name__}")
    return raw


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a config file, with overrides such as "search.trainings=40".

    Raises:
        ConfigError: it is missing, not YAML, or a key is unknown, missing or wrong; file and key are named.
    """
    raw = read_mapping(path)
    for override in overrides:
        apply_override(raw, override)
    try:
        config = ExperimentConfig.model_validate(raw)
        config.split_space()
    except ValidationError as error:
        raise ConfigError(f"{path}: {in_words(error)}") from error
    except SpaceError as error:
        raise ConfigError(f"{path}: space: {error}") from error
    return config


def in_words(error: ValidationError) -> str:
    """What is wrong with a config, by the dotted names of its keys."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'config'}: "
        f"{'no such key' if e['type'] == 'extra_forbidden' else e['msg'].removeprefix('Value error, ')}"
        for e in error.errors()
    )


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of a config to a YAML value."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected key=value, e.g. --set search.trainings=40")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {parent} is not a group of keys")
    try:
        node[last] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error


def resolved(config: ExperimentConfig) -> str:
    """The config with every default filled in, as YAML."""
    text: str = yaml.safe_dump(config.model_dump(), sort_keys=False)
    return text
