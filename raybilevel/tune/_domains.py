"""Tune's search domains <-> the box of the upper level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.tune.search.sample import (
    Categorical,
    Domain,
    Float,
    Function,
    Integer,
    LogUniform,
    Normal,
    Quantized,
    Uniform,
)

from raybilevel._parameter import CHOICE, DOMAINS
from raybilevel.errors import SpaceError
from raybilevel.space import Parameter, Space, flatten, nest

SUPPORTED = " or ".join(f"tune.{name}" for name in [*DOMAINS, CHOICE])


def to_param_space(space: Space, constants: Mapping[str, Any]) -> dict[str, Any]:
    """The Tune `param_space` of a box and the nested constants around it."""
    domains = {
        p.path: tune.choice(list(p.choices)) if p.choices else getattr(tune, p.domain)(*p.arguments)
        for p in space.parameters
    }
    return nest({**domains, **flatten(constants)})


def split_param_space(param_space: Mapping[str, Any]) -> tuple[Space, dict[str, Any]]:
    """A Tune `param_space` as the box that is searched and the nested constants around it.

    Raises:
        SpaceError: an entry cannot be searched; it is named, with what to do.
    """
    parameters, constants = [], {}
    if not isinstance(param_space, Mapping):
        raise SpaceError(f"expected a dict of domains and constants, got {type(param_space).__name__}")
    for path, entry in flatten(without_wrappers(param_space)).items():
        if isinstance(entry, Domain):
            parameters.append(parameter("/".join(path), path, entry))
        elif isinstance(entry, list | tuple) and any(isinstance(item, Domain) for item in entry):
            raise SpaceError(f"{'/'.join(path)}: domains inside a list are not supported; give each its own key")
        else:
            constants[path] = entry
    return Space(tuple(parameters)), nest(constants)


def without_wrappers(tree: Any, path: tuple[str, ...] = ()) -> Any:
    """The same space, after refusing what stands for a choice of values and is not a domain."""
    if isinstance(tree, Mapping):
        if set(tree) == {"grid_search"}:
            raise SpaceError(
                f"{'/'.join(path) or 'param_space'}: grid_search cannot be combined with a searcher; "
                f"use {SUPPORTED}, or run without search_alg"
            )
        for key in tree:
            if not isinstance(key, str):
                raise SpaceError(f"{'/'.join((*path, str(key)))}: the key {key!r} is no text; write {str(key)!r}")
        return {key: without_wrappers(value, (*path, key)) for key, value in tree.items()}
    # Tune replaces sample_from and objects by placeholders before a searcher sees the space.
    if isinstance(tree, tuple) and tree and tree[0] == "__fn_ph":
        raise SpaceError(f"{'/'.join(path)}: sample_from cannot be searched; use {SUPPORTED}, or make it a constant")
    if isinstance(tree, tuple) and tree and tree[0] == "__ref_ph":
        raise SpaceError(
            f"{'/'.join(path)}: an object in the space does not reach the upper level; make it an attribute of the "
            "problem, and leave numbers and strings here"
        )
    return tree


def parameter(name: str, path: tuple[str, ...], domain: Domain) -> Parameter:
    sampler = domain.get_sampler()
    step: tuple[float, ...] = ()
    if isinstance(sampler, Quantized):
        # Tune wraps the sampler of a quantised domain.
        step, sampler = (float(sampler.q),), sampler.get_sampler()
    if isinstance(domain, Function):
        raise SpaceError(f"{name}: sample_from cannot be searched; use {SUPPORTED}, or make it a constant")
    if isinstance(domain, Categorical):
        return Parameter.of_choices(path, domain.categories)
    quantised = "q" if step else ""
    if isinstance(domain, Float) and isinstance(sampler, Normal):
        return Parameter.of(path, f"{quantised}randn", (sampler.mean, sampler.sd, *step))
    if isinstance(domain, Float | Integer) and isinstance(sampler, Uniform | LogUniform):
        log = "log" if isinstance(sampler, LogUniform) else ""
        kind = "randint" if isinstance(domain, Integer) else "uniform"
        return Parameter.of(path, f"{quantised}{log}{kind}", (domain.lower, domain.upper, *step))
    raise SpaceError(
        f"{name}: {type(domain).__name__} with {type(sampler).__name__} sampling is not supported; use {SUPPORTED}"
    )
