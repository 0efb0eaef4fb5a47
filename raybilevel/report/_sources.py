"""What a folder holds: the records of a comparison or of the benchmark, or one run, read as a record too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybilevel._config.experiment import read_config
from raybilevel._metrics import EPOCH, FINISHED, GPUS, UPPER_LOSS, problem_metrics
from raybilevel._records import store as records
from raybilevel._records.names import CONFIG_FILE, SUMMARY_FILE, TUNE_FOLDER
from raybilevel._records.store import Record
from raybilevel._records.summary import config_of, finite
from raybilevel.errors import DataError, RaybilevelError, StateError
from raybilevel.search import _state_file as state_file
from raybilevel.search_state import SearchState, Training
from raybilevel.space import Space


@dataclass(frozen=True)
class Source:
    """Records, and the files that are none.

    kind: "comparison" or "run".
    wrong: one line for each file that was skipped.
    """

    kind: str
    folder: Path
    records: list[Record]
    wrong: list[str]

    @property
    def good(self) -> list[Record]:
        """Those with something to show."""
        return [r for r in self.records if r["status"] != "unavailable" and known(r)]

    @property
    def done(self) -> list[Record]:
        """Those that a table may count: whole runs, also such in which no training ran to its end."""
        return [r for r in self.records if r["status"] == "done" or self.kind == "run"]


def known(record: Record) -> bool:
    return any(o["upper"] is not None for o in record["observations"])


def read_folder(folder: Path) -> Source:
    """The records of a comparison, a benchmark or a run.

    Raises:
        DataError: the folder holds none of them.
    """
    if (folder / "records").is_dir():
        found, wrong = records.read_all(folder)
        if not found:
            raise DataError(f"{folder}: no whole record in it" + (f"; {wrong[0]}" if wrong else ""))
        return Source("comparison", folder, found, wrong)
    if (folder / TUNE_FOLDER).is_dir() and (folder / CONFIG_FILE).is_file():
        return Source("run", folder, [read_run(folder)], [])
    raise DataError(f"{folder}: neither the folder of a comparison (records/) nor of a run ({TUNE_FOLDER}/)")


def search_of(record: Record) -> state_file.SavedSearch | None:
    """The search of one of raybilevel's own methods, as its state file has it; None where a record has none.

    Raises:
        StateError: what is there is none.
    """
    if record.get("search") is None:
        return None
    try:
        return state_file.ADAPTER.validate_json(json.dumps(record["search"]))
    except ValueError as error:
        raise StateError(f"{record['problem_name']} {record['method_name']}: not a search state: {error}") from error


def read_run(folder: Path) -> Record:
    """A folder of `raybilevel run`, finished or not, as a record.

    Raises:
        DataError: it has no search state yet.
    """
    config = read_config(folder / CONFIG_FILE)
    states = sorted((folder / TUNE_FOLDER).glob("searcher-state-*.pkl"))
    if not states:
        raise DataError(f"{folder}: no search state in {TUNE_FOLDER}/ yet; Tune writes the first within seconds")
    saved = state_file.read(states[-1])
    summary = read_json(folder / SUMMARY_FILE)
    names = {index: trial for trial, index in saved.trials.items()}
    results = {trial: list(lines) for trial, lines in trial_results(folder / TUNE_FOLDER).items()}
    began = min((float(line[0]["timestamp"]) - float(line[0]["time_total_s"]) for line in results.values()), default=0)
    trials = [trial_log(trial, lines, began, saved) for trial, lines in results.items()]
    space = Space(saved.parameters)
    refit = (summary.get("best") or {}).get("test_loss_refit")
    observations = list(observations_of(saved.state, space, names, results, began))
    best = saved.state.best
    position = {t.index: i for i, t in enumerate(saved.state.told)}
    return {
        "format": 1,
        "kind": "run",
        "status": "done" if summary else "unfinished",
        "error": None,
        "problem_name": config.problem,
        "method_name": config.search.method,
        "settings": {
            "problem": config.problem,
            "options": config.options,
            "seed": config.search.seed,
            "budget": float(config.search.trainings),
            "budget_unit": "trainings",
        },
        "epochs_per_training": max((line[-1][EPOCH] for line in results.values()), default=1),
        "marks": [],
        "space": [{"name": p.name, "low": p.low, "high": p.high, "log": p.log} for p in space.parameters],
        "optimum": None,
        "versions": summary.get("versions", {}),
        "machine": {},
        "exhausted": bool(summary),
        "seconds": summary.get("wall_seconds", max((o["seconds"] for o in observations), default=0.0)),
        "spent": {},
        "observations": observations,
        "trials": trials,
        "refits": {} if refit is None or best is None else {str(position[best.index]): {"test_loss": refit}},
        "overhead": {},
        "steps": [],
        "search": json.loads(state_file.ADAPTER.dump_json(saved)),
        "summary": summary,
    }


def observations_of(
    state: SearchState,
    space: Space,
    names: Mapping[int, str],
    results: Mapping[str, list[dict[str, Any]]],
    began: float,
) -> Iterator[dict[str, Any]]:
    """The ended trainings of a search, in the terms of a comparison's observations."""
    best: tuple[int, float] | None = None
    for number, (training, cost) in enumerate(zip(state.told, state.costs(), strict=True)):
        done = training.status == "done"
        if done and (best is None or training.upper_loss < best[1]):
            best = (number, training.upper_loss)
        lines = results.get(names.get(training.index, ""), [])
        yield {
            "trial": names.get(training.index, ""),
            "status": training.status,
            "unit": list(training.unit),
            "hyperparameters": config_of(space, training),
            "upper": finite(training.upper_loss) if done else None,
            "lower": finite(training.lower_loss) if done else None,
            "stopped_upper": finite(training.upper_loss) if training.status == "stopped" else None,
            "metrics": problem_metrics(lines[-1]) if lines else {},
            "passes": training.passes,
            "extra": sum(step.passes for step in state.steps if step.finished <= number),
            "seconds": float(lines[-1]["timestamp"]) - began if lines else ended_before(state, training),
            "incumbent": 0 if best is None else best[0],
            "cost": cost,
            "spent": cost,
        }


def ended_before(state: SearchState, training: Training) -> float:
    """A training whose trial left no file has no time: it sorts by the order in which it ended."""
    return float(training.finished)


def trial_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each trial reported, by Tune's JSON logger; a half-written last line is left out."""
    found = {}
    for path in sorted(folder.glob("*/result.json")):
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        if lines:
            found[str(lines[0]["trial_id"])] = lines
    return found


def trial_log(trial: str, lines: list[dict[str, Any]], began: float, saved: state_file.SavedSearch) -> dict[str, Any]:
    """A trial's life as `raybilevel._compare.ledger.TrialLog` has it."""
    index = saved.trials.get(trial)
    status = saved.state.trainings[index].status if index is not None else "unknown"
    return {
        "trial": trial,
        "status": "done" if lines[-1].get(FINISHED) else status,
        "node": str(lines[-1].get("node_ip", "")),
        "pid": int(lines[-1].get("pid", 0)),
        "gpus": str(lines[-1].get(GPUS, "")),
        "seconds": [float(line["timestamp"]) - began for line in lines],
        "took": [float(line["time_this_iter_s"]) for line in lines],
        "epochs": [int(line[EPOCH]) for line in lines],
        "uppers": [finite(float(line[UPPER_LOSS])) for line in lines],
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content, nothing where there is no whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check(source: Source) -> None:
    """Raises RaybilevelError where there is nothing to report."""
    if not source.good:
        raise RaybilevelError(f"{source.folder}: no training ran to its end yet, so there is nothing to report")
