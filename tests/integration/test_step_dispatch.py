"""Upper-level steps in real processes of their own: kept, lost, hanging, cancelled."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from raybilevel._cluster import step_dispatch
from raybilevel._cluster.sent_state import BLOCK_SIZES, SentState
from raybilevel._cluster.shared import Shared
from raybilevel._cluster.step_call import SharedBySteps, StepCall
from raybilevel._cluster.step_dispatch import NO_RESOURCES, StepDispatch
from raybilevel._cluster.step_worker import MAX_RETRIES
from raybilevel.errors import StepError
from raybilevel.methods._base import UpperResult, UpperStep
from raybilevel.methods._default import Default
from raybilevel.search_state import Proposal, SearchState, StepRecord
from raybilevel.space import STARTS
from tests.cluster.faulty_problems import enter
from tests.processes import ends
from tests.tiny_problems import Parabola

pytestmark = pytest.mark.usefixtures("local_ray")


class TwoWordsError(Exception):
    """Pickles, and cannot be unpickled: its arguments are no longer two."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


@dataclass(frozen=True)
class Deeds(Default):
    """A step does what the hyperparameter constant of its number says, in its first so many tries; then it reports
    where it ran, and the state that it was sent."""

    folder: str = ""

    def run(self, problem: Any, space: Any, constants: Any, step: UpperStep, load: Any, memory: Any = None) -> Any:
        tried = enter(self.folder, f"try of {step.number}")
        deed, times = constants.get(step.number, ("", 0))
        if tried < times:
            match deed:
                case "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hangs":
                    time.sleep(600)
                case "raises":
                    raise RuntimeError("on purpose")
                case "raises what does not unpickle":
                    raise TwoWordsError("on", "purpose")
        while deed == "waits" and not Path(self.folder, "go").exists():
            time.sleep(0.05)
        return UpperResult(
            StepRecord(step.number, 0, float(os.getpid())), None, memory=pickle.dumps((step.state, problem))
        )


class Steps:
    """Steps of one dispatch, with `Deeds`."""

    def __init__(self, folder: Path, deeds: dict[Any, tuple[str, int]]) -> None:
        self.folder = folder
        self.dispatch, self.sent = StepDispatch(), SentState(ray.put)
        method = Deeds(folder=str(folder))
        self.shared = ray.put(SharedBySteps(Shared(Parabola()), STARTS, deeds, method, None))

    def begin(
        self, number: int, state: SearchState | None = None, limit: float | None = None, options: Any = NO_RESOURCES
    ) -> None:
        newest, blocks = self.sent.parts(state or SearchState())
        self.dispatch.begin(
            options, StepCall(UpperStep(number, "fill", 0, newest, 0), {}, None, limit), self.shared, blocks
        )

    def end(self, count: int = 1) -> dict[int, UpperResult | Exception]:
        """What the next so many steps came to."""
        found: dict[int, UpperResult | Exception] = {}
        deadline = time.monotonic() + 240
        while len(found) < count:
            assert time.monotonic() < deadline
            found.update(self.dispatch.ended(timeout=5))
        return found

    def process(self, number: int, **options: Any) -> int:
        """Of one step from its begin to its end."""
        self.begin(number, **options)
        return where(self.end()[number])

    def tries(self, number: int) -> int:
        return len(list(self.folder.glob(f"try of {number} *")))


def where(found: UpperResult | Exception) -> int:
    assert isinstance(found, UpperResult), found
    return int(found.record.passes)


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Steps]:
    deeds = {
        2: ("raises", 9),
        4: ("dies", 1),
        6: ("dies", 9),
        8: ("hangs", 1),
        10: ("raises what does not unpickle", 9),
        **dict.fromkeys((11, 12, 13), ("waits", 0)),
    }
    steps = Steps(tmp_path, deeds)
    yield steps
    steps.dispatch.cancel()


def test_one_step_after_the_other_runs_in_one_process(steps: Steps) -> None:
    process = steps.process(1)
    steps.begin(2)
    failure = steps.end()[2]
    assert isinstance(failure, StepError) and "RuntimeError: on purpose" in str(failure)
    assert steps.tries(2) == 1
    assert steps.process(3) == process != os.getpid()
    time.sleep(3)  # Ray ends the processes of tasks that are idle for a second
    assert steps.process(5) == process
    assert len(steps.dispatch) == 0


def test_an_exception_that_does_not_survive_the_way_is_that_of_the_step_all_the_same(steps: Steps) -> None:
    """And no process that was lost, whose step would be tried again."""
    process = steps.process(1)
    steps.begin(10)
    failure = steps.end()[10]
    assert isinstance(failure, StepError) and "TwoWordsError: on purpose" in str(failure)
    assert steps.tries(10) == 1
    assert steps.process(3) == process


def test_steps_do_not_wait_behind_one_that_takes_much_longer_than_others(steps: Steps, tmp_path: Path) -> None:
    now = 0.0
    steps.dispatch = StepDispatch(clock=lambda: now)
    process = steps.process(1)
    steps.begin(11)
    steps.begin(3)
    now = 3.5
    assert not steps.dispatch.ended() and len(steps.dispatch.results) == 1
    now = 4.5  # as long as a process's start
    assert where(steps.end()[3]) != process
    (tmp_path / "go").touch()
    assert where(steps.end()[11]) == process


