"""Against `torch.nn.functional` where both are defined, and by differences where torch has no gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as reference

from raybilevel import functional as ours

REDUCTIONS = ["none", "mean", "sum"]
# Sums in another order: some units in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def indices(*shape: int, classes: int = 4) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def assert_close(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=TOLERANCE[a.dtype], equal_nan=True)


def differentiable_twice(function: Callable[..., Tensor], *inputs: Tensor) -> bool:
    return gradcheck(function, inputs) and gradgradcheck(function, inputs)


def test_the_public_names_are_the_functions_for_users() -> None:
    assert all(inspect.isfunction(getattr(ours, name)) for name in ours.__all__)
    others = [name for name in ours.__all__ if not hasattr(reference, name)]
    assert others == ["focal_loss", "gaussian_dropout", "weight_decay"]


@pytest.mark.parametrize(
    "refused",
    [
        lambda t: reference.cross_entropy(normal(4, 3), indices(4, classes=3), label_smoothing=t),
        lambda t: reference.cross_entropy(normal(4, 3), indices(4, classes=3), weight=t.expand(3)),
        lambda t: reference.binary_cross_entropy_with_logits(normal(4), normal(4), weight=t),
        lambda t: reference.binary_cross_entropy_with_logits(normal(4), normal(4), pos_weight=t),
        lambda t: reference.huber_loss(normal(4), normal(4), delta=t),
        lambda t: reference.smooth_l1_loss(normal(4), normal(4), beta=t),
        lambda t: reference.dropout(normal(4), p=t),
        lambda t: reference.leaky_relu(normal(4), negative_slope=t),
    ],
)
def test_torch_refuses_what_is_written_again_here(refused: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"not differentiable|must be (float|Number), not Tensor"):
        refused(scalar(0.3))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(4,), (6, 4), (3, 4, 2, 2)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["indices", "ignored", "probabilities"])
def test_cross_entropy_is_that_of_torch(
    reduction: Any, dtype: torch.dtype, shape: tuple[int, ...], weighted: bool, target: str
) -> None:
    dim = 0 if len(shape) == 1 else 1
    logits = normal(*shape, dtype=dtype)
    labels = indices(*shape[:dim], *shape[dim + 1 :])
    settings: dict[str, Any] = {"reduction": reduction}
    if target == "probabilities":
        labels = normal(*shape, dtype=dtype, seed=2).softmax(dim)
    elif target == "ignored":  # with a single example the mean is nan, there as here
        settings["ignore_index"] = int(labels.flatten()[0])
    if weighted:
        settings["weight"] = normal(4, dtype=dtype, seed=3).exp()
    for smoothing in (0.0, 0.2):
        expected = reference.cross_entropy(logits, labels, label_smoothing=smoothing, **settings)
        for given in (smoothing, scalar(smoothing, dtype)):
            assert_close(ours.cross_entropy(logits, labels, label_smoothing=given, **settings), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_is_differentiable_in_weights_and_smoothing(reduction: Any) -> None:
    logits, weight, smoothing = normal(5, 4).requires_grad_(), normal(4, seed=3).exp().requires_grad_(), scalar(0.1)
    labels, probabilities = indices(5), normal(5, 4, seed=2).softmax(1)

    def loss(target: Tensor, **settings: int) -> Callable[..., Tensor]:
        return lambda z, w, s: ours.cross_entropy(z, target, w, label_smoothing=s, reduction=reduction, **settings)

    assert differentiable_twice(loss(labels), logits, weight, smoothing)
    assert differentiable_twice(loss(labels, ignore_index=int(labels[0])), logits, weight, smoothing)
    assert differentiable_twice(loss(probabilities), logits, weight, smoothing)


def test_a_class_that_is_ruled_out_is_no_harm_without_smoothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    loss = ours.cross_entropy(logits, torch.tensor([1]))
    assert_close(loss, reference.cross_entropy(logits, torch.tensor([1])))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()


def test_the_focal_loss_weights_by_the_probability_of_being_wrong() -> None:
    # Two classes with logits (log 3, 0): p = (3/4, 1/4).
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]], dtype=torch.float64).log()
    losses = ours.focal_loss(logits, torch.tensor([0, 1]), gamma=2.0, reduction="none")
    expected = torch.tensor([[1 / 16, 3 / 4], [9 / 16, 1 / 4]], dtype=torch.float64)
    assert_close(losses, -expected[:, 0] * expected[:, 1].log())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4,), (6, 4), (3, 4, 2)])
def test_the_focal_loss_without_focus_is_cross_entropy(reduction: Any, shape: tuple[int, ...]) -> None:
    labels = indices(*shape[:1], *shape[2:]) if len(shape) > 1 else indices()
    settings: dict[str, Any] = {"weight": normal(4, seed=3).exp(), "reduction": reduction, "ignore_index": 3}
    assert_close(
        ours.focal_loss(normal(*shape), labels, gamma=0.0, **settings),
        reference.cross_entropy(normal(*shape), labels, **settings),
    )


def test_the_focal_loss_is_differentiable_in_focus_and_weights() -> None:
    weight, labels = normal(4, seed=3).exp().requires_grad_(), indices(5)
    assert differentiable_twice(
        lambda z, g, w: ours.focal_loss(z, labels, g, w), normal(5, 4).requires_grad_(), scalar(1.5), weight
    )


def test_the_focal_loss_of_what_is_learned_has_a_gradient() -> None:
    logits, gamma = torch.tensor([[80.0, 0.0]], requires_grad=True), scalar(0.5, torch.float32)
    gradients = torch.autograd.grad(ours.focal_loss(logits, torch.tensor([0]), gamma), (logits, gamma))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weight", [None, 1, 4])
@pytest.mark.parametrize("pos_weight", [None, 1, 4])
def test_binary_cross_entropy_is_that_of_torch(
    reduction: Any, dtype: torch.dtype, weight: int | None, pos_weight: int | None
) -> None:
    logits = 30 * normal(6, 4, dtype=dtype)  # far in both tails
    settings: dict[str, Any] = {
        "weight": None if weight is None else normal(weight, dtype=dtype, seed=3).exp(),
        "pos_weight": None if pos_weight is None else normal(pos_weight, dtype=dtype, seed=4).exp(),
    }
    labels = normal(6, 4, dtype=dtype, seed=2).sigmoid()
    assert_close(
        ours.binary_cross_entropy_with_logits(logits, labels, reduction=reduction, **settings),
        reference.binary_cross_entropy_with_logits(logits, labels, reduction=reduction, **settings),
    )


def test_binary_cross_entropy_is_differentiable_in_its_weights() -> None:
    labels = normal(5, 3, seed=2).sigmoid()
    weights = [normal(3, seed=seed).exp().requires_grad_() for seed in (3, 4)]
    assert differentiable_twice(
        lambda z, w, q: ours.binary_cross_entropy_with_logits(z, labels, w, pos_weight=q),
        normal(5, 3).requires_grad_(),
        *weights,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [0.3, 1.0, 10.0])
def test_huber_and_smooth_l1_losses_are_those_of_torch(reduction: Any, dtype: torch.dtype, size: float) -> None:
    a, b = normal(6, 4, dtype=dtype), normal(6, 4, dtype=dtype, seed=2)
    for given in (size, scalar(size, dtype)):
        assert_close(
            ours.huber_loss(a, b, reduction, delta=given), reference.huber_loss(a, b, reduction=reduction, delta=size)
        )
        assert_close(
            ours.smooth_l1_loss(a, b, reduction, beta=given),
            reference.smooth_l1_loss(a, b, reduction=reduction, beta=size),
        )
    assert_close(
        ours.smooth_l1_loss(a, b, reduction, beta=0.0), reference.smooth_l1_loss(a, b, reduction=reduction, beta=0.0)
    )


@pytest.mark.parametrize("loss", [ours.huber_loss, ours.smooth_l1_loss])
def test_huber_and_smooth_l1_losses_are_differentiable_in_their_threshold(loss: Callable[..., Tensor]) -> None:
    a, b = normal(6, 4).requires_grad_(), normal(6, 4, seed=2)
    assert differentiable_twice(lambda z, size: loss(z, b, "none", size), a, scalar(0.7))
    per_column = torch.tensor([0.3, 0.7, 1.1, 2.9], dtype=torch.float64, requires_grad=True)
    assert differentiable_twice(lambda z, size: loss(z, b, "mean", size), a, per_column)


def test_the_huber_loss_of_a_perfect_fit_is_still_curved() -> None:
    residual = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = ours.huber_loss(residual, torch.zeros_like(residual), delta=scalar(1.0))
    (slope,) = torch.autograd.grad(loss, residual, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, residual)
    assert slope == 0 and curvature == 1


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_leaky_relu_is_that_of_torch_and_differentiable_in_its_slope(dtype: torch.dtype) -> None:
    z = torch.cat([normal(9, dtype=dtype), torch.zeros(1, dtype=dtype)]).requires_grad_()
    for given in (0.2, scalar(0.2, dtype)):
        value, expected = ours.leaky_relu(z, given), reference.leaky_relu(z, 0.2)
        assert_close(value, expected)
        assert_close(*(torch.autograd.grad(y.sum(), z)[0] for y in (value, expected)))
    assert differentiable_twice(ours.leaky_relu, normal(9).requires_grad_(), scalar(0.2))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_dropout_makes_the_draws_of_torch(dtype: torch.dtype, rate: float) -> None:
    z = normal(50, 4, dtype=dtype)
    torch.manual_seed(7)
    expected = reference.dropout(z, rate)
    torch.manual_seed(7)
    assert_close(ours.dropout(z, scalar(rate)), expected)
    torch.manual_seed(7)
    assert_close(ours.dropout(z, rate), expected)
    assert_close(ours.dropout(z, scalar(rate), generator=torch.Generator().manual_seed(7)), expected)


def test_neither_dropout_does_anything_in_evaluation() -> None:
    z, p = normal(5), scalar(0.5)
    assert ours.dropout(z, p, training=False) is z
    assert ours.gaussian_dropout(z, p, training=False) is z


@pytest.mark.parametrize("layer", [ours.dropout, ours.gaussian_dropout])
@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_the_gradient_of_dropout_is_on_average_that_of_the_mean_of_a_quadratic_loss(
    layer: Callable[..., Tensor], rate: float
) -> None:
    # E (h^2 / 2 + b h), h of mean z and variance z^2 p / (1 - p), has the derivative z^2 / (2 (1 - p)^2) in p.
    z, b, draws = 1.5, 0.7, 400_000
    p = scalar(rate)
    h = layer(torch.full((draws,), z, dtype=torch.float64), p, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((h.square() / 2 + b * h).mean(), p)
    # Five standard errors; the scale 1 / (1 - p) alone would give more than twice this.
    assert gradient.item() == pytest.approx(z**2 / (2 * (1 - rate) ** 2), rel=0.03)
    assert h.mean().item() == pytest.approx(z, rel=0.01)
    assert h.var().item() == pytest.approx(z**2 * rate / (1 - rate), rel=0.02)


def test_dropout_has_a_gradient_where_nothing_is_dropped() -> None:
    p = scalar(0.0)
    (gradient,) = torch.autograd.grad(ours.dropout(torch.ones(3, dtype=torch.float64), p).sum(), p)
    assert gradient == pytest.approx(3 * 0.5)


def test_gaussian_dropout_is_differentiable_draw_by_draw() -> None:
    assert differentiable_twice(
        lambda z, p: ours.gaussian_dropout(z, p, generator=torch.Generator().manual_seed(0)),
        normal(6).requires_grad_(),
        scalar(0.4),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.cross_entropy(normal(2, 3), indices(2), label_smoothing=1.5), "must be from 0 to 1, got 1.5"),
        (lambda: ours.cross_entropy(normal(2, 3), indices(2), weight=normal(4)), r"3 classes, got shape \(4,\)"),
        (lambda: ours.cross_entropy(normal(2, 3), indices(3)), r"must have shape \(2,\), got \(3,\)"),
        (lambda: ours.cross_entropy(normal(2, 3), normal(2, 4)), r"shape of input, \(2, 3\), got \(2, 4\)"),
        (lambda: ours.cross_entropy(normal(2, 4), indices(2), reduction="Mean"), "'none', 'mean' or 'sum', got 'Mean'"),
        (lambda: ours.focal_loss(normal(2, 4), indices(2), gamma=-1.0), "gamma must not be negative, got -1.0"),
        (lambda: ours.binary_cross_entropy_with_logits(normal(2), normal(2, 1)), r"\(2,\), got \(2, 1\)"),
        (lambda: ours.huber_loss(normal(2), normal(2), delta=0.0), "delta must be positive, got 0.0"),
        (lambda: ours.smooth_l1_loss(normal(2), normal(2), beta=-1.0), "beta must be positive, got -1.0"),
        (lambda: ours.dropout(normal(2), 1.5), "p must be from 0 to 1, got 1.5"),
        (lambda: ours.dropout(normal(2), scalar(-0.5)), "p must be from 0 to 1, got -0.5"),
        (lambda: ours.gaussian_dropout(normal(2), 1.0), "p must be at least 0 and below 1, got 1.0"),
    ],
)  # fmt: skip
def test_errors_name_what_was_wrong(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_class_out_of_range_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        ours.cross_entropy(normal(2, 3), torch.tensor([0, 3]))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adadelta])
def test_weight_decay_is_that_of_optimizers(optimizer: type[torch.optim.Optimizer]) -> None:
    def stepped(by_optimizer: bool) -> list[Tensor]:
        first, second = (torch.linspace(-1, k, 4, dtype=torch.double, requires_grad=True) for k in (1, 2))
        groups = [{"params": [first], "weight_decay": 0.3}, {"params": [second], "weight_decay": 0.02}]
        loss = (first * second).sin().sum() + (0.0 if by_optimizer else ours.weight_decay(groups))
        loss.backward()
        optimizer(groups if by_optimizer else [first, second], lr=0.1).step()
        return [first.detach(), second.detach()]

    torch.testing.assert_close(stepped(True), stepped(False), rtol=1e-12, atol=0)


def test_weight_decay_has_a_gradient_in_the_decay() -> None:
    decay, y = torch.tensor(0.1, requires_grad=True), torch.tensor([1.0, 2.0])
    (slope,) = torch.autograd.grad(ours.weight_decay([y, y], decay), decay)
    assert slope == 5.0
    with pytest.raises(ValueError, match="params has no weights"):
        ours.weight_decay([], decay)
