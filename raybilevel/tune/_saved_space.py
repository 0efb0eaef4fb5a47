"""A space with functions or objects in it, and the constants around it, as text for the state file."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from typing import Any

from ray import cloudpickle

from raybilevel._parameter import is_literal
from raybilevel.errors import StateError
from raybilevel.space import Space

logger = logging.getLogger(__name__)


def pack(space: Space, constants: Mapping[str, Any]) -> str | None:
    """A pickle of both, in base64; None if the rest of the state file has all of them, "" if they cannot be pickled."""
    simple = not space.fixed and not space.tuples and all(map(is_literal, (p.choices for p in space.parameters)))
    if simple and is_json(constants):
        return None
    try:
        return base64.b64encode(cloudpickle.dumps((space, dict(constants)))).decode()
    except Exception as error:  # whatever an object's own pickling raises
        logger.error(
            "the space cannot be saved with the search, which will not go on from its state: %s: %s",
            type(error).__name__, error,
        )  # fmt: skip
        return ""


def unpack(text: str) -> tuple[Space, dict[str, Any]]:
    """
    Raises:
        StateError: what it needs is not there, or not as it was.
    """
    if not text:
        raise StateError(
            "the space could not be saved with the search; give the space to BilevelSearch, or to Tuner.restore as "
            "param_space"
        )
    try:
        found: tuple[Space, dict[str, Any]] = cloudpickle.loads(base64.b64decode(text))
    except Exception as error:  # a pickle may raise anything
        raise StateError(
            f"the functions and objects of the space cannot be read ({type(error).__name__}: {error}); give the space "
            "to BilevelSearch, or to Tuner.restore as param_space"
        ) from error
    return found


def is_json(constants: Mapping[str, Any]) -> bool:
    """Whether JSON keeps them as they are."""
    try:
        text = json.dumps(constants)
    except (TypeError, ValueError):
        return False
    # JSON makes lists of tuples, and texts of keys that are numbers. By repr, as NaN is not equal to itself.
    return repr(json.loads(text)) == repr(constants)
