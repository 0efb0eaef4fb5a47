"""When failed trainings end a search: they have one cause, it is of the problem, and none has succeeded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raybilevel.tune._failures import FailedTrainings, cause_of

TRACEBACK = """Failure # 1 (occurred at 2025-01-01_00-00-00)
\x1b[36mray::ImplicitFunc.train()\x1b[39m (pid=1234, ip=127.0.0.1)
  File "/site-packages/ray/tune/trainable.py", line 331, in train
    raise skipped from exception_cause(skipped)
  File "/work/problem.py", line 12, in evaluate
    return {{"accuracy": self.labels[{row}]}}
           ~~~~~~~~~~~^^^
{cause}

Further words.
"""


def failing(folder: Path, *causes: str | None) -> list[str | None]:
    """What is said after each of some failures; None stands for an error whose file is not known."""
    failures, said = FailedTrainings(), []
    files = {}
    for number, cause in enumerate(causes):
        trial = f"t{number}"
        if cause is not None:
            files[trial] = folder / trial
            files[trial].write_text(TRACEBACK.format(row=number, cause=cause))
        failures.failed(trial)
        error = failures.always(lambda trial: str(files[trial]) if trial in files else None)
        said.append(None if error is None else str(error))
    return said


def test_three_failures_with_one_cause_end_the_search_in_one_line(tmp_path: Path) -> None:
    *before, said = failing(tmp_path, *(f"IndexError: index {row} is out of bounds" for row in (7, 8, 9)))
    assert before == [None, None]
    assert said is not None and "\n" not in said
    assert said.startswith("the first 3 trainings failed alike, and none succeeded: IndexError: index 9 is out of")
    assert said.endswith(f"(all of it: {tmp_path / 't2'})")


def test_what_trials_report_may_be_the_cause() -> None:
    failures = FailedTrainings()
    for number in range(3):
        assert failures.always(lambda trial: None) is None
        failures.failed(f"t{number}", f"reported upper_loss = [{number}, 0.5]; report a number.")
    assert str(failures.always(lambda trial: None)) == (
        "the first 3 trainings failed alike, and none succeeded: reported upper_loss = [2, 0.5]; report a number."
    )


def test_causes_that_differ_by_a_number_in_any_notation_are_one(tmp_path: Path) -> None:
    values = ("0.0316 of <Model at 0x7f8e4c00ab>", "3.16e-05 of <Model at 0x7fa1>", "-2 of <Model at 0xbeef>")
    said = failing(tmp_path, *(f"ValueError: decay is {value}" for value in values))
    assert said[-1] is not None and said[-1].startswith("the first 3 trainings failed alike")


DIED = """Failure # 1 (occurred at 2025-01-01_00-00-00)
The actor died unexpectedly before finishing this task.
\tclass_name: ImplicitFunc
\tactor_id: {number}bb820350d886a8a5c301000000
\tpid: {number}
The actor is dead because its worker process has died. Worker exit type: {kind} Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed.
"""
NODE_DIED = """Failure # 1 (occurred at 2025-01-01_00-00-00)
The actor died unexpectedly before finishing this task.
\tpid: {number}
The actor died because its node has died. Node Id: {number}
\tthe actor's node was terminated: {kind}
"""
KILLED = """Failure # 1 (occurred at 2025-01-01_00-00-00)
Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.{number}) was 9{number}GB / 100GB; {kind}
"""


@pytest.mark.parametrize(
    ("text", "kind", "cause"),
    [
        (
            DIED,
            "SYSTEM_ERROR",
            r"the worker process died \(SYSTEM_ERROR\), as by os\._exit, a crash, or for want of memory",
        ),
        (DIED, "INTENDED_USER_EXIT", r"the worker process died \(INTENDED_USER_EXIT\)"),
        (KILLED, "", "Ray killed the worker, as its node had no memory left"),
        (DIED, "INTENDED_SYSTEM_EXIT", None),
        (NODE_DIED, "preempted", None),
    ],
)
def test_workers_that_die_alike_end_the_search(tmp_path: Path, text: str, kind: str, cause: str | None) -> None:
    failures, said = FailedTrainings(), None
    for number in range(3):
        (tmp_path / f"t{number}").write_text(text.format(number=number, kind=kind))
        assert said is None
        failures.failed(f"t{number}")
        said = failures.always(lambda trial: str(tmp_path / trial))
    if cause is None:
        assert said is None
    else:
        assert re.search(f"the first 3 trainings failed alike, and none succeeded: {cause}", str(said))


@pytest.mark.parametrize(
    "causes",
    [
        ["ValueError: a", "ValueError: b", "TypeError: a"],
        [None, None, None, None],
        ["raybilevel.errors.NotFiniteError: the lower-level loss is nan"] * 4,
        ["ray.exceptions.NodeDiedError: Task failed"] * 4,
    ],
)
def test_other_failures_do_not(tmp_path: Path, causes: list[str | None]) -> None:
    assert failing(tmp_path, *causes) == [None] * len(causes)


def test_several_failures_may_be_heard_of_at_once(tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(TRACEBACK.format(row=0, cause="ImportError: no module named 'mine'"))
    failures = FailedTrainings()
    for trial in "abcd":
        failures.failed(trial)
    assert "ImportError: no module named 'mine'" in str(failures.always(lambda trial: str(tmp_path / "error.txt")))


def test_a_file_that_is_gone_or_says_nothing_is_no_cause(tmp_path: Path) -> None:
    failures = FailedTrainings()
    for trial in "abcd":
        failures.failed(trial)
    assert failures.always(lambda trial: str(tmp_path / "gone")) is None
    assert cause_of("The actor died unexpectedly.\n") is None
    assert cause_of("") is None
