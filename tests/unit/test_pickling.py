"""A problem that cannot reach other processes is refused where it enters, and the attribute is named."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raybilevel._cluster.pickling import check_can_be_sent
from raybilevel.errors import ProblemError
from raybilevel.tune import BilevelSearch, hypergradient_trainable, lower_level_trainable
from tests.tiny_problems import Parabola, parabola


@pytest.mark.parametrize(
    ("attribute", "path"),
    [
        (threading.Lock(), "Parabola.kept: a lock"),
        ({"a": [1, threading.Lock()]}, r"Parabola.kept\['a'\]\[1\]: a lock"),
        ((number for number in range(3)), "Parabola.kept: a generator"),
        (np.array([threading.Lock()]), "Parabola.kept: a ndarray"),
    ],
)
def test_the_attribute_is_named(attribute: Any, path: str) -> None:
    with pytest.raises(ProblemError, match=f"^{path}.*cannot be pickled"):
        check_can_be_sent(parabola(kept=attribute))


def test_what_a_method_refers_to_is_no_attribute() -> None:
    lock = threading.Lock()

    class Guarded(Parabola):
        def model(self) -> nn.Module:
            with lock:
                return super().model()

    with pytest.raises(ProblemError, match="Guarded: something that its methods refer to"):
        check_can_be_sent(Guarded())


def test_data_models_functions_and_cycles_can_be_sent() -> None:
    module = nn.Linear(2, 2)
    sound = parabola(data=torch.zeros(2), array=np.zeros(2), module=module, shift=lambda x: x + 1)
    sound.itself = sound
    check_can_be_sent(sound)


@pytest.mark.parametrize("enter", [BilevelSearch, lower_level_trainable, hypergradient_trainable])
def test_it_is_refused_where_it_enters(enter: Any) -> None:
    with pytest.raises(ProblemError, match=r"Parabola\.kept"):
        enter(parabola(kept=threading.Lock()))
