"""Real trials on a real local Ray: both entry points, faults, early stopping, restoring."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import tune
from ray.tune.execution import insufficient_resources_manager
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from raybilevel import BilevelSearch, lower_level_trainable
from raybilevel._cluster import pace
from raybilevel._cluster.environment import waiting_trials
from raybilevel._cluster.local_files import local_filesystem
from raybilevel._command.resources import for_tune, reuses_processes, with_room_for_steps
from raybilevel._config.experiment import read_config
from raybilevel._config.plan import resolve
from raybilevel._config.resources import TrainingResources
from raybilevel._lower.training import CHECKPOINT_FILE, load_checkpoint, train
from raybilevel.errors import ConfigError, ProblemError, RaybilevelError, SpaceError
from raybilevel.methods._base import UpperResult, UpperStep
from raybilevel.methods._default import Default
from raybilevel.problems.synthetic import ManyMinimisers
from raybilevel.search_state import Proposal, StepRecord
from raybilevel.tune._scheduler import WORKER_START_S, PatientFIFO
from raybilevel.tune._snapshot import prepare_resume
from tests.processes import ends
from tests.tiny_problems import Means, Parabola, Unlucky
from tests.unit.test_mixed_space import SHIFTS, Mixed

pytestmark = pytest.mark.usefixtures("local_ray")

CONFIGS = Path(__file__).parents[2] / "configs"
SPACE = {"x": {"a": tune.loguniform(1e-4, 1e2)}}


def fit(search: BilevelSearch, folder: Path, samples: int, space: Any = SPACE, **options: Any) -> tune.ResultGrid:
    trainable = tune.with_resources(lower_level_trainable(search.problem), {"cpu": 1})
    config = {"metric": "upper_loss", "mode": "min", "reuse_actors": True, **options}
    run = tune.RunConfig(name="run", storage_path=str(folder), verbose=0)
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(search_alg=search, num_samples=samples, **config),
        run_config=run,
    )
    return tuner.fit()


def test_tuner_finds_the_known_optimum(tmp_path: Path) -> None:
    search = BilevelSearch(Parabola(("a", "b")), max_concurrent=2)
    space = {"x": {"a": tune.loguniform(1e-4, 1e2), "b": tune.loguniform(1e-4, 1e2)}, "note": "kept", "size": 3}
    results = fit(search, tmp_path, 11, space)
    assert len(results) == 11
    assert not results.errors
    best = results.get_best_result()
    assert best.metrics["upper_loss"] < 1e-2  # of about 3 at the centre
    assert best.config["x"]["a"] == pytest.approx(0.1, rel=0.5)
    assert best.config["note"] == "kept"
    assert best.config["size"] == 3
    # A trial's config is what was trained: the optimum of f at it is the trained weight.
    with best.checkpoint.as_directory() as folder:
        state = load_checkpoint(Path(folder) / CHECKPOINT_FILE)
    assert 10 ** state["model"]["weight"][0, 0].item() == pytest.approx(best.config["x"]["a"], rel=1e-3)
    # Danskin: df/dx at the minimiser of this f is 0.
    assert best.metrics["lower_gradient"]["x"]["a"] == pytest.approx(0, abs=1e-3)
    assert best.metrics["lower_level_finished"]
    assert best.metrics["training_iteration"] == 2
    assert len(search.state.steps) >= 4
    assert not any(step.failed for step in search.state.steps)


def test_an_optimistic_problem_is_trained_in_trials_as_in_this_process(tmp_path: Path) -> None:
    problem = ManyMinimisers(optimistic=True)
    (result,) = tune.run(
        lower_level_trainable(problem, epoch_time_limit=60), config={"x0": 0.6, "x1": -0.4}, metric="upper_loss",
        mode="min", storage_path=str(tmp_path), verbose=0,
    ).trials  # fmt: skip
    here, _ = train(problem, {"x0": 0.6, "x1": -0.4})
    assert result.last_result["upper_loss"] == pytest.approx(here.upper_loss) == pytest.approx(0.1, rel=1e-3)
    assert result.last_result["lower_passes"] == here.passes > problem.epochs


def test_tune_run_gives_the_same_search(tmp_path: Path) -> None:
    problem = Parabola()
    search = BilevelSearch(problem, seed=3, max_concurrent=1)
    analysis = tune.run(
        lower_level_trainable(problem), config=SPACE, search_alg=search, metric="upper_loss", mode="min",
        num_samples=6, storage_path=str(tmp_path), reuse_actors=True, verbose=0,
    )  # fmt: skip
    assert len(analysis.trials) == 6
    again = BilevelSearch(problem, seed=3, max_concurrent=1)
    fit(again, tmp_path / "again", 6)
    assert [t.unit for t in again.state.trainings] == [t.unit for t in search.state.trainings]


class Marking(Parabola):
    """Leaves a file in a folder wherever it is unpickled."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        (self.folder / str(os.getpid())).touch()


