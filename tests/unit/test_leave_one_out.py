from __future__ import annotations

import pytest
import torch

from raybilevel._models import leave_one_out
from raybilevel._models.gaussian_process import fit
from raybilevel.space import sobol_points


@pytest.mark.parametrize("known", [(), (0, 2, 3)])
def test_each_error_is_that_of_the_process_without_the_point(known: tuple[int, ...]):
    x = sobol_points(2, 6, 1)
    values = (x - 0.3).square().sum(-1)
    fitted = fit(x, values, {i: 2 * (x[i] - 0.3) for i in known})
    model, (rows,) = fitted.model, fitted.model.train_inputs
    targets = model.train_targets
    expected = []
    for i in range(len(x)):
        others = (rows[:, :2] != x[i]).any(1)
        model.set_train_data(rows[others], targets[others], strict=False)
        with torch.no_grad():
            expected.append((targets[i] - model.posterior(x[i : i + 1]).mean.squeeze()).item())
    model.set_train_data(rows, targets, strict=False)
    assert leave_one_out.errors(fitted).tolist() == pytest.approx(expected, abs=1e-5)  # rounding times the condition
