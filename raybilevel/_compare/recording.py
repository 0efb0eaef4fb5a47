"""The parts of a comparison's record apart from the trials: those known at the start, and those of the searcher."""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import ray

from raybilevel._compare.config import Run
from raybilevel._compare.ledger import Ledger
from raybilevel._compare.searchers import BudgetedSearch, TimedSearcher, overhead_of, spent_on_steps
from raybilevel._records.record import Machine, Record, Step, box
from raybilevel._records.versions import core_digest, versions
from raybilevel.problem import BilevelProblem
from raybilevel.space import Space
from raybilevel.tune._searcher import BilevelSearch

PEERS = ("optuna", "hyperopt", "ax-platform", "bayesian-optimization", "hpbandster", "ConfigSpace")


def begun(run: Run, problem: BilevelProblem, space: Space) -> Record:
    """The record of a run at its start."""
    return Record(
        kind="comparison",
        status="running",
        problem_name=run.problem_name,
        method_name=run.method_name,
        settings=run.settings,
        epochs_per_training=problem.epochs,
        marks=run.marks,
        space=box(space),
        optimum=getattr(problem, "optimum", None),
        versions={**versions(PEERS), "core": core_digest()},
        machine=machine(),
    )


def machine() -> Machine:
    """The cluster, without host names."""
    resources = ray.cluster_resources()
    return Machine(
        system=platform.platform(terse=True),
        nodes=sum(node["Alive"] for node in ray.nodes()),
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        accelerators=tuple(
            sorted(name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:"))
        ),
        memory_gib=round(resources.get("memory", 0.0) / 2**30, 1),
    )


def own_part(timed: TimedSearcher | None, ledger: Ledger) -> dict[str, Any]:
    """The overhead of the method, and for raybilevel's own methods the whole search, as fields of the record."""
    search = timed.inner if timed is not None else None
    if not isinstance(search, BudgetedSearch):
        return {"overhead": overhead_of(timed)}
    seconds = sum(step.ended - step.began for step in search.step_times)
    steps = tuple(
        Step(
            number=step.number,
            began=round(step.began - ledger.began, 3),
            ended=round(step.ended - ledger.began, 3),
        )
        for step in search.step_times
    )
    spent = {"upper_seconds": round(seconds, 3), "upper_passes": spent_on_steps(search)[0]}
    return {"overhead": overhead_of(timed).model_copy(update=spent), "steps": steps, "search": saved_search(search)}


def saved_search(search: BilevelSearch) -> dict[str, Any] | None:
    """The state of a search as plain values, as in its state file, without references to the run's storage."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "search"
        search.save(str(path))
        if not path.exists():
            return None
        # A state file holds the search as text, over which its checksum is.
        saved: dict[str, Any] = json.loads(json.loads(path.read_text(encoding="utf-8"))["search"])
    # The storage of a comparison's run is temporary, so its checkpoints are gone when the record is read.
    return {**saved, "memory": None, "checkpoints": {}}
