"""Trainings by loops of the user's own: what is kept of them, and problems that train themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from ray import tune
from torch import nn

from raybilevel import BilevelSearch, conclude
from raybilevel._lower.own_loop import OwnTraining, train_itself
from raybilevel._lower.training import LowerLevelTraining, load_checkpoint, observed, refit, train
from raybilevel.errors import CheckpointError, ConfigError, ProblemError
from raybilevel.methods import Default
from raybilevel.methods._base import UpperStep
from raybilevel.problem import Report, make_model, trains_itself
from raybilevel.search import BilevelOptimizer, observe, search
from raybilevel.search_state import Proposal, SearchState, Training
from raybilevel.space import Parameter, Space
from raybilevel.tune._data_parallel import data_parallel_trainable
from raybilevel.tune._trainable import lower_level_trainable
from tests.problems_for_tests import Network, Ridge, vector
from tests.tiny_problems import OwnLoop, Parabola, parabola

CONFIG, SEED = {"decay": 0.01}, 3
POINT = {"x": {"a": 0.1}}


class Itself(Network):
    """The same as our loop, by hand."""

    def train(self, config: Mapping[str, Any], report: Report, checkpoint: Mapping[str, Any] | None) -> nn.Module:
        model, generator = self.model(), torch.Generator().manual_seed(SEED)
        optimizer = self.optimizer(model)
        for _ in range(self.epochs):
            for batch in self.batches("lower", generator):
                optimizer.zero_grad()
                self.lower_loss(model, {"decay": torch.tensor(config["decay"])}, batch).backward()
                optimizer.step()
        return model


def test_a_problem_that_trains_itself_observes_what_our_loop_does() -> None:
    ours, theirs = train(Network(), CONFIG, SEED), train(Itself(), CONFIG, SEED)
    assert theirs[0] == ours[0]  # passes, too: they are counted
    expected, found = (load_checkpoint(checkpoint)["model"] for _, checkpoint in (ours, theirs))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_hypergradient_at_a_concluded_training_is_that_of_our_loop_at_the_same_weights() -> None:
    problem, unit = Ridge(), vector(0.4, 0.5, 0.6)
    config = problem.space.to_config(unit)
    training = LowerLevelTraining(problem, config)
    training.run()
    own = OwnTraining(problem, config, training.model, 1.0)
    assert own.losses() == training.losses() and own.gradient() == training.gradient()

    def hypergradient(checkpoint: bytes) -> tuple[float, ...]:
        seen = observe(problem.space, config, observed(own))
        known = Training(
            0, Proposal(tuple(unit.tolist()), "start"), "done", 0, seen.lower_loss, seen.upper_loss,
            seen.lower_gradient, 100.0,
        )  # fmt: skip
        step = UpperStep(0, "region", 0, SearchState((known,)), 0, targets=(0,))
        return (
            Default().run(problem, problem.space, {}, step, lambda index: load_checkpoint(checkpoint)).hypergradients[0]
        )

    found = hypergradient(own.dump())
    assert found == hypergradient(train(problem, config)[1])
    x = unit.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(problem.reduced(x), x)
    assert found == pytest.approx(exact.tolist(), rel=1e-3)  # it is the limit of a large multiplier


def test_what_is_kept_is_a_copy_and_costs_what_is_said() -> None:
    problem, config = Parabola(), POINT
    model = make_model(problem, config)
    own = OwnTraining(problem, config, model, 7.5)
    with torch.no_grad():
        model.get_parameter("weight").fill_(5.0)
    assert own.losses()["upper_loss"] == 1.0  # at weights of zero
    own.gradient()
    assert own.passes == 8.5


@pytest.mark.parametrize("model", [nn.Linear(2, 1, bias=False), nn.DataParallel(nn.Linear(1, 1, bias=False))])
def test_another_model_than_the_problems_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ProblemError, match=r"Parabola.model\(\) makes another model of the config (?s:.)*weight"):
        OwnTraining(Parabola(), POINT, model, 1.0)


def test_no_model_is_an_error() -> None:
    with pytest.raises(ProblemError, match=r"Parabola: expected the trained torch.nn.Module, got NoneType"):
        OwnTraining(Parabola(), POINT, None, 1.0)  # type: ignore[arg-type]


def test_an_optimistic_problem_has_no_loop_of_its_own() -> None:
    problem = OwnLoop()
    problem.optimistic = True
    with pytest.raises(ProblemError, match=r"OwnLoop.optimistic: a loop of your own"):
        train(problem, POINT)


def test_what_is_reported_has_our_metrics_with_it() -> None:
    told: list[dict[str, Any]] = []
    train_itself(OwnLoop(), POINT, 0, lambda metrics, checkpoint: told.append(metrics))
    assert [metrics["epoch"] for metrics in told] == [metrics["step_of_mine"] for metrics in told] == [1, 2, 3, 4]
    assert [metrics["lower_passes"] for metrics in told] == [1, 2, 3, 4]
    assert not any(metrics["lower_level_finished"] for metrics in told)
    errors = [0.5**step for step in range(1, 5)]  # each step halves it
    assert [metrics["lower_loss"] for metrics in told] == pytest.approx([error**2 / 2 for error in errors])
    assert [metrics["upper_loss"] for metrics in told] == pytest.approx([error**2 for error in errors])
    assert "test_loss" in told[0]


def test_metrics_are_reported_as_they_are_where_no_model_is_given() -> None:
    class Brief(OwnLoop):
        def train(self, config: Mapping[str, Any], report: Report, checkpoint: Mapping[str, Any] | None) -> nn.Module:
            report({"upper_loss": 3.0, "epoch": 12})
            return self.model()

    told: list[dict[str, Any]] = []
    training = train_itself(Brief(), POINT, 0, lambda metrics, checkpoint: told.append(metrics))
    assert told == [{"upper_loss": 3.0, "epoch": 12, "lower_level_finished": False}]
    assert training.passes == Brief.epochs  # nothing was taken of its batches


def test_a_reported_time_is_that_of_the_weights_or_refused() -> None:
    class Timed(OwnLoop):
        time: Mapping[str, Any] = {"weight": torch.tensor(2.0)}

        def train(self, config: Mapping[str, Any], report: Report, checkpoint: Mapping[str, Any] | None) -> nn.Module:
            report({}, trained_time=self.time)
            return self.model()

    problem = Timed()
    assert load_checkpoint(train(problem, POINT)[1])["time"] == {"weight": torch.tensor(2.0)}
    assert "time" not in load_checkpoint(train(OwnLoop(), POINT)[1])
    problem.time = {"weights": torch.tensor(2.0)}
    with pytest.raises(ProblemError, match=r"of shape \(\) or \(1, 1\) for the weights weight, got nothing"):
        train(problem, POINT)
    problem.time = {"weight": torch.ones(3)}
    with pytest.raises(ProblemError, match=r"got shape \(3,\)"):
        train(problem, POINT)


def test_a_training_that_was_interrupted_goes_on_from_its_checkpoint() -> None:
    saved: list[bytes] = []
    with pytest.raises(RuntimeError, match="a fault"):
        train_itself(OwnLoop(fault=3), POINT, 0, lambda metrics, checkpoint: saved.append(checkpoint or b""))
    assert len(saved) == 2
    told: list[dict[str, Any]] = []
    resumed = train_itself(OwnLoop(fault=3), POINT, 0, lambda metrics, checkpoint: told.append(metrics), saved[-1])
    assert [metrics["epoch"] for metrics in told] == [3, 4]
    whole = train_itself(OwnLoop(), POINT, 0)
    assert resumed.losses() == whole.losses() and resumed.passes == whole.passes == 4


def test_a_checkpoint_that_holds_code_is_refused() -> None:
    class Careless(OwnLoop):
        def train(self, config: Mapping[str, Any], report: Report, checkpoint: Mapping[str, Any] | None) -> nn.Module:
            report({}, checkpoint={"model": self.model()})
            return self.model()

    with pytest.raises(CheckpointError, match="state/model is a Linear"):
        train_itself(Careless(), POINT, 0)


def test_a_search_without_ray_runs_the_loop_of_the_problem() -> None:
    space = Space((Parameter(("x", "a"), 1e-3, 1e1, log=True),))
    optimizer = BilevelOptimizer(space, Default(upper_share=2.0))  # of trainings of four epochs
    search(OwnLoop(), optimizer, 12)
    assert any(training.hypergradient for training in optimizer.state.trainings)
    assert optimizer.state.best is not None and optimizer.state.best.upper_loss < 1e-2
    assert {training.passes for training in optimizer.state.done} == {5.0}


def test_only_a_method_of_that_name_is_a_loop() -> None:
    problem = Parabola()
    problem.train = 50  # type: ignore[attr-defined]  # of examples
    assert not trains_itself(problem) and trains_itself(OwnLoop())
    assert refit(OwnLoop(), POINT) is None


def test_what_a_loop_of_its_own_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="epoch_time_limit: OwnLoop trains itself"):
        lower_level_trainable(OwnLoop(), epoch_time_limit=5.0)
    with pytest.raises(ProblemError, match=r"OwnLoop\.train: data_parallel_trainable does not have it"):
        data_parallel_trainable(OwnLoop(), scaling=None)  # type: ignore[arg-type]


def test_f_has_the_name_that_the_script_gives_it() -> None:
    problem = parabola(upper_metric="val_loss")
    found = OwnTraining(problem, POINT, problem.model(), 1.0).losses()
    assert found["val_loss"] == found["upper_loss"] == 1.0


def test_a_search_by_that_name_has_hypergradients_and_one_by_another_has_none() -> None:
    problem = parabola(upper_metric="val_loss")
    space = {"x": {"a": tune.loguniform(1e-4, 1e2)}}
    assert BilevelSearch(problem, space).metric == "val_loss"
    for metric, hypergradients in (("val_loss", True), ("upper_loss", True), ("score", False)):
        assert BilevelSearch(problem, space, metric=metric).method.hypergradients == hypergradients
    with pytest.raises(ConfigError, match="mode='max' with metric='val_loss': the upper-level loss is minimised"):
        BilevelSearch(problem, space, metric="val_loss", mode="max")


def test_a_loop_that_is_stopped_before_its_end_has_an_f_only(caplog: pytest.LogCaptureFixture) -> None:
    problem = parabola(upper_metric="val_loss", own_loop=True)
    search = BilevelSearch(problem, max_concurrent=1)
    search.set_search_properties("val_loss", "min", {"x": {"a": tune.loguniform(1e-4, 1e2)}}, num_samples=5)
    for trial in ("a", "b", "c"):
        assert search.suggest(trial) is not None
        search.on_trial_complete(trial, {"val_loss": 2.0, "lower_passes": 3})
    assert [(t.status, t.upper_loss, t.passes) for t in search.state.trainings] == 3 * [("stopped", 2.0, 3.0)]
    assert "3 trainings ended without raybilevel.conclude(problem, model, config), and none with it" in caplog.text


def test_conclude_keeps_the_time_that_weights_were_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr("raybilevel.tune._conclude.send", lambda *given: sent.append(given))
    problem = Parabola()
    conclude(problem, problem.model(), POINT, trained_time={"weight": torch.tensor(3.0)})
    conclude(problem, problem.model(), POINT)
    (timed, plain) = (load_checkpoint(given[2]) for given in sent)
    assert timed["time"] == {"weight": torch.tensor(3.0)} and "time" not in plain
    with pytest.raises(ProblemError, match="Parabola: trained_time needs a tensor of shape"):
        conclude(problem, problem.model(), POINT, trained_time={})
