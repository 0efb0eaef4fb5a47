"""Which hyperparameters a problem reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Recorded(dict[str, Any]):
    """Hyperparameters, nested as a space is, that note which of them are read.

    A dict, as the losses are given one; its iteration is its own, so that `dict(x)` and `**x` read the entries, too.
    """

    def __init__(self, given: Mapping[str, Any], read: set[str] | None = None, prefix: str = "") -> None:
        self.read: set[str] = set() if read is None else read
        self.prefix = prefix
        super().__init__(
            {
                key: Recorded(value, self.read, f"{prefix}{key}/") if isinstance(value, Mapping) else value
                for key, value in given.items()
            }
        )

    def _note(self, key: str) -> None:
        if key in self and not isinstance(super().__getitem__(key), Recorded):
            self.read.add(f"{self.prefix}{key}")

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def values(self) -> Any:
        return [self[key] for key in self]
