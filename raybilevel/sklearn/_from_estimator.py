"""Linear estimators of scikit-learn, trained by their own code, as bilevel problems."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier, SGDRegressor
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, softplus

from raybilevel._adapters.adapter import Adapter, Trained
from raybilevel._adapters.factories import Factory, check_factory, made_of
from raybilevel._adapters.marks import Held
from raybilevel.errors import ProblemError
from raybilevel.functional import huber_loss
from raybilevel.problem import Batch, Hyperparameters, Level

ESTIMATOR = "_raybilevel_estimator"
SUPPORTED = (SGDClassifier, SGDRegressor, LogisticRegression, Ridge)
MARGINS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "log_loss": lambda margin: softplus(-margin),
    "squared_hinge": lambda margin: (1 - margin).clamp(min=0).square(),
    "modified_huber": lambda margin: torch.where(margin > -1, (1 - margin).clamp(min=0).square(), -4 * margin),
}
"""Losses of SGDClassifier that have a gradient everywhere, of the margin +-z."""
RESIDUALS = ("squared_error", "huber")

Data = tuple[Any, ...]
"""X, y and, if there are some, weights of the examples."""


def from_estimator(
    estimator: Factory,
    train: Data | Callable[[], Data],
    validation: Data | Callable[[], Data],
    *,
    fit: Callable[[Mapping[str, Any]], Any] | None = None,
    metric: str = "val_loss",
    upper_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    by_values: Collection[str] = (),
) -> EstimatorProblem:
    """A linear estimator of scikit-learn as a problem and a Tune trainable in one.

        problem = from_estimator(lambda config: LogisticRegression(C=config["C"]), (x, y), (x_val, y_val))
        tune.Tuner(problem, param_space={"C": tune.loguniform(1e-4, 1e4)}, tune_config=tune.TuneConfig(
            search_alg=BilevelSearch(problem), metric="val_loss", mode="min", num_samples=20
        )).fit()

    The estimator trains by its own code. f is its objective per example, as a function of its coefficients. It has
    gradients in `alpha`, `C`, `l1_ratio`, `epsilon` and the values of `class_weight`. F is the mean log loss of the
    probabilities, the mean squared error of numbers, or with other losses of `SGDClassifier` the mean of these.
    Supported are `SGDClassifier` with the loss "log_loss", "squared_hinge" or "modified_huber", `SGDRegressor` with
    "squared_error" or "huber", `LogisticRegression` but for liblinear, and `Ridge`. Zero coefficients of an l1 penalty
    stay zero for a small change of x, which hypergradients do not know.

    estimator: a function of the config that makes an estimator. It is called with the entries that it has parameters
        for. If its one parameter has none of their names, it gets the config.
    train, validation: X, shape (n, p), y, shape (n,), and, if there are some, weights of the examples, shape (n,); or
        a function that returns them.
    fit:    a function of the config that trains by a loop of your own, e.g. by `partial_fit`, and returns the
        estimator. None: the estimator's `fit`.
    metric: the name of F, which is searched.
    upper_loss: F of the decision function, shape (n, outputs), and of y, the numbers of the classes or targets.
    evaluate: further metrics of an estimator that was trained.
    by_values: names of hyperparameters that have no gradients.

    Raises:
        ConfigError: an argument is no function.
        ProblemError: when it is searched: the estimator or its loss is not supported.
    """
    check_factory(estimator, "estimator")
    return EstimatorProblem(estimator, train, validation, fit, metric, upper_loss, evaluate, by_values)


@dataclass(frozen=True)
class Examples:
    """x: shape (n, p). y: classes by number, or targets, shape (n,). weight: shape (n,)."""

    x: Tensor
    y: Tensor
    weight: Tensor

    @classmethod
    def of(cls, data: Data, classes: np.ndarray | None) -> Examples:
        x, y, *weights = (np.asarray(part) for part in data)
        if classes is not None and not np.isin(y, classes).all():
            raise ProblemError("from_estimator: the validation data have classes that the training data lack")
        numbers = torch.from_numpy(y.astype(np.float64) if classes is None else np.searchsorted(classes, y))
        weight = torch.from_numpy(weights[0].astype(np.float64)) if weights else torch.ones(len(y), dtype=torch.double)
        return cls(torch.from_numpy(x.astype(np.float64)), numbers, weight)


@dataclass(frozen=True)
class Made:
    """An estimator and what its objective needs to know of the training data.

    counts: examples of each class; None of a regression.
    labels: of the classes, sorted.
    """

    estimator: Any
    counts: Tensor | None
    labels: np.ndarray | None


class EstimatorProblem(Adapter):
    """What `from_estimator` makes."""

    made_by = "from_estimator"
    dtype = torch.double

    def __init__(
        self,
        estimator: Factory,
        train: Data | Callable[[], Data],
        validation: Data | Callable[[], Data],
        fit: Callable[[Mapping[str, Any]], Any] | None,
        metric: str,
        upper_loss: Callable[[Tensor, Tensor], Tensor] | None,
        evaluate: Callable[[Any], Mapping[str, float]] | None,
        by_values: Collection[str],
    ) -> None:
        super().__init__(metric, by_values, "cpu")
        self._estimator, self._train, self._validation = estimator, train, validation
        self._fit, self._upper, self._evaluate = fit, upper_loss, evaluate

    def made(self, config: Mapping[str, Any]) -> Any:
        """The estimator of a config, not trained."""
        estimator = made_of(self._estimator, config, "estimator")
        check_estimator(estimator)
        return estimator

    def data(self, level: Level) -> Data:
        found = self._train if level == "lower" else self._validation
        return found() if callable(found) else found

    def marked_model(self, config: Mapping[str, Any]) -> nn.Module:
        estimator = self.made(config)
        x, y = (np.asarray(part) for part in self.data("lower")[:2])
        labels, counts, outputs = None, None, 1
        if is_classifier(estimator):
            labels, found = np.unique(y, return_counts=True)
            counts, outputs = torch.from_numpy(found), 1 if len(labels) == 2 else len(labels)
        model = nn.Linear(x.shape[1], outputs, bias=estimator.fit_intercept, dtype=torch.double)
        vars(model)[ESTIMATOR] = Held(Made(estimator, counts, labels))
        return model

    def roots(self, model: nn.Module) -> Collection[Any]:
        return [vars(model)[ESTIMATOR].value.estimator]

    def training_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        return objective(vars(model)[ESTIMATOR].value, cast(nn.Linear, model), Examples(*batch))

    def validation_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        made, examples = vars(model)[ESTIMATOR].value, Examples(*batch)
        z = model(examples.x)
        if self._upper is not None:
            return self._upper(z, examples.y)
        return (examples.weight * judged(made.estimator, z, examples.y)).sum() / examples.weight.sum()

    def batches(
        self, level: Level, generator: torch.Generator | None, hyperparameters: Mapping[str, Any]
    ) -> Iterator[Batch]:
        labels = np.unique(np.asarray(self.data("lower")[1])) if is_classifier(self.made(hyperparameters)) else None
        examples = Examples.of(self.data(level), labels)
        yield examples.x, examples.y, examples.weight

    def train_model(self, config: Mapping[str, Any]) -> Trained:
        x, y, *weights = self.data("lower")
        estimator = self._fit(config) if self._fit is not None else self.made(config).fit(x, y, *weights)
        if not hasattr(estimator, "coef_"):
            raise ProblemError(
                f"from_estimator: fit must return the estimator that it has trained, got {type(estimator).__name__}"
            )
        coefficients = torch.tensor(np.atleast_2d(estimator.coef_), dtype=torch.double)
        model = nn.Linear(coefficients.shape[1], len(coefficients), estimator.fit_intercept, dtype=torch.double)
        state = {"weight": coefficients}
        if estimator.fit_intercept:
            state["bias"] = torch.tensor(np.atleast_1d(estimator.intercept_), dtype=torch.double)
        model.load_state_dict(state)
        metrics = self._evaluate(estimator) if self._evaluate is not None else {}
        return Trained(model, passes_of(estimator, len(x)), metrics)


def is_classifier(estimator: object) -> bool:
    return isinstance(estimator, SGDClassifier | LogisticRegression)


def check_estimator(estimator: Any) -> None:
    """Whether its objective is known, and has a gradient.

    Raises:
        ProblemError: it is not, or has none.
    """
    kind = type(estimator).__name__
    if not isinstance(estimator, SUPPORTED):
        names = ", ".join(known.__name__ for known in SUPPORTED)
        raise ProblemError(f"from_estimator: expected one of {names}, got {kind}")
    losses = tuple(MARGINS) if isinstance(estimator, SGDClassifier) else RESIDUALS
    if isinstance(estimator, SGDClassifier | SGDRegressor) and estimator.loss not in losses:
        raise ProblemError(f"from_estimator: {kind}.loss must be one of {', '.join(losses)}, got {estimator.loss!r}")
    if isinstance(estimator, LogisticRegression) and estimator.solver == "liblinear":
        raise ProblemError(
            "from_estimator: liblinear penalises the intercept, too; use another solver of LogisticRegression"
        )


def objective(made: Made, model: nn.Linear, examples: Examples) -> Tensor:
    """What an estimator minimises, divided by the number of examples where it is a sum over them, shape ().

    Hyperparameters in the estimator may be tensors. Its documentation has the formulas: the sections "Mathematical
    formulation" of SGD, and those on ridge and logistic regression.
    """
    estimator, z, n = made.estimator, model(examples.x), len(examples.y)
    if isinstance(estimator, Ridge):
        losses = (z[:, 0] - examples.y).square()
        found: Tensor = ((examples.weight * losses).sum() + estimator.alpha * model.weight.square().sum()) / n
        return found
    scale = 1 / (estimator.C * n) if isinstance(estimator, LogisticRegression) else estimator.alpha
    found = (examples.weight * weighted(made, z, examples.y)).mean() + scale * penalty(estimator, model.weight)
    return found


def weighted(made: Made, z: Tensor, y: Tensor) -> Tensor:
    """The training loss of each example with the weights of classes, shape (n,)."""
    estimator = made.estimator
    if isinstance(estimator, SGDRegressor):
        if estimator.loss == "huber":
            return huber_loss(z[:, 0], y, reduction="none", delta=estimator.epsilon)
        return (z[:, 0] - y).square() / 2
    weights = class_weights(made)
    if z.shape[1] > 1 and isinstance(estimator, LogisticRegression):
        return weights[y] * cross_entropy(z, y, reduction="none")
    loss = MARGINS[estimator.loss if isinstance(estimator, SGDClassifier) else "log_loss"]
    if z.shape[1] == 1:
        return weights[y] * loss(torch.where(y == 1, z[:, 0], -z[:, 0]))
    # One against the others: only the positives of each are weighted.
    positive = nn.functional.one_hot(y, z.shape[1]).bool()
    return (torch.where(positive, weights, 1.0) * loss(torch.where(positive, z, -z))).sum(1)


def class_weights(made: Made) -> Tensor:
    """Shape (classes,)."""
    assert made.counts is not None and made.labels is not None
    given = made.estimator.class_weight
    if given is None:
        return torch.ones(len(made.counts), dtype=torch.double)
    if isinstance(given, str):  # "balanced"
        return made.counts.sum() / (len(made.counts) * made.counts.double())
    values = (given.get(label, 1.0) for label in made.labels.tolist())
    return torch.stack([torch.as_tensor(value, dtype=torch.double) for value in values])


def penalty(estimator: Any, weight: Tensor) -> Tensor:
    """(1 - r) / 2 |w|^2 + r |w|_1 with the l1 ratio r."""
    # Newer logistic regressions have a ratio only.
    kind = getattr(estimator, "penalty", "deprecated")
    if kind is None:
        return torch.zeros((), dtype=torch.double)
    ratio = {"l1": 1.0, "l2": 0.0}.get(kind, estimator.l1_ratio)
    ratio = 0.0 if ratio is None else ratio
    return (1 - ratio) / 2 * weight.square().sum() + ratio * weight.abs().sum()


def judged(estimator: Any, z: Tensor, y: Tensor) -> Tensor:
    """The validation loss of each example, shape (n,)."""
    if not is_classifier(estimator):
        return (z[:, 0] - y).square()
    if isinstance(estimator, SGDClassifier) and estimator.loss != "log_loss":
        margins = torch.where(nn.functional.one_hot(y, max(2, z.shape[1])).bool()[:, -z.shape[1] :], z, -z)
        return MARGINS[estimator.loss](margins).sum(1)
    if z.shape[1] == 1:
        return softplus(torch.where(y == 1, -z[:, 0], z[:, 0]))
    if isinstance(estimator, SGDClassifier):
        # The probabilities of one against the others, made to add up to 1.
        log_p = logsigmoid(z)
        return log_p.logsumexp(1) - log_p.gather(1, y[:, None])[:, 0]
    return cross_entropy(z, y, reduction="none")


def passes_of(estimator: Any, examples: int) -> float:
    """Over the training data: of SGD its steps, else its iterations; 1 of a solution in one go."""
    if isinstance(estimator, SGDClassifier | SGDRegressor):
        return max(1.0, float(estimator.t_ - 1) / examples)
    iterations = getattr(estimator, "n_iter_", None)
    return 1.0 if iterations is None else max(1.0, float(np.max(iterations)))