def test_a_step_whose_process_dies_is_tried_again_in_another(steps: Steps) -> None:
    process = steps.process(1)
    after = steps.process(4)
    assert after != process and steps.tries(4) == 2
    steps.begin(6)
    failure = steps.end()[6]
    assert isinstance(failure, ray.exceptions.RayError) and not isinstance(failure, ray.exceptions.RayTaskError)
    assert steps.tries(6) == 1 + MAX_RETRIES
    assert steps.process(7) not in (process, after)  # and the next one runs as if nothing had been


def test_a_step_that_cannot_begin_fails_and_no_other_one(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> Any:
        raise ray.exceptions.ObjectStoreFullError("full")

    with monkeypatch.context() as patch:
        patch.setattr(steps.dispatch, "_start", start)
        steps.begin(1)
        assert len(steps.dispatch) == 1
    steps.begin(3)
    found = steps.end(2)
    assert isinstance(found[1], ray.exceptions.ObjectStoreFullError)
    assert where(found[3])
    assert len(steps.dispatch) == 0


def test_a_step_that_hangs_is_ended_at_its_limit_and_tried_again(steps: Steps) -> None:
    process = steps.process(1, limit=60.0)
    assert steps.process(8, limit=1.0) != process
    assert steps.tries(8) == 2


def test_steps_wait_for_a_process_where_that_is_sooner_than_another_one(steps: Steps) -> None:
    process = steps.process(1)
    for number in (3, 5, 7):
        steps.begin(number)
    assert len(steps.dispatch) == 3 and len(steps.dispatch.results) == 1
    found = steps.end(3)
    assert list(found) == [3, 5, 7]
    assert {where(one) for one in found.values()} == {process}


def test_a_step_that_would_wait_for_long_has_a_process_of_its_own(steps: Steps, tmp_path: Path) -> None:
    """Of those that wait for a step whose length nobody knows yet, once it has taken as long as two processes' starts
    and half of what the waiting may take."""
    now = 0.0
    steps.dispatch = StepDispatch(clock=lambda: now)
    steps.begin(11)
    steps.begin(12)
    now = 9.9
    assert not steps.dispatch.ended() and len(steps.dispatch.results) == 1
    now = 10.1
    assert not steps.dispatch.ended() and len(steps.dispatch.results) == 2
    (tmp_path / "go").touch()
    assert len({where(found) for found in steps.end(2).values()}) == 2


def test_of_many_processes_some_stay(steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_dispatch, "MAX_IDLE_WORKERS", 1)
    monkeypatch.setattr(step_dispatch, "WORKER_START_S", 0.0)
    steps.begin(11)
    steps.begin(12)
    assert not steps.dispatch.ended() and len(steps.dispatch.results) == 2
    (tmp_path / "go").touch()
    kept, ended = (where(found) for found in steps.end(2).values())
    assert ends(ended)
    assert steps.process(14) == kept


def test_processes_that_were_lost_while_idle_cost_a_step_no_more_than_one_try(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(step_dispatch, "WORKER_START_S", 0.0)
        for number in (11, 12, 13):
            steps.begin(number)
    (tmp_path / "go").touch()
    lost = {where(found) for found in steps.end(3).values()}
    assert len(lost) == 3
    for process in lost:
        os.kill(process, signal.SIGKILL)
    monkeypatch.setattr(step_dispatch, "MAX_RETRIES", 1)
    assert steps.process(14) not in lost


def test_a_process_that_has_no_step_ends_by_itself(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_dispatch, "WORKER_IDLE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(step_dispatch, "DELIVERY_GRACE_S", 1.0)
    steps.begin(11)
    time.sleep(4)  # one that has a step does not
    (tmp_path / "go").touch()
    process = where(steps.end()[11])
    assert ends(process)
    assert steps.process(14) != process
    assert steps.tries(11) == steps.tries(14) == 1


def test_cancelled_steps_and_idle_processes_end(steps: Steps) -> None:
    first = steps.process(1)
    steps.begin(11)
    steps.begin(12, options={"num_cpus": 0.5})
    steps.begin(3)  # waits
    while not (steps.tries(11) and steps.tries(12)):
        time.sleep(0.05)
    results = steps.dispatch.results
    steps.dispatch.cancel(timeout=60)
    assert ends(first)
    assert len(steps.dispatch) == 0 and not steps.dispatch.ended()
    for result in results:
        with pytest.raises(ray.exceptions.RayError):
            ray.get(result, timeout=60)
    assert steps.process(14) != first


@pytest.mark.parametrize("options", [NO_RESOURCES, {"num_cpus": 1}], ids=["process", "task"])
def test_every_step_has_the_whole_state_and_the_problem(steps: Steps, options: Any) -> None:
    """Also in a process that takes another's place and knows nothing of the blocks that were sent before."""
    state, process = SearchState(), 0
    for number in (20, 21, 22):
        for _ in range(BLOCK_SIZES[-1] + 5):
            state = state.add(Proposal((0.5,), "fill"))
            index = len(state.trainings) - 1
            state = state.change(index, status="done", lower_loss=1.0, upper_loss=float(number), finished=index)
        state = state.after(StepRecord(number, 0, 1.0))
        if number == 22 and options == NO_RESOURCES:
            os.kill(process, signal.SIGKILL)
        steps.begin(number, state, options=options)
        found = steps.end()[number]
        process = where(found)
        assert isinstance(found, UpperResult) and found.memory is not None
        received, problem = pickle.loads(found.memory)
        assert received.trainings == state.trainings and received.steps == state.steps
        assert isinstance(problem, Parabola)
