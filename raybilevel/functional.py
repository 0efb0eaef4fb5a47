"""Losses and layers whose hyperparameters may be tensors that require a gradient.

Those of `torch.nn.functional` refuse them: `cross_entropy` a tensor for `label_smoothing` and a gradient for
`weight`, `binary_cross_entropy_with_logits` a gradient for `weight` and `pos_weight`, `huber_loss`, `smooth_l1_loss`,
`dropout` and `leaky_relu` a tensor for `delta`, `beta`, `p` and `negative_slope`. The functions here have torch's
names, arguments and values, up to rounding. They are differentiable in these too, twice except where said. They take
numbers as well. `weight_decay` is what torch has as an option of optimizers only.

Not here is what torch differentiates already: class probabilities as targets, `prelu`, `lerp`, and mixup, whose share
is `torch.distributions.Beta(alpha, alpha).rsample()`.

A number out of range is an error. The value of a tensor is not checked, which would wait for its device: give it a
search space within the range.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "dropout",
    "focal_loss",
    "gaussian_dropout",
    "huber_loss",
    "leaky_relu",
    "smooth_l1_loss",
    "weight_decay",
]

Reduction = Literal["none", "mean", "sum"]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: Tensor | float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`, differentiable in `weight` and `label_smoothing`.

    For logits z, class weights w and smoothing s over C classes, an example of class t has the loss

        -(1 - s) w_t log p_t - s / C sum_c w_c log p_c,    p = softmax(z),

    and "mean" divides the sum over examples by the sum of their w_t. With class probabilities q for a target the loss
    is -sum_c ((1 - s) q_c + s / C) w_c log p_c, and "mean" divides by the number of examples. Smoothing: Szegedy et al.
    (2016), Rethinking the Inception Architecture for Computer Vision, section 7.

    input:  logits, shape (C,), (n, C) or (n, C, ...).
    target: class indices, shape () or (n, ...), of which `ignore_index` counts for nothing; or class probabilities, of
        the shape of `input`.
    weight: shape (C,).
    label_smoothing: shape (), from 0 to 1.

    Raises:
        ValueError: reduction, smoothing or shapes are not those above.
        RuntimeError: a class index is outside 0 to C - 1.
    """
    check_between("label_smoothing", label_smoothing, 0, 1)
    dim = 0 if input.dim() == 1 else 1
    log_p = input.log_softmax(dim)
    w = class_weights(weight, log_p, dim)
    spread = label_smoothing / input.shape[dim]
    if target.is_floating_point():
        check_same_shape(input, target)
        losses = -(((1 - label_smoothing) * target + spread) * w * log_p).sum(dim)
        return reduced(losses, reduction, count=losses.numel())
    chosen, kept = class_indices(input, target, dim, ignore_index)
    # Examples that do not count weigh nothing, in the mean as well.
    w_target = torch.where(kept, gathered(w.expand_as(log_p), chosen, dim), 0)
    nll = -w_target * gathered(log_p, chosen, dim)
    losses = nll
    if isinstance(label_smoothing, Tensor) or label_smoothing > 0:  # else a logit of -inf would make 0 * inf
        losses = (1 - label_smoothing) * nll - spread * torch.where(kept, (w * log_p).sum(dim), 0)
    return reduced(losses, reduction, count=w_target.sum())


def focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: Tensor | float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The focal loss of a softmax, differentiable in `gamma` and `weight`. With gamma = 0 it is `cross_entropy`.

        -w_t (1 - p_t)^gamma log p_t,    p = softmax(z),

    for an example of class t. "mean" divides the sum over examples by the sum of their w_t, as `cross_entropy` does.
    Lin et al. (2017), Focal Loss for Dense Object Detection, equation 5, where the classes are independent sigmoids.

    input:  logits, shape (C,), (n, C) or (n, C, ...), of at least two classes.
    target: class indices, shape () or (n, ...), of which `ignore_index` counts for nothing.
    gamma:  shape (), not negative.
    weight: shape (C,).

    Raises:
        ValueError: reduction, gamma or shapes are not those above.
        RuntimeError: a class index is outside 0 to C - 1.
    """
    if not isinstance(gamma, Tensor) and gamma < 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    dim = 0 if input.dim() == 1 else 1
    log_p = input.log_softmax(dim)
    chosen, kept = class_indices(input, target, dim, ignore_index)
    w = class_weights(weight, log_p, dim)
    w_target = torch.where(kept, gathered(w.expand_as(log_p), chosen, dim), 0)
    # log(1 - p_t) from the other classes: 1 - p_t itself is 0 in single precision once an example is learned, and
    # neither 0^gamma nor its logarithm has a gradient there.
    is_target = torch.zeros_like(log_p, dtype=torch.bool).scatter(dim, chosen.unsqueeze(dim), True)
    log_rest = log_p.masked_fill(is_target, -torch.inf).logsumexp(dim)
    losses = -w_target * (gamma * log_rest).exp() * gathered(log_p, chosen, dim)
    return reduced(losses, reduction, count=w_target.sum())


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.binary_cross_entropy_with_logits`, differentiable in `weight` and `pos_weight`.

        -w (q t log sigmoid(z) + (1 - t) log(1 - sigmoid(z)))

    for a logit z, target t, weight w and weight q of the positives; "mean" divides by the number of elements.

    input, target: logits and probabilities, of one shape.
    weight, pos_weight: of any shape that can be broadcast to it.

    Raises:
        ValueError: reduction or shapes are not those above.
    """
    check_same_shape(input, target)
    log_sigmoid = functional.logsigmoid(input)
    positives = log_sigmoid if pos_weight is None else (1 + (pos_weight - 1) * target) * log_sigmoid
    # log(1 - sigmoid(z)) = log sigmoid(z) - z, which is finite also where sigmoid(z) is 1 in single precision.
    losses = (1 - target) * input - positives
    if weight is not None:
        losses = weight * losses
    return reduced(losses, reduction, count=losses.numel())


def huber_loss(input: Tensor, target: Tensor, reduction: Reduction = "mean", delta: Tensor | float = 1.0) -> Tensor:
    """`torch.nn.functional.huber_loss`, differentiable in `delta`, once and, where |r| is not delta, twice.

        r^2 / 2 where |r| <= delta, else delta (|r| - delta / 2),    r = input - target

    Huber (1964), Robust Estimation of a Location Parameter.

    input, target: of one shape.
    delta: positive, of any shape that can be broadcast to it.

    Raises:
        ValueError: reduction, delta or shapes are not those above.
    """
    check_positive("delta", delta)
    check_same_shape(input, target)
    losses = huber(input - target, delta)
    return reduced(losses, reduction, count=losses.numel())


def smooth_l1_loss(input: Tensor, target: Tensor, reduction: Reduction = "mean", beta: Tensor | float = 1.0) -> Tensor:
    """`torch.nn.functional.smooth_l1_loss`, differentiable in `beta`: `huber_loss` with delta = beta, divided by beta.

    Girshick (2015), Fast R-CNN, equation 3, has beta = 1. The number 0 makes it the mean absolute error. A tensor must
    be positive.

    Raises:
        ValueError: reduction, beta or shapes are not those of `huber_loss`.
    """
    check_same_shape(input, target)
    if not isinstance(beta, Tensor) and beta == 0:
        return functional.l1_loss(input, target, reduction=reduction)
    check_positive("beta", beta)
    losses = huber(input - target, beta) / beta
    return reduced(losses, reduction, count=losses.numel())


def leaky_relu(input: Tensor, negative_slope: Tensor | float = 0.01) -> Tensor:
    """`torch.nn.functional.leaky_relu`, differentiable in `negative_slope`: z where z > 0, else slope times z."""
    return torch.where(input > 0, input, negative_slope * input)


