"""What is charged: gradients of f and F, in passes over the lower-level data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Passes:
    """The ledger of one model: everything that takes a gradient there is charged here.

    A pass is a gradient of f over all lower-level data. A gradient of F costs as many passes as it has examples for one
    of f. A product with second derivatives counts as one pass, the gradient that it differentiates included. Values
    without gradients are free: one costs about a third of a gradient, and a training decides how often it takes them
    (`BilevelProblem.evaluate_every`).

    examples: whose gradient was taken, of either level.
    whole:    examples in a pass over the lower-level data, as the last one counted them; 0 before there was one.
    """

    examples: float = 0
    whole: float = 0

    def charge(self, examples: float) -> None:
        self.examples += examples

    @property
    def count(self) -> float:
        """Passes so far. As long as no pass has gone to its end, all that was seen is taken for one."""
        return self.examples / (self.whole or self.examples or 1)
