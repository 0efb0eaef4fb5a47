from __future__ import annotations

import pytest
import torch

from raybilevel._lower.training import refit, train
from raybilevel.errors import ConfigError
from raybilevel.problems.banded_ridge import BandedRidge


def small() -> BandedRidge:
    return BandedRidge(groups=3, features=4, examples=23, tested=50, folds=4, seed=1)


def solve(x: torch.Tensor, target: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(x.T @ x / len(x) + torch.diag(decay), x.T @ target / len(x))


def test_f_is_the_error_of_each_example_where_it_is_held_out() -> None:
    problem = small()
    config = problem.space.to_config(torch.tensor([0.2, 0.5, 0.3], dtype=torch.double))
    trained, _ = train(problem, config)
    (x, target), (batch,) = problem.data["train"], problem.batches("upper", None)
    decay = torch.tensor(list(config["decay"].values()), dtype=torch.double).repeat_interleave(4)
    errors = torch.zeros(23, dtype=torch.double)
    for fold in range(4):
        inside = batch.trained[:, fold] == 1
        errors[~inside] = x[~inside] @ solve(x[inside], target[inside], decay) - target[~inside]
    assert trained.upper_loss == pytest.approx(errors.square().mean().item(), rel=1e-5)  # where L-BFGS ends
    assert (batch.trained.sum(1) == 3).all()


def test_a_refit_trains_every_fold_on_all_examples() -> None:
    problem = small()
    config = problem.space.to_config(torch.full((3,), 0.4, dtype=torch.double))
    decay = torch.full((12,), config["decay"]["g0"], dtype=torch.double)
    x, target = problem.data["test"]
    errors = x @ solve(*problem.data["train"], decay) - target
    found = refit(problem, config)
    assert found is not None
    assert found["test_loss"] == pytest.approx(errors.square().mean().item(), rel=1e-5)
    assert found["test_r2"] == pytest.approx(1 - (errors.square().mean() / target.var(correction=0)).item(), rel=1e-4)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="folds must be from 2 to the number of examples, 5, got 6"):
        BandedRidge(examples=5, folds=6)
    with pytest.raises(ConfigError, match="noise must be positive"):
        BandedRidge(noise=0)


def test_no_penalties_are_better_on_average_than_the_true_ones() -> None:
    errors: dict[float, float] = {}
    for seed in range(40):
        problem = BandedRidge(groups=3, features=4, examples=24, tested=400, folds=4, seed=seed)
        (x, target), (x_test, target_test) = problem.data["train"], problem.data["test"]
        # As many as a fold is trained on.
        x, target = x[:18], target[:18]
        true = torch.tensor(list(problem.true_decays["decay"].values()), dtype=torch.double).repeat_interleave(4)
        for factor in (0.25, 1.0, 4.0):
            error = (x_test @ solve(x, target, factor * true) - target_test).square().mean().item()
            errors[factor] = errors.get(factor, 0.0) + error
    assert errors[1.0] < min(errors[0.25], errors[4.0])
