"""A run or a comparison as tables, figures and one page.

`write` makes the page, as `raybilevel report` does. `load` gives the same as data frames and figures of plotly. Both
need the extra `report`.
"""

from raybilevel.report._page import Loaded, load, write

__all__ = ["Loaded", "load", "write"]
