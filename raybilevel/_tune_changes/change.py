"""A change of Ray Tune as a value, and the replacement of a method."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuneChange:
    """A change of one attribute of one class of Tune.

    name:      for logs.
    module, owner, attribute: the upstream code that it replaces.
    versions:  of Ray, oldest first. That code was read in their source, and the change is tested with them (`make
        test-ray`).
    without:   what Tune does without the change, for the warning.
    """

    name: str
    module: str
    owner: str
    attribute: str
    versions: tuple[str, ...]
    without: str

    @property
    def target(self) -> str:
        return f"{self.module}.{self.owner}.{self.attribute}"

    @property
    def source(self) -> str:
        """The upstream code of the newest version, on GitHub."""
        path = self.module.replace(".", "/")
        return f"https://github.com/ray-project/ray/blob/ray-{self.versions[-1]}/python/{path}.py"

    def log_applied(self) -> None:
        logger.debug("changed Ray Tune: %s (%s)", self.name, self.target)

    def warn_of_missing(self) -> None:
        logger.warning(
            "cannot change Ray Tune: %s. Ray %s has no %s as in the tested versions, %s (%s). Without the change %s",
            self.name, ray.__version__, self.target, ", ".join(self.versions), self.source, self.without,
        )  # fmt: skip


@dataclass(frozen=True)
class MethodChange(TuneChange):
    """A change of a method.

    parameters:  of the upstream method. A method with others counts as missing, as the replacement could not be called.
    replacement: makes the new method from the upstream one.
    """

    parameters: tuple[str, ...]
    replacement: Callable[[Callable[..., Any]], Callable[..., Any]]

    def upstream(self) -> tuple[type, Callable[..., Any]] | None:
        """The class and its current method; None if this version of Ray has no such method."""
        try:
            owner = getattr(importlib.import_module(self.module), self.owner)
            method = vars(owner)[self.attribute]  # not getattr, which would find an inherited one
        except (ImportError, AttributeError, KeyError):
            return None
        return (owner, method) if tuple(inspect.signature(method).parameters) == self.parameters else None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the method inside the block. Warn if it is missing."""
        found = self.upstream()
        if found is None:
            self.warn_of_missing()
            yield
            return
        owner, method = found
        setattr(owner, self.attribute, self.replacement(method))
        self.log_applied()
        try:
            yield
        finally:
            setattr(owner, self.attribute, method)
