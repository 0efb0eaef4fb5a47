"""A run or a comparison as tables, figures and one page; `load` and `write` are what a user needs."""

from raybilevel.report._page import Loaded, load, write

__all__ = ["Loaded", "load", "write"]
