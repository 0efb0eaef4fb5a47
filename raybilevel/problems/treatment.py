"""Treatment effects from observational data: a network weights the units of an outcome regression to balance them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from raybilevel.errors import ConfigError
from raybilevel.problem import Hyperparameters, LargeUpperLevel, Level
from raybilevel.problems._classification import check_positive

COVARIATES = 4
EFFECT = 10.0
"""The mean effect of the treatment over the population."""


class Units(NamedTuple):
    """Units of the study.

    covariates: as observed, with mean 0 and deviation 1, (n, 4).
    treated:    1 or 0, (n,).
    outcome:    with mean 0 and deviation 1, (n,).
    effect:     the true effect on each unit, in the outcome's original units, (n,). Only metrics use it.
    """

    covariates: Tensor
    treated: Tensor
    outcome: Tensor
    effect: Tensor


class Batch(NamedTuple):
    """The units of a level, and the covariates and treatment of all units, to measure the balance."""

    units: Units
    everyone: Tensor
    treated: Tensor


class Distances(NamedTuple):
    """Distances between units: of each pair, (n, n), the mean of each unit to all, (n,), and the mean of all, ()."""

    pairs: Tensor
    to_all: Tensor
    mean: Tensor

    @classmethod
    def between(cls, covariates: Tensor) -> Distances:
        pairs = torch.cdist(covariates, covariates)
        return cls(pairs, pairs.mean(1), pairs.mean())


class UnitWeights(nn.Module):
    """The upper-level variable: a network 5-hidden-1 from covariates, (n, 4), and treatment, (n,), to weights, (n,),
    which have mean 1 in each arm."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(COVARIATES + 1, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(self.last.weight)  # at first all units weigh the same

    def forward(self, covariates: Tensor, treated: Tensor) -> Tensor:
        inputs = torch.cat([covariates, 2 * treated[:, None] - 1], 1)
        logits = self.last(torch.tanh(self.first(inputs)))[:, 0]
        weights = torch.zeros_like(logits)
        for arm in (treated > 0, treated <= 0):  # a softmax within the arm, so that the mean is 1
            weights = weights + torch.where(arm, logits, -torch.inf).softmax(0) * arm.sum()
        return weights


