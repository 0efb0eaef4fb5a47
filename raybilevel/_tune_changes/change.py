"""Changes to methods of Tune, of this process and from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replace(owner: type, name: str, change: Callable[[Any], Any]) -> None:
    """A method by what `change` makes of it; nothing is done where there is no such method any more."""
    method = getattr(owner, name, None)
    if method is not None:
        setattr(owner, name, change(method))
