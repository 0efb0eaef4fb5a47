from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raybilevel._models.shrinkage import GroupPenalty, expected_at_spread, expected_loss, off_mean, penalised
from raybilevel.search_state import Likelihood, Proposal, SearchState, Shrinkage, StepRecord, Training

GROUPS = ((0, 2), (1, 3, 4))


def search(
    units: list[list[float]],
    uppers: list[float],
    strength: float,
    likelihood: Likelihood = "log_likelihood",
    **others: object,
) -> SearchState:
    trainings = tuple(
        Training(i, Proposal(tuple(unit), "start", predicted_upper_loss=upper), "done", i, upper_loss=upper)
        for i, (unit, upper) in enumerate(zip(units, uppers, strict=True))
    )
    values: dict[str, object] = {"mode": tuple(units[0]), "supported": 2.0, "applied": True} | others
    found = Shrinkage(((0, 1),), likelihood, 10, strength, **values)  # type: ignore[arg-type]
    return SearchState(trainings, (StepRecord(0, 0, 1.0, shrinkage=found),))


def test_off_mean_is_the_projection_off_each_groups_mean() -> None:
    d = 6
    dense = torch.zeros(d, d).double()
    for group in GROUPS:
        for i in group:
            for j in group:
                dense[i, j] = float(i == j) - 1 / len(group)
    x = torch.randn(3, d, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert torch.allclose(off_mean(x, GROUPS), x @ dense)
    assert torch.allclose(dense @ dense, dense)


def test_the_penalty_by_hand() -> None:
    x = torch.tensor([0.2, 0.6, 0.9]).double()  # |P x|^2 = 0.08 for the group of the first two
    penalty = GroupPenalty(((0, 1),), "log_likelihood", 5.0)
    assert penalty(torch.tensor(1.5), x).item() == pytest.approx(1.7)
    assert penalty.in_units_of_upper(torch.tensor(1.5), x).item() == pytest.approx(1.7)
    squared = GroupPenalty(((0, 1),), "squared_error", 5.0)
    assert squared(torch.tensor(1.5), x).item() == pytest.approx(math.log(1.5) / 2 + 0.2)
    assert squared.in_units_of_upper(torch.tensor(1.5), x).item() == pytest.approx(1.5 * math.exp(0.4))


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=5),
    st.sampled_from(["log_likelihood", "squared_error"]),
    st.floats(0, 10),
)
def test_both_units_of_the_penalty_put_points_in_one_order(
    points: list[tuple[float, float, float]], likelihood: Likelihood, strength: float
) -> None:
    penalty = GroupPenalty(((0, 1),), likelihood, strength)
    upper = torch.tensor([p[0] for p in points], dtype=torch.double)
    x = torch.tensor([p[1:] for p in points], dtype=torch.double)
    merit, shown = penalty(upper, x), penalty.in_units_of_upper(upper, x)
    order = shown.argsort()
    assert (merit[order].diff() >= -1e-12).all()


def test_a_search_is_judged_by_f_with_the_penalty() -> None:
    apart, alike = [0.1, 0.9], [0.5, 0.5]
    state = search([apart, alike], [1.0, 1.1], 2.0)  # |P x|^2 = 0.32 and 0
    assert state.best is state.trainings[0]
    seen = penalised(state)
    assert [t.upper_loss for t in seen.trainings] == pytest.approx([1.32, 1.1])
    assert [t.proposal.predicted_upper_loss for t in seen.trainings] == pytest.approx([1.32, 1.1])
    assert seen.best is not None and seen.best.index == 1
    assert seen.steps == state.steps


def test_without_a_penalty_a_search_is_judged_as_it_is() -> None:
    for state in (SearchState(), search([[0.1, 0.9]], [1.0], 0.0), search([[0.1, 0.9]], [1.0], 2.0, applied=False)):
        assert penalised(state) is state


