"""Reads YAML files of keys and values, and reports the mistakes in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from raybilevel.errors import ConfigError

UNION_TAG = "one of: "
"""Prefix of the tags of a config's unions. Pydantic lists the tags among the keys of a mistake."""


class Checked(BaseModel):
    """A part of a config. It refuses unknown keys, and truth values for numbers, and is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        # For pydantic true is 1. YAML reads yes and on as true.
        if isinstance(value, bool) and kind in (int, float, int | None, float | None):
            raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


MERGE = "tag:yaml.org,2002:merge"
Config = TypeVar("Config", bound=BaseModel)


class Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-6 is a number, as in YAML 1.2. For PyYAML, which is 1.1, it is a string.

    A key that is given twice is an error, as YAML says. PyYAML takes the last one.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice; leave one out", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# PyYAML finds a resolver by the first character of a value, so all that a number may begin with are listed.
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader)  # a SafeLoader


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked.

    Raises:
        ConfigError: the file is missing, is not YAML, or has no keys and values.
    """
    if Path(path).suffix == ".py":
        raise ConfigError(
            f"{path}: Python, and no config; give the YAML file that names its class (problem: "
            f"{Path(path).name}:MyProblem). "
            "`raybilevel new` writes both"
        )
    try:
        raw = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(raw).__name__}")
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of a config to a YAML value.

    Raises:
        ConfigError: the override is not key=value, or a part of the key is not a group.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected key=value, e.g. --set search.trainings=40")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:  # missing, or a key without a value
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {parent} is not a group of keys")
    try:
        node[last] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error


def validated(kind: type[Config], raw: dict[str, Any], path: str | Path) -> Config:
    """The content of a file as a config.

    Raises:
        ConfigError: keys are unknown, missing or wrong. There is one line for each mistake, with file and key.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {mistake}" for mistake in mistakes(kind, error))) from error


def mistakes(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """The mistakes in a config, each with the dotted name of its key."""
    found = []
    for mistake in error.errors():
        key = ".".join(part for part in map(str, mistake["loc"]) if not part.startswith(UNION_TAG))
        # Pydantic puts "Value error, " before the text of a ValueError.
        text = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            text = f"no such key; choose one of {', '.join(part_at(kind, mistake['loc'][:-1]).model_fields)}"
        # A validator may report several mistakes, one a line.
        found += [f"{key}: {line}" if key else line for line in text.splitlines()]
    return found


def part_at(kind: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """The part of a config at a path. Places in lists, keys of dicts and tags of unions lead to no other part."""
    for key in path:
        if key in kind.model_fields:
            kind = part_in(kind.model_fields[str(key)].annotation) or kind
    return kind


def part_in(annotation: Any) -> type[BaseModel] | None:
    """The first part of a config in the type of a field."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := part_in(inner))), None)
