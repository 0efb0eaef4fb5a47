"""Each change of Tune takes effect while a run lasts, and no longer. No cluster is needed for it."""

from __future__ import annotations

import dataclasses
import gc
import logging
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution.insufficient_resources_manager import logger as resource_logger
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from raybilevel._tune_changes import run as run_module
from raybilevel._tune_changes.actor_errors import ACTOR_ERRORS
from raybilevel._tune_changes.applied import CHANGES, tune_changes
from raybilevel._tune_changes.change import MethodChange
from raybilevel._tune_changes.default_result import DEFAULT_RESULT
from raybilevel._tune_changes.idle_actors import IDLE_ACTORS
from raybilevel._tune_changes.run import TuneRun, tune_run
from raybilevel._tune_changes.run_end import RUN_END, at_end
from raybilevel._tune_changes.signal_handlers import restored_signal_handlers
from raybilevel._tune_changes.trial_queue import TRIAL_QUEUE

ROOT = Path(__file__).parents[2]


class Controller(TuneController):  # type: ignore[misc]
    """Tune's controller without anything to control; its search never has a trial."""

    def __init__(self, *statuses: str) -> None:
        self._live_trials = {trial_of(status) for status in statuses}
        self._trials = list(self._live_trials)
        self.questions = 0
        self.run: TuneRun | None = None
        self._search_alg = SimpleNamespace(next_trial=self.ask)
        self.did: list[str] = []

    def ask(self) -> None:
        self.questions += 1
        self.run = tune_run()

    def is_finished(self) -> bool:
        return False

    def _cleanup_trials(self) -> None:
        self.did.append("trials")

    def end_experiment_callbacks(self) -> None:
        self.did.append("callbacks")


def trial_of(status: str) -> Trial:
    trial = Trial("none", stub=True)
    trial.status = status
    return trial


def methods() -> list[Any]:
    """The upstream methods as they are now."""
    found = [change.upstream() for change in CHANGES]
    assert None not in found
    return [method for _, method in found if method]  # type: ignore[misc]


def questions_without_a_trial(monkeypatch: pytest.MonkeyPatch) -> int:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", sleep)
        patch.setattr(time, "time", lambda: now)
        controller = Controller()
        controller._search_alg.next_trial = lambda: setattr(controller, "questions", controller.questions + 1)
        assert not TuneController._update_trial_queue(controller, blocking=True, timeout=3)
    assert now >= 1  # which keeps the loop from spinning
    return controller.questions


def error_of_a_trial_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    told: list[Exception] = []
    actor = SimpleNamespace(actor_id=1, _on_error=None)
    task = SimpleNamespace(_tracked_actor=actor, _on_error=lambda actor, error: told.append(error))
    manager = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    try:
        RayActorManager._actor_task_failed(manager, task, OutOfMemoryError("killed"))
    except RuntimeError as error:
        return type(error)
    assert "OutOfMemoryError" in str(told[0])
    return type(told[0])


def result_of_a_trial_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    def killed(reference: Any) -> Any:
        raise OutOfMemoryError("killed")

    trial = trial_of(Trial.ERROR)
    trial._default_result_or_future = ray.ObjectRef.nil()
    with monkeypatch.context() as patch:
        patch.setattr(ray, "get", killed)
        try:
            result = trial._get_default_result_or_future()
        except OutOfMemoryError as error:
            return type(error)
    assert trial.last_result == {"trial_id": trial.trial_id}
    return result