def dropout(
    input: Tensor, p: Tensor | float = 0.5, training: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """`torch.nn.functional.dropout`, with an estimate of the gradient in `p`. On a CPU the draws are torch's.

        z m / (1 - p),    m = 0 with probability p, else 1

    A draw m is a step in p, so it has no gradient. What is wanted is that of the mean of a loss over the draws. The
    noise m / (1 - p) is 1 + s(p) e, where s(p)^2 = p / (1 - p) is its variance and e has mean 0 and variance 1. The
    gradient in p here is that at a fixed e:

        z e s'(p) = z / (2 (1 - p)^2) where m = 1,    -z / (2 p (1 - p)) where m = 0.

    Its mean is exact for a loss that is quadratic in what is returned. For others it is an approximation, as the third
    moment of e depends on p. Its variance grows as p falls to 0. There is no second derivative in p, and no first one
    at p = 1. In evaluation nothing is dropped, so there p has no influence on a loss and no gradient.

    p: shape (), from 0 to 1. Its value is read, which waits for its device.
    generator: of the draws, else torch's own.

    Raises:
        ValueError: p is not from 0 to 1.
    """
    rate = float(p.detach() if isinstance(p, Tensor) else p)
    check_between("p", rate, 0, 1)
    if not training or (rate == 0 and not isinstance(p, Tensor)):
        return input
    kept = torch.empty_like(input).bernoulli_(1 - rate, generator=generator)
    # Nothing is kept, and 1 / (1 - p) is infinite.
    if rate == 1:
        return input * kept
    noise = kept / (1 - rate)
    if isinstance(p, Tensor):
        # max(): with p = 0 nothing is dropped.
        slope = torch.where(kept > 0, 0.5 / (1 - rate) ** 2, -0.5 / max(rate * (1 - rate), 1e-30))
        # Adds 0 to the value, and `slope` to the gradient.
        noise = noise + slope * (p - p.detach())
    # p may be of another precision.
    return input * noise.to(input.dtype)


def gaussian_dropout(
    input: Tensor, p: Tensor | float = 0.5, training: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Dropout with normal noise of the same mean and variance, whose gradient in `p` is exact.

        z (1 + sqrt(p / (1 - p)) e),    e standard normal

    It is differentiable draw by draw, so the gradient of a mean over draws is the mean of their gradients. Srivastava
    et al. (2014), Dropout: A Simple Way to Prevent Neural Networks from Overfitting, section 10.

    p: shape (), at least 0 and below 1; a tensor above 0, where the root has a gradient.
    generator: of the draws, else torch's own.

    Raises:
        ValueError: the number p is not at least 0 and below 1.
    """
    if not isinstance(p, Tensor) and not 0 <= p < 1:
        raise ValueError(f"p must be at least 0 and below 1, got {p}")
    if not training:
        return input
    noise = torch.empty_like(input).normal_(generator=generator)
    return input * (1 + (p / (1 - p)) ** 0.5 * noise)


def weight_decay(params: Iterable[Tensor] | Iterable[Mapping[str, Any]], decay: Tensor | float = 0.0) -> Tensor:
    """What the option `weight_decay` of SGD, Adam and most optimizers of torch adds to a training loss.

        decay / 2 |y|^2,    summed over groups

    The decay of AdamW is no part of a loss, and neither is that of other optimizers with `decoupled_weight_decay`.

    params: as an optimizer takes them: weights, or groups {"params": weights, "weight_decay": decay}.
    decay:  of what has none of its own.

    Raises:
        ValueError: there are no weights.
    """
    groups: list[Mapping[str, Any]] = [entry if isinstance(entry, Mapping) else {"params": [entry]} for entry in params]
    terms = [group.get("weight_decay", decay) / 2 * y.square().sum() for group in groups for y in group["params"]]
    if not terms:
        raise ValueError("params has no weights")
    return torch.stack(terms).sum()


def huber(residual: Tensor, delta: Tensor | float) -> Tensor:
    """The loss of each residual. By clamping, as the absolute value would have no second derivative at 0."""
    clamped = residual.clamp(-delta, delta)  # type: ignore[arg-type]  # both are numbers, or both tensors
    return clamped * (residual - clamped / 2)


def class_weights(weight: Tensor | None, like: Tensor, dim: int) -> Tensor:
    """The weights along the classes of a tensor, shape (C, 1, ...); ones where there are none."""
    classes = like.shape[dim]
    if weight is None:
        weight = like.new_ones(classes)
    if weight.shape != (classes,):
        raise ValueError(
            f"weight must have one entry for each of the {classes} classes, got shape {tuple(weight.shape)}"
        )
    return weight.view(-1, *[1] * (like.dim() - dim - 1))


def class_indices(input: Tensor, target: Tensor, dim: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Each example's class, 0 for those that do not count, and which ones do. Both have the shape of `target`."""
    expected = input.shape[:dim] + input.shape[dim + 1 :]
    if target.shape != expected:
        raise ValueError(
            f"class indices for logits of shape {tuple(input.shape)} must have shape {tuple(expected)}, "
            f"got {tuple(target.shape)}"
        )
    kept = target != ignore_index
    # `gather` takes no -100.
    return torch.where(kept, target, 0), kept


def gathered(values: Tensor, chosen: Tensor, dim: int) -> Tensor:
    return values.gather(dim, chosen.unsqueeze(dim)).squeeze(dim)


def reduced(losses: Tensor, reduction: str, count: Tensor | int) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / count
    raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def check_same_shape(input: Tensor, target: Tensor) -> None:
    if input.shape != target.shape:
        raise ValueError(f"target must have the shape of input, {tuple(input.shape)}, got {tuple(target.shape)}")


def check_between(name: str, value: Tensor | float, low: int, high: int) -> None:
    if not isinstance(value, Tensor) and not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def check_positive(name: str, value: Tensor | float) -> None:
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
