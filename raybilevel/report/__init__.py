"""A run or a comparison as tables, figures and one page.

`write` makes the page, as `raybilevel report` does. `load` returns the same content as data frames and plotly figures.
Both need the extra `report`.
"""

from raybilevel.report._page import Loaded, load, write

__all__ = ["Loaded", "load", "write"]
