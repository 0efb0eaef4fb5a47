"""The preconditioner of recent Krylov vectors against dense algebra, and the rule for its use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raybilevel._linear import limited_memory
from raybilevel._linear.krylov import KrylovMemory
from raybilevel._linear.limited_memory import LimitedMemory, Pair
from raybilevel.errors import ConfigError
from raybilevel.hypergradient import LinearSolution, LinearSystem, MinimalResidual

N = 60


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def matrix(values: Tensor, seed: int = 1) -> Tensor:
    basis, _ = torch.linalg.qr(random(N, N, seed=seed))
    return basis * values @ basis.T


# Twelve small eigenvalues, which slow MINRES down, and the rest near 1.
VALUES = torch.cat([torch.logspace(-3, -1, 12, dtype=torch.double), torch.linspace(0.9, 1.1, N - 12).double()])


def solve_all(
    solver: MinimalResidual, matrices: list[Tensor], right: Tensor | None = None
) -> tuple[list[LinearSolution], list[LimitedMemory]]:
    memory: KrylovMemory | None = None
    found, kept = [], []
    for number, h in enumerate(matrices):
        b = right if right is not None else random(N, seed=100) + 0.1 * random(N, seed=number)
        solution, memory = solver.solve(LinearSystem(lambda v, h=h: h @ v, b, lambda v: v), memory)
        found.append(solution)
        kept.append(memory.recent or LimitedMemory())
    return found, kept


@pytest.mark.parametrize("change", [0.0, 0.3])
def test_the_preconditioner_inverts_on_its_pairs_and_is_positive_definite(change: float) -> None:
    h, other = matrix(VALUES), matrix(VALUES) + change * matrix(torch.linspace(-1, 1, N).double(), seed=2)
    vectors = random(8, N, seed=3)
    # Half of the images are of another matrix, and with a change that one is indefinite.
    pairs = [Pair(v, (h if k % 2 else other) @ v) for k, v in enumerate(vectors)]
    preconditioner = LimitedMemory(tuple(pairs), worth=True).preconditioner()
    assert preconditioner is not None
    dense = torch.stack([preconditioner(e) for e in torch.eye(N, dtype=torch.double)], 1)
    torch.testing.assert_close(dense, dense.T)
    assert torch.linalg.eigvalsh(dense)[0] > 0
    if change == 0:
        for pair in pairs:
            torch.testing.assert_close(dense @ pair.image, pair.vector)


def test_directions_of_negative_curvature_are_dropped() -> None:
    h = torch.diag(torch.tensor([-1.0, 2.0, 4.0], dtype=torch.double))
    eye = torch.eye(3, dtype=torch.double)
    preconditioner = LimitedMemory(tuple(Pair(e, h @ e) for e in eye[:2]), worth=True).preconditioner()
    assert preconditioner is not None
    torch.testing.assert_close(preconditioner(h @ eye[1]), eye[1])
    assert preconditioner(eye[0])[0] > 0
    assert LimitedMemory((Pair(eye[0], h @ eye[0]),), worth=True).preconditioner() is None


def test_a_direction_without_curvature_does_not_spoil_the_others() -> None:
    h = torch.diag(torch.tensor([1.0, -1.0, 2.0, 4.0, 0.0], dtype=torch.double))
    eye = torch.eye(5, dtype=torch.double)
    flat = eye[0] + eye[1] + 1e-9 * eye[2]  # <s, H s> = 2e-18, and |H s| = 1.4
    pairs = tuple(Pair(v, h @ v) for v in (flat, *eye[2:]))
    preconditioner = LimitedMemory(pairs, worth=True).preconditioner()
    assert preconditioner is not None
    for one in eye[2:4]:
        torch.testing.assert_close(preconditioner(h @ one), one, rtol=0, atol=1e-6)


def test_auto_saves_iterations_without_other_products() -> None:
    drift = matrix(torch.linspace(-1, 1, N).double(), seed=2)
    matrices = [matrix(VALUES) + 1e-5 * k * drift for k in range(12)]
    plain, _ = solve_all(MinimalResidual(1e-8, selection=None), matrices)
    auto, kept = solve_all(MinimalResidual(1e-8), matrices)
    for one, other in zip(plain, auto, strict=True):
        torch.testing.assert_close(one.solution, other.solution, rtol=0, atol=1e-4)
        assert other.residual <= 1e-8 and other.products <= other.iterations + 1
    # Numbers 4 and 6 are trials, and number 8 is one without.
    without = [0, 1, 2, 4, 7]
    assert [plain[k].iterations for k in without[:3]] == [auto[k].iterations for k in without[:3]]
    assert [memory.worth for memory in kept] == [False] * 5 + [True] * 7
    used = [k for k in range(12) if k not in without]
    assert sum(auto[k].iterations for k in used) <= 0.6 * sum(plain[k].iterations for k in used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_have_a_preconditioner(dtype: torch.dtype) -> None:
    vectors, h = random(3, N, seed=3), matrix(VALUES)
    pairs = tuple(Pair(v.to(dtype), (h @ v).to(dtype)) for v in vectors)
    preconditioner = LimitedMemory(pairs, worth=True).preconditioner()
    assert preconditioner is not None
    found = preconditioner(pairs[0].image)
    assert found.dtype == dtype and float((found - pairs[0].vector).norm()) <= 0.1 * float(vectors[0].norm())


def test_auto_is_without_where_systems_have_nothing_in_common() -> None:
    matrices = [matrix(VALUES, seed=10 + k) for k in range(12)]
    plain, _ = solve_all(MinimalResidual(1e-6, selection=None), matrices)
    auto, kept = solve_all(MinimalResidual(1e-6), matrices)
    assert not any(memory.worth or memory.in_doubt for memory in kept)
    # But for the trials at numbers 4 and 8, which leave the next a little elsewhere.
    for k in (0, 1, 2, 4, 5, 6, 8, 9, 10, 11):
        assert abs(auto[k].iterations - plain[k].iterations) <= 2


def test_one_lucky_trial_decides_nothing() -> None:
    memory = LimitedMemory((Pair(torch.ones(1), torch.ones(1)),), solves=3, iterations=10)
    seen = []
    # Trials are solves 4, 6, 8 and 10, with it. Of the second on it is not better, of the last two it is.
    for iterations, trial in ((5, True), (10, False), (9, True), (10, False), (5, True), (10, False), (5, True)):
        assert memory.in_trial == trial
        memory = memory.after([], iterations, preconditioned=trial, met=True)
        seen.append((memory.worth, memory.in_doubt))
    assert seen == [(False, True)] * 2 + [(False, False)] * 2 + [(False, True)] * 2 + [(True, False)]


def test_a_solve_that_misses_its_tolerance_is_done_again_without() -> None:
    """A system that becomes singular has the same least-squares solution as without."""
    singular = matrix(torch.cat([torch.zeros(20).double(), torch.linspace(0.5, 2, N - 20).double()]))
    matrices = [*[matrix(VALUES)] * 3, singular, singular]  # number 4 is a trial
    right = random(N, seed=5)
    plain, _ = solve_all(MinimalResidual(1e-6, selection=None, limit=200), matrices, right)
    auto, kept = solve_all(MinimalResidual(1e-6, limit=200), matrices, right)
    assert kept[2].pairs and not kept[3].worth and not kept[3].pairs
    assert auto[3].iterations > plain[3].iterations  # of both solves
    least = torch.linalg.pinv(singular) @ right
    for found in (plain[3], auto[3]):
        # The range of H: in its null space the solution is that of the system before.
        torch.testing.assert_close(singular @ found.solution, singular @ least, rtol=0, atol=1e-4)


def test_memory_is_bounded_and_may_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LimitedMemory.capacity(1000) == 40 and LimitedMemory.capacity(2**20) == 2
    assert LimitedMemory.capacity(10**8) == 0
    for numbers, pairs in ((7 * 2 * N, 7), (0, 0)):
        monkeypatch.setattr(limited_memory, "MOST_NUMBERS", numbers)
        found, kept = solve_all(MinimalResidual(1e-6), [matrix(VALUES)] * 3)
        assert [len(memory.pairs) for memory in kept] == [pairs] * 3
        assert all(one.residual <= 1e-6 for one in found)


def test_a_selection_of_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="selection must be"):
        MinimalResidual(selection="always")  # type: ignore[arg-type]
