"""Estimators with one penalty per group of features."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.exceptions import SkipTestWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.utils.estimator_checks import check_estimator

from raybilevel._lower.training import train
from raybilevel.errors import ConfigError
from raybilevel.folds import CrossValidated
from raybilevel.problems.banded_ridge import BandedRidge
from raybilevel.sklearn import GroupPenaltyClassifier, GroupPenaltyRegressor
from raybilevel.sklearn._folds import Fold, FoldLoss, Penalties
from raybilevel.sklearn._logistic import LogisticFolds, all_logits, fit_logistic
from raybilevel.sklearn._on_ray import LinearFold
from raybilevel.sklearn._ridge import RidgeFolds, fit_ridge

GROUPS = np.array([0, 0, 1, 1, 2, 2, 2])


def data(count: int = 40, targets: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(count, len(GROUPS))) + 0.5
    weights = random.normal(size=(len(GROUPS), targets)) * np.array([2.0, 0.5, 0.05])[GROUPS, None]
    return inputs, inputs @ weights + random.normal(size=(count, targets))


def one_hot(scores: np.ndarray, classes: int) -> np.ndarray:
    label = np.digitize(scores[:, 0], np.quantile(scores[:, 0], np.arange(1, classes) / classes))
    return np.eye(classes)[label] if classes > 2 else label[:, None].astype(float)


def ridge(count: int = 40) -> FoldLoss:
    inputs, targets = data(count, targets=2)
    return folded(RidgeFolds, inputs, targets)


def logistic(classes: int) -> FoldLoss:
    inputs, targets = data(60)
    return folded(LogisticFolds, inputs, one_hot(targets, classes))


def folded(kind: Callable[..., FoldLoss], inputs: np.ndarray, targets: np.ndarray) -> FoldLoss:
    folds = [Fold(inputs[a], targets[a], inputs[b], targets[b]) for a, b in KFold(3).split(inputs)]
    return kind(folds, Penalties.of(inputs, GROUPS))


LOSSES = {
    "ridge": ridge(),
    "more features than examples": ridge(8),
    "two classes": logistic(2),
    "three classes": logistic(3),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_hypergradients_are_those_of_differences(loss: FoldLoss) -> None:
    x = torch.tensor([0.4, 0.55, 0.7], dtype=torch.double)
    gradient = loss.value_and_gradient(x)[1].tolist()
    steps = 1e-3 * torch.eye(3, dtype=torch.double)
    differences = [(loss.value(x + step) - loss.value(x - step)) / 2e-3 for step in steps]
    assert gradient == pytest.approx(differences, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("loss", [ridge(400), logistic(2)], ids=["ridge", "two classes"])
def test_curvatures_are_those_of_gauss_and_newton(loss: FoldLoss) -> None:
    x = torch.tensor([0.5, 0.5, 0.6], dtype=torch.double)

    def residuals(x: torch.Tensor) -> np.ndarray:
        """Whose half mean square has the Hessian that is approximated, at x and near it."""
        penalty = loss.penalties.at(x)[loss.penalties.group]
        found = []
        for fold in loss.folds:
            if isinstance(loss, RidgeFolds):
                weights, intercept = fit_ridge(fold.inputs, fold.targets, penalty)
            else:
                weights, intercept = fit_logistic(fold.inputs, fold.targets, penalty)
            found.append(fold.held_out @ weights + intercept)
        return np.concatenate(found).ravel()

    steps = 1e-4 * torch.eye(3, dtype=torch.double)
    change = np.stack([(residuals(x + step) - residuals(x - step)) / 2e-4 for step in steps], 1)
    if isinstance(loss, RidgeFolds):
        upper, gradient = loss.upper(x), loss.value_and_gradient(x)[1].numpy()
        expected = change.T @ change / loss.examples / upper - 2 * np.outer(gradient, gradient)
    else:
        p = 1 / (1 + np.exp(-residuals(x)))
        expected = change.T @ (change * (p * (1 - p))[:, None]) / loss.examples
    assert loss.hessian(x).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_f_of_one_group_is_the_cross_validated_loss_of_scikit_learn() -> None:
    inputs, targets = data()
    fitted = GroupPenaltyRegressor(cv=4).fit(inputs, targets[:, 0])
    model = Ridge(alpha=fitted.penalties_[0]).fit(inputs, targets[:, 0])
    assert fitted.coef_ == pytest.approx(model.coef_)
    assert fitted.intercept_ == pytest.approx(model.intercept_)
    held_out = cross_val_predict(model, inputs, targets[:, 0], cv=KFold(4))
    assert fitted.cv_loss_ == pytest.approx(np.square(held_out - targets[:, 0]).mean())
    assert fitted.penalties_[0] == fitted.shared_penalty_


@pytest.mark.parametrize("classes", [2, 3])
def test_a_penalty_is_one_over_c(classes: int) -> None:
    inputs, label = load_iris(return_X_y=True)
    last = label > 2 - classes  # versicolor and virginica overlap
    inputs, label = inputs[last][::3] / 10, label[last][::3]
    fitted = GroupPenaltyClassifier(cv=3).fit(inputs, label)
    model = LogisticRegression(C=1 / fitted.penalties_[0], solver="newton-cg", tol=1e-9, max_iter=5000)
    model.fit(inputs, label)
    assert fitted.predict_proba(inputs) == pytest.approx(model.predict_proba(inputs), abs=1e-3)
    held_out = cross_val_predict(model, inputs, label, cv=StratifiedKFold(3), method="predict_proba")
    assert fitted.cv_loss_ == pytest.approx(log_loss(label, held_out), rel=1e-3)


def banded(seed: int, groups: int = 20) -> tuple[Any, ...]:
    problem = BandedRidge(groups=groups, seed=seed)
    (inputs, targets), (tested, test_targets) = (
        tuple(tensor.numpy() for tensor in problem.data[name]) for name in ("train", "test")
    )
    return np.repeat(np.arange(groups), 15), inputs, targets, tested, test_targets


def test_many_penalties_are_better_than_one_and_better_still_as_far_as_supported() -> None:
    groups, inputs, targets, tested, test_targets = banded(1)
    ours, lowest, shared = (
        GroupPenaltyRegressor(**settings).fit(inputs, targets)
        for settings in ({"groups": groups}, {"groups": groups, "generalise": False}, {})
    )
    scores = [model.score(tested, test_targets) for model in (ours, lowest, shared)]
    assert scores[0] > scores[1] > scores[2] + 0.1
    assert shared.cv_loss_ > ours.cv_loss_ > lowest.cv_loss_
    assert 5 < ours.n_supported_ < 20 == lowest.n_supported_


def test_groups_that_have_nothing_to_tell_apart_share_their_penalty() -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(60, 12))
    targets = inputs @ random.normal(size=12) + random.normal(size=60)
    fitted = GroupPenaltyRegressor(list("aabbccddeeff")).fit(inputs, targets)
    apart = GroupPenaltyRegressor(list("aabbccddeeff"), generalise=False).fit(inputs, targets)
    assert fitted.groups_.tolist() == list("abcdef")
    assert np.log(fitted.penalties_).std() < 0.2 * np.log(apart.penalties_).std()


def test_a_group_of_noise_is_penalised_away() -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(80, 30))
    label = np.where(inputs[:, 0] + inputs[:, 1] > 0, "yes", "no")
    fitted = GroupPenaltyClassifier(["signal"] * 2 + ["noise"] * 28).fit(inputs, label)
    noise, signal = fitted.penalties_  # sorted by label
    assert noise > 30 * signal
    assert fitted.score(inputs, label) > 0.95


def test_folds_are_split_by_scikit_learn() -> None:
    inputs, targets = data()
    by_hand = [(a, b) for a, b in KFold(4, shuffle=True, random_state=3).split(inputs)]
    fitted = [
        GroupPenaltyRegressor(GROUPS, cv=cv).fit(inputs, targets[:, 0])
        for cv in (KFold(4, shuffle=True, random_state=3), by_hand, 4)
    ]
    assert fitted[0].penalties_.tolist() == fitted[1].penalties_.tolist() != fitted[2].penalties_.tolist()


def test_folds_that_are_repeated_support_no_more_penalties() -> None:
    """The same folds three times have the F, and the examples, of those folds once."""
    groups, inputs, targets, *_ = banded(1, groups=6)
    splits = list(KFold(3).split(inputs))
    once, thrice = (GroupPenaltyRegressor(groups, cv=cv).fit(inputs, targets) for cv in (splits, 3 * splits))
    assert thrice.cv_loss_ == pytest.approx(once.cv_loss_)
    assert thrice.n_supported_ == pytest.approx(once.n_supported_)


def test_targets_of_several_columns_share_the_penalties() -> None:
    inputs, targets = data(targets=2)
    fitted = GroupPenaltyRegressor(GROUPS).fit(inputs, targets)
    assert fitted.coef_.shape == (2, 7) and fitted.predict(inputs).shape == (40, 2) and len(fitted.penalties_) == 3


@pytest.mark.parametrize("groups", [[0, 1], [[0] * 7]])
def test_groups_are_checked(groups: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"one label per feature, 7 in all, got an array of shape \("):
        GroupPenaltyRegressor(groups).fit(*data())


def test_the_backend_is_checked() -> None:
    with pytest.raises(ConfigError, match="backend must be 'local' or 'ray', got 'dask'"):
        GroupPenaltyRegressor(backend="dask").fit(*data())  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [0, 2, 3])
def test_the_problem_of_a_search_on_ray_has_the_same_losses(classes: int) -> None:
    inputs, targets = data(60, targets=2)
    penalties = Penalties.of(inputs, GROUPS)
    splits = list(KFold(3).split(inputs))
    hot = one_hot(targets, classes) if classes else targets
    given = all_logits(2 * hot - 1).argmax(1) if classes else targets
    problem = CrossValidated(partial(LinearFold, inputs, given, penalties), len(inputs), splits)
    x = torch.tensor([0.4, 0.5, 0.6], dtype=torch.double)
    config = {"penalty": {str(g): float(value) for g, value in enumerate(penalties.at(x))}}
    loss = folded(LogisticFolds if classes else RidgeFolds, inputs, hot)
    assert train(problem, config)[0].upper_loss == pytest.approx(loss.upper(x), rel=1e-5)


def test_regressor_keeps_the_contract_of_scikit_learn() -> None:
    keeps_the_contract(GroupPenaltyRegressor())


@pytest.mark.slow
def test_classifier_keeps_the_contract_of_scikit_learn() -> None:
    keeps_the_contract(GroupPenaltyClassifier())


def keeps_the_contract(estimator: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        done = check_estimator(estimator, on_skip=None)
    assert {check["check_name"] for check in done if check["status"] != "passed"} <= {"check_array_api_input"}
