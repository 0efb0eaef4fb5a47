"""Products with sparse matrices that can be differentiated any number of times, in the entries and the other factor.

torch's own sparse products have no second derivatives. Sums over gathered rows do, but take three times as long.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Pattern(NamedTuple):
    """The places of the e entries of a sparse matrix, all int64.

    row, column:   of each entry, (e,), in any order.
    by_row:        the order that sorts the entries by row, (e,).
    row_starts:    where each row begins in that order, (rows,).
    by_column, column_starts: the same by column.
    """

    row: Tensor
    column: Tensor
    by_row: Tensor
    row_starts: Tensor
    by_column: Tensor
    column_starts: Tensor

    def transposed(self) -> Pattern:
        return Pattern(self.column, self.row, self.by_column, self.column_starts, self.by_row, self.row_starts)


class Sparse(NamedTuple):
    """A matrix: a pattern and its entries, (e,)."""

    pattern: Pattern
    entry: Tensor

    def times(self, dense: Tensor) -> Tensor:
        """The product with a matrix, (columns, d) -> (rows, d)."""
        return product(self.entry, dense, self.pattern)


def pattern(row: Tensor, column: Tensor, rows: int, columns: int) -> Pattern:
    by_row, row_starts = _sorted(row, rows)
    by_column, column_starts = _sorted(column, columns)
    return Pattern(row, column, by_row, row_starts, by_column, column_starts)


def _sorted(number: Tensor, count: int) -> tuple[Tensor, Tensor]:
    sizes = torch.bincount(number, minlength=count)
    # A row starts after all entries of the rows before it.
    return torch.argsort(number, stable=True), sizes.cumsum(0) - sizes


def product(entry: Tensor, dense: Tensor, where: Pattern) -> Tensor:
    """The product A B, for A with these entries, (e,), and B = `dense`, (columns, d)."""
    found: Tensor = _Product.apply(entry, dense, where)  # type: ignore[no-untyped-call]
    return found


def sampled(left: Tensor, right: Tensor, where: Pattern) -> Tensor:
    """The entries of L R^T at a pattern, (e,)."""
    found: Tensor = _Sampled.apply(left, right, where)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """The product A B. Its gradients, for an incoming G, are G B^T at the pattern and A^T G."""

    @staticmethod
    def forward(ctx: Any, entry: Tensor, dense: Tensor, where: Pattern) -> Tensor:
        ctx.save_for_backward(entry, dense)
        ctx.where = where
        # embedding_bag sums weighted rows of B for each row of A without storing the gathered rows.
        columns, weights = where.column.index_select(0, where.by_row), entry.index_select(0, where.by_row)
        return embedding_bag(columns, dense.contiguous(), where.row_starts, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        entry, dense = ctx.saved_tensors
        # By `sampled` and `product` again, which have a backward of their own: so there are second derivatives.
        needed = ctx.needs_input_grad
        return (
            sampled(gradient, dense, ctx.where) if needed[0] else None,
            product(entry, gradient, ctx.where.transposed()) if needed[1] else None,
            None,
        )


class _Sampled(torch.autograd.Function):
    """The entries of L R^T. Their gradients, for the incoming entries of a matrix G, are G R and G^T L."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, where: Pattern) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.where = where
        return (left.index_select(0, where.row) * right.index_select(0, where.column)).sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        left, right = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            product(gradient, right, ctx.where) if needed[0] else None,
            product(gradient, left, ctx.where.transposed()) if needed[1] else None,
            None,
        )
