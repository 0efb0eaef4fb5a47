"""What to train next: the protocol of a method, and the methods there are, by name."""

from raybilevel.methods._base import Method
from raybilevel.methods._default import Default
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.methods._paper import Paper
from raybilevel.methods._registry import METHODS, make_method

__all__ = ["METHODS", "Default", "HypergradientDescent", "Method", "Paper", "make_method"]
