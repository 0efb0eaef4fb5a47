"""A shared value is unpickled once in a process, whatever carries it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from raybilevel._cluster import shared
from raybilevel._cluster.shared import MAX_CACHED_VALUES, Shared


class Counted:
    """Counts how often its instances are unpickled."""

    unpickled = 0

    def __init__(self, name: str) -> None:
        self.name, self.data = name, torch.arange(1000.0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        Counted.unpickled += 1


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    shared._kept.clear()
    monkeypatch.setattr(Counted, "unpickled", 0)


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_process_unpickles_it_once(protocol: int) -> None:
    shared_value = Shared(Counted("a"))
    carried, again = pickle.dumps(shared_value, protocol), pickle.dumps(shared_value, protocol)
    first, second, third = pickle.loads(carried), pickle.loads(carried), pickle.loads(again)
    assert Counted.unpickled == 1
    assert first.value is second.value is third.value
    assert first.value.data.equal(torch.arange(1000.0))


def test_its_bytes_travel_out_of_band() -> None:
    buffers: list[pickle.PickleBuffer] = []
    value = Shared(Counted("a"))
    inside = pickle.dumps(value, 5, buffer_callback=buffers.append)
    assert len(inside) < 500
    assert len(buffers) == 1
    assert pickle.loads(inside, buffers=buffers).value.name == "a"


def test_an_unpickled_value_can_be_sent_again() -> None:
    arrived = pickle.loads(pickle.dumps(Shared(Counted("a"))))
    assert pickle.loads(pickle.dumps(arrived)).value.name == "a"


def test_values_are_kept_apart_and_old_ones_are_dropped() -> None:
    carried = [pickle.dumps(Shared(Counted(str(number)))) for number in range(MAX_CACHED_VALUES + 2)]
    assert [pickle.loads(data).value.name for data in carried] == [
        str(number) for number in range(MAX_CACHED_VALUES + 2)
    ]
    assert len(shared._kept) == MAX_CACHED_VALUES
    assert pickle.loads(carried[0]).value.name == "0"
    assert Counted.unpickled == MAX_CACHED_VALUES + 3