def test_trainings_without_f_stay_without() -> None:
    state = search([[0.1, 0.9]], [1.0], 2.0).add(Proposal((0.2, 0.4), "region"))
    waiting = penalised(state).trainings[1]
    assert waiting.status == "pending" and math.isnan(waiting.upper_loss)
    assert waiting.proposal.predicted_upper_loss is None


def test_the_loss_on_new_data_of_a_gaussian_mean() -> None:
    # z_i ~ N(truth, 1) in d coordinates, G(x) = |x - mean z|^2 / 2, truths ~ N(0, 1 / (n tau)) about a common mean of a
    # group of d: averaged over truths and examples, the formula is the measured gap, both at x_tau and at mean z.
    d, n, tau, draws = 8, 20, 0.5, 20_000
    generator = torch.Generator().manual_seed(0)
    group = (tuple(range(d)),)
    truth = off_mean(torch.randn(draws, d, generator=generator, dtype=torch.double), group) / math.sqrt(n * tau)
    mean = truth + torch.randn(draws, d, generator=generator, dtype=torch.double) / math.sqrt(n)
    mode = mean - off_mean(mean, group) * tau / (1 + tau)
    supported = 1 + (d - 1) / (1 + tau)
    for x in (mode, mean):
        seen, new = (x - mean).square().sum(1) / 2, (x - truth).square().sum(1) / 2
        # the examples' own variance: at the truth, F on them is on average F on new data
        seen = seen - (truth - mean).square().sum(1) / 2
        measured = (new - seen).mean().item()
        shrinkages = (
            Shrinkage(group, "log_likelihood", n, tau, tuple(point), supported, applied=True)
            for point in mode[:500].tolist()
        )
        told = [expected_loss(s, tuple(point), 0.0) for s, point in zip(shrinkages, x[:500].tolist(), strict=True)]
        assert sum(told) / len(told) == pytest.approx(measured, rel=0.1)  # of chance


def test_a_squared_error_grows_by_a_factor() -> None:
    shrinkage = Shrinkage(((0, 1),), "squared_error", 10, 1.0, (0.5, 0.5), 2.0, applied=True)
    assert expected_loss(shrinkage, (0.5, 0.5), 4.0) == pytest.approx(4.0 * math.exp(2 * 2.0 / 10))


def test_the_loss_on_new_data_at_bounds() -> None:
    # As above, without a group, for a minimum in the unit cube. Half of the truths are beyond it.
    d, n, draws = 8, 400, 200_000
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.4, 0.5] * 2 + [-1.0, 2.0] * 2, dtype=torch.double)
    mean = truth + torch.randn(draws, d, generator=generator, dtype=torch.double) / math.sqrt(n)
    x = mean.clamp(0, 1)
    seen = (x - mean).square().sum(1) / 2 - (truth - mean).square().sum(1) / 2
    measured = ((x - truth).square().sum(1) / 2 - seen).mean().item()
    shrinkage = Shrinkage((), "log_likelihood", n, 0.0, tuple(x[0].tolist()), d, applied=True, adapted=4.0)
    assert expected_loss(shrinkage, tuple(x[0].tolist()), 0.0) == pytest.approx(4 / n)
    assert measured == pytest.approx(4 / n, rel=0.2)  # of chance


def test_what_a_group_adds_is_that_of_its_members_off_their_bounds() -> None:
    group = ((0, 1, 2, 3),)
    inside = Shrinkage(group, "log_likelihood", 10, 1.0, (0.2, 0.4, 0.6, 0.8), 3.0, applied=True)
    # Of 3.0 one is the mean of the group.
    assert expected_at_spread(inside, 1.0, 0.5) == pytest.approx(1 + 0.5 * 2.0 / 10)
    two = replace(inside, mode=(0.0, 0.4, 0.6, 1.0), adapted=1.5)
    assert expected_at_spread(two, 1.0, 0.5) == pytest.approx(1 + 0.5 * 0.5 / 10)
    # One alone has no other from which to differ.
    assert expected_at_spread(replace(two, mode=(0.0, 0.0, 0.6, 1.0), adapted=1.0), 1.0, 0.5) == 1.0
