"""A loss and its gradients on a batch, measured; and whether it is the same at each call."""

from __future__ import annotations

import logging
import math
import pickle
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils._pytree import tree_map

from raybilevel._lower.levels import differentiable_in_eval_mode
from raybilevel._lower.random_numbers import common_random, random_state
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.problem import Batch, BilevelProblem, move, upper_loss
from raybilevel.search._calls import Given, calling
from raybilevel.search._fresh import changes, copies, listed

logger = logging.getLogger(__name__)

SEEDS_OF_CHANCE = 8
"""So often a loss that draws random numbers is evaluated: what happens to one batch in three is hardly missed then."""
EXAMPLES = 8
ROUNDING_OF_SUMS = 1e-4
ROUNDING_OF_SLOPES = 8.0
"""In units of eps."""
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


@dataclass(frozen=True)
class Measured:
    """A loss and its gradients: by the name of each searched hyperparameter, None where it does not depend on it, and
    in the weights, shape (n,)."""

    loss: Tensor
    in_x: Mapping[str, Tensor | None]
    in_y: Tensor


@dataclass(frozen=True)
class Probe:
    """One level of a problem, to be measured with a model in eval mode.

    given:    the hyperparameters that its loss gets.
    searched: those of them that can be differentiated, by name.
    """

    problem: BilevelProblem
    level: str
    given: Given
    searched: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        return f"{type(self.problem).__name__}.{self.level}_loss"

    def measure(self, model: nn.Module, raw: Batch) -> Measured:
        """Its loss and gradients on a batch.

        Raises:
            ProblemError: it fails, is no scalar, does not depend on the weights, or changes the model.
            NotFiniteError: it is NaN or infinite, or so is the gradient that a training follows.
        """
        with differentiable_in_eval_mode(model):
            return self._measure(model, raw)

    def _measure(self, model: nn.Module, raw: Batch) -> Measured:
        weights, before = trained(model), copies(model)
        loss = self.loss(model, raw)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ProblemError(f"{self.name} must return a tensor of shape (), got {shape}")
        if loss.is_complex():
            raise ProblemError(f"{self.name} must return a real number, got one of {loss.dtype}; take .abs() or .real")
        if not math.isfinite(loss.item()):
            raise NotFiniteError(f"{self.name} is {loss.item()} at the start weights; check data and model")
        if not loss.requires_grad:
            raise ProblemError(f"{self.name} does not depend on the model's parameters")
        changed = changes(model, before)
        if model.training or changed:
            raise ProblemError(
                f"{self.name} changes the model ({'train mode' if model.training else listed(changed)}) when it is "
                "called in eval mode; leave model.train() and what follows from it to the training"
            )
        with calling(self.problem, f"{self.level}_loss, differentiated,"):
            # In one call, since the graph is freed by it.
            found = torch.autograd.grad(loss, [*self.searched.values(), *weights], allow_unused=True)
        in_x = dict(zip(self.searched, found, strict=False))
        in_y = found[len(in_x) :]
        if all(slope is None for slope in in_y):  # of a model that is kept elsewhere, for instance
            raise ProblemError(f"{self.name} does not depend on the model's parameters")
        if any(slope is not None and slope.layout != torch.strided for slope in in_y):
            raise ProblemError(
                f"{self.name} has sparse gradients, as of an embedding, and raybilevel needs gradients of all weights "
                "as one vector; leave out sparse=True"
            )
        measured = Measured(loss.detach(), in_x, as_vector(in_y, weights))
        if self.level == "lower" and not measured.in_y.isfinite().all():
            raise NotFiniteError(
                f"{self.name} is {loss.item():.6g} at the start weights, but its gradient in the weights is NaN or "
                "infinite; look for sqrt, norm or log at 0"
            )
        return measured

    def loss(self, model: nn.Module, raw: Batch) -> Tensor:
        """In eval mode."""
        batch = move(raw, self.problem.device, self.problem.dtype)
        model.eval()
        with calling(self.problem, f"{self.level}_loss"):
            if self.level == "lower":
                return self.problem.lower_loss(model, self.given, batch)
            return upper_loss(self.problem, model, self.given, batch)

    def felt(self, model: nn.Module, raw: Batch) -> set[str]:
        """The hyperparameters that change the gradient in the weights by more than rounding, by a product with mixed
        second derivatives; all of them where the loss cannot be differentiated twice."""
        with common_random(self.problem.device, seed=0), differentiable_in_eval_mode(model):
            loss = self.loss(model, raw)
            try:
                slopes = torch.autograd.grad(loss, trained(model), create_graph=True, allow_unused=True)
                # In one random direction: where all are zero so is its, and else it is not.
                terms = [torch.randn_like(slope) * slope for slope in slopes if slope is not None]
                along = sum(term.sum() for term in terms)
                if not isinstance(along, Tensor) or not along.requires_grad:
                    return set()
                found = torch.autograd.grad(along, list(self.searched.values()), allow_unused=True)
            except RuntimeError:  # as torch has it
                return set(self.searched)
        size = sum(term.detach().abs().sum().item() for term in terms)
        pairs = zip(self.searched.items(), found, strict=True)
        return {name for (name, x), mixed in pairs if mixed is not None and not rounded_away(mixed, x, size)}

    def check(self, model: nn.Module, raw: Batch) -> Measured:
        """The same, after making sure that it is the same at each call. A lower-level loss may draw torch's random
        numbers where a hyperparameter says how, e.g. the level of noise: its gradient in that differs from draw to
        draw then.

        Raises:
            ProblemError: it is not.
        """
        outside = self.state_outside_of_torch(model)
        with common_random(self.problem.device, seed=0):
            before = random_state(self.problem.device)
            once = self.measure(model, raw)
            drawn = before != random_state(self.problem.device)
        # Of these none is seeded here: each call draws others.
        if outside != self.state_outside_of_torch(model):
            for _ in range(SEEDS_OF_CHANCE):
                self.check_same(once, self.draw(model, raw, 0))
        self.check_same(once, self.draw(model, raw, 0))
        self.check_backward(once, model, raw)
        if not drawn:
            return once
        # From 1, as seed 0 is that of `once`.
        others = [self.draw(model, raw, seed) for seed in range(1, SEEDS_OF_CHANCE)]
        if self.level == "lower" and any(in_x_differs(once, other) for other in others):
            logger.warning(
                "%s draws random numbers in eval mode, and its gradient in the hyperparameters differs from draw to "
                "draw: f is taken as its mean over some draws, the same at each evaluation; where they are not meant "
                "for f, draw only if model.training", self.name,
            )  # fmt: skip
            return once
        for other in others:
            self.check_same(once, other)
        return once

    def check_backward(self, measured: Measured, model: nn.Module, raw: Batch) -> None:
        """Whether the backward pass of a training gives the gradient that was measured.

        Raises:
            ProblemError: it does not.
        """
        weights = trained(model)
        with common_random(self.problem.device, seed=0), differentiable_in_eval_mode(model):
            loss = self.loss(model, raw)
            with calling(self.problem, f"{self.level}_loss, differentiated,"):
                loss.backward()
        in_y = as_vector([weight.grad for weight in weights], weights)
        model.zero_grad()
        if not agree(measured.in_y, in_y):
            raise ProblemError(
                f"{self.name} has another gradient in the weights by torch.autograd.grad than by backward() "
                f"({measured.in_y.norm().item():.6g} and {in_y.norm().item():.6g}, norms), and raybilevel takes both; "
                "with torch.utils.checkpoint give use_reentrant=False"
            )

    def draw(self, model: nn.Module, raw: Batch, seed: int) -> Measured:
        with common_random(self.problem.device, seed):
            return self.measure(model, raw)

    def state_outside_of_torch(self, model: nn.Module) -> tuple[Any, ...]:
        """Of the random numbers of Python and of NumPy, and of generators that the problem or the model keeps."""
        _, keys, position, *_ = np.random.get_state()
        kept = [value for owner in (self.problem, *model.modules()) for value in vars(owner).values()]
        states = [pickle.dumps(value) for value in kept if type(value) in GENERATORS]
        return random.getstate(), np.asarray(keys).tobytes(), position, states

    def warn_of_sum(self, model: nn.Module, first: Batch, last: Batch) -> None:
        """Batches are averaged by their sizes, so that of sums those of a smaller batch would count for less."""
        size = self.problem.batch_size(first)
        if size == self.problem.batch_size(last):
            return

        def twice(entry: Any) -> Any:
            of_examples = isinstance(entry, Tensor) and entry.dim() > 0 and len(entry) == size
            return torch.cat([entry, entry]) if of_examples else entry

        with torch.no_grad(), common_random(self.problem.device, seed=0):
            try:
                once, both = self.loss(model, first).item(), self.loss(model, tree_map(twice, first)).item()
            except ProblemError:  # of a batch whose examples are not independent
                return
        if both and abs(both - 2 * once) <= ROUNDING_OF_SUMS * abs(both):
            logger.warning(
                "%s of a batch twice over is twice as large, a sum over examples; batches are averaged by their sizes, "
                "which differ: reduce by the mean, or examples of smaller batches count for less", self.name,
            )  # fmt: skip

    def single(self, model: nn.Module, batch: Batch) -> list[float]:
        """The loss on single examples of a batch, a few of them; none where it fails on one."""
        size = self.problem.batch_size(batch)

        def alone(entry: Any, row: int) -> Any:
            return entry[row : row + 1] if isinstance(entry, Tensor) and entry.dim() and len(entry) == size else entry

        rows = range(0, size, max(1, size // EXAMPLES))
        with torch.no_grad(), common_random(self.problem.device, seed=0):
            try:
                return [self.loss(model, tree_map(lambda entry, r=row: alone(entry, r), batch)).item() for row in rows]
            except ProblemError:
                return []

    def check_same(self, one: Measured, two: Measured) -> None:
        """Whether two evaluations at one point agree.

        Raises:
            ProblemError: they do not.
        """
        if differs := difference(one, two):
            what, a, b = differs
            raise ProblemError(
                f"{self.name} is not the same twice: on the same batch, with the model in eval mode, {what} is "
                f"{a:.6g} and then {b:.6g} (norms); draw no random numbers unless model.training (F.dropout needs "
                "training=model.training), or draw them from a torch.Generator that is seeded anew at each call"
            )

    def check_own(self, one: Measured, two: Measured) -> None:
        """Whether F is as it was before f was evaluated at other hyperparameters.

        Raises:
            ProblemError: it is not.
        """
        if differs := difference(one, two):
            what, a, b = differs
            raise ProblemError(
                f"{self.name} follows what lower_loss was last evaluated at: {what} is {a:.6g} and, after that was "
                f"done at other hyperparameters, {b:.6g} (norms); keep none of them in the problem or the model, and "
                "give upper_loss an argument `hyperparameters`"
            )

    def check_nothing_kept(self, one: Measured, two: Measured) -> None:
        """Whether a loss is as it was before a step of training, at the weights and on the data of then.

        Raises:
            ProblemError: it is not.
        """
        if differs := difference(one, two):
            what, a, b = differs
            raise ProblemError(
                f"{self.name} is another one after a step of training: at the start weights, on the same data, {what} "
                f"is {a:.6g} before and {b:.6g} after (norms); keep nothing of a training in the problem, and change "
                "no data in place"
            )


def rounded_away(slope: Tensor, x: Tensor, size: float) -> bool:
    """Whether a slope in a hyperparameter x is no more than the rounding of what it is taken of, as that of x / x."""
    change = slope.abs() * (x.abs().item() or 1.0)
    # Of half precision, a decay that matters may be no more.
    eps = min(torch.finfo(slope.dtype).eps, torch.finfo(torch.float32).eps)
    return bool(change <= ROUNDING_OF_SLOPES * eps * size)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def as_vector(slopes: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """Gradients in the weights, shape (n,); None is 0."""
    pairs = zip(slopes, weights, strict=True)
    return parameters_to_vector([torch.zeros_like(w) if g is None else g for g, w in pairs])


def difference(one: Measured, two: Measured) -> tuple[str, float, float] | None:
    """In what two evaluations at one point differ, and both norms.

    Sums in another order, as some kernels of accelerators take them, differ by rounding: by sqrt(n) eps for n terms, so
    that 100 eps allow for n = 10,000. A descent differentiates by differences over a length of sqrt(eps), so that more
    would drown them.
    """
    pairs = [("it", one.loss, two.loss), ("its gradient in the weights", one.in_y, two.in_y)]
    pairs += [
        (f"its gradient in {name}", a, b)
        for name, a in one.in_x.items()
        if a is not None and (b := two.in_x[name]) is not None
    ]
    for what, a, b in pairs:
        if not agree(a, b):
            return what, a.norm().item(), b.norm().item()
    return None


def in_x_differs(one: Measured, two: Measured) -> bool:
    pairs = [(a, two.in_x[name]) for name, a in one.in_x.items()]
    return any(a is not None and b is not None and not agree(a, b) for a, b in pairs)


def agree(a: Tensor, b: Tensor) -> bool:
    """What is not finite, e.g. the slope of a square root at 0, is so in both."""
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return False
    a, b = a[finite], b[finite]
    scale = max(a.norm().item(), b.norm().item())
    return bool((a - b).norm().item() <= 100 * torch.finfo(a.dtype).eps * scale)
