"""One run of a comparison: trials on Ray Tune until the budget is spent, and then the record."""

from __future__ import annotations

import contextlib
import logging
import signal
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow.fs
import ray
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from raybilevel._cluster.environment import environment
from raybilevel._cluster.resources import most_slots, task_options, trainings_that_fit
from raybilevel._cluster.shared import Shared
from raybilevel._cluster.storage import Storage
from raybilevel._command.refit import refit_options, refit_task
from raybilevel._command.resources import asked_for, for_tune, reuses_processes, with_room_for_steps
from raybilevel._compare.config import Run
from raybilevel._compare.ledger import BudgetStopper, Ledger
from raybilevel._compare.methods import (
    METRIC,
    PAUSERS,
    WITHOUT_LOGARITHMS,
    Parts,
    Setting,
    UnavailableError,
    check_space,
    grid,
    make_scheduler,
    make_searcher,
    parse,
    probe,
)
from raybilevel._compare.recording import begun, own_part
from raybilevel._compare.searchers import BudgetedSearch, TimedSearcher, spent_on_steps
from raybilevel._config.plan import Plan
from raybilevel._records.incumbents import incumbent_at
from raybilevel._records.names import OWN_METHODS
from raybilevel._records.record import Record, RunStatus
from raybilevel.methods import make_method
from raybilevel.problem import make_refit_batches
from raybilevel.space import flatten, nest
from raybilevel.tune._domains import to_param_space
from raybilevel.tune._searcher import BilevelSearch
from raybilevel.tune._trainable import lower_level_trainable

MAX_TRIALS = 10_000
"""Limit of trials if the budget is in seconds, which ends the run before."""
CANCEL_TIMEOUT_S = 10.0
"""Timeout for upper-level steps to end that are cancelled at the end of a run."""


def execute(
    run: Run,
    plan: Plan,
    news: Callable[[Ledger], None] = lambda ledger: None,
    keep: Callable[[Record], None] = lambda record: None,
    storage: Storage | None = None,
) -> Record:
    """Do a run on the Ray cluster that this process has joined. Returns its record.

    The status is "unavailable" if the method cannot be run. An "interrupted" or "failed" run keeps its results so far.

    plan:    of its problem (`Run.plan`).
    news:    called again and again during the run.
    keep:    called after every training with the record so far, of status "running", in case this process is killed.
    storage: for trials and their checkpoints during the run; by default a temporary folder of this machine.
    """
    parts, plan = parse(run.method.method), with_room_for_steps(plan)
    record = begun(run, plan.problem, plan.space)
    ledger = Ledger(plan.space, plan.problem.epochs, run.budget, gpus_of(plan))
    setting = setting_of(run, plan)
    began = time.perf_counter()
    try:
        probe_parts(parts, setting)
    except UnavailableError as error:
        return record.model_copy(update={"status": "unavailable", "error": str(error)})
    kept = 0

    def so_far(ledger: Ledger) -> None:
        nonlocal kept
        news(ledger)
        if len(ledger.observed) > kept:
            kept = len(ledger.observed)
            keep(record.model_copy(update=seen(ledger, began)))

    ledger.on_news = so_far
    status: RunStatus = "failed"
    found: dict[str, Any] = {}
    searcher: TimedSearcher | None = None
    place = temporary_place(storage)
    try:
        searcher = searcher_of(parts, setting, ledger, place)
        with stop_on_interrupt(ledger):
            tune_run(run, plan, parts, setting, searcher, ledger, place)
        # Tune has ended the run, and not the stopper: there was nothing more to try.
        found["exhausted"] = not ledger.over
        if not ledger.interrupted:
            found["refits"] = refits_of(run, plan, ledger)
        status = "interrupted" if ledger.interrupted else "done"
    except Exception as raised:  # it is in the record, and the other runs continue
        logging.getLogger(__name__).debug("run failed", exc_info=True)
        found |= {"error": f"{type(raised).__name__}: {first_line(raised)}", "traceback": traceback.format_exc()}
    finally:
        # Before the storage is removed: a step under way would hold its resources, and fail for want of a checkpoint.
        if searcher is not None and isinstance(searcher.inner, BilevelSearch):
            searcher.inner.cancel_steps(CANCEL_TIMEOUT_S)
        with contextlib.suppress(OSError):
            place.filesystem.delete_dir(place.path)
    found |= seen(ledger, began) | own_part(searcher, ledger)
    return record.model_copy(update={"status": status, **found})


def temporary_place(storage: Storage | None) -> Storage:
    """A new folder for one run, in the storage or on this machine."""
    if storage is None:
        return Storage(pyarrow.fs.LocalFileSystem(), tempfile.mkdtemp(prefix="raybilevel-compare-"))
    return Storage(storage.filesystem, f"{storage.path}/raybilevel-compare-{uuid.uuid4().hex}")


def seen(ledger: Ledger, began: float) -> dict[str, Any]:
    """The results of the trials so far, as fields of the record."""
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "spent": ledger.total,
        "observations": ledger.observations(),
        "trials": tuple(ledger.trials.values()),
    }


def setting_of(run: Run, plan: Plan) -> Setting:
    unit, amount, epochs = run.budget.unit, run.budget.amount, plan.problem.epochs
    return Setting(
        plan.problem,
        plan.space,
        to_param_space(plan.space, plan.constants),
        epochs,
        run.seed,
        {"trainings": amount, "epochs": amount / epochs}.get(unit),
        slots_for(plan),
        plan.step,
        run.method.searcher,
        run.method.scheduler,
    )


def slots_for(plan: Plan) -> int:
    """Concurrent trainings: as many as the cluster holds, up to the default limit of `BilevelSearch` for short runs."""
    return max(1, min(most_slots(0), trainings_that_fit(asked_for(plan.training))))


