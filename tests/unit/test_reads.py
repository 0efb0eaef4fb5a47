from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from raybilevel.search._reads import Recorded

GIVEN = {"decay": {"fc1": 1.0, "fc2": 2.0}, "lr": 0.1, "name": "x"}


@pytest.mark.parametrize(
    ("use", "read"),
    [
        (lambda given: given["lr"], {"lr"}),
        (lambda given: given.get("lr"), {"lr"}),
        (lambda given: given.get("momentum", 0.9), set()),
        (lambda given: "lr" in given, set()),
        (lambda given: given["decay"], set()),
        (lambda given: given["decay"]["fc1"], {"decay/fc1"}),
        (lambda given: sum(given["decay"].values()), {"decay/fc1", "decay/fc2"}),
        (lambda given: {key: value for key, value in given["decay"].items()}, {"decay/fc1", "decay/fc2"}),  # noqa: C416
        (lambda given: dict(**given), {"lr", "name"}),
        (lambda given: {**given["decay"]}, {"decay/fc1", "decay/fc2"}),
        (lambda given: dict(given), {"lr", "name"}),
        (list, set()),
    ],
)
def test_what_is_read_is_noted(use: Callable[[Any], Any], read: set[str]) -> None:
    given = Recorded(GIVEN)
    assert use(given) == use(GIVEN)
    assert given.read == read
