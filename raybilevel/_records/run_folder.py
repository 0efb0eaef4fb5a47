"""Reads the folder of `raybilevel run`, finished or not, as a record."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raybilevel._config.experiment import ExperimentConfig, read_config
from raybilevel._metrics import EPOCH, FINISHED, GPUS, STEP, problem_metrics
from raybilevel._own_problem import file_of
from raybilevel._records.names import CONFIG_FILE, SEARCH_STATE, SUMMARY_FILE, TUNE_FOLDER, TUNE_STATE
from raybilevel._records.record import Observation, Record, Settings, TrialLog, box
from raybilevel.errors import DataError, StateError
from raybilevel.search_state import Training
from raybilevel.space import Space, flatten, nest

if TYPE_CHECKING:
    from raybilevel.search._state_file import SavedSearch

Lines = Sequence[Mapping[str, Any]]
"""The results that a trial reported, one per epoch."""


def is_run(folder: Path) -> bool:
    return (folder / TUNE_FOLDER).is_dir() and (folder / CONFIG_FILE).is_file()


def read_run(folder: Path) -> Record:
    """A folder of `raybilevel run` as a record.

    Raises:
        DataError: it has no search state yet.
        StateError: the search state cannot be read.
    """
    saved = newest_state(folder / TUNE_FOLDER)
    if saved is None:
        raise DataError(f"{folder}: no search state in {TUNE_FOLDER}/ yet; Tune writes the first within seconds")
    return record_of(
        settings_of(read_config(folder / CONFIG_FILE)),
        saved,
        trial_results(folder / TUNE_FOLDER),
        read_json(folder / SUMMARY_FILE),
    )


def newest_state(folder: Path) -> SavedSearch | None:
    """The newest state of a search in the folder of an experiment; None where there is none.

    Raises:
        StateError: it cannot be read.
    """
    from raybilevel.search import _state_file as state_file  # imports botorch, which takes seconds

    # Tune has the time in the names.
    states = sorted(folder.glob(f"{SEARCH_STATE}*.pkl"))
    return state_file.read(states[-1]) if states else None


def settings_of(config: ExperimentConfig) -> Settings:
    return Settings(
        problem=config.problem,
        options=config.options,
        method=config.search.method,
        method_settings=config.search.settings,
        space=config.space,
        resources=config.resources.model_dump(),
        seed=config.search.seed,
        budget=float(config.search.trainings),
    )


def record_of(
    settings: Settings,
    saved: SavedSearch,
    results: Mapping[str, Lines],
    summary: Mapping[str, Any],
) -> Record:
    """The record of a run.

    results: by trial.
    summary: empty while the run is under way.
    """
    from raybilevel.search import _state_file as state_file  # imports botorch, which takes seconds

    ended = summary.get("trainings") == len(saved.state.told)  # else the run has gone on since
    began = start_of(results)
    names = {index: trial for trial, index in saved.trials.items()}
    space = Space(saved.parameters)
    observations = tuple(observations_of(saved, space, names, results, began))
    best = summary.get("best") or {}
    refit = best.get("test_loss_refit")
    # A record has trainings in the order of their ends, a search in the order in which they were asked.
    position = {o.number: place for place, o in enumerate(observations) if o.number}
    returned = position.get(best["training"]) if ended and best else None
    if returned is not None:
        observations = (*observations[:-1], observations[-1].model_copy(update={"incumbent": returned}))
    return Record(
        kind="run",
        status="done" if ended else "running",
        problem_name=file_of(settings.problem),
        method_name=settings.method,
        metric=saved.metric if saved.mode == "min" else f"-{saved.metric}",
        settings=settings,
        # The problem is not made here: what the longest training has reached stands for its epochs.
        epochs_per_training=max((reached(lines[-1]) for lines in results.values()), default=1),
        space=box(space),
        versions=summary.get("versions", {}),
        exhausted=ended,
        seconds=summary.get("wall_seconds", max((o.seconds for o in observations), default=0.0)),
        observations=observations,
        trials=tuple(trial_log(trial, lines, began, saved) for trial, lines in results.items()),
        refits={} if refit is None or returned is None else {returned: {"test_loss": refit}},
        search=state_file.ADAPTER.dump_python(saved, mode="json"),
        verdict=summary.get("verdict"),
        diagnostics=summary.get("diagnostics", {}),
        in_words=summary.get("in_words", ()) if ended else (),
        gain=summary.get("gain") if ended else None,
        shared=position.get(summary["shared"]["training"]) if ended and summary.get("shared") else None,
        gain_over_shared=summary.get("gain_over_shared") if ended else None,
    )


def start_of(results: Mapping[str, Lines]) -> float:
    """Of an experiment, as a Unix time; 0 before any trial has reported."""
    # Tune writes no start time. A trial's first result has its time of arrival and the seconds that it took.
    firsts = [lines[0] for lines in results.values()]
    return min((float(first["timestamp"]) - float(first["time_total_s"]) for first in firsts), default=0.0)


def observations_of(
    saved: SavedSearch, space: Space, names: Mapping[int, str], results: Mapping[str, Lines], began: float
) -> Iterator[Observation]:
    """The ended trainings of a search.

    names:   trials by the index of their training.
    results: by trial.
    began:   start of the run, as a Unix time.
    """
    state, best = saved.state, None
    for number, (training, cost) in enumerate(zip(state.told, state.costs(), strict=True)):
        done = training.status == "done"
        if done and (best is None or training.rank < best[1]):
            best = (number, training.rank)
        trial = names.get(training.index, "")
        lines = results.get(trial, ())
        yield Observation(
            trial=trial,
            number=state.number(training),
            status=training.status if training.status in ("done", "stopped") else "failed",
            unit=training.unit,
            hyperparameters=searched_in(saved, lines) or config_of(space, training),
            upper_loss=finite(training.upper_loss) if done else None,
            lower_loss=finite(training.lower_loss) if done else None,
            stopped_upper_loss=finite(training.upper_loss) if training.status == "stopped" else None,
            metrics=problem_metrics(lines[-1]) if lines else {},
            feasible=training.feasible if training.excesses else None,
            passes=training.passes,
            # Of the steps that were heard of before this training ended.
            extra_passes=sum(step.passes for step in state.steps if step.finished <= number),
            # A training whose trial left no file has no time. Its place in the order of ends stands in for it.
            seconds=float(lines[-1]["timestamp"]) - began if lines else float(training.finished),
            incumbent=0 if best is None else best[0],
            cost=cost,
            spent=cost,
        )


def searched_in(saved: SavedSearch, lines: Lines) -> dict[str, Any]:
    """What a trial's config has beside the constants around the space, nested: of a space that has more than its
    `parameters`, such as items of lists and alternatives; empty for others, and where the results have no config."""
    if saved.space is None or not lines:
        return {}
    around = flatten(json.loads(saved.constants))
    return nest({path: value for path, value in flatten(lines[-1].get("config", {})).items() if path not in around})


def trial_log(trial: str, lines: Lines, began: float, saved: SavedSearch) -> TrialLog:
    index, last = saved.trials.get(trial), lines[-1]
    status = "unknown" if index is None else saved.state.trainings[index].status
    return TrialLog(
        trial=trial,
        # A trial's own report is newer than the state, which Tune saves now and then.
        status="done" if last.get(FINISHED) else "running" if status == "pending" else status,
        node=str(last.get("node_ip", "")),
        pid=int(last.get("pid", 0)),
        gpus=str(last.get(GPUS, "")),
        seconds=tuple(float(line["timestamp"]) - began for line in lines),
        took=tuple(float(line["time_this_iter_s"]) for line in lines),
        epochs=tuple(reached(line) for line in lines),
        upper_losses=tuple(finite(float(line.get(saved.metric, math.nan))) for line in lines),
    )


def reached(line: Mapping[str, Any]) -> int:
    """The number of epochs of a training so far, or of steps of a descent."""
    return int(line[EPOCH] if EPOCH in line else line.get(STEP, 1))


def trial_results(folder: Path) -> dict[str, Lines]:
    """The results of each trial from Tune's JSON logger, without a half-written last line. Of a trial without that, as
    where Tune's loggers are switched off, the last result by Tune's own snapshot of its trials."""
    found: dict[str, Lines] = {trial: [result] for trial, result in last_results(folder)}
    for path in sorted(folder.glob("*/result.json")):
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # the run is writing this line now, or was killed while it did
                break
        if lines:
            found[str(lines[0]["trial_id"])] = lines
    return found


def last_results(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each trial that has reported, with its last result, in Tune's newest snapshot."""
    # Tune has the time in the names.
    snapshots = sorted(folder.glob(TUNE_STATE))
    for trial, of_run in read_json(snapshots[-1]).get("trial_data", []) if snapshots else []:
        result = json.loads(of_run)["last_result"]
        if "timestamp" in result:  # else it has reported nothing
            yield str(json.loads(trial)["trial_id"]), result


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if the file is missing or incomplete."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def search_of(record: Record) -> SavedSearch | None:
    """The search in the record of one of raybilevel's own methods; None if the record has none.

    Raises:
        StateError: the content of the record is not a search.
    """
    if record.search is None:
        return None
    from raybilevel.search import _state_file as state_file  # imports botorch, which takes seconds

    try:
        return state_file.ADAPTER.validate_python(record.search)
    except ValueError as error:
        raise StateError(f"{record.problem_name} {record.method_name}: not a search state: {error}") from error


def config_of(space: Space, training: Training) -> dict[str, Any]:
    """The hyperparameters of a training, nested."""
    return space.to_config(torch.tensor(training.unit, dtype=torch.double))


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
