"""What a run from a config does on a real Ray beside its search."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor, nn

from raybilevel import problems
from raybilevel._command.cluster import joined
from raybilevel._command.experiment import run
from raybilevel._command.refit import chosen_for_refit, loss_after_refit
from raybilevel._command.resources import check_room, reuses_processes
from raybilevel._config.experiment import ExperimentConfig
from raybilevel._config.plan import resolve
from raybilevel._config.resources import ResourcesConfig
from raybilevel._records.names import CONFIG_FILE, SUMMARY_FILE
from raybilevel._records.run_folder import read_run
from raybilevel.errors import ConfigError
from raybilevel.problems.digits import DigitsLogistic
from raybilevel.search import ForRefit, config_for_refit
from raybilevel.search_state import Shrinkage
from tests.tiny_problems import Parabola

pytestmark = pytest.mark.usefixtures("local_ray")


class FailsOnAllData(Parabola):
    """Its training on all data raises, hangs, or ends its process; in the process that checks it, it does not."""

    def __init__(self, how: str = "raises") -> None:
        super().__init__()
        self.how, self.made_in = how, os.getpid()

    def refit_batches(self, generator: Any) -> Any:
        if os.getpid() == self.made_in:
            return self.batches("lower", generator)
        if self.how == "dies":
            os._exit(1)
        if self.how == "hangs":
            time.sleep(600)
        raise RuntimeError("too large")


class WithTestLosses(Parabola):
    """Two test examples, one of which is twice as hard, or a failure."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__(target=-2.0)  # the start is at -1
        self.fails = fails

    def test_losses(self, model: nn.Module) -> Tensor:
        if self.fails:
            raise RuntimeError("no test data here")
        loss = (model.get_parameter("weight").detach() - self.target).square().sum()
        return torch.stack([loss, 2 * loss])


class CannotBeHalved(DigitsLogistic):
    def halves(self) -> Any:
        raise RuntimeError("too few")


def config(problem: str, **options: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "problem": problem,
            "options": options,
            "space": {"x": {"a": {"loguniform": [1e-4, 1e2]}}},
            "search": {"trainings": 3, "max_concurrent": 1},
        }
    )


