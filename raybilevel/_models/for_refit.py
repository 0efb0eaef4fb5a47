"""How far hyperparameters of a kind may differ in a refit, which has more examples than the trainings of the search.

The search chooses x for weights trained on the training examples alone. A refit has the validation examples as well,
and may need less: loss weights of classes that were rare, for instance. So x is compared with points nearer to the
means of its groups,

    x(s) = x - (1 - s) P x,   s = 1, 1/2, 1/4, 0,

P the projection off the mean of each group (`shrinkage`). Each is trained on the training examples and one half of the
validation examples and judged by the other half, and then the other way round. The examples have chosen x before, so F
at x(s) is raised by its optimism, of which x(1/2) has half as much as x. The next s is taken if what it is then
expected to be is lower by more than one standard error of the paired differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raybilevel._lower.paired import Gain, difference, upper_losses
from raybilevel._lower.training import LowerLevelTraining
from raybilevel._models.shrinkage import expected_at_spread, off_mean
from raybilevel.errors import NotFiniteError
from raybilevel.problem import BilevelProblem, SupportsHalves, trains_itself
from raybilevel.search_state import Shrinkage
from raybilevel.space import Space, flatten, nest

SPREADS = (0.5, 0.25, 0.0)
EQUAL = 0.01
"""Distance from the mean of its group, as a share of the range, up to which a hyperparameter has the group's value."""


@dataclass(frozen=True)
class ForRefit:
    """What to refit with.

    config:    hyperparameters and constants, nested.
    spread:    of groups, relative to the result's: 1 for the result itself, 0 for one value in each group.
    gain:      of the config over the result, by validation examples that were held out, and by how much less of their
        chance it follows; None for the result itself.
    trainings: that it took to know; 0 where there was nothing to compare.
    """

    config: Mapping[str, Any]
    spread: float = 1.0
    gain: Gain | None = None
    trainings: int = 0


def config_for_refit(
    problem: BilevelProblem,
    config: Mapping[str, Any],
    space: Space,
    shrinkage: Shrinkage | None = None,
    seed: int = 0,
) -> ForRefit:
    """The config to refit with, given that of a search's result: hyperparameters of a kind may be nearer to each other.

        chosen = config_for_refit(problem, best.config, search.space, search.state.shrinkage)
        metrics = refit(problem, chosen.config)

    It takes four to eight trainings, in this process, and none where no hyperparameters are of a kind, where they are
    equal already, where the problem has no `halves` (`SupportsHalves`) or trains itself, or where losses of single
    examples are not known.

    config:    hyperparameters and constants, nested.
    space:     that was searched.
    shrinkage: what the search learned of groups, and so of the optimism of F at its result.
    """
    if not can_be_nearer(problem, config, space):
        return ForRefit(config)
    assert isinstance(problem, SupportsHalves)
    unit = space.encode(config)
    apart = off_mean(unit, space.groups())
    halves = list(problem.halves())
    result = held_out_losses(halves, config, seed)
    if result is None:
        return ForRefit(config, trainings=len(halves))
    chosen, losses, trainings = ForRefit(config), result, len(halves)
    for spread in SPREADS:
        nearer = nest({**flatten(config), **flatten(space.to_config(unit - (1 - spread) * apart))})
        found, trainings = held_out_losses(halves, nearer, seed), trainings + len(halves)
        gain = gain_of(shrinkage, losses, found, chosen.spread, spread)
        if found is None or gain is None or gain.mean <= gain.standard_error:
            break
        chosen, losses = ForRefit(nearer, spread, gain_of(shrinkage, result, found, 1.0, spread)), found
    return replace(chosen, trainings=trainings)


def can_be_nearer(problem: BilevelProblem, config: Mapping[str, Any], space: Space) -> bool:
    """Whether hyperparameters of a kind differ, and the problem can tell if they should. Nothing is trained."""
    # A problem that trains itself has no refit.
    if not isinstance(problem, SupportsHalves) or trains_itself(problem):
        return False
    return bool((off_mean(space.encode(config), space.groups()).abs() > EQUAL).any())


def gain_of(
    shrinkage: Shrinkage | None, before: Tensor, after: Tensor | None, spread_before: float, spread_after: float
) -> Gain | None:
    """Between losses of the same examples, both of shape (n,), in what is to be expected on new data."""
    gain = difference("upper_loss", before, after)
    if gain is None or after is None or shrinkage is None:
        return gain
    one = expected_at_spread(shrinkage, before.mean().item(), spread_before)
    return replace(gain, mean=one - expected_at_spread(shrinkage, after.mean().item(), spread_after))


def held_out_losses(halves: Sequence[BilevelProblem], config: Mapping[str, Any], seed: int) -> Tensor | None:
    """Of each validation example, where it is held out, shape (n,); None where they are not known, or where a training
    diverges."""
    found = []
    for half in halves:
        training = LowerLevelTraining(half, config, seed)
        try:
            training.run()
        except NotFiniteError:
            return None
        found.append(upper_losses(training))
    known = [losses for losses in found if losses is not None]
    return torch.cat(known) if len(known) == len(halves) else None
