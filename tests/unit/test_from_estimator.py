"""Linear estimators of scikit-learn as problems, without Ray."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from ray import tune
from sklearn.linear_model import Lasso, LogisticRegression, Ridge, SGDClassifier, SGDRegressor
from sklearn.metrics import log_loss
from torch.nn.functional import softmax

from raybilevel.errors import ConfigError, ProblemError
from raybilevel.sklearn import from_estimator
from raybilevel.sklearn._from_estimator import EstimatorProblem
from tests.adapter_problems import ROWS, differences, ended, examples, hypergradient, with_gradients


def data(seed: int, classes: int = 3, weighted: bool = False) -> tuple[Any, ...]:
    x, y = (part.numpy().astype(kind) for part, kind in zip(examples(seed), (float, int), strict=True))
    weights = np.linspace(0.5, 2.0, ROWS)
    # Labels that are no numbers from 0 on.
    return (x, np.array(["b", "a", "c"])[y % classes], *([weights] if weighted else []))


def numbers(seed: int) -> tuple[Any, ...]:
    x, *_ = data(seed)
    return x, x @ np.array([1.0, -0.5, 0.2, 0.0]) + np.random.default_rng(seed).standard_normal(ROWS)


def logistic(C: float, a: float = 1.0, l1_ratio: float = 0.0) -> LogisticRegression:
    return LogisticRegression(C=C, class_weight={"a": a}, tol=1e-10, max_iter=1000)


def ridge(alpha: float) -> Ridge:
    return Ridge(alpha=alpha)


def stochastic(alpha: float, a: float, loss: str = "log_loss", **options: Any) -> SGDClassifier:
    """Its rate falls until it is at the minimum."""
    return SGDClassifier(
        loss=loss, alpha=alpha, class_weight={"a": a}, learning_rate="invscaling", eta0=0.1, power_t=0.6,
        max_iter=8000, tol=None, average=True, random_state=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_hypergradients_of_logistic_regression_are_differences_of_trained_f(classes: int, weighted: bool) -> None:
    problem = from_estimator(logistic, data(0, classes, weighted), data(1, classes, weighted))
    config = {"C": 0.3, "a": 2.0}
    found = hypergradient(problem, config)
    assert found == pytest.approx(differences(problem, config, found, 1e-3), rel=1e-4)
    assert min(map(abs, found.values())) > 1e-4


def test_hypergradients_of_ridge_are_differences_of_trained_f() -> None:
    problem = from_estimator(ridge, numbers(0), numbers(1))
    found = hypergradient(problem, {"alpha": 20.0})
    assert found == pytest.approx(differences(problem, {"alpha": 20.0}, found, 1e-3), rel=1e-5)


def gradient_norm(problem: EstimatorProblem, config: dict[str, Any]) -> tuple[float, float]:
    """Of f at trained weights and at weights of zero."""
    end = ended(problem, config)
    y = end.levels.y
    at = [end.levels.lower(end.variables.x, weights).in_y.norm().item() for weights in (y, torch.zeros_like(y))]
    return at[0], at[1]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("loss", ["log_loss", "squared_hinge", "modified_huber"])
def test_sgd_classifiers_end_where_f_is_flat(loss: str, classes: int) -> None:
    problem = from_estimator(stochastic, data(0, classes), data(1, classes))
    trained, start = gradient_norm(problem, {"alpha": 0.1, "a": 2.0, "loss": loss})
    assert trained < 0.02 * start


@pytest.mark.parametrize(("loss", "epsilon"), [("squared_error", 0.1), ("huber", 0.5)])
def test_sgd_regressors_end_where_f_is_flat(loss: str, epsilon: float) -> None:
    def estimator(alpha: float, epsilon: float) -> SGDRegressor:
        return SGDRegressor(
            loss=loss, alpha=alpha, epsilon=epsilon, learning_rate="invscaling", eta0=0.05, power_t=0.6,
            max_iter=8000, tol=None, average=True, random_state=0,
        )  # fmt: skip

    problem = from_estimator(estimator, numbers(0), numbers(1))
    trained, start = gradient_norm(problem, {"alpha": 0.1, "epsilon": epsilon})
    assert trained < 0.02 * start


def test_elastic_nets_and_balanced_classes_end_where_f_is_flat() -> None:
    def elastic(C: float, l1_ratio: float) -> LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LogisticRegression(
                C=C, l1_ratio=l1_ratio, solver="saga", tol=1e-10, max_iter=10000, class_weight="balanced"
            )

    x, y = data(0)
    kept = ~((y == "a") & (np.arange(ROWS) % 2 == 0))
    problem = from_estimator(elastic, (x[kept], y[kept]), data(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        end = ended(problem, {"C": 1.0, "l1_ratio": 0.1})
    y = end.levels.y
    gradient = end.levels.lower(end.variables.x, y).in_y
    assert (y == 0).sum() == 1  # where it has none
    assert gradient[y != 0].abs().max() < 1e-8


@pytest.mark.parametrize("classes", [2, 3])
def test_f_is_the_log_loss_of_scikit_learn(classes: int) -> None:
    for estimator, config in ((logistic, {"C": 0.5}), (stochastic, {"alpha": 0.1, "a": 2.0})):
        problem = from_estimator(estimator, data(0, classes), data(1, classes, weighted=True))
        fitted = problem.made(config).fit(*data(0, classes))
        x, y, weights = data(1, classes, weighted=True)
        expected = log_loss(y, fitted.predict_proba(x), sample_weight=weights)
        assert ended(problem, config).upper() == pytest.approx(expected, rel=1e-6)


def test_what_stands_in_the_objective_has_gradients() -> None:
    space = {"alpha": tune.loguniform(1e-4, 1.0), "a": tune.loguniform(0.2, 5.0), "power_t": tune.uniform(0.1, 0.9)}

    def estimator(alpha: float, a: float, power_t: float) -> SGDClassifier:
        return SGDClassifier(loss="log_loss", alpha=alpha, class_weight={"a": a}, power_t=power_t)

    assert with_gradients(from_estimator(estimator, data(0), data(1)), space) == {"alpha", "a"}


def test_a_loop_and_a_validation_loss_of_ones_own() -> None:
    def fit(config: Any) -> SGDClassifier:
        estimator = SGDClassifier(loss="log_loss", alpha=config["alpha"], random_state=0)
        for _ in range(7):
            estimator.partial_fit(*data(0), classes=["a", "b", "c"])
        return estimator

    def brier(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (softmax(z, 1) - torch.nn.functional.one_hot(y, 3)).square().mean()

    def made(alpha: float) -> SGDClassifier:
        return SGDClassifier(loss="log_loss", alpha=alpha)

    problem = from_estimator(
        made, lambda: data(0), lambda: data(1), fit=fit, upper_loss=brier, evaluate=lambda one: {"t": one.t_}
    )
    trained = problem.train_model({"alpha": 0.1})
    assert trained.passes == 7.0 and trained.metrics == {"t": 7 * ROWS + 1}
    assert 0 < ended(problem, {"alpha": 0.1}).upper() < 0.3
    with pytest.raises(ProblemError, match="fit must return the estimator that it has trained, got NoneType"):
        from_estimator(made, data(0), data(1), fit=lambda config: None).train_model({"alpha": 0.1})


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (Lasso(), "expected one of SGDClassifier, SGDRegressor, LogisticRegression, Ridge, got Lasso"),
        (SGDClassifier(), "SGDClassifier.loss must be one of log_loss, squared_hinge, modified_huber, got 'hinge'"),
        (SGDRegressor(loss="epsilon_insensitive"), "SGDRegressor.loss must be one of squared_error, huber"),
        (LogisticRegression(solver="liblinear"), "liblinear penalises the intercept"),
    ],
)
def test_what_is_not_supported_is_named(estimator: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        from_estimator(lambda config: estimator, data(0), data(1)).model({"alpha": 0.1})


def test_classes_that_were_not_trained_are_refused() -> None:
    with pytest.raises(ProblemError, match="the validation data have classes that the training data lack"):
        list(from_estimator(logistic, data(0, 2), data(1, 3)).batches("upper", None, {"C": 1.0}))
    with pytest.raises(ConfigError, match="estimator must be a class or a function of the config, got Ridge"):
        from_estimator(Ridge(), numbers(0), numbers(1))  # type: ignore[arg-type]
