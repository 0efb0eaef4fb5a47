"""Tune's search spaces <-> the box of the upper level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
from ray.tune.search.variant_generator import generate_variants

from raybilevel._define_by_run import read_define_by_run
from raybilevel._dependent import Dependent
from raybilevel._parameter import CHOICE, DOMAINS, Parameter
from raybilevel._space_tree import Choice, Leaf, read_tree
from raybilevel._tree import Path, nest_lists
from raybilevel.errors import SpaceError
from raybilevel.space import Fixed, Space, flatten, is_met, nest

SUPPORTED = " or ".join(f"tune.{name}" for name in [*DOMAINS, CHOICE])


def to_param_space(space: Space, constants: Mapping[str, Any]) -> dict[str, Any]:
    """The Tune `param_space` of a box without functions and the nested constants around it."""
    return nest({**flatten(part_of(space, (), {})), **flatten(constants)})


def part_of(space: Space, path: Path, chosen: Mapping[int, int]) -> Any:
    """The part of a Tune `param_space` at a path, where these numbers of switches are chosen."""
    entries: dict[Path, Any] = {}

    def is_here(entry: Parameter | Fixed) -> bool:
        inside = entry.path[: len(path)] == path and is_met(entry.when, chosen)
        # What lies below a switch is in its options already.
        return inside and not any(entry.path[: len(other)] == other for other in entries)

    for number, p in enumerate(space.parameters):
        if p.switch and number not in chosen and is_here(p):
            options = [part_of(space, p.path, {**chosen, number: option}) for option in range(len(p.choices))]
            entries[p.path] = tune.choice(options)
    found = {
        p.path: tune.choice(list(p.choices)) if p.choices else getattr(tune, p.domain)(*p.arguments)
        for p in space.parameters
        if not p.switch and is_here(p)
    }
    found |= {f.path: f.value for f in space.fixed if is_here(f)}
    found |= entries
    # In the order of the space, which is that of the coordinates when this is read again.
    in_order: tuple[Parameter | Fixed, ...] = (*space.parameters, *space.fixed)
    flat = {e.path[len(path) :]: found[e.path] for e in in_order if e.path in found}
    return flat[()] if () in flat else nest_lists(flat)


def split_param_space(param_space: Mapping[str, Any] | Callable[..., Any]) -> tuple[Space, dict[str, Any]]:
    """A Tune `param_space`, or a define-by-run function, as the box that is searched and the nested constants around
    it.

    Raises:
        SpaceError: an entry cannot be searched; it is named, with what to do.
    """
    if isinstance(param_space, Mapping):
        return read_tree(as_tree(param_space))
    if callable(param_space):
        return read_define_by_run(param_space), {}
    raise SpaceError(
        f"expected a dict of domains and constants, or a define-by-run function, got {type(param_space).__name__}"
    )


def as_tree(entry: Any, path: tuple[Any, ...] = ()) -> Any:
    """A part of a `param_space` without Tune's own types."""
    if isinstance(entry, Mapping):
        if set(entry) == {"grid_search"}:
            return grid(entry["grid_search"], path)
        if set(entry) == {"eval"}:  # Tune's form for JSON and YAML
            return Dependent(partial(evaluated, entry["eval"]))
        return {key: as_tree(value, (*path, key)) for key, value in entry.items()}
    if isinstance(entry, list):
        return [as_tree(item, (*path, place)) for place, item in enumerate(entry)]
    # Of a named tuple `tuple(...)` would lose the type.
    if type(entry) is tuple:
        if entry and entry[0] in ("__fn_ph", "__ref_ph"):
            raise SpaceError(
                f"{'/'.join(map(str, path))}: Tune has put a placeholder in the place of a function or an object, and "
                "this version of Ray does not show what it stands for; give the space to BilevelSearch(space=...)"
            )
        return tuple(as_tree(item, (*path, place)) for place, item in enumerate(entry))
    return domain(entry, path) if isinstance(entry, Domain) else entry


def grid(values: Any, path: tuple[Any, ...]) -> Any:
    """A `grid_search`. Of one value it is a constant."""
    options = tuple(as_tree(value, path) for value in values)
    if not options or any(isinstance(option, Mapping) for option in options):
        raise SpaceError(
            f"{'/'.join(map(str, path))}: grid_search needs values that are no dicts, which Tune would merge with it; "
            "use tune.choice between dicts"
        )
    return Choice(options, grid=True) if len(options) > 1 else options[0]


def domain(entry: Domain, path: tuple[Any, ...]) -> Any:
    sampler = entry.get_sampler()
    step: tuple[float, ...] = ()
    if isinstance(sampler, Quantized):
        # Tune wraps the sampler of a quantised domain.
        step, sampler = (float(sampler.q),), sampler.get_sampler()
    if isinstance(entry, Function):
        return Dependent(Sampled(entry))
    if isinstance(entry, Categorical):
        return Choice(tuple(as_tree(option, path) for option in entry.categories))
    quantised = "q" if step else ""
    if isinstance(entry, Float) and isinstance(sampler, Normal):
        return Leaf(f"{quantised}randn", (sampler.mean, sampler.sd, *step))
    if isinstance(entry, Float | Integer) and isinstance(sampler, Uniform | LogUniform):
        log = "log" if isinstance(sampler, LogUniform) else ""
        kind = "randint" if isinstance(entry, Integer) else "uniform"
        return Leaf(f"{quantised}{log}{kind}", (entry.lower, entry.upper, *step))
    raise SpaceError(
        f"{'/'.join(map(str, path))}: {type(entry).__name__} with {type(sampler).__name__} sampling is not supported; "
        f"use {SUPPORTED}"
    )


class Spec(dict[str, Any]):
    """A dict whose entries are attributes as well."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        super().__init__({key: Spec(e) if isinstance(e, Mapping) else e for key, e in entries.items()})
        self.__dict__ = self


@dataclass
class Sampled:
    """A `sample_from` function. It takes the config, in the older form a `spec` around that, or nothing.

    takes_spec: whether it is of the older form, once a call has told. Tune tries both and logs a warning each time.
    """

    domain: Function
    takes_spec: bool | None = None

    def __call__(self, config: Mapping[str, Any]) -> Any:
        if not self.domain.pass_config:
            return self.domain.func()
        if not self.takes_spec:
            try:
                found = self.domain.func(config)
            except (AttributeError, KeyError):
                if self.takes_spec is False:
                    raise
            else:
                self.takes_spec = False
                return found
        found = self.domain.func(Spec({"config": config}))
        self.takes_spec = True
        return found


def evaluated(expression: str, config: Mapping[str, Any]) -> Any:
    """An expression in `spec`, as Tune evaluates it."""
    _, found = next(generate_variants({"config": dict(config), "value": {"eval": expression}}))
    return found["value"]
