"""Both levels of a problem at one model, as functions of flat vectors; and whether a problem can be searched at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel._lower.functions import BothLevels, Part
from raybilevel._lower.passes import Passes
from raybilevel._lower.random_numbers import FEWEST_DRAWS, common_random, draws_needed, random_state
from raybilevel._lower.variables import UpperVariables, split, weights_of
from raybilevel.errors import ProblemError
from raybilevel.problem import Batch, BilevelProblem, Level, SupportsLowerMap, make_batches, move, upper_loss


class Levels(BothLevels):
    """A problem's levels over all its batches, with any x and y in place of the weights that a model has.

    All is taken in eval mode. The model's own weights and those of an upper-level module are neither read nor changed.
    A level that comes as one batch stays on the device; of several each is fetched when it is its turn.

    Where a loss draws torch's random numbers, e.g. noise whose level is a hyperparameter, a level is its mean over a
    few draws, the same at every x and y (common random numbers). Each draw is a pass. Their number follows from the
    scatter of the first ones.

    config: the hyperparameters with which the model was made and trained, as plain values. Batches are those of this
        config at every x.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        model: nn.Module,
        variables: UpperVariables,
        config: Mapping[str, Any] | None = None,
        ledger: Passes | None = None,
    ) -> None:
        self.problem, self.model, self.variables, self.config = problem, model, variables, config or {}
        self.ledger = ledger or Passes()
        self.examples: dict[Level, int] = {}
        self._draws: dict[Level, int] = {}
        self._held: dict[Level, tuple[Batch, int]] = {}
        self._placed = _Placed(model, variables.module)
        check_dense(type(problem).__name__, self._placed)
        if variables.module is not None:  # during a training of the model, too
            variables.module.eval()

    @property
    def y(self) -> Tensor:
        """The model's own weights, shape (n,)."""
        return weights_of(self.model)

    def hyperparameters(self, x: Tensor) -> dict[str, Any]:
        """What the losses are given at x, on the problem's device; a module is set to x."""
        if self.variables.module is not None:
            with torch.no_grad():
                nn.utils.vector_to_parameters(x, self.variables.module.parameters())
        return self._given(x)

    def _given(self, x: Tensor) -> dict[str, Any]:
        given: dict[str, Any] = move(self.variables.given(x), self.problem.device, self.problem.dtype)
        return given

    def loss(self, level: Level, hyperparameters: Mapping[str, Any], batch: Batch) -> Tensor:
        """The user's loss on one batch that is on the device, at the weights in the model."""
        if level == "upper":
            return upper_loss(self.problem, self.model, hyperparameters, batch)
        return self.problem.lower_loss(self.model, hyperparameters, batch)

    def visit(self, level: Level, x: Tensor, y: Tensor, take: Callable[[Part], None]) -> float:
        """As of every pair of levels; weights are examples.

        Raises:
            ProblemError: the level has no examples.
        """

        means: list[float] = []
        drawn = False

        def one_draw() -> int:
            nonlocal drawn
            count, total, device = 0, 0.0, self.problem.device
            # The seed is the number of the draw, so that draws are the same at every x and y.
            with common_random(device, seed=len(means)):
                for batch, size in self.batches(level):
                    # Not before the batch is there: a DataLoader draws a seed of its own from the same numbers.
                    before = random_state(device) if level not in self._draws else ()
                    loss = self.loss(level, self._given(x), batch)
                    if level not in self._draws:  # which takes the CPU's time, and a wait for an accelerator
                        drawn = drawn or before != random_state(device)
                        total += loss.item() * size
                    take(Part(loss, size, size))
                    count += size
            if count == 0:
                raise ProblemError(f"{type(self.problem).__name__}.batches({level!r}, None) yields no examples")
            means.append(total / count)
            return count

        def all_draws() -> int:
            count = one_draw()
            if level not in self._draws:
                while drawn and len(means) < FEWEST_DRAWS:
                    one_draw()
                self._draws[level] = draws_needed(means) if drawn else 1
            while len(means) < self._draws[level]:
                one_draw()
            return count

        # Each time, since a training puts its model back into train mode.
        self._placed.eval()
        with differentiable_in_eval_mode(self._placed):
            count: int = self._at(x, y, all_draws)
        self.examples[level] = count
        if level == "lower":
            self.ledger.whole = count
        return count * len(means)

    def draws(self, level: Level) -> int:
        """How many draws of its random numbers the level is the mean of; 1 until it was evaluated."""
        return self._draws.get(level, 1)

    def is_single(self, level: Level) -> bool:
        return level in self._held and self.draws(level) == 1

    def mapped(self, x: Tensor, y: Tensor) -> Tensor:
        problem = self.problem
        assert isinstance(problem, SupportsLowerMap)
        batches = list(self.batches("lower"))
        if len(batches) != 1:
            raise ProblemError(f"{type(problem).__name__}: with a lower_map, the lower level must be one batch")
        ((batch, size),) = batches
        self.ledger.whole = size
        # A forward pass and no gradient of it.
        self.ledger.charge(size / 2)
        self._placed.eval()
        found: Tensor = self._at(x, y, lambda: problem.lower_map(self.model, self._given(x), batch))
        return found

    def batches(self, level: Level) -> Iterator[tuple[Batch, int]]:
        """One pass over a level's batches, on the device, with their sizes."""
        if level in self._held:
            yield self._held[level]
            return
        only: tuple[Batch, int] | None = None
        for number, raw in enumerate(make_batches(self.problem, level, None, self.config)):
            found = move(raw, self.problem.device, self.problem.dtype), self.problem.batch_size(raw)
            only = found if number == 0 else None
            yield found
        # At the end of a pass only: a second batch may still come after the first.
        if only is not None:
            self._held[level] = only

    def count(self, level: Level) -> int:
        """Examples of a level."""
        if level not in self.examples:
            self.examples[level] = sum(size for _, size in self.batches(level))
        return self.examples[level]

    def _at(self, x: Tensor, y: Tensor, work: Callable[[], Any]) -> Any:
        """What is worked out while x and y are in place. Gradients belong in it: a checkpointed layer runs again when
        it is differentiated."""
        # The same parameters in the same order as in `weights_of`, which made y.
        inner = {f"model.{name}": w for name, w in self.model.named_parameters() if w.requires_grad}
        module = self.variables.module
        outer = dict(module.named_parameters(prefix="upper")) if module is not None else {}
        return torch.func.functional_call(self._placed, {**split(y, inner), **split(x, outer)}, (work,))


@contextmanager
def differentiable_in_eval_mode(modules: nn.Module) -> Iterator[None]:
    """Inside the block recurrent layers are torch's own: those of cuDNN refuse a backward pass in eval mode."""
    before = torch.backends.cudnn.enabled
    if any(isinstance(part, nn.RNNBase) for part in modules.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def check_dense(problem: str, modules: nn.Module) -> None:
    """Whether gradients of all weights are tensors like any other.

    Raises:
        ProblemError: those of an embedding are sparse.
    """
    for name, part in modules.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            raise ProblemError(
                f"{problem}: the embedding {name.partition('.')[2]} has sparse gradients, and "
                "raybilevel needs gradients of all weights as one vector; leave out sparse=True"
            )


class _Placed(nn.Module):
    """The modules that x and y are put into, by `torch.func.functional_call`."""

    def __init__(self, model: nn.Module, upper: nn.Module | None) -> None:
        super().__init__()
        self.model, self.upper = model, upper

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()
