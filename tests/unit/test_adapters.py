"""What adapters share: hyperparameters where a model keeps them, losses that take tensors, decays, loaders, time."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from raybilevel._adapters.clock import Clock
from raybilevel._adapters.decays import decays_of, penalty
from raybilevel._adapters.factories import made_of
from raybilevel._adapters.functions import TakesTensors
from raybilevel._adapters.loaders import in_order
from raybilevel._adapters.marks import MOST_ENTRIES, Attributes, Held, Mark, in_place, marked, places_in, plain
from raybilevel.errors import ConfigError

CONFIG = {"a": 0.5, "b": {"c": 2.0}, "n": 3, "name": "x", "list": [0.25, 1]}


def given(**tensors: float) -> dict[str, Any]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in tensors.items()}


def test_marks_are_floats() -> None:
    config = marked(CONFIG)
    assert config == CONFIG
    assert {type(value) for value in (config["a"], config["b"]["c"], config["list"][0])} == {Mark}
    assert type(config["n"]) is int and type(config["list"][1]) is int
    assert type(marked(CONFIG, by_values=["b/c", "list/0"])["b"]["c"]) is float
    a = config["a"]
    assert copy.deepcopy(a) is a and copy.copy(a) is a
    assert type(pickle.loads(pickle.dumps(a))) is float


def test_what_is_computed_of_a_mark_follows_the_hyperparameter() -> None:
    a = marked({"a": 0.5})["a"]
    values = [a + 1, 1 - a, 3 * a, a / 4, 2 / a, a**2, 2**a, -a, a - a * a]
    numbers = [1.5, 0.5, 1.5, 0.125, 4.0, 0.25, 2**0.5, -0.5, 0.25]
    assert values == pytest.approx(numbers) and {type(value) for value in values} == {Mark}
    x = {"a": torch.tensor(0.7)}
    at = [value.value(x).item() for value in values]
    assert at == pytest.approx([1.7, 0.3, 2.1, 0.175, 2 / 0.7, 0.49, 2**0.7, -0.7, 0.21])
    assert type(math.log(a)) is float and not isinstance(a * torch.ones(2), Mark)
    assert isinstance((-a) ** 0.5, complex)


@dataclass
class Settings:
    rate: float


class Everywhere(nn.Module):
    def __init__(self, a: float) -> None:
        super().__init__()
        self.attribute, self.pair, self.dropout = a, (a, "other", (2 * a,)), nn.Dropout(a)
        self.listed, self.settings, self.space = [a, {"deep": a}], Settings(a), SimpleNamespace(value=a)
        self.closure, self.partial = (lambda: a), functools.partial(max, a)
        self.keywords = functools.partial(dict, value=a)
        self.data, self.held, self.buffer = [a] * (MOST_ENTRIES + 1), Held(a), torch.tensor(a)
        self.myself = SimpleNamespace(module=self)

    def values(self) -> list[Any]:
        return [
            self.attribute, self.pair[0], self.pair[2][0] / 2, self.dropout.p, self.listed[0], self.listed[1]["deep"],
            self.settings.rate, self.space.value, self.closure(), self.keywords()["value"],
        ]  # fmt: skip


def test_marks_are_found_where_a_module_keeps_them() -> None:
    module, x = Everywhere(marked({"a": 0.5})["a"]), given(a=0.7)
    with in_place(places_in([module]), x):
        assert [value is x["a"] or value.item() for value in module.values()] == pytest.approx(
            [True] * 2 + [0.7] + [True] * 7
        )
        assert module.held.value == 0.5 and module.data[-1] == 0.5 and module.buffer == 0.5
        assert module.pair[1] == "other"
    assert [type(value) for value in module.values()] == [Mark] * 10
    with pytest.raises(ZeroDivisionError), in_place(places_in([module]), x):
        raise ZeroDivisionError
    assert module.attribute == 0.5


def test_of_an_object_its_attributes_alone_may_be_searched() -> None:
    a = marked({"a": 0.5})["a"]
    outer, x = SimpleNamespace(a=a, inner=SimpleNamespace(a=a)), given(a=0.7)
    with in_place(places_in([Attributes(outer)]), x):
        assert outer.a is x["a"] and outer.inner.a is a


def test_a_long_chain_of_objects_is_not_followed_to_its_end() -> None:
    a = marked({"a": 0.5})["a"]
    chain = SimpleNamespace(a=a)
    for _ in range(5000):
        chain = SimpleNamespace(a=a, next=chain)
    assert 10 < len(places_in([chain])) < 100


def test_plain_configs_have_numbers() -> None:
    assert plain({"a": torch.tensor(0.5), "b": [torch.tensor(2.0), ("x", 1)]}) == {"a": 0.5, "b": [2.0, ("x", 1)]}


Z, LABELS = torch.tensor([[0.3, -1.0], [2.0, 0.1]]), torch.tensor([0, 1])
TARGETS = torch.tensor([[0.0, 1.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("loss", "at"),
    [
        (lambda x: functional.cross_entropy(Z, LABELS, label_smoothing=x), 0.2),
        (lambda x: nn.CrossEntropyLoss(torch.stack([x, 1 / x]) if isinstance(x, Tensor) else None)(Z, LABELS), 0.2),
        (lambda x: nn.BCEWithLogitsLoss(pos_weight=x)(Z, TARGETS), 0.2),
        (lambda x: functional.huber_loss(Z, TARGETS, delta=x), 0.2),
        (lambda x: functional.smooth_l1_loss(Z, TARGETS, beta=x), 0.2),
        (lambda x: functional.leaky_relu(Z, x).square().sum(), 0.2),
    ],
)
def test_losses_of_torch_have_gradients_in_tensors(loss: Any, at: float) -> None:
    x = torch.tensor(at, requires_grad=True)
    with TakesTensors([x]):
        value = loss(x)
        (slope,) = torch.autograd.grad(value, x)
        ahead, behind = (loss(torch.tensor(at + h)) for h in (1e-2, -1e-2))
    assert slope.item() == pytest.approx((ahead - behind).item() / 2e-2, rel=2e-2)
    assert slope != 0


def test_plain_numbers_are_left_to_torch() -> None:
    with TakesTensors([]):
        loss = functional.cross_entropy(Z.requires_grad_(), LABELS, label_smoothing=0.2)
    assert loss.grad_fn is not None and loss.item() == functional.cross_entropy(Z, LABELS, label_smoothing=0.2).item()
    with TakesTensors([]):
        assert functional.cross_entropy(Z, LABELS).grad_fn.name() == "NllLossBackward0"  # type: ignore[union-attr]


def test_where_torch_takes_no_tensor_a_hyperparameter_is_a_number() -> None:
    eps = torch.tensor(0.1, requires_grad=True)
    with TakesTensors([eps]):
        found = functional.layer_norm(Z, (2,), eps=eps)  # type: ignore[arg-type]
        assert nn.Dropout(eps).eval()(Z) is Z  # type: ignore[arg-type]
        with pytest.raises(RuntimeError):
            Z @ torch.ones(3, 3)
    torch.testing.assert_close(found, functional.layer_norm(Z, (2,), eps=0.1))


def test_decays_are_those_that_are_part_of_a_loss() -> None:
    model, a = nn.Linear(2, 1), marked({"a": 0.5})["a"]
    x = given(a=0.7)

    def groups() -> list[dict[str, Any]]:
        return [{"params": [model.weight], "weight_decay": a}, {"params": [model.bias]}]

    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad):
        decays = decays_of([kind(groups(), lr=0.1)], model)  # type: ignore[call-arg]
        found = penalty(decays, model, x)
        assert isinstance(found, Tensor) and found.item() == pytest.approx(0.35 * model.weight.square().sum().item())
        (slope,) = torch.autograd.grad(found, x["a"])
        assert slope.item() == pytest.approx(model.weight.square().sum().item() / 2)
    for optimizer in (
        torch.optim.AdamW(groups()), torch.optim.Adam(groups(), decoupled_weight_decay=True),
        torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.LBFGS(model.parameters()),
    ):  # fmt: skip
        assert penalty(decays_of([optimizer], model), model, x) == 0.0


def test_factories_get_what_they_have_parameters_for() -> None:
    config = {"a": 1.0, "b": 2.0}
    assert made_of(lambda config: config, config, "it") is config
    assert made_of(lambda b, other=3: (b, other), config, "it") == (2.0, 3)
    assert made_of(lambda: 4, config, "it") == 4
    assert made_of(lambda **every: every, config, "it") == config
    assert made_of(lambda b, **others: (b, others), config, "it") == (2.0, {})
    with pytest.raises(ConfigError, match="it: <lambda> has the parameters c without a default"):
        made_of(lambda b, c: None, config, "it")


class Noisy(TensorDataset):
    def __getitem__(self, row: int) -> Any:
        return (*super().__getitem__(row), torch.rand(()), random.random(), np.random.random())


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_are_read_in_order_without_a_trace(workers: int) -> None:
    loader = DataLoader(Noisy(torch.arange(10)), 4, shuffle=True, drop_last=True, num_workers=workers)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].sum()  # type: ignore[index]
    one, two = list(in_order(loader)), list(in_order(loader))
    assert [batch[0].tolist() for batch in one] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
    assert one[0][1].unique().numel() == 4
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].sum()  # type: ignore[index]


def test_a_sampler_of_the_users_own_stays() -> None:
    sampler = WeightedRandomSampler([0.0, 1.0, 1.0], 4)
    loader = DataLoader(TensorDataset(torch.arange(3)), 2, sampler=sampler)
    one, two = (torch.cat([batch[0] for batch in in_order(loader)]).tolist() for _ in range(2))
    assert one == two and len(one) == 4 and 0 not in one


def test_a_clock_follows_steps_wherever_they_are_taken() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with Clock() as clock:
        for rate in [0.1] * 30 + [0.2] * 15:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    optimizer.step()  # after the training
    found = clock.time(model)
    assert found is not None and found.keys() == {"weight", "bias"}
    assert found["weight"].item() == pytest.approx(2 * (30 * 0.1 + 15 * 0.2))
    half = clock.time(model, 0.5)
    assert half is not None and half["bias"].item() == pytest.approx(found["bias"].item() / 2)
    assert clock.time(other) is None
