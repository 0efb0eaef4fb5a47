"""The estimators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin, is_classifier
from sklearn.model_selection import check_cv
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from raybilevel.errors import ConfigError
from raybilevel.folds import times_held_out
from raybilevel.sklearn._choice import choose
from raybilevel.sklearn._folds import Array, Fold, FoldLoss, Penalties
from raybilevel.sklearn._logistic import LogisticFolds, all_logits, fit_logistic
from raybilevel.sklearn._ridge import RidgeFolds, fit_ridge


class GroupPenalty(BaseEstimator):  # type: ignore[misc]
    """What both estimators share."""

    def __init__(
        self,
        groups: Sequence[Any] | None = None,
        cv: Any = 5,
        generalise: bool = True,
        backend: Literal["local", "ray"] = "local",
        trials: int = 25,
    ) -> None:
        # As given: scikit-learn's `clone` refuses an estimator that changes its arguments, so `fit` checks them.
        self.groups = groups
        self.cv = cv
        self.generalise = generalise
        self.backend = backend
        self.trials = trials

    def _choose(self, kind: type[RidgeFolds] | type[LogisticFolds], inputs: Array, targets: Array, y: Any) -> Array:
        """Set what was chosen; the penalty of each feature, shape (p,)."""
        self.groups_, group = labels(self.groups, inputs.shape[1])
        if self.backend not in ("local", "ray"):
            raise ConfigError(f"backend must be 'local' or 'ray', got {self.backend!r}")
        splits = list(check_cv(self.cv, y, classifier=is_classifier(self)).split(inputs, y))
        penalties = Penalties.of(inputs, group)
        if self.backend == "ray":
            from raybilevel.sklearn._on_ray import choose_on_ray  # Ray takes seconds to import

            # The numbers of the classes. Of two there is one column of targets, and the first class has the logit 0.
            of_torch = targets if kind is RidgeFolds else all_logits(2 * targets - 1).argmax(1)
            found = choose_on_ray(inputs, of_torch, penalties, splits, self.generalise, self.trials)
            self.penalties_, self.cv_loss_, self.n_supported_ = found.penalties, found.upper, found.supported
            return np.asarray(self.penalties_[group])
        folds = [Fold(inputs[a], targets[a], inputs[b], targets[b]) for a, b in splits]
        loss: FoldLoss = kind(folds, penalties)
        chosen = choose(loss, self.generalise, times_held_out(splits))
        self.penalties_ = penalties.at(chosen.x)
        self.shared_penalty_ = float(penalties.at(chosen.shared)[0])
        self.cv_loss_ = loss.upper(chosen.x)
        self.n_supported_ = chosen.supported
        return np.asarray(self.penalties_[group])


class GroupPenaltyRegressor(MultiOutputMixin, RegressorMixin, GroupPenalty):  # type: ignore[misc]
    """Ridge regression with one penalty per group of features, chosen by cross-validation (banded ridge regression).

        minimise |y - X w - b|^2 + sum_g penalty_g |w_g|^2

    The penalties are chosen by gradients of the mean squared error of each example where it is held out. They begin at
    the best value that all groups can share, and move apart as far as the examples support it. Scale the features
    first, e.g. by `StandardScaler`. Targets of several columns share the penalties.

    Args:
        groups: the group of each feature, shape (n_features,); any labels. None: all features are one group.
        cv: folds, a splitter of scikit-learn or an iterable of (train, test).
        generalise: False for the penalties with the lowest error on the folds, whatever is expected of new data. With
            fewer than four groups they are those.
        backend: "local", in this process, or "ray" for a search on the Ray cluster whose trials train all folds each:
            for data on which one training takes seconds.
        trials: of a search on Ray.

    Attributes:
        penalties_: of each group, shape (n_groups,), in the order of `groups_`.
        groups_: the labels of the groups, sorted.
        shared_penalty_: the best that all groups can share; only of the local backend.
        cv_loss_: the mean squared error over held-out examples.
        n_supported_: how many penalties the examples determine.
        coef_, intercept_: as those of `sklearn.linear_model.Ridge`.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Choose the penalties, and train on all examples.

        Raises:
            ConfigError: `groups` has not one label per feature.
        """
        inputs, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2)
        targets = np.asarray(y, dtype=np.float64).reshape(len(inputs), -1)
        weights, intercept = fit_ridge(inputs, targets, self._choose(RidgeFolds, inputs, targets, y))
        several = y.ndim > 1
        # Ridge has shape (n_features,) for targets of shape (n,), and (targets, n_features) for several.
        self.coef_ = weights.T if several else weights[:, 0]
        self.intercept_ = intercept if several else float(intercept[0])
        return self

    def predict(self, X: Any) -> Array:
        """Of inputs, shape (n, n_features); shape (n,), or (n, targets)."""
        check_is_fitted(self)
        inputs = validate_data(self, X, dtype=np.float64, reset=False)
        return np.asarray(inputs @ self.coef_.T + self.intercept_)


class GroupPenaltyClassifier(ClassifierMixin, GroupPenalty):  # type: ignore[misc]
    """Logistic regression with one penalty per group of features, chosen by cross-validation.

        minimise -sum_i log p(y_i | x_i) + sum_g penalty_g |W_g|^2 / 2

    So a penalty is 1 / C of `sklearn.linear_model.LogisticRegression`. The penalties are chosen by gradients of the
    mean negative log-likelihood of each example where it is held out; otherwise as `GroupPenaltyRegressor`. One matrix
    of n_features squared is factorised per class, so the features should be thousands at most.

    Args:
        groups: the group of each feature, shape (n_features,); any labels. None: all features are one group.
        cv: folds, a splitter of scikit-learn or an iterable of (train, test). A number stands for stratified folds.
        generalise: as of `GroupPenaltyRegressor`, like those that follow.
        backend: "local" or "ray".
        trials: of a search on Ray.

    Attributes:
        penalties_: of each group, shape (n_groups,), in the order of `groups_`.
        groups_: the labels of the groups, sorted.
        shared_penalty_: the best that all groups can share; only of the local backend.
        cv_loss_: the mean negative log-likelihood over held-out examples.
        n_supported_: how many penalties the examples determine.
        classes_, coef_, intercept_: as those of `sklearn.linear_model.LogisticRegression`.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Choose the penalties, and train on all examples.

        Raises:
            ConfigError: `groups` has not one label per feature.
            ValueError: there is one class only.
        """
        inputs, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        binarizer = LabelBinarizer().fit(y)
        self.classes_ = binarizer.classes_
        if len(self.classes_) < 2:
            raise ValueError(
                f"GroupPenaltyClassifier needs examples of at least two classes, y has one class: {self.classes_[0]!r}"
            )
        targets = np.asarray(binarizer.transform(y), dtype=np.float64)
        weights, intercept = fit_logistic(inputs, targets, self._choose(LogisticFolds, inputs, targets, y))
        self.coef_, self.intercept_ = weights.T, intercept
        return self

    def decision_function(self, X: Any) -> Array:
        """Logits, shape (n, classes); of two classes that of the second, shape (n,)."""
        check_is_fitted(self)
        inputs = validate_data(self, X, dtype=np.float64, reset=False)
        logits = np.asarray(inputs @ self.coef_.T + self.intercept_)
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def predict_proba(self, X: Any) -> Array:
        """Shape (n, classes)."""
        logits = self.decision_function(X)
        return np.asarray(softmax(all_logits(logits.reshape(len(logits), -1)), axis=1))

    def predict(self, X: Any) -> NDArray[Any]:
        """The most likely class of each input, shape (n,)."""
        most_likely = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[most_likely])


def labels(groups: Sequence[Any] | None, features: int) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The labels that there are, sorted, and the number of each feature's."""
    if groups is None:
        groups = [0] * features
    if np.ndim(groups) != 1 or len(groups) != features:
        raise ConfigError(
            f"groups must have one label per feature, {features} in all, got an array of shape {np.shape(groups)}"
        )
    found, group = np.unique(np.asarray(groups), return_inverse=True)
    return found, group
