"""Where the user expects the optimum: what is given, its density, the start design and the looks at the whole box."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from scipy import stats

from raybilevel import BilevelSearch, problems
from raybilevel._config.experiment import ExperimentConfig
from raybilevel._config.plan import resolve
from raybilevel.errors import ConfigError, SpaceError, StateError
from raybilevel.methods import Default, Paper
from raybilevel.methods._default import factors_of
from raybilevel.search import _state_file as state_file
from raybilevel.search._optimizer import BilevelOptimizer, Observation
from raybilevel.search_state import SearchState
from raybilevel.space import Parameter, Space, sobol_points, with_priors
from raybilevel.tune._resume import check_saved
from tests.tiny_problems import Parabola

LR = Parameter(("lr",), 1e-4, 1.0, log=True)
WIDTH = Parameter(("net", "width"), 0.0, 10.0)
DEPTH = Parameter(("net", "depth"), 1.0, 40.0, integer=True)
KIND = Parameter.of_choices(("net", "kind"), ["relu", "tanh", None])
SPACE = Space((LR, WIDTH, DEPTH, KIND))


def priors_of(space: Space) -> dict[str, tuple[float, ...]]:
    return {p.name: p.prior for p in space.parameters}


def test_priors_are_given_by_name_nested_or_for_a_group() -> None:
    weights = {"tanh": 1, "relu": 4, None: 2}
    found = with_priors(SPACE, {"lr": (1e-2, 0.5), "net": {"width": [3, 2], "kind": weights}})
    assert priors_of(found) == {"lr": (0.01, 0.5), "net/width": (3, 2), "net/depth": (), "net/kind": (1.0, 0.25, 0.5)}
    assert with_priors(SPACE, {"net/depth": (3, 1)}).parameters[2].prior == (3, 1)
    group = Space(tuple(Parameter(("decay", name), 0.1, 1.0) for name in "ab"))
    assert priors_of(with_priors(group, {"decay": (0.5, 1)})) == {"decay/a": (0.5, 1), "decay/b": (0.5, 1)}
    assert with_priors(SPACE, {}) == SPACE


@pytest.mark.parametrize(
    ("priors", "words"),
    [
        ({"rate": (1, 1)}, "rate is not in the space, which has lr, net/width, net/depth, net/kind"),
        ({"net": {"size": (1, 1)}}, "net/size is not in the space"),
        ({"lr": 0.01}, r"lr: expected a value within \[0.0001, 1\] and a positive deviation in decades, got 0.01"),
        ({"lr": (2.0, 1)}, r"lr: expected a value within"),
        ({"lr": (0.1, 0)}, r"got \(0.1, 0\)"),
        ({"net": {"width": (1, math.inf)}}, r"net/width: .* a positive deviation in its unit"),
        ({"net": {"width": {"a": 1}}}, r"net/width: expected a value within"),
        ({"net": {"kind": {"relu": 1, "tanh": 1}}}, "a positive weight for each of 'relu', 'tanh', None, got"),
        ({"net": {"kind": {"relu": 1, "tanh": 0, None: 1}}}, "net/kind: expected a mapping with a positive weight"),
        ({"net": {"kind": {"relu": 1, "tanh": 1, None: 1, "gelu": 1}}}, "net/kind: expected a mapping"),
        ([("lr", 1)], "priors: expected a mapping such as"),
    ],
)
def test_what_is_no_prior_is_refused(priors: Any, words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        with_priors(SPACE, priors)


def test_a_grid_has_no_prior() -> None:
    grid = Parameter(("a",), 0.0, 1.0, choices=(1, 2), grid=True)
    with pytest.raises(SpaceError, match="priors: a is not searched"):
        with_priors(Space((grid, LR)), {"a": {1: 1, 2: 2}})


def test_the_density_is_normal_on_the_scale_of_the_search() -> None:
    space = with_priors(SPACE, {"lr": (1e-2, 0.5), "net": {"depth": (3, 2), "kind": {"relu": 4, "tanh": 1, None: 2}}})
    configs = [
        {"lr": 1e-3, "net": {"width": 1.0, "depth": 3, "kind": "relu"}},
        {"lr": 1e-2, "net": {"width": 9.0, "depth": 8, "kind": "tanh"}},
        {"lr": 1e-2, "net": {"width": 5.0, "depth": 3, "kind": "relu"}},
    ]
    points = torch.stack([space.encode(config) for config in configs])
    assert space.log_prior(points).tolist() == pytest.approx([-2.0, -(2.5**2) / 2 + math.log(0.25), 0.0], abs=1e-9)
    # The width has none.
    (slopes,) = torch.autograd.grad(space.log_prior(x := points[1].clone().requires_grad_()), x)
    assert slopes[2] < 0 and slopes[1] == 0
    domain_of_tune = with_priors(Space((Parameter.of(("a",), "randn", [0.0, 1.0]),)), {"a": (1.0, 0.5)})
    assert domain_of_tune.log_prior(domain_of_tune.encode({"a": 2.0})).item() == pytest.approx(-2.0, rel=1e-6)


def test_what_is_not_active_does_not_count() -> None:
    switch = Parameter(("a",), 0.0, 1.0, choices=(0, 1), smooth=False)
    space = with_priors(Space((switch, Parameter(("b",), 0.0, 1.0, when=(((0, 1),),)))), {"b": (0.0, 0.1)})
    off, on = space.at_rest(torch.tensor([[0.25, 0.5], [0.75, 0.5]], dtype=torch.double))[0]
    assert space.log_prior(off) == 0 and space.log_prior(on).item() == pytest.approx(-12.5)


def test_a_design_is_moved_to_mode_and_quantiles_of_the_prior() -> None:
    space = with_priors(SPACE, {"lr": (1e-1, 1.0), "net": {"kind": {"relu": 1, "tanh": 6, None: 1}}})
    points = sobol_points(4, 5, seed=0)
    moved = space.expected(points)
    assert torch.equal(moved[2::2], points[2::2]) and torch.equal(moved[:, 1:3], points[:, 1:3])
    assert space.to_config(moved[0])["lr"] == pytest.approx(0.1) and space.to_config(moved[0])["net"]["kind"] == "tanh"
    # Of log10(lr), between -4 and 0 around -1.
    law = stats.truncnorm(-3, 1, loc=-1, scale=1)
    for unit, share in zip(moved[1::2, 0].tolist(), points[1::2, 0].tolist(), strict=True):
        assert math.log10(LR.to_value(unit)) == pytest.approx(law.ppf(share), abs=1e-6)
    shares = torch.tensor([[0.5, 0.5, 0.5, share] for share in (0.5, 0.1, 0.5, 0.2, 0.5, 0.9)], dtype=torch.double)
    kinds = [space.to_config(point)["net"]["kind"] for point in space.expected(shares)[1::2]]
    assert kinds == ["relu", "tanh", None]


def test_the_start_design_begins_at_the_mode_and_keeps_half_of_its_points() -> None:
    plain = Space((LR, WIDTH))
    space = with_priors(plain, {"lr": (1e-3, 0.5), "net": {"width": (9.0, 1.0)}})
    before, after = (Default().start_design(s, slots=6, seed=0) for s in (plain, space))
    assert torch.equal(after[0], space.encode({"lr": 1e-3, "net": {"width": 9.0}}))
    assert torch.equal(after[2::2], before[2::2]) and not torch.isclose(after[1::2], before[1::2]).any()


@pytest.mark.parametrize("trainings", [2, 20])
def test_the_prior_weighs_less_with_every_training(trainings: int) -> None:
    space = with_priors(Space((LR,)), {"lr": (1e-2, 0.5)})
    optimizer = BilevelOptimizer(space, Default())
    for number in range(trainings):
        optimizer.add(str(number), {"lr": 1e-3}, Observation(1.0, 1.0, (0.0,), 1.0))
    (factor,) = factors_of(optimizer.state, space, None)
    at = space.encode({"lr": 1e-1})
    assert factor(at).item() == pytest.approx(-2.0 * 10 / trainings)
    assert factors_of(SearchState(), Space((LR,)), None) == []


def lowest(space: Space, target: float, trainings: int, seed: int = 0) -> float:
    """F of a bowl around `target`, searched by values."""
    optimizer = BilevelOptimizer(space, Default(hypergradients=False), seed=seed)
    for number in range(trainings):
        while (step := optimizer.plan()) is not None:
            optimizer.tell_step(step.number, optimizer.run(Parabola(), {}, step, {}.__getitem__))
        assert optimizer.ask(str(number)) is not None
        unit = optimizer.state.trainings[-1].unit
        upper = sum((u - target) ** 2 for u in unit)
        optimizer.tell(str(number), Observation(upper, 0.0, (math.nan,) * len(unit), 1.0))
    assert optimizer.best is not None
    return optimizer.best.upper_loss


def test_a_good_prior_helps_and_a_wrong_one_is_overcome() -> None:
    box = Space(tuple(Parameter((name,), 0.0, 1.0, smooth=False) for name in "abc"))
    good = with_priors(box, dict.fromkeys("abc", (0.85, 0.1)))
    wrong = with_priors(box, dict.fromkeys("abc", (0.1, 0.1)))
    assert lowest(good, 0.8, 5) < 0.2 * lowest(box, 0.8, 5)
    assert lowest(wrong, 0.8, 16) < 0.01


def test_a_saved_search_keeps_its_priors(tmp_path: Path) -> None:
    space = with_priors(Space((LR,)), {"lr": (1e-3, 0.5)})
    more = {"metric": "upper_loss", "mode": "min", "constants": "{}", "checkpoints": {}}
    saved = state_file.SavedSearch(**vars(BilevelOptimizer(space, Default()).saved()), **more)
    state_file.write(tmp_path / "state.json", saved)
    saved = state_file.read(tmp_path / "state.json")
    assert BilevelOptimizer.from_saved(saved, Default()).space == space
    check_saved(saved, space, None, None)
    words = r"and prior \(0.001, 0.5\); this search is of one with lr: loguniform\(0.0001, 1.0\)$"
    with pytest.raises(StateError, match=words):
        check_saved(saved, Space((LR,)), None, None)


def test_a_searcher_of_tune_takes_priors() -> None:
    space = {"x": {"a": tune.loguniform(1e-4, 1e2)}}
    search = BilevelSearch(Parabola(), space, max_concurrent=1, priors={"x": {"a": (1e-3, 0.5)}})
    found = search.suggest("first")
    assert isinstance(found, dict) and found["x"]["a"] == pytest.approx(1e-3)
    with pytest.raises(ConfigError, match="priors: Paper takes none; use method='default'"):
        BilevelSearch(Parabola(), space, method=Paper(), priors={"x": {"a": (1e-3, 0.5)}})
    with pytest.raises(SpaceError, match="priors: a is not in the space, which has x/a"):
        BilevelSearch(Parabola(), space, priors={"a": (1e-3, 0.5)})


def test_a_config_has_priors_and_their_mistakes_stand_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.PROBLEMS, "parabola", Parabola)

    def config(**search: Any) -> ExperimentConfig:
        space = {"x": {"a": {"loguniform": [1e-4, 1e2]}}}
        return ExperimentConfig.model_validate(
            {"problem": "parabola", "space": space, "search": {"trainings": 3, **search}}
        )

    assert resolve(config(priors={"x": {"a": [1e-3, 0.5]}})).config.search.priors == {"x": {"a": [1e-3, 0.5]}}
    with pytest.raises(ConfigError) as caught:
        resolve(config(priors={"x": {"a": 1.0}}, points_to_evaluate=[{"b": 1}]))
    assert "search.points_to_evaluate[0]" in str(caught.value) and "priors: x/a: expected a value" in str(caught.value)
