"""What a search expects of new data: its optimism about F, and how many hyperparameters the examples support."""

from __future__ import annotations

from dataclasses import dataclass

from raybilevel._models.shrinkage import expected_loss
from raybilevel.search_state import SearchState, Training


@dataclass(frozen=True)
class NewData:
    """Of the result, and of the training with the lowest F.

    examples:        of the upper level.
    hyperparameters: that are searched.
    supported:       how many of them the examples determine; the others are held together where they may be.
    strength:        of the penalty on differences within groups; 0 where there are no groups.
    applied:         the search uses it.
    expected_loss, expected_loss_of_lowest: F to expect on new data.
    in_words:        the same, to be shown.
    """

    examples: int
    hyperparameters: int
    supported: float
    strength: float
    applied: bool
    expected_loss: float
    expected_loss_of_lowest: float
    in_words: str


def new_data(state: SearchState, result: Training | None) -> NewData | None:
    """None where nothing is known: F is no likelihood, or there were too few steps."""
    shrinkage, lowest = state.shrinkage, state.best
    if shrinkage is None or result is None or lowest is None:
        return None
    expected, of_lowest = (expected_loss(shrinkage, t.unit, t.upper_loss) for t in (result, lowest))
    d, n = len(result.unit), shrinkage.examples
    words = f"F {result.upper_loss:.3g}, expected on new data about {expected:.2g}"
    beyond = d - round(shrinkage.supported)
    if beyond > 0:
        are, follow = ("is", "follows the others of its") if beyond == 1 else ("are", "follow the others of their")
        words += f". {beyond} of {d} hyperparameters {are} not supported by {n} examples"
        words += f" and {follow} group" if shrinkage.applied else ""
    if lowest.index != result.index:
        words += f". The lowest F is {lowest.upper_loss:.3g}, expected on new data about {of_lowest:.2g}"
    return NewData(n, d, shrinkage.supported, shrinkage.strength, shrinkage.applied, expected, of_lowest, words)
