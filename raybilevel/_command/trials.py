"""The trials of a run: its searcher, Tune's loop, and the results of the trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune

from raybilevel._cluster.environment import waiting_trials
from raybilevel._cluster.resources import most_slots
from raybilevel._cluster.storage import Storage
from raybilevel._command.progress import ProgressCallback, View
from raybilevel._command.resources import for_tune, reuses_processes
from raybilevel._config.plan import Plan
from raybilevel._metrics import HYPERPARAMETERS, UPPER_LOSS
from raybilevel._records.names import TUNE_FOLDER
from raybilevel._tune_changes.applied import tune_changes
from raybilevel._tune_changes.signal_handlers import restored_signal_handlers
from raybilevel.search_state import Training
from raybilevel.space import flatten, nest
from raybilevel.tune._descent_trainable import hypergradient_trainable
from raybilevel.tune._domains import to_param_space
from raybilevel.tune._scalars import SearchScalars
from raybilevel.tune._scheduler import WORKER_START_S, PatientFIFO
from raybilevel.tune._searcher import BilevelSearch
from raybilevel.tune._snapshot import ResumableGenerator
from raybilevel.tune._trainable import lower_level_trainable


def searcher_of(plan: Plan, place: Storage) -> BilevelSearch:
    """The searcher of a plan. It reads checkpoints from the storage."""
    return BilevelSearch(
        plan.problem,
        metric=[UPPER_LOSS, *plan.other_objectives],
        mode=["min", *plan.other_objectives.values()],
        method=plan.method,
        seed=plan.seed,
        max_concurrent=plan.max_concurrent,
        points_to_evaluate=plan.points,
        constraints=plan.constraints,
        priors=plan.config.search.priors,
        upper_resources=plan.step,
        lower_resources=for_tune(plan.training),
        storage_filesystem=place.filesystem,
        step_time_limit=plan.step_time_limit,
    )


def train_all(plan: Plan, searcher: BilevelSearch, place: Storage, resume: bool, view: View) -> Any:
    """Run the trials. Returns Tune's analysis after they have ended or were interrupted."""
    try:
        slots = plan.max_concurrent or most_slots(plan.trainings)
        with waiting_trials(slots), restored_signal_handlers(), tune_changes():
            return tune_run(plan, searcher, place, resume, view)
    finally:
        searcher.cancel_steps()
        view.update(searcher.state, 0)
        view.close()


def tune_run(plan: Plan, searcher: BilevelSearch, place: Storage, resume: bool, view: View) -> Any:
    """Run Tune. `Tuner.restore` would make a searcher of its own and not hand it out, so this calls `tune.run`."""
    return tune.run(
        tune.with_resources(trainable(plan), for_tune(plan.training)),
        name=TUNE_FOLDER,
        storage_path=place.path,
        storage_filesystem=place.filesystem,
        config=to_param_space(plan.space, plan.constants),
        # Without effect where workers are not reused: then none is ever idle.
        search_alg=ResumableGenerator(searcher, plan.trainings),
        scheduler=PatientFIFO(idle_timeout_s=WORKER_START_S),
        metric=UPPER_LOSS,
        mode="min",
        num_samples=plan.trainings,
        # "AUTO" begins anew where Tune had not saved anything yet.
        resume="AUTO" if resume else None,
        reuse_actors=reuses_processes(plan.training, plan.step, plan.max_failures),
        callbacks=[
            SearchScalars(searcher),
            ProgressCallback(lambda: view.update(searcher.state, searcher.steps_under_way)),
        ],
        max_failures=plan.max_failures,
        raise_on_failed_trial=False,
        verbose=0,
    )


def trainable(plan: Plan) -> Any:
    """The trainable of a trial: a lower-level training, or a descent."""
    limit = plan.epoch_time_limit
    if plan.method.descent is not None:
        return hypergradient_trainable(plan.problem, plan.method.descent, plan.space, plan.seed, epoch_time_limit=limit)
    return lower_level_trainable(plan.problem, plan.seed, epoch_time_limit=limit)


def trial_results(searcher: BilevelSearch, analysis: Any) -> dict[int, Mapping[str, Any]]:
    """The last result of each training, by its index."""
    found = {}
    for trial in analysis.trials:
        index = searcher.index_of(trial.trial_id)
        if index is not None and trial.last_result:
            found[index] = trial.last_result
    return found


def configuration(
    searcher: BilevelSearch, training: Training, results: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """The config of a training with all constants. For a descent, with its final hyperparameters."""
    found = results.get(training.index, {}).get(HYPERPARAMETERS) or searcher.config_of(training)
    return nest({**flatten(searcher.constants), **flatten(found)})