def test_a_process_for_the_first_step_starts_beside_the_first_training(tmp_path: Path) -> None:
    search = BilevelSearch(Marking(tmp_path), space=SPACE, metric="upper_loss", mode="min", max_concurrent=2)
    search.suggest("one")
    search.suggest("two")
    deadline = time.monotonic() + 60

    def elsewhere() -> list[str]:
        # In this process the checks of the problem copy it.
        return [path.name for path in tmp_path.iterdir() if path.name != str(os.getpid())]

    while not (found := elsewhere()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(found) == 1
    assert search.steps_under_way == 0


@pytest.mark.parametrize("start_of_a_process", [60.0, 0.0])
def test_a_step_is_waited_for_where_trainings_are_short(
    start_of_a_process: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else Tune would hear of the next training's end, and end one of two processes that are idle."""
    monkeypatch.setattr(pace, "WORKER_START_S", start_of_a_process)
    search = BilevelSearch(Parabola(), space=SPACE, metric="upper_loss", mode="min", max_concurrent=2)
    for trial in "ab":
        assert search.suggest(trial) is not None
    for number, trial in enumerate("ab"):
        found = {"upper_loss": 1.0 + number, "lower_loss": 0.5, "lower_gradient/x/a": 0.25, "lower_passes": 3.0}
        search.on_trial_complete(trial, {**found, "lower_level_finished": True, "time_total_s": 1.0})
        assert number > 0 or search.suggest("c") is not None
    assert search.steps_under_way == 1 and len(search.state.pending) == 1
    assert (search.suggest("d") is not None) == (start_of_a_process > 0)
    search.cancel_steps(timeout=10)


@pytest.mark.parametrize("seconds", [1.0, 60.0])
def test_a_process_that_short_trainings_leave_free_gets_another_point_at_once(seconds: float) -> None:
    """Else Tune would end it, and end those that it starts in its place when the next short training has ended."""
    search = BilevelSearch(Parabola(), space=SPACE, metric="upper_loss", mode="min", max_concurrent=4)
    for trial in "abcd":
        assert search.suggest(trial) is not None
    found = {"upper_loss": 1.0, "lower_loss": 0.5, "lower_gradient/x/a": 0.25, "lower_passes": 3.0}
    search.on_trial_complete("a", {**found, "lower_level_finished": True, "time_total_s": seconds})
    assert search.steps_under_way == 0
    assert (search.suggest("e") is not None) == (seconds < pace.WORKER_START_S)
    assert search.suggest("f") is None
    search.cancel_steps()


def test_failed_trainings_are_counted_and_the_search_goes_on(tmp_path: Path) -> None:
    search = BilevelSearch(Unlucky(limit=0.2), max_concurrent=2)
    results = fit(search, tmp_path, 9)
    failed = [t for t in search.state.trainings if t.status == "failed"]
    assert len(results.errors) == len(failed) > 0
    assert len(search.state.done) == 9 - len(failed)
    assert search.state.best is not None
    assert search.state.best.upper_loss < 0.2


def test_a_failed_trial_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    class Fragile(Parabola):
        """Its worker dies at the first third epoch of all."""

        epochs = 4

        def __init__(self, log: str) -> None:
            super().__init__()
            self.log, self.made_in = log, os.getpid()

        def batches(self, level: Any, generator: Any) -> Any:
            # A training pass; one in the process that made the problem is of its check.
            if generator is not None and os.getpid() != self.made_in:
                with open(self.log, "a") as file:
                    file.write("epoch\n")
                if Path(self.log).read_text().count("epoch") == 3:
                    os._exit(1)
            return super().batches(level, generator)

    log = tmp_path / "epochs"
    problem = Fragile(str(log))
    search = BilevelSearch(problem, max_concurrent=1)
    trainable = tune.with_resources(lower_level_trainable(problem, checkpoint_every=1), {"cpu": 1, "gpu": 0.5})
    analysis = tune.run(
        trainable, config=SPACE, search_alg=search, metric="upper_loss", mode="min", num_samples=1,
        storage_path=str(tmp_path), max_failures=1, verbose=0,
    )  # fmt: skip
    (trial,) = analysis.trials
    assert trial.status == "TERMINATED"
    assert trial.last_result["epoch"] == 4
    assert trial.last_result["gpus"] == "0"
    assert log.read_text().count("epoch") == 5  # the third one twice, the first two once
    assert [t.status for t in search.state.trainings] == ["done"]


class KillsAnIdleProcess(tune.Callback):
    """The process of the second training, when that has ended."""

    ended = 0

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.ended += 1
        if self.ended == 2:
            os.kill(trial.last_result["pid"], signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_dies_idle_costs_no_trial_where_trials_are_tried_again(tmp_path: Path) -> None:
    search = BilevelSearch(Parabola(), max_concurrent=1)
    analysis = tune.run(
        lower_level_trainable(search.problem), config=SPACE, search_alg=search, metric="upper_loss", mode="min",
        num_samples=4, max_failures=-1, reuse_actors=reuses_processes(TrainingResources(({"CPU": 1},)), {}, -1),
        storage_path=str(tmp_path), callbacks=[KillsAnIdleProcess()], raise_on_failed_trial=False, verbose=0,
    )  # fmt: skip
    assert [trial.status for trial in analysis.trials] == ["TERMINATED"] * 4
    assert len(search.state.done) == 4


def test_trials_that_a_scheduler_stops_are_no_lower_level_optima(tmp_path: Path) -> None:
    class Slow(Parabola):
        epochs = 6

        def optimizer(self, model: Any) -> Any:
            import torch

            return torch.optim.SGD(model.parameters(), lr=0.3)

    search = BilevelSearch(Slow(), max_concurrent=2)
    scheduler = ASHAScheduler(max_t=6, grace_period=1, reduction_factor=2)
    fit(search, tmp_path, 8, scheduler=scheduler)
    stopped = [t for t in search.state.trainings if t.status == "stopped"]
    assert stopped
    assert len(stopped) + len(search.state.done) == 8
    assert not any(t in search.state.done for t in stopped)


def test_steps_under_way_at_the_end_of_a_run_end_with_their_processes(tmp_path: Path) -> None:
    """An exception in them would leave processes broken that were just importing or filling a cache."""

    class Endless(Parabola):
        """Upper-level steps never end; the last of the first three trainings waits until one has begun."""

        epochs = 12  # long enough for hypergradients to pay

        def __init__(self, step: Path) -> None:
            super().__init__()
            self.step = step

        def lower_loss(self, model: Any, hyperparameters: Any, batch: Any) -> Any:
            deadline = time.monotonic() + 120
            while hyperparameters["x"]["a"] > 1 and not self.step.exists():
                assert time.monotonic() < deadline, "no upper-level step has begun"
                time.sleep(0.05)
            return super().lower_loss(model, hyperparameters, batch)

        def upper_loss(self, model: Any, batch: Any) -> Any:
            if torch.is_grad_enabled() and os.getpid() != driver:  # only a step differentiates F
                self.step.with_suffix(".tmp").write_text(str(os.getpid()))
                self.step.with_suffix(".tmp").rename(self.step)
                while True:
                    with suppress(KeyboardInterrupt):
                        time.sleep(60)
            return super().upper_loss(model, batch)

    driver, step = os.getpid(), tmp_path / "step"
    search = BilevelSearch(Endless(step), max_concurrent=2)
    fit(search, tmp_path, 3)
    assert len(search.state.done) == 3
    assert search.steps_under_way == 0
    assert ends(int(step.read_text()))


def test_a_run_whose_steps_all_fail_is_stopped_and_its_trainings_stay_good(tmp_path: Path) -> None:
    class Forbidding(Parabola):
        """Only a step differentiates F."""

        epochs = 12  # long enough for hypergradients to pay

        def upper_loss(self, model: Any, batch: Any) -> Any:
            if torch.is_grad_enabled() and os.getpid() != driver:
                raise RuntimeError("not here")
            return super().upper_loss(model, batch)

    driver = os.getpid()
    search = BilevelSearch(Forbidding(), max_concurrent=2)
    with pytest.raises(Exception, match="3 upper-level steps in a row failed") as caught:
        fit(search, tmp_path, 20)
    assert "not here" in str(caught.value) + str(caught.value.__cause__)
    assert 3 <= len(search.state.done) < 10
    assert not any(t.status == "failed" for t in search.state.trainings)
    assert not list(tmp_path.glob("run/*/error.txt"))


@dataclass(frozen=True)
class BrokenSteps(Default):
    """Steps that fail as soon as there is a file of their number."""

    folder: str = ""

    def run(self, problem: Any, space: Any, constants: Any, step: UpperStep, *rest: Any, **options: Any) -> Any:
        while not (Path(self.folder) / str(step.number)).exists():
            time.sleep(0.01)
        raise RuntimeError("not here")


def test_the_last_of_too_many_failed_steps_is_no_fault_of_the_trial_that_ends_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune would take an exception at a trial's end for one of the trial's, and go on."""
    monkeypatch.setattr(pace, "WORKER_START_S", 0.0)  # so that `suggest` waits for no step
    space: dict[str, Any] = {"space": SPACE, "metric": "upper_loss", "mode": "min"}
    search = BilevelSearch(Parabola(), method=BrokenSteps(folder=str(tmp_path)), max_concurrent=2, **space)
    found = {"upper_loss": 1.0, "lower_loss": 0.5, "lower_gradient/x/a": 0.25, "lower_passes": 3.0}

    def end(trial: str) -> None:
        if results := search._session.steps.dispatch.results:
            (tmp_path / str(len(search.state.steps))).touch()
            ray.wait(results, timeout=60)
        search.on_trial_complete(trial, {**found, "lower_level_finished": True})

    assert search.suggest("a") and search.suggest("b")
    end("a")
    assert search.suggest("c")
    end("b")  # begins a step, whose failure is heard at the end of c
    for trial, following in ("cd", "de", "ef"):
        assert search.steps_under_way == 1
        end(trial)
        assert sum(step.failed for step in search.state.steps) == "cde".index(trial) + 1
        if trial != "e":
            assert search.suggest(following) and search.suggest("waits") is None
    assert [t.status for t in search.state.trainings] == ["done"] * 5
    with pytest.raises(RaybilevelError, match="3 upper-level steps in a row failed"):
        search.suggest("f")


def test_a_step_that_cannot_begin_costs_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    search = BilevelSearch(Parabola(), space=SPACE, metric="upper_loss", mode="min", max_concurrent=1)
    found = {"upper_loss": 1.0, "lower_loss": 0.5, "lower_gradient/x/a": 0.25, "lower_passes": 3.0}

    def full(state: Any) -> Any:
        raise ray.exceptions.ObjectStoreFullError("for a moment")

    for trial in "abc":
        assert search.suggest(trial) is not None
        with monkeypatch.context() as patch:
            patch.setattr(search._session.steps.sent, "parts", full)
            search.on_trial_complete(trial, {**found, "lower_level_finished": True})
    assert [step.failed for step in search.state.steps] == [True]
    assert search.suggest("d") is not None
    assert search.state.trainings[-1].proposal.origin == "fill"


def train_without_checkpoints(search: BilevelSearch, count: int, folder: Path) -> None:
    """So many trainings, each the best one so far, whose checkpoints are said to be in the folder and are not."""
    found = {"lower_loss": 0.5, "lower_gradient/x/a": 0.25, "lower_passes": 3.0, "lower_level_finished": True}
    where = {"trial_path": str(folder), "checkpoint_dir_name": "none"}
    for number in range(count):
        while search.suggest(str(number)) is None:
            pass
        search.on_trial_complete(str(number), {**found, **where, "upper_loss": 1.0 / (1 + number)})


@dataclass(frozen=True)
class Unbearable(Default):
    """Steps that look for the hypergradient of the given trainings fail; those of others find one."""

    trainings: tuple[int, ...] = ()

    def run(self, problem: Any, space: Any, constants: Any, step: UpperStep, load: Any, memory: Any = None) -> Any:
        if set(step.targets) & set(self.trainings):
            raise RuntimeError("not this one")
        unit = (0.01 + 0.9 * ((0.37 * step.number) % 1.0),)
        record = StepRecord(step.number, step.centre, 1.0)
        return UpperResult(record, Proposal(unit, step.origin, step.region), dict.fromkeys(step.targets, (0.1,)))


@pytest.mark.parametrize(("trainings", "ends"), [((2,), False), (tuple(range(40)), True)], ids=["one", "all"])
def test_a_training_at_which_steps_fail_is_left_out_and_many_end_the_search(
    trainings: tuple[int, ...], ends: bool, tmp_path: Path
) -> None:
    method = Unbearable(trainings=trainings)
    search = BilevelSearch(Parabola(), space=SPACE, metric="upper_loss", mode="min", max_concurrent=1, method=method)
    with pytest.raises(RaybilevelError, match="in a row failed") if ends else nullcontext():
        train_without_checkpoints(search, 14, tmp_path)
    failed = sum(step.failed for step in search.state.steps)
    assert failed == 3 if ends else 1 <= failed <= 2
    assert ends or len(search.state.done) == 14
    search.cancel_steps()


def test_checkpoints_that_no_step_can_read_end_the_search(tmp_path: Path) -> None:
    """One is left out; where there is none at all, the storage is not what steps think it is."""
    search = BilevelSearch(Parabola(), space=SPACE, metric="upper_loss", mode="min", max_concurrent=1)
    with pytest.raises(RaybilevelError, match=r"found no checkpoint.*every node must see"):
        train_without_checkpoints(search, 40, tmp_path)
    assert len(search.state.done) < 12 and not any(step.failed for step in search.state.steps)
    search.cancel_steps()


@pytest.mark.slow
def test_trainings_and_steps_share_the_only_gpu(tmp_path: Path) -> None:
    """A training that holds all of it would keep it until the next one is known, which waits for a step."""

    class OnGpu(Parabola):
        device = "cuda"

    plan = resolve(read_config(CONFIGS / "digits.yaml", ["resources.lower={cpu: 1, gpu: 1}"]))
    assert with_room_for_steps(plan) is plan  # whose steps need no GPU
    shared = with_room_for_steps(replace(plan, problem=OnGpu()))
    search = BilevelSearch(Parabola(), max_concurrent=1, upper_resources=shared.step)
    analysis = tune.run(
        tune.with_resources(lower_level_trainable(search.problem), for_tune(shared.training)), config=SPACE,
        search_alg=search, metric="upper_loss", mode="min", num_samples=5, storage_path=str(tmp_path), verbose=0,
    )  # fmt: skip
    assert [trial.last_result["gpus"] for trial in analysis.trials] == ["0"] * 5
    assert len(search.state.done) == 5
    assert len(search.state.steps) >= 2


@pytest.fixture
def impatient_tune(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Tune warns of too few resources after half a second without a trial, not after a minute."""
    monkeypatch.setattr(insufficient_resources_manager, "_get_insufficient_resources_warning_threshold", lambda: 0.5)
    logger = insufficient_resources_manager.logger
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("impatient_tune")
def test_steps_have_the_only_gpu_when_no_training_has_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    search = BilevelSearch(Parabola(), max_concurrent=1, upper_resources={"gpu": 1})
    analysis = tune.run(
        tune.with_resources(lower_level_trainable(search.problem), {"cpu": 1, "gpu": 1}), config=SPACE,
        search_alg=search, metric="upper_loss", mode="min", num_samples=5, storage_path=str(tmp_path), verbose=0,
    )  # fmt: skip
    assert len(analysis.trials) == len(search.state.done) == 5
    assert len(search.state.steps) >= 2
    assert "not having enough resources" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("vectors", [31, 60])
def test_steps_keep_to_the_memory_that_they_ask_of_ray(vectors: int, tmp_path: Path) -> None:
    problem = Means((0.1, 0.2))
    search = BilevelSearch(problem, max_concurrent=1, upper_resources={"memory": vectors * 2 * 8})
    space = {"mean": {"m0": tune.uniform(-2, 2), "m1": tune.uniform(-2, 2)}}
    fit(search, tmp_path, 5, space)
    assert any(training.hypergradient for training in search.state.done) == (vectors == 60)


@pytest.mark.usefixtures("impatient_tune")
def test_tune_warns_of_a_training_that_asks_for_more_than_there_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = BilevelSearch(Parabola(), max_concurrent=1)
    tune.run(
        tune.with_resources(lower_level_trainable(search.problem), {"cpu": 1000}), config=SPACE, search_alg=search,
        metric="upper_loss", mode="min", time_budget_s=3, storage_path=str(tmp_path), verbose=0,
    )  # fmt: skip
    assert "not having enough resources" in caplog.text


def test_where_a_moved_experiment_is_a_training_says_before_the_next_step(tmp_path: Path) -> None:
    search = BilevelSearch(Parabola(), max_concurrent=1)
    fit(search, tmp_path / "before", 3)
    search.save(str(tmp_path / "state"))
    there, moved = BilevelSearch(Parabola(), max_concurrent=1), BilevelSearch(Parabola(), max_concurrent=1)
    there.restore(str(tmp_path / "state"))
    there.suggest("next")
    there.cancel_steps()
    assert not any(training.proposal.origin == "fill" for training in there.state.trainings)
    (tmp_path / "before").rename(tmp_path / "after")
    moved.restore(str(tmp_path / "state"))
    assert moved.suggest("next") is not None
    assert not moved.steps_under_way
    assert moved.state.trainings[3].proposal.origin == "fill"
    paths = [moved.checkpoint_of(training) for training in moved.state.done]
    assert all(path is not None and path.startswith(str(tmp_path / "before")) for path in paths)
    moved.on_trial_result("next", {"trial_path": str(tmp_path / "after" / "run" / "next")})
    paths = [moved.checkpoint_of(training) for training in moved.state.done]
    assert all(path is not None and Path(path).is_dir() for path in paths)


def test_tune_limits_the_number_of_trials_at_once(tmp_path: Path) -> None:
    search = BilevelSearch(Parabola())
    results = fit(search, tmp_path, 6, max_concurrent_trials=1)
    assert len(results) == 6
    assert search.state.best is not None
    problem = Parabola()
    limited = ConcurrencyLimiter(BilevelSearch(problem, metric="upper_loss", mode="min"), max_concurrent=1)
    analysis = tune.run(
        lower_level_trainable(problem), config=SPACE, search_alg=limited, num_samples=5,
        storage_path=str(tmp_path / "limited"), reuse_actors=True, verbose=0,
    )  # fmt: skip
    assert len(analysis.trials) == 5


def test_suggest_answers_quickly_while_trials_are_live(tmp_path: Path) -> None:
    search = BilevelSearch(Parabola(), max_concurrent=2)
    times: list[tuple[bool, float]] = []
    inner = search.suggest

    def timed(trial_id: str) -> Any:
        live = bool(search.state.pending)
        start = time.process_time()
        answer = inner(trial_id)
        times.append((live, time.process_time() - start))
        return answer

    search.suggest = timed  # type: ignore[method-assign]
    problem = search.problem
    tune.run(
        lower_level_trainable(problem), config=SPACE, search_alg=search, metric="upper_loss", mode="min",
        num_samples=7, storage_path=str(tmp_path), reuse_actors=True, verbose=0,
    )  # fmt: skip
    live = sorted(seconds for was_live, seconds in times if was_live)
    # CPU time of the driver, so that other load does not count: models are fitted and descents run in tasks.
    assert live
    assert live[len(live) // 2] < 0.05


def test_maximising_a_metric_flips_it_once(tmp_path: Path) -> None:
    search = BilevelSearch(Parabola(), max_concurrent=1)
    results = fit(search, tmp_path, 8, metric="score", mode="max")
    best = results.get_best_result()
    # score = -|log10 x|, largest at x = 1
    assert best.metrics["score"] == pytest.approx(0, abs=0.2)
    assert search.state.best is not None
    assert search.state.best.upper_loss == pytest.approx(-best.metrics["score"])


def test_points_to_evaluate_come_first(tmp_path: Path) -> None:
    points = [{"x": {"a": 0.05}}, {"x": {"a": 20.0}}]
    search = BilevelSearch(Parabola(), points_to_evaluate=points, max_concurrent=1)
    results = fit(search, tmp_path, 3)
    tried = sorted(result.config["x"]["a"] for result in results)
    assert tried[0] == pytest.approx(0.05)
    assert tried[-1] == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"x": {"a": tune.choice([1])}}, "x/a.*choice"),
        ({"x": {"a": tune.randint(1, 2)}}, "x/a.*below"),
        ({"x": {"a": tune.uniform(2.0, 1.0)}}, "x/a.*below"),
        ({"x": {"a": 1.0}}, "no hyperparameter"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_before_any_training(space: Any, words: str, tmp_path: Path) -> None:
    search = BilevelSearch(Parabola())
    with pytest.raises(Exception, match=words) as caught:
        fit(search, tmp_path, 2, space)
    assert isinstance(caught.value, SpaceError) or isinstance(caught.value.__cause__, SpaceError)
    assert not search.state.trainings


def test_a_hyperparameter_without_effect_is_refused_before_any_training(tmp_path: Path) -> None:
    space = {"x": {"a": tune.loguniform(1e-4, 1e2), "b": tune.uniform(0, 1)}}
    search = BilevelSearch(Parabola())
    with pytest.raises(Exception, match=r"x/b: nothing in .* reads it") as caught:
        fit(search, tmp_path, 2, space)
    assert isinstance(caught.value, ProblemError) or isinstance(caught.value.__cause__, ProblemError)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="expected a BilevelProblem"):
        BilevelSearch(Parabola)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown method 'asha'"):
        BilevelSearch(Parabola(), method="asha")
    with pytest.raises(ConfigError, match="max_concurrent"):
        BilevelSearch(Parabola(), max_concurrent=0)
    with pytest.raises(ConfigError, match="mode='max'"):
        BilevelSearch(Parabola(), space=SPACE, metric="upper_loss", mode="max")
    with pytest.raises(SpaceError, match=r"points_to_evaluate\[0\].*x/c"):
        BilevelSearch(Parabola(), space=SPACE, points_to_evaluate=[{"x": {"a": 1.0, "c": 2.0}}])
    with pytest.raises(ProblemError, match="pass an instance"):
        lower_level_trainable(Parabola)  # type: ignore[arg-type]


def test_an_interrupted_experiment_is_restored_to_exactly_its_samples(tmp_path: Path) -> None:
    """The whole driver is killed in the middle, and `Tuner.restore` in a new one ends with every sample, once."""
    script = Path(__file__).parent / "killed_driver.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.Popen([sys.executable, str(script), str(tmp_path), "9"], env=environment)
    state = tmp_path / "run"
    deadline = time.monotonic() + 120
    while first.poll() is None and time.monotonic() < deadline and len(list(state.glob("lower_level_*"))) < 6:
        time.sleep(0.1)
    assert first.poll() is None, "the driver ended before it could be killed"
    first.kill()
    first.wait()
    prepare_resume(local_filesystem(), str(state))
    restored = tune.Tuner.restore(
        str(state), trainable=lower_level_trainable(Parabola()), storage_filesystem=local_filesystem()
    )
    results = restored.fit()
    assert len(results) == 9
    assert not results.errors
    configs = [result.config["x"]["a"] for result in results]
    assert len(set(configs)) == 9
    assert min(result.metrics["upper_loss"] for result in results) < 1e-2


class Pairs(Searcher):
    """Has no trial until both of the last pair have ended, and a moment more."""

    def __init__(self) -> None:
        super().__init__(metric="seconds", mode="min")
        self.asked = self.ended = 0
        self.since = 0.0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self.asked - self.asked % 2 > self.ended or time.monotonic() - self.since < 0.5:
            return None
        self.asked += 1
        return {"pair": (self.asked - 1) // 2}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.ended += 1
        self.since = time.monotonic()

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("idle_timeout_s", "processes"), [(WORKER_START_S, 2), (0.0, 4)])
def test_processes_outlive_a_search_that_thinks(idle_timeout_s: float, processes: int, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()

    def with_the_other(config: dict[str, Any]) -> dict[str, float]:
        (beside / f"{config['pair']} {os.getpid()}").touch()
        while len(list(beside.glob(f"{config['pair']} *"))) < 2:
            time.sleep(0.05)
        return {"seconds": 0.0}

    with waiting_trials(2):
        results = tune.run(
            with_the_other, search_alg=Pairs(), num_samples=6, scheduler=PatientFIFO(idle_timeout_s), reuse_actors=True,
            storage_path=str(tmp_path), verbose=0,
        )  # fmt: skip
    assert len({trial.last_result["pid"] for trial in results.trials}) == processes


def test_choices_and_whole_numbers_reach_trials_and_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    space = {
        "a": tune.uniform(-1, 1),
        "b": tune.uniform(-1, 1),
        "kind": tune.choice(["high", "low", "middle"]),
        "decay": tune.loguniform(1e-3, 1),
        "layers": tune.randint(1, 6),
        "rate": tune.loguniform(1e-4, 1),
    }
    search = BilevelSearch(Mixed())
    tuner = tune.Tuner(
        lower_level_trainable(Mixed()),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search, metric="upper_loss", mode="min", num_samples=7, reuse_actors=True
        ),
        run_config=tune.RunConfig(verbose=0, storage_path=str(tmp_path)),
    )
    results = tuner.fit()
    assert not results.errors and len(search.state.done) == 7
    for training in search.state.done:
        config = search.config_of(training)
        assert config["kind"] in SHIFTS and type(config["layers"]) is int and 1 <= config["layers"] <= 5
    known = [training.hypergradient for training in search.state.done if training.hypergradient]
    assert known and all(
        [math.isnan(entry) for entry in found] == [False, False, True, False, True, True] for found in known
    )
    assert "with gradients: a, b, decay; by values: kind, layers, rate" in caplog.text