def what_is_done_at_the_end(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    controller = Controller()
    at_end[controller] = lambda: controller.did.append("end")
    controller.cleanup()
    return controller.did


EFFECTS: list[tuple[MethodChange, Callable[[pytest.MonkeyPatch], Any], Any, Any]] = [
    (TRIAL_QUEUE, questions_without_a_trial, 4, 1),
    (ACTOR_ERRORS, error_of_a_trial_out_of_memory, RuntimeError, RayActorError),
    (DEFAULT_RESULT, result_of_a_trial_out_of_memory, OutOfMemoryError, None),
    (RUN_END, what_is_done_at_the_end, ["trials", "callbacks"], ["trials", "callbacks", "end"]),
]


@pytest.mark.parametrize(
    ("change", "observe", "upstream", "changed"), EFFECTS, ids=lambda value: getattr(value, "name", "")
)
def test_each_change_takes_effect_and_is_undone(
    change: MethodChange,
    observe: Callable[[pytest.MonkeyPatch], Any],
    upstream: Any,
    changed: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert observe(monkeypatch) == upstream
    with tune_changes():
        assert observe(monkeypatch) == changed
    assert observe(monkeypatch) == upstream


def test_every_change_has_its_effect_tested_and_is_logged_by_name(caplog: pytest.LogCaptureFixture) -> None:
    assert {change.name for change, *_ in EFFECTS} == {change.name for change in CHANGES}
    with caplog.at_level(logging.DEBUG, logger="raybilevel"), tune_changes():
        pass
    assert [record.getMessage() for record in caplog.records] == [
        f"changed Ray Tune: {change.name} ({change.target})" for change in CHANGES
    ]


def test_overlapping_blocks_are_undone_by_the_last_in_any_order_and_thread() -> None:
    upstream = methods()
    first, second = ExitStack(), ExitStack()
    first.enter_context(tune_changes())
    changed = methods()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(second.enter_context, tune_changes()).result()
        assert methods() == changed != upstream  # once, not on top of each other
        first.close()
        assert methods() == changed
        thread.submit(second.close).result()
    assert methods() == upstream


@pytest.mark.parametrize(
    "gone", [{"attribute": "no_more"}, {"owner": "NoMore"}, {"module": "ray.no_more"}, {"parameters": ("self", "more")}]
)
def test_a_missing_target_is_reported_with_versions(gone: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    change = dataclasses.replace(TRIAL_QUEUE, **gone)
    upstream = methods()
    with change.applied():
        assert methods() == upstream
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for words in (change.name, change.target, ray.__version__, *change.versions, change.source, change.without):
        assert words in record.getMessage()


def test_a_run_changes_tune_from_its_first_suggestion_to_its_end() -> None:
    upstream = methods()
    controller = Controller()
    controller._update_trial_queue()
    assert controller.run is not None
    changed = methods()
    assert all(ours is not theirs for ours, theirs in zip(changed, upstream, strict=True))
    run = controller.run
    controller._update_trial_queue()
    assert controller.run is run
    another = Controller()
    another._update_trial_queue()
    controller.cleanup()
    assert methods() == changed
    another.cleanup()
    assert methods() == upstream


def test_a_run_without_cleanup_changes_tune_until_it_is_garbage_collected() -> None:
    upstream = methods()
    controller = Controller()
    controller._update_trial_queue()
    assert methods() != upstream
    del controller
    gc.collect()
    assert methods() == upstream


def test_a_failure_at_the_end_of_a_run_leaves_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = methods()
    controller = Controller()
    controller._update_trial_queue()

    def fail() -> None:
        raise RuntimeError("a callback failed")

    monkeypatch.setattr(controller, "end_experiment_callbacks", fail)
    with pytest.raises(RuntimeError, match="a callback failed"):
        controller.cleanup()
    assert methods() == upstream


def test_a_searcher_outside_a_run_changes_nothing() -> None:
    upstream = methods()
    assert tune_run() is None
    assert methods() == upstream


def test_nothing_is_changed_if_the_end_of_a_run_would_go_unnoticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_module, "RUN_END", dataclasses.replace(RUN_END, attribute="no_more"))
    run_module._controller_class.cache_clear()
    controller = Controller()
    controller._update_trial_queue()
    controller._update_trial_queue()
    run_module._controller_class.cache_clear()
    assert controller.run is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "a searcher changes nothing of Tune" in caplog.text


@pytest.mark.parametrize("live", [Trial.PENDING, Trial.RUNNING, Trial.PAUSED])
def test_a_run_is_idle_without_a_live_trial(live: str) -> None:
    for controller, idle in ((Controller(Trial.ERROR), True), (Controller(Trial.ERROR, live), False)):
        controller._update_trial_queue()
        assert controller.run is not None
        assert controller.run.idle is idle
        controller.cleanup()


def test_failed_trials_have_settled_results_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune's result grid asks for them when the changes are undone."""
    controller = Controller(Trial.ERROR)
    controller._trials[0]._default_result_or_future = ray.ObjectRef.nil()
    controller._update_trial_queue()
    with monkeypatch.context() as patch:
        patch.setattr(ray, "get", lambda reference: (_ for _ in ()).throw(OutOfMemoryError("killed")))
        controller.cleanup()
        assert controller._trials[0].last_result == {"trial_id": controller._trials[0].trial_id}


@pytest.mark.parametrize(("status", "warnings"), [(Trial.PENDING, 1), (Trial.RUNNING, 0)])
def test_tune_warns_of_too_few_resources_only_with_a_pending_trial(
    status: str, warnings: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource_logger, "handlers", [caplog.handler])
    monkeypatch.setattr(resource_logger, "propagate", False)
    controller = Controller(status)
    controller._update_trial_queue()
    resource_logger.warning("few resources")
    controller.cleanup()
    assert len(caplog.records) == warnings
    resource_logger.warning("few resources")
    assert len(caplog.records) == warnings + 1


def test_signal_handlers_are_restored() -> None:
    def of_a_run(number: int, frame: Any) -> None: ...

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    with restored_signal_handlers():
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, of_a_run)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)] == before

    def in_a_thread() -> None:  # where Python lets nobody set a handler
        with restored_signal_handlers():
            pass

    with ThreadPoolExecutor(1) as thread:
        thread.submit(in_a_thread).result()


def test_documents_state_the_tested_versions() -> None:
    (versions,) = {change.versions for change in (*CHANGES, IDLE_ACTORS)}
    (default,) = re.findall(r"^VERSIONS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tuple(default.split()) == versions
    limits = (ROOT / "docs" / "explanation" / "limits.md").read_text()
    assert all(f"| {version} |" in limits for version in versions)
    assert f"ray=={versions[-1]}\n" in (ROOT / "constraints.txt").read_text()
