from __future__ import annotations

import numpy as np
import pytest

from raybilevel.sklearn import GroupPenaltyRegressor


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_search_on_ray_chooses_as_one_in_this_process() -> None:
    random = np.random.default_rng(0)
    inputs, groups = random.normal(size=(60, 12)), np.repeat(["noise", "signal"], 6)
    targets = inputs[:, 6:] @ random.normal(size=6) + random.normal(size=60)
    local = GroupPenaltyRegressor(groups, cv=3).fit(inputs, targets)
    on_ray = GroupPenaltyRegressor(groups, cv=3, backend="ray", trials=10).fit(inputs, targets)
    assert on_ray.cv_loss_ == pytest.approx(local.cv_loss_, rel=0.01)
    assert on_ray.predict(inputs) == pytest.approx(local.predict(inputs), abs=0.2)