def test_the_cluster_that_was_joined_is_named() -> None:
    address = ray.get_runtime_context().gcs_address
    assert joined().startswith(f"joined the Ray cluster at {address}: 1 node, ")


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_refit_that_fails_costs_no_more_than_its_loss(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(problems.PROBLEMS, "no refit", FailsOnAllData)
    summary = run(config("no refit", how=how), tmp_path / "out")
    assert summary["trainings"] == 3 and summary["best"]["upper_loss"] < 1
    assert summary["best"]["test_loss"] is not None and summary["best"]["test_loss_refit"] is None
    assert "the refit on all data failed" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_the_gain_over_the_start_is_told_with_its_standard_error(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(problems.PROBLEMS, "with test losses", WithTestLosses)
    summary = run(config("with test losses", fails=fails), tmp_path / "out")
    if fails:
        assert summary["gain"] is None and "the standard error of the gain is not known" in caplog.text
        return
    # Losses l and 2 l fall by d and 2 d: the mean is 1.5 d, and its error d / 2.
    lower = summary["start"]["test_loss"] - summary["best"]["test_loss"]
    assert summary["gain"]["of"] == "test_loss" and summary["gain"]["examples"] == 2
    assert summary["gain"]["mean"] == pytest.approx(1.5 * lower)
    assert summary["gain"]["standard_error"] == pytest.approx(lower / 2)
    assert " over 2 test examples, beyond two standard errors" in summary["in_words"][1]
    assert read_run(tmp_path / "out").gain is not None


@pytest.mark.parametrize("generalise", [True, False])
def test_the_refit_is_with_what_halves_of_the_validation_examples_say(
    generalise: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(problems.PROBLEMS, "cannot be halved", CannotBeHalved)
    decays = {f"g{g}": {"loguniform": [1e-6, 10.0]} for g in range(4)}
    found = {"weight_decay": dict(zip(decays, (1.0, 1e-6, 1.0, 1e-6), strict=True))}

    def plan(problem: str) -> Any:
        options = {"groups": 4, "train": 30, "validation": 60}
        given = {"problem": problem, "options": options, "space": {"weight_decay": decays},
                 "search": {"trainings": 3, "settings": {"generalise": generalise}}}  # fmt: skip
        return resolve(ExperimentConfig.model_validate(given))

    one = plan("digits_logistic")
    shrinkage = Shrinkage(((0, 1, 2, 3),), "log_likelihood", 60, 2.0, (0.5,) * 4, 3.0, applied=True)
    chosen = chosen_for_refit(one, found, shrinkage)
    if not generalise:
        assert (chosen.config, chosen.trainings) == (found, 0)
        return
    assert chosen == config_for_refit(one.problem, found, one.space, shrinkage, one.seed) and chosen.spread < 1
    assert chosen_for_refit(plan("cannot be halved"), found, shrinkage).config == found
    assert "the refit is with the result of the search: " in caplog.text and "too few" in caplog.text
    # Where there is nothing to compare, no task is begun.
    monkeypatch.setattr("raybilevel._command.refit.choice_task", None)
    equal = {"weight_decay": dict.fromkeys(decays, 1.0)}
    assert chosen_for_refit(one, equal, shrinkage) == ForRefit(equal)


@pytest.mark.slow
def test_a_refit_that_hangs_is_killed_after_the_limits_of_its_epochs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(problems.PROBLEMS, "no refit", FailsOnAllData)
    plan = replace(resolve(config("no refit", how="hangs")), epoch_time_limit=0.5)
    assert loss_after_refit(plan, {"x": {"a": 1.0}}) is None
    assert "the refit on all data failed" in caplog.text


def test_config_and_summary_are_kept_in_the_storage_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.PROBLEMS, "parabola", Parabola)
    out, storage = tmp_path / "out", tmp_path / "storage"
    run(config("parabola"), out, storage=str(storage))
    for name in (CONFIG_FILE, SUMMARY_FILE):
        assert (storage / name).read_text() == (out / name).read_text()
    assert not (out / "tune").exists() and (storage / "tune").is_dir()
    # The folder is gone with its machine.
    summary = run(config("parabola"), tmp_path / "other", storage=str(storage), resume=True)
    assert summary["trainings"] == 3
    assert (storage / SUMMARY_FILE).read_text() == (tmp_path / "other" / SUMMARY_FILE).read_text()


@pytest.mark.timeout(200)
def test_steps_find_the_resources_that_trainings_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainings take all CPUs, and when both have ended the next one waits for steps, which need one."""
    monkeypatch.setitem(problems.PROBLEMS, "parabola", Parabola)
    two = config("parabola").model_dump()
    two["search"] |= {"trainings": 6, "max_concurrent": 2}
    two["resources"]["upper"] = {"cpu": 1}
    handler = signal.getsignal(signal.SIGINT)
    summary = run(ExperimentConfig.model_validate(two), tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is handler  # Tune leaves its own, to which a Ctrl-C afterwards would be lost
    assert summary["trainings"] == 6
    assert summary["upper_steps"] > 0


@pytest.mark.parametrize(
    ("resources", "wrong"),
    [
        ({"lower": {"cpu": 3}}, r"resources.lower: a training asks for {CPU: 3}, this machine has {CPU: 2}"),
        (
            {"lower": {"bundles": [{"CPU": 2}, {"CPU": 1, "GPU": 1}]}},
            r"for {CPU: 2 \+ CPU: 1, GPU: 1}, this machine has {CPU: 2, GPU: 1}",
        ),
        ({"upper": {"disk": 0.5}}, r"resources.upper: an upper-level step asks for {disk: 0.5}, .* {disk: 0}"),
        ({"lower": {"CPU": 2, "gpu": 1}, "upper": {"GPU": 0.5, "memory": 1}}, None),
        ({}, None),
    ],
)
def test_what_this_machine_has_not_is_named(
    resources: Any, wrong: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """It has two CPUs and a GPU."""
    given = ResourcesConfig.model_validate(resources)
    asked = given.of_training(on_gpu=False), given.of_step(on_gpu=False)
    check_room(*asked, alone=False)
    assert ("waits for one that joins" in caplog.text) == (wrong is not None)
    with pytest.raises(ConfigError, match=wrong) if wrong else nullcontext():
        check_room(*asked, alone=True)


@pytest.mark.parametrize(
    ("lower", "upper", "max_failures", "reuses"),
    [
        ({"cpu": 1}, None, 0, True),
        ({"cpu": 1}, {"memory": 1}, 0, True),
        ({"cpu": 1}, {"cpu": 0, "gpu": 1}, 0, True),
        ({"cpu": 1}, {"cpu": 0.5}, 0, False),
        ({"cpu": 1}, {"num_cpus": 1}, 0, False),
        ({"bundles": [{"CPU": 1}, {"CPU": 2}]}, {"cpu": 1}, 0, False),
        ({"bundles": [{"CPU": 1}, {"GPU": 1}]}, None, 0, False),
        ({"cpu": 1, "disk": 1}, {"disk": 1}, 0, False),
        ({"cpu": 1, "gpu": 1}, None, 0, False),
        ({"cpu": 1}, None, 2, False),
    ],
)
def test_no_idle_process_is_kept_that_steps_wait_for_or_that_may_be_lost(
    lower: Any, upper: Any, max_failures: int, reuses: bool
) -> None:
    given = ResourcesConfig(lower=lower, upper=upper)
    assert reuses_processes(given.of_training(on_gpu=False), given.of_step(on_gpu=False), max_failures) == reuses
