"""Linear models with one penalty per group of features, as scikit-learn estimators."""

from raybilevel.sklearn._estimators import GroupPenaltyClassifier, GroupPenaltyRegressor

__all__ = ["GroupPenaltyClassifier", "GroupPenaltyRegressor"]