class OutcomeRegression(nn.Module):
    """The lower-level variable: a linear regression in each arm, (2, 5), with the control's first."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(2, COVARIATES + 1))

    def forward(self, covariates: Tensor) -> Tensor:
        """Outcomes without and with treatment, (2, n)."""
        return self.coefficients[:, :-1] @ covariates.T + self.coefficients[:, -1:]


class TreatmentEffects(LargeUpperLevel):
    """The mean effect of a treatment without random assignment, from a regression on weighted units:

        f(x, y) = sum_i w_i (outcome_i - g_y(covariates_i, treated_i))^2 / n + decay |y|^2 / 2
        F(x, y) = the same for other units, without decay, + imbalance (E_1 + E_0)

    The weights w come from a network x. E_t is the energy distance (Szekely & Rizzo 2013) between the covariates of the
    weighted units of arm t and those of all units. F is the bound on the counterfactual risk of Johansson, Kallus,
    Shalit & Sontag, arXiv:1802.08598, with the energy distance in place of their kernel's, as in Huling & Mak,
    arXiv:2004.13962. The regression is linear and the outcome is not, so its predictions depend on the weights.

    The data follow Kang & Schafer 2007 (Statistical Science 22(4)), with two arms. There are four independent normal
    variables z, of which only nonlinear transforms are observed:

        P(treated) = 1 / (1 + exp(z_1 - z_2 / 2 + z_3 / 4 + z_4 / 10))
        outcome = 210 + 27.4 z_1 + 13.7 (z_2 + z_3 + z_4) + effect treated + N(0, 1),    effect = 10 + spread z_1,

    So neither a logistic propensity nor a linear outcome is right.

    units:      number of units.
    validation: share of the units in the upper level.
    spread:     of effects over units.
    latent:     whether z itself is observed. Then both simple models are right.
    imbalance:  weight of the energy distances, of covariates with deviation 1.
    hidden:     size of the weight network.
    decay:      of the regression.
    """

    dtype = torch.float64
    epochs = 1

    def __init__(
        self,
        units: int = 1000,
        validation: float = 0.5,
        spread: float = 5.0,
        latent: bool = False,
        imbalance: float = 100.0,
        hidden: int = 32,
        decay: float = 1e-3,
        data_seed: int = 0,
    ) -> None:
        check_positive(units=units, imbalance=imbalance, hidden=hidden, decay=decay)
        if not 0 < validation < 1 or units < 40:
            raise ConfigError(f"validation is a share of at least 40 units, got {validation} of {units}")
        self.units, self.validation, self.spread, self.latent = units, validation, spread, latent
        self.imbalance, self.hidden, self.decay, self.data_seed = imbalance, hidden, decay, data_seed

    @cached_property
    def everyone(self) -> Units:
        """All units, with those of the lower level first."""
        generator = torch.Generator().manual_seed(self.data_seed)
        z = torch.randn(self.units, COVARIATES, generator=generator, dtype=self.dtype)
        # 1 / (1 + exp(z_1 - z_2 / 2 + z_3 / 4 + z_4 / 10))
        propensity = torch.sigmoid(z @ z.new_tensor([-1.0, 0.5, -0.25, -0.1]))
        treated = (torch.rand(self.units, generator=generator, dtype=self.dtype) < propensity).to(z)
        noise = torch.randn(self.units, generator=generator, dtype=self.dtype)
        effect = EFFECT + self.spread * z[:, 0]
        outcome = 210 + z @ z.new_tensor([27.4, 13.7, 13.7, 13.7]) + effect * treated + noise
        covariates = z if self.latent else observed(z)
        covariates = (covariates - covariates.mean(0)) / covariates.std(0)
        # For metrics, which are in the outcome's own units.
        self.scale = outcome.std().item()
        return Units(covariates, treated, (outcome - outcome.mean()) / self.scale, effect)

    @cached_property
    def distances(self) -> Distances:
        # Kept on the device: (n, n) numbers are too many to be moved there with every F.
        return Distances.between(self.everyone.covariates.to(self.device))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("everyone", "distances", "scale")}

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Batch]:
        everyone, cut = self.everyone, round((1 - self.validation) * self.units)
        part = slice(cut) if level == "lower" else slice(cut, None)
        treated = everyone.treated[part]
        if not 0 < treated.sum() < len(treated):
            raise ConfigError(
                f"of the {len(treated)} units of the {level} level {int(treated.sum())} are treated, so that an "
                "arm is empty; give more units, another share for validation, or another data_seed"
            )
        yield Batch(Units(*(column[part] for column in everyone)), everyone.covariates, everyone.treated)

    def upper_variables(self) -> nn.Module:
        return UnitWeights(self.hidden)

    def model(self) -> nn.Module:
        return OutcomeRegression()

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        coefficients = model.get_parameter("coefficients")
        return self.risk(model, hyperparameters, batch.units) + self.decay / 2 * coefficients.square().sum()

    def risk(self, model: nn.Module, hyperparameters: Hyperparameters, units: Units) -> Tensor:
        """The weighted mean square of the residuals."""
        without, with_treatment = model(units.covariates)
        residual = units.outcome - torch.where(units.treated > 0, with_treatment, without)
        weights: Tensor = hyperparameters["upper"](units.covariates, units.treated)
        return (weights * residual.square()).mean()

    def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        weights = hyperparameters["upper"](batch.everyone, batch.treated)
        balance = energy_distances(weights, batch.treated, self.distances)
        return self.risk(model, hyperparameters, batch.units) + self.imbalance * balance.sum()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def evaluate(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
        """Errors of the effects by a regression on all units with the learned weights, in the outcome's units.

        `ate_error` is the absolute error of the mean effect. `pehe` is the root mean square error of the units' effects
        (Hill 2011). The other `estimators` have the same metrics with their names in front. `effective_units` is Kish's
        measure of how even the weights are.
        """
        units = Units(*(column.to(self.device) for column in self.everyone))
        weights = hyperparameters["upper"](units.covariates, units.treated).detach()
        without, with_treatment = regressed(units, weights, self.decay)
        effects = {"": with_treatment - without, **estimators(units, self.decay)}
        found = {"effective_units": (weights.sum().square() / weights.square().sum()).item()}
        for name, effect in effects.items():
            error = self.scale * effect - units.effect
            prefix = f"{name}_" if name else ""
            found[f"{prefix}ate_error"] = error.mean().abs().item()
            found[f"{prefix}pehe"] = error.square().mean().sqrt().item()
        return found


def observed(z: Tensor) -> Tensor:
    """The observed transforms of the latent variables, (n, 4) -> (n, 4)."""
    a, b, c, d = z.T
    return torch.stack(
        [(a / 2).exp(), b / (1 + a.exp()) + 10, (a * c / 25 + 0.6) ** 3, (b + d + 20) ** 2],
        1,
    )


def energy_distances(weights: Tensor, treated: Tensor, distances: Distances) -> Tensor:
    """The energy distance 2 E|U - V| - E|U - U'| - E|V - V'| from each weighted arm U to all units V, (2,)."""
    arms = torch.stack([weights * (1 - treated), weights * treated])
    # Weights of each arm as probabilities.
    arms = arms / arms.sum(1, keepdim=True)
    return 2 * arms @ distances.to_all - ((arms @ distances.pairs) * arms).sum(1) - distances.mean


def regressed(units: Units, weights: Tensor, decay: float) -> Tensor:
    """Outcomes without and with treatment, (2, n), by a weighted regression in each arm.

    It is the solution of the lower level in closed form.
    """
    x = torch.cat([units.covariates, torch.ones_like(units.covariates[:, :1])], 1)
    outcomes = []
    for arm in (units.treated <= 0, units.treated > 0):
        # (n, 1), 0 outside the arm.
        w = (weights * arm)[:, None] / len(x)
        # Half of the decay, as f has the squares without a factor 1/2.
        gram = x.T @ (w * x) + decay / 2 * torch.eye(x.shape[1]).to(x)
        outcomes.append(x @ torch.linalg.solve(gram, x.T @ (w[:, 0] * units.outcome)))
    return torch.stack(outcomes)


def estimators(units: Units, decay: float) -> Mapping[str, Tensor]:
    """Effects, (n,), by common estimators. Those that estimate only a mean give it for each unit.

    difference:     of the arms' means.
    ipw:            inverse propensities from a logistic regression, normalised (Hajek).
    ipw_trimmed:    the same, with propensities clamped to [0.05, 0.95].
    regression:     unweighted.
    ipw_regression: weighted by trimmed inverse propensities.
    doubly_robust:  regression plus the mean of its residuals by trimmed inverse propensities (Robins, Rotnitzky & Zhao
        1994).
    """
    x, t, outcome = units.covariates, units.treated, units.outcome
    # A large C, so that the regression is practically unregularised.
    fitted = LogisticRegression(C=1e6, max_iter=1000).fit(x.cpu().numpy(), t.cpu().numpy())
    propensity = torch.from_numpy(fitted.predict_proba(x.cpu().numpy())[:, 1]).to(x)
    trimmed = propensity.clamp(0.05, 0.95)

    def inverse(p: Tensor) -> Tensor:
        return t / p + (1 - t) / (1 - p)

    def difference(weights: Tensor, values: Tensor) -> Tensor:
        treated, control = weights * t, weights * (1 - t)
        found = (treated * values).sum() / treated.sum() - (control * values).sum() / control.sum()
        return found.expand_as(values)

    plain, weighted = (regressed(units, weights, decay) for weights in (torch.ones_like(t), inverse(trimmed)))
    residual = outcome - torch.where(t > 0, plain[1], plain[0])
    return {
        "difference": difference(torch.ones_like(t), outcome),
        "ipw": difference(inverse(propensity), outcome),
        "ipw_trimmed": difference(inverse(trimmed), outcome),
        "regression": plain[1] - plain[0],
        "ipw_regression": weighted[1] - weighted[0],
        "doubly_robust": plain[1] - plain[0] + difference(inverse(trimmed), residual),
    }
