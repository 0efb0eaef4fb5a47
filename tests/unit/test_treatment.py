"""Treatment effects: the formulas, the known answers of the data, and that learned weights help."""

from __future__ import annotations

import pickle

import pytest
import torch

from raybilevel._lower.variables import weights_of
from raybilevel.errors import ConfigError
from raybilevel.hypergradient import solve_lower
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.problems.treatment import Distances, TreatmentEffects, energy_distances, estimators, regressed

METHOD = HypergradientDescent(
    steps=40, rate=0.1, lower="tolerance", lower_tolerance=1e-4, solver_settings={"tolerance": 1e-4}
)


def test_energy_distances_by_hand() -> None:
    points = torch.tensor([[0.0], [2.0], [0.0], [2.0]], dtype=torch.double)
    distance = Distances.between(points)
    treated = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.double)
    alike = torch.ones(4, dtype=torch.double)
    torch.testing.assert_close(energy_distances(alike, treated, distance), torch.zeros(2, dtype=torch.double))
    # all weight of the treated at 0: 2 E|U - V| = 2, E|U - U'| = 0, E|V - V'| = 1
    uneven = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.double)
    expected = torch.tensor([0.0, 1.0], dtype=torch.double)
    torch.testing.assert_close(energy_distances(uneven, treated, distance), expected)


def test_where_the_simple_models_are_right_they_know_the_effect() -> None:
    """Kang & Schafer 2007: with z observed a linear regression is exact up to noise of deviation 1."""
    problem = TreatmentEffects(units=4000, latent=True)
    units = problem.everyone
    truth = units.effect.mean().item()
    found = {name: problem.scale * effect.mean().item() for name, effect in estimators(units, 1e-6).items()}
    # about four standard errors, of noise 1 for the regression, of outcomes' deviation 36 for the difference by weights
    assert found["regression"] == pytest.approx(truth, abs=0.2)
    assert found["doubly_robust"] == pytest.approx(truth, abs=0.3)
    assert found["ipw"] == pytest.approx(truth, abs=8)
    assert abs(found["difference"] - truth) > 15  # those with low outcomes are treated more often
    effects = problem.scale * regressed(units, torch.ones_like(units.treated), 1e-6)
    torch.testing.assert_close(effects[1] - effects[0], units.effect, rtol=0, atol=0.7)


def test_the_lower_level_has_the_closed_form() -> None:
    problem = TreatmentEffects(units=200)
    descent = BilevelDescent(problem, {"start": 0.0}, METHOD)
    descent.run_step()
    y = solve_lower(descent.levels, descent.x.detach(), weights_of(descent.model), 1e-10).y
    (batch,) = problem.batches("lower", None)
    upper = descent.levels.hyperparameters(descent.x.detach())["upper"]
    weights = upper(batch.units.covariates, batch.units.treated).detach()
    x = torch.cat([batch.units.covariates, torch.ones(100, 1, dtype=torch.double)], 1)
    torch.testing.assert_close(y.view(2, 5) @ x.T, regressed(batch.units, weights, problem.decay), rtol=1e-6, atol=1e-8)
    for arm in (0, 1):
        assert weights[batch.units.treated == arm].mean().item() == pytest.approx(1)


def test_learned_weights_balance_the_arms_and_halve_the_error_of_the_regression() -> None:
    problem = TreatmentEffects(units=600, data_seed=1)
    descent = BilevelDescent(problem, {"start": 0.0}, METHOD)
    first = descent.run_step()["upper_loss"]
    while not descent.finished:
        descent.run_step()
    found = descent.conclude()
    assert found["upper_loss"] < first / 3
    # at the same weights for all the regression is the unweighted one
    assert found["pehe"] < found["regression_pehe"] / 1.5
    assert 100 < found["effective_units"] < 600
    again = pickle.loads(pickle.dumps(problem))
    assert "everyone" not in again.__dict__ and torch.equal(again.everyone.outcome, problem.everyone.outcome)


def test_an_arm_without_units_is_refused() -> None:
    problem = TreatmentEffects(units=40, validation=0.02)  # one unit
    assert list(problem.batches("lower", None))
    with pytest.raises(ConfigError, match="more units"):
        list(problem.batches("upper", None))


@pytest.mark.parametrize("options", [{"units": 10}, {"validation": 1.0}, {"imbalance": 0.0}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        TreatmentEffects(**options)  # type: ignore[arg-type]
