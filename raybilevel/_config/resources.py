"""The resources in a config, and those of a training and an upper-level step that result from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from raybilevel._config.files import UNION_TAG, Checked

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


def possible(amounts: dict[str, float]) -> dict[str, float]:
    """Check amounts of resources.

    Raises:
        ValueError: Ray cannot grant an amount.
    """
    for name, amount in amounts.items():
        # Ray would take them for custom resources, and a training would wait for them for ever.
        if name.lower() in ("cpus", "gpus"):
            raise ValueError(f"{name}: no such resource; write {name.lower()[:-1]}")
        if not (math.isfinite(amount) and amount >= 0):
            raise ValueError(f"{name}: expected an amount of at least 0, got {amount:g}")
        if by_ray(name) == "GPU" and amount > 1 and amount != int(amount):
            raise ValueError(f"{name}: expected a share of one GPU or a whole number of them, got {amount:g}")
    return amounts


Amounts = Annotated[dict[str, float], AfterValidator(possible)]


class BundlesConfig(Checked):
    """A training of several processes. Ray reserves all of their resources at once, as a placement group.

    bundles:  resources of each process ({"CPU": 1, "GPU": 1}). The training itself runs in the first.
    strategy: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
    """

    bundles: list[Amounts] = Field(min_length=1)
    strategy: Strategy = "PACK"


def form_of(lower: Any) -> str:
    """The tag of the union: pydantic then reports the mistakes of one form and not of both."""
    # A mapping in a file, an object in a config that is made from another one.
    bundles = isinstance(lower, BundlesConfig) or (isinstance(lower, Mapping) and "bundles" in lower)
    return f"{UNION_TAG}bundles" if bundles else f"{UNION_TAG}amounts"


class ResourcesConfig(Checked):
    """Ray resources: cpu, gpu, fractions of them, and custom ones by their names.

    lower: of a lower-level training, or its bundles. The default is a CPU, and a GPU if `options.device` is one.
    upper: of an upper-level step. The default is a GPU if `options.device` is one, else nothing.
    """

    lower: (
        Annotated[
            Annotated[Amounts, Tag(f"{UNION_TAG}amounts")] | Annotated[BundlesConfig, Tag(f"{UNION_TAG}bundles")],
            Discriminator(form_of),
        ]
        | None
    ) = None
    upper: Amounts | None = None

    def of_training(self, on_gpu: bool) -> TrainingResources:
        """Resources of a training. on_gpu: whether trainings run on a GPU."""
        if isinstance(self.lower, BundlesConfig):
            return TrainingResources(tuple(map(named_by_ray, self.lower.bundles)), self.lower.strategy)
        given = {"CPU": 1.0, **own_gpu(on_gpu)} if self.lower is None else self.lower
        return TrainingResources((named_by_ray(given),))

    def of_step(self, on_gpu: bool) -> dict[str, float]:
        """Resources of an upper-level step. on_gpu: whether steps run on a GPU."""
        return own_gpu(on_gpu) if self.upper is None else named_by_ray(self.upper)


@dataclass(frozen=True)
class TrainingResources:
    """Resources of a training.

    bundles:  of each of its processes, by Ray's names. The training itself runs in the first.
    strategy: of their placement group; None for a single process without a group.
    """

    bundles: tuple[dict[str, float], ...]
    strategy: Strategy | None = None

    @property
    def first(self) -> dict[str, float]:
        return self.bundles[0]


def own_gpu(on_gpu: bool) -> dict[str, float]:
    return {"GPU": 1.0} if on_gpu else {}


def named_by_ray(amounts: Mapping[str, float]) -> dict[str, float]:
    return {by_ray(name): amount for name, amount in amounts.items()}


def by_ray(name: str) -> str:
    """Ray's name of a resource. Tune's names are in lower case."""
    return name.upper() if name in ("cpu", "gpu") else name
