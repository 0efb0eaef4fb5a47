"""Linear models with one penalty per group of features, as scikit-learn estimators; and scikit-learn's own ones as
bilevel problems."""

from typing import TYPE_CHECKING

from raybilevel._lazy import lazy_names
from raybilevel.sklearn._estimators import GroupPenaltyClassifier, GroupPenaltyRegressor

if TYPE_CHECKING:
    from raybilevel.sklearn._from_estimator import EstimatorProblem, from_estimator

__all__ = ["EstimatorProblem", "GroupPenaltyClassifier", "GroupPenaltyRegressor", "from_estimator"]

# These import Ray.
__getattr__ = lazy_names(__name__, {"EstimatorProblem": "._from_estimator", "from_estimator": "._from_estimator"})


def __dir__() -> list[str]:
    return sorted(__all__)
