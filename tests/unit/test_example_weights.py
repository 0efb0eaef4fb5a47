"""Hyper-cleaning with a weight for each example, and what it is compared with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.example_weights import Best, clean_alone, equal, ours, row, vpbgd
from raybilevel.errors import ConfigError
from raybilevel.hypergradient import DescentSettings
from raybilevel.problems.example_weights import CLASSES, PIXELS, ExampleWeights, Numbered, Weights

SETTINGS = DescentSettings(steps=15, rate=0.5, lower="tolerance", lower_tolerance=1e-3)


class Clusters(ExampleWeights):
    """Inputs around ten centres in the place of images."""

    def load(self) -> dict[str, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.split_seed)
        centres = torch.randn(CLASSES, PIXELS, generator=generator)

        def draw(count: int) -> tuple[Tensor, Tensor]:
            y = torch.arange(count) % CLASSES
            return 0.1 * (centres[y] + 2 * torch.randn(count, PIXELS, generator=generator)), y

        (x, y), upper, test = draw(self.train), draw(self.validation), draw(200)
        wrong = torch.rand(self.train, generator=generator) < self.wrong
        self._right = ~wrong
        return {"lower": (x, torch.where(wrong, (y + 1) % CLASSES, y)), "upper": upper, "test": test}


def small(**options: float) -> Clusters:
    return Clusters("unused", **{"train": 150, "validation": 150, "wrong": 0.4, **options})  # type: ignore[arg-type]


def test_each_example_has_its_weight_in_f() -> None:
    problem, weights = small(decay=0.1), Weights(150)
    with torch.no_grad():
        weights.logits.copy_(torch.linspace(-2, 2, 150))
    model = problem.model()
    (batch,) = problem.batches("lower", None)
    assert isinstance(batch, Numbered)
    losses = cross_entropy(model(batch.x), batch.y, reduction="none")
    decay = 0.05 * sum(part.square().sum() for part in model.parameters())
    expected = (torch.linspace(-2, 2, 150).sigmoid() * losses).mean() + decay
    assert problem.lower_loss(model, {"upper": weights}, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_f1_is_that_of_the_right_labels() -> None:
    problem, weights = small(), Weights(150)
    _ = problem.splits
    with torch.no_grad():
        weights.logits.copy_(torch.where(problem._right, 1.0, -1.0))
        # One that is right is missed, and one that is wrong is kept.
        weights.logits[int(problem._right.nonzero()[0])] = -1.0
        weights.logits[int((~problem._right).nonzero()[0])] = 1.0
        found = problem.evaluate(problem.model(), {"upper": weights})
    right = int(problem._right.sum())
    assert found["precision"] == found["recall"] == pytest.approx((right - 1) / right)
    assert found["f1"] == pytest.approx((right - 1) / right)
    with pytest.raises(ConfigError, match="wrong must be from 0"):
        ExampleWeights("unused", wrong=1.0)


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_descent_finds_wrong_labels(hidden: int) -> None:
    problem = small(hidden=hidden)
    found = ours(problem, SETTINGS, seed=0)
    assert found["f1"] > 0.8 and found["best_test_accuracy"] >= found["test_accuracy"]
    alike = equal(problem, SETTINGS, seed=0)["test_accuracy"]
    assert found["test_accuracy"] > alike
    # A refit of the linear model has the clean examples as well.
    assert ("refit" in found) == (hidden == 0)


def test_what_it_is_compared_with_learns() -> None:
    problem = small()
    found = vpbgd(problem, iterations=400, seed=0)
    assert found["test_accuracy"] > 0.5 and found["best_test_accuracy"] >= found["test_accuracy"] and found["f1"] > 0
    assert clean_alone(problem)["test_accuracy"] > 0.5
    best = Best()
    for accuracy, f1 in ((0.5, 0.9), (0.8, 0.4), (0.7, 0.6)):
        best.see({"test_accuracy": accuracy, "f1": f1})
    assert best.scores == {"test_accuracy": 0.8, "f1": 0.4}
    assert row("one", [{"test_accuracy": 0.5}]) == ("one", "0.5000", "", "", "", "", "")
