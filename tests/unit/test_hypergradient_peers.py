"""The measurement against other packages: that all ways give the same hypergradient, and what memory is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.hypergradient_peers import PeakBytes, all_ways, curvature
from raybilevel.hypergradient import BilevelFunctions


def quadratic() -> tuple[BilevelFunctions, Tensor, Tensor, Tensor]:
    """f = y^T H y / 2 - y^T B x, F = |y|^2 / 2 + <x, x> / 2: dF/dx = x + B^T H^-1 y; with x, y* and that."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.double))
    h = basis * torch.linspace(0.5, 2, 6, dtype=torch.double) @ basis.T
    b = torch.randn(6, 4, generator=generator, dtype=torch.double)
    x = torch.randn(4, generator=generator, dtype=torch.double)
    y = torch.linalg.solve(h, b @ x)
    functions = BilevelFunctions(
        [lambda x, y: y.square().sum() / 2 + x.square().sum() / 2], [lambda x, y: y @ h @ y / 2 - y @ b @ x]
    )
    return functions, x, y, x + b.T @ torch.linalg.solve(h, y)


def test_all_ways_give_the_same_hypergradient(tmp_path: Path) -> None:
    functions, x, y, truth = quadratic()
    assert curvature(functions, x, y) == pytest.approx(2, rel=1e-3)
    ways = all_ways(60, 0.5, tmp_path)
    assert {name.split()[1] for name in ways} >= {"MINRES", "CG", "Neumann", "unrolled"}
    for name, gradient in ways.items():
        # 60 steps of a contraction by 3/4 leave 3e-8; boat-torch returns the iterate before the last
        tolerance = 3e-3 if name.startswith("boat") else 1e-5
        torch.testing.assert_close(gradient(functions, x, y), truth, rtol=0, atol=tolerance, msg=name)


def test_memory_is_what_was_alive_at_once() -> None:
    with PeakBytes() as memory:
        kept = torch.zeros(1000, dtype=torch.double)
        for _ in range(5):
            kept + 1  # freed at once
        kept[:10]  # a view takes none
    assert memory.peak == 16_000
