from __future__ import annotations

import torch

from raybilevel.problems.digits import DigitsLogistic


def test_a_decay_for_each_class_and_group_is_of_the_weights_of_that_class_and_group() -> None:
    problem = DigitsLogistic(groups=4, train=30, validation=30, per_class=True)
    assert problem.space.dimension == 40
    model = problem.model()
    torch.nn.init.normal_(model.get_parameter("weight"), generator=torch.Generator().manual_seed(0))
    weight = model.get_parameter("weight")
    decays = {f"g{g}": torch.tensor(float(g == 4 * 7 + 2)) for g in range(40)}
    # The third quarter of the pixels, of class 7.
    expected = weight[7, 32:48].square().sum() / 2
    assert torch.allclose(problem.group_penalty(model, decays), expected)
    # Equal for all classes it is that of the groups.
    shared = {f"g{g}": torch.tensor(0.1 * (g % 4 + 1)) for g in range(40)}
    plain = DigitsLogistic(groups=4, train=30, validation=30)
    assert torch.allclose(
        problem.group_penalty(model, shared), plain.group_penalty(model, {f"g{g}": shared[f"g{g}"] for g in range(4)})
    )