def gpus_of(plan: Plan) -> tuple[float, float]:
    """The GPUs of a training and of an upper-level step."""
    return plan.training.first.get("GPU", 0.0), float(task_options(plan.step).get("num_gpus", 0.0))


def probe_parts(parts: Parts, setting: Setting) -> None:
    """Check that all parts of the method can be run.

    Raises:
        UnavailableError: a part cannot be run. The message has the reason.
    """
    check_space(parts, setting.space)
    if not parts.own:
        probe(parts.searcher, setting)
    if parts.searcher == "grid":
        grid(setting.space, setting.trainings)
    make_scheduler(parts.scheduler, setting)


def searcher_of(parts: Parts, setting: Setting, ledger: Ledger, place: Storage) -> TimedSearcher | None:
    """The searcher of the trials; None if Tune's own variant generator makes them."""
    if not parts.own:
        inner = make_searcher(parts.searcher, setting)
        if inner is None:
            return None
        return TimedSearcher(inner, setting.space if parts.searcher in WITHOUT_LOGARITHMS else None)
    # A scheduler may stop a training early, so a trial may begin even if the budget could not pay for all of it.
    room = ledger.room if not parts.stops_early else lambda: not ledger.over
    search = BudgetedSearch(
        setting.problem,
        metric=METRIC,
        mode="min",
        method=make_method(OWN_METHODS[parts.searcher], **setting.searcher),
        seed=setting.seed,
        max_concurrent=setting.slots,
        upper_resources=setting.upper_resources,
        storage_filesystem=place.filesystem,
        room=room,
    )
    ledger.steps = lambda: spent_on_steps(search)
    return TimedSearcher(search)


def tune_run(
    run: Run, plan: Plan, parts: Parts, setting: Setting, searcher: Any, ledger: Ledger, place: Storage
) -> None:
    """Run the trials, with the same trainable, seed and resources for every method."""
    space, samples = dict(setting.param_space), samples_of(parts, setting)
    if parts.searcher == "grid":
        values = grid(setting.space, setting.trainings)
        space = nest({**flatten(space), **{path: tune.grid_search(v) for path, v in values.items()}})
        samples = 1
    if searcher is None:
        searcher = BasicVariantGenerator(random_state=run.seed)
    every = 1 if parts.scheduler in PAUSERS else None
    trainable = lower_level_trainable(setting.problem, run.seed, every)
    # The clock starts with the trials: probing the method is not charged.
    ledger.began = ledger.seen = time.monotonic()
    with quiet():
        tune.run(
            tune.with_resources(trainable, for_tune(plan.training)),
            name="tune",
            storage_path=place.path,
            storage_filesystem=place.filesystem,
            config=space,
            search_alg=searcher,
            scheduler=make_scheduler(parts.scheduler, setting),
            metric=METRIC,
            mode="min",
            num_samples=samples,
            reuse_actors=reuses_processes(plan.training, plan.step),
            callbacks=[ledger],
            stop=BudgetStopper(ledger),
            raise_on_failed_trial=False,
            verbose=0,
        )


def samples_of(parts: Parts, setting: Setting) -> int:
    """Limit of the number of trials.

    Without early stopping it is the budget in trainings, and so is the size of a population. The median rule stops
    about half of the trials. With successive halving each trial takes at least one epoch.
    """
    if setting.trainings is None:
        return MAX_TRIALS if parts.scheduler not in ("pbt", "pb2") else max(4, 2 * setting.slots)
    whole = max(1, int(setting.trainings + 1e-9))
    if not parts.stops_early or parts.scheduler in ("pbt", "pb2"):
        return whole
    if parts.scheduler == "median-stopping":
        return 2 * whole
    return max(1, int(setting.trainings * setting.epochs))


def refits_of(run: Run, plan: Plan, ledger: Ledger) -> dict[int, dict[str, float]]:
    """Metrics after a training on training plus validation data with the incumbent's hyperparameters.

    There is one for the incumbent at each mark, by the incumbent's position. They are not charged, as every method has
    them.
    """
    observations = ledger.observations()
    resources, shared = refit_options(plan), Shared(plan.problem)
    found: dict[int, dict[str, float]] = {}
    tasks: dict[int, Any] = {}
    # Infinity for the last incumbent, where the trial that spent the budget went beyond it.
    for mark in (*run.marks, run.budget.amount, float("inf")):
        index = incumbent_at(observations, mark, "spent")
        if index is not None and index not in tasks:
            config = nest({**flatten(plan.constants), **flatten(observations[index].hyperparameters)})
            if make_refit_batches(plan.problem, None, config) is None:
                return {}
            tasks[index] = refit_task.options(**resources).remote(shared, config, run.seed)
    for index, task in tasks.items():
        with contextlib.suppress(ray.exceptions.RayError):  # a refit that diverges or is lost has no metrics
            if (metrics := ray.get(task)) is not None:
                found[index] = metrics
    return found


@contextlib.contextmanager
def stop_on_interrupt(ledger: Ledger) -> Iterator[None]:
    """Let the first Ctrl-C end the run with a record, and the second one at once. Only in the main thread."""

    def interrupt(number: int, frame: Any) -> None:
        if ledger.interrupted:
            raise KeyboardInterrupt
        ledger.interrupted = True

    try:
        earlier = signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # Python allows signal handlers in the main thread only
        earlier = None
    try:
        with environment("TUNE_DISABLE_SIGINT_HANDLER", "1"):  # Tune's would replace ours
            yield
    finally:
        if earlier is not None:
            signal.signal(signal.SIGINT, earlier)


def quiet() -> contextlib.AbstractContextManager[None]:
    """Turn off Tune's loggers (TensorBoard, JSON, CSV). The record holds what they would write."""
    return environment("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
