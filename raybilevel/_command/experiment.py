"""A whole run from a config: trials and upper-level steps on Ray, then the refit and the summary."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray import tune
from rich.console import Console

from raybilevel._cluster.environment import waiting_trials
from raybilevel._cluster.resources import (
    asked_by,
    most_slots,
    on_gpu,
    summed,
    task_options,
    trainings_that_fit,
)
from raybilevel._cluster.shared import Shared
from raybilevel._cluster.storage import Storage, check_access, locate
from raybilevel._cluster.time_limit import time_limit
from raybilevel._command.progress import ProgressCallback, View, make_view
from raybilevel._config.experiment import BundlesConfig, ExperimentConfig, entries, read_config, resolved
from raybilevel._config.experiment import Domain as ConfigDomain
from raybilevel._lower.training import refit
from raybilevel._records.summary import as_text, summarise
from raybilevel._tune_changes.applied import tune_changes
from raybilevel._tune_changes.signal_handlers import restored_signal_handlers
from raybilevel.errors import ConfigError, RaybilevelError, StorageError
from raybilevel.methods import make_method
from raybilevel.methods._registry import name_for
from raybilevel.problem import BilevelProblem, LargeUpperLevel
from raybilevel.problems import make_problem
from raybilevel.search._checks import check_search
from raybilevel.search_state import Training
from raybilevel.space import STARTS, Space, flatten, nest
from raybilevel.tune._descent_trainable import HYPERPARAMETERS, hypergradient_trainable
from raybilevel.tune._results import UPPER_LOSS
from raybilevel.tune._scalars import SearchScalars
from raybilevel.tune._scheduler import WORKER_START_S, PatientFIFO
from raybilevel.tune._searcher import BilevelSearch
from raybilevel.tune._snapshot import ResumableGenerator, prepare_resume
from raybilevel.tune._trainable import lower_level_trainable

logger = logging.getLogger(__name__)

TUNE_FOLDER = "tune"
CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
SHARE_OF_STEPS = 0.2


class InterruptedRunError(RaybilevelError):
    """The run was stopped by Ctrl-C; what it observed is kept, and `--resume` goes on."""


def check(config: ExperimentConfig, data: str | None = None) -> None:
    """Everything that can be wrong with a config, found without running it.

    Raises:
        RaybilevelError: naming what is wrong.
    """
    problem = make_problem(config.problem, config.options, data)
    config = with_method(config)
    method = make_method(config.search.method, **config.search.settings)
    space, constants = config.split_space()
    check_search(problem, space, constants, method)


def run(
    config: ExperimentConfig,
    out: Path,
    data: str | None = None,
    resume: bool = False,
    address: str | None = None,
    storage: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run, or go on with, an experiment in the folder `out`; the summary, which is also written there.

    address: of a Ray cluster; by default a local one is started.
    storage: where the trials and their checkpoints are kept, a folder or a URI that every node sees; by default `out`.
        The config and the summary are kept there as well, so that the run outlives this machine: `resume` with another
        `out` goes on with it.

    Raises:
        ConfigError: the config, the folder or `resume` is wrong, or this machine alone has not what it asks for;
            nothing was run.
        StorageError: the storage cannot be written, or nodes of the cluster do not see it; nothing was run.
        StateError: what is to be resumed is damaged beyond repair; nothing was run.
        InterruptedRunError: Ctrl-C, or SIGTERM.
    """
    problem = make_problem(config.problem, config.options, data)
    config = with_method(config)
    method = make_method(config.search.method, **config.search.settings)
    space, constants = config.split_space()
    check_search(problem, space, constants, method)
    place = locate(storage or out)
    prepare_folder(out, config, resume, place)
    started = time.monotonic()
    with cluster(address) as alone:
        check_access(place)
        config = with_room_for_steps(config, problem)
        check_room(config, alone)
        searcher = BilevelSearch(
            problem,
            metric=UPPER_LOSS,
            mode="min",
            method=method,
            seed=config.search.seed,
            max_concurrent=config.search.max_concurrent,
            points_to_evaluate=config.search.points_to_evaluate,
            upper_resources=config.resources.upper,
            lower_resources=trial_resources(config),
            storage_filesystem=place.filesystem,
            step_time_limit=config.search.step_time_limit,
        )
        if resume:
            prepare_resume(place.filesystem, f"{place.path}/{TUNE_FOLDER}")
        title = f"{config.problem}: {upper_level(problem, space)}, method {config.search.method}"
        view = make_view(title, config.search.trainings, console)
        try:
            slots = config.search.max_concurrent or most_slots(config.search.trainings)
            with waiting_trials(slots), restored_signal_handlers(), tune_changes():
                analysis = tune_run(config, problem, searcher, place, resume, view)
        finally:
            searcher.cancel_steps()
            view.update(searcher.state, 0)
            view.close()
        if len(searcher.state.told) < config.search.trainings and not searcher.exhausted:
            # On SIGINT Tune saves and returns as if all were done.
            raise InterruptedRunError(
                f"stopped after {len(searcher.state.told)} of {config.search.trainings} trainings"
            )
        results = trial_results(searcher, analysis)
        best = searcher.method.incumbent(searcher.state)
        test_loss_refit = None
        if best is not None and not space.of_starts:
            found = configuration(searcher, best, results)
            test_loss_refit = loss_after_refit(problem, found, config)
        summary = summarise(
            searcher.state,
            space,
            searcher.method,
            results,
            {t.index: path for t in searcher.state.done if (path := searcher.checkpoint_of(t))},
            {"problem": config.problem, "method": config.search.method, "seed": config.search.seed},
            test_loss_refit,
            time.monotonic() - started,
        )
    keep(SUMMARY_FILE, as_text(summary), out, place)
    return summary


def tune_run(
    config: ExperimentConfig, problem: BilevelProblem, searcher: BilevelSearch, place: Storage, resume: bool, view: View
) -> Any:
    """The trials. `tune.run` rather than `Tuner`, whose restore does not hand out the searcher that it makes."""
    limit = config.search.epoch_time_limit
    trainable = lower_level_trainable(problem, config.search.seed, epoch_time_limit=limit)
    if searcher.method.descent is not None:
        space, _ = config.split_space()
        trainable = hypergradient_trainable(
            problem, searcher.method.descent, space, config.search.seed, epoch_time_limit=limit
        )
    return tune.run(
        tune.with_resources(trainable, trial_resources(config)),
        name=TUNE_FOLDER,
        storage_path=place.path,
        storage_filesystem=place.filesystem,
        config=param_space(config),
        search_alg=ResumableGenerator(searcher),
        scheduler=PatientFIFO(idle_timeout_s=WORKER_START_S),
        metric=UPPER_LOSS,
        mode="min",
        num_samples=config.search.trainings,
        resume="AUTO" if resume else None,
        reuse_actors=reuses_processes(config),
        callbacks=[
            SearchScalars(searcher),
            ProgressCallback(lambda: view.update(searcher.state, searcher.steps_under_way)),
        ],
        max_failures=config.search.max_failures,
        raise_on_failed_trial=False,
        verbose=0,
    )


def with_method(config: ExperimentConfig) -> ExperimentConfig:
    """The config with its method chosen: by the dimension, where it is "auto"."""
    if config.search.method != "auto":
        return config
    space, _ = config.split_space()
    search = config.search.model_copy(update={"method": name_for(0 if space.of_starts else space.dimension)})
    return config.model_copy(update={"search": search})


def upper_level(problem: BilevelProblem, space: Space) -> str:
    """How large the upper level is."""
    if not isinstance(problem, LargeUpperLevel) or not space.of_starts:
        return f"{space.dimension} hyperparameters"
    return f"{sum(parameter.numel() for parameter in problem.upper_variables().parameters()):,} upper-level variables"


def param_space(config: ExperimentConfig) -> dict[str, Any]:
    """The config's space in Tune's own domains."""
    makers = {
        "uniform": tune.uniform,
        "loguniform": tune.loguniform,
        "quniform": tune.quniform,
        "qloguniform": tune.qloguniform,
    }
    space, constants = config.split_space()
    if space.of_starts:
        start = STARTS.parameters[0]
        return {**constants, "start": tune.quniform(start.low, start.high, start.step)}
    return nest(
        {
            path: makers[entry.kind](*entry.numbers) if isinstance(entry, ConfigDomain) else entry
            for path, entry in entries(config.space).items()
        }
    )


def prepare_folder(out: Path, config: ExperimentConfig, resume: bool, place: Storage) -> None:
    saved = out / CONFIG_FILE
    try:
        begun = place.exists(TUNE_FOLDER)
        elsewhere = place.read(CONFIG_FILE) if resume and not saved.exists() and place.exists(CONFIG_FILE) else None
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"cannot reach the storage {place.path}: {error}") from error
    if resume:
        if not begun:
            raise ConfigError(f"--resume: there is no run in {place.path}; leave --resume out to begin one")
        if elsewhere is not None:  # the run began on another machine
            keep(CONFIG_FILE, elsewhere, out, place)
        if decisive(read_config(saved)) != decisive(config):
            raise ConfigError(
                f"--resume: the config differs from the one in {saved}, with which the run began; only "
                "search.max_concurrent may"
            )
        return
    if begun:
        raise ConfigError(
            f"{place.path} already holds a run; choose another --out (or --storage), or go on with it by --resume"
        )
    keep(CONFIG_FILE, resolved(config), out, place)


def keep(name: str, text: str, out: Path, place: Storage) -> None:
    """A file of the run in its folder and, where that is another place, in the storage."""
    here = locate(out)
    try:
        here.write(name, text)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"cannot write to {out}: {getattr(error, 'strerror', None) or error}") from error
    if place.path == here.path:
        return
    try:
        place.write(name, text)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"cannot write to the storage {place.path}: {error}") from error


def decisive(config: ExperimentConfig) -> ExperimentConfig:
    """What must be the same when a run goes on, with every default filled in."""
    resources = config.resources.model_copy(update={"lower": config.lower_resources, "upper": config.upper_resources})
    search = config.search.model_copy(update={"max_concurrent": None})
    return config.model_copy(update={"search": search, "resources": resources})


def trial_results(searcher: BilevelSearch, analysis: Any) -> dict[int, Mapping[str, Any]]:
    """What each training last reported, by its index."""
    found = {}
    for trial in analysis.trials:
        index = searcher.index_of(trial.trial_id)
        if index is not None and trial.last_result:
            found[index] = trial.last_result
    return found


def configuration(
    searcher: BilevelSearch, training: Training, results: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """What the training was of; where it was a descent, the hyperparameters that it ended at."""
    found = results.get(training.index, {}).get(HYPERPARAMETERS) or searcher.config_of(training)
    return nest({**flatten(searcher.constants), **flatten(found)})


def loss_after_refit(problem: BilevelProblem, found: Mapping[str, Any], config: ExperimentConfig) -> float | None:
    """The test loss after a training on all data; None where the problem has none, or the training fails: what was
    found before is not lost with it."""
    resources = task_options({"cpu": 1, **first_bundle(config)})
    limit = config.search.epoch_time_limit and 2 * problem.epochs * config.search.epoch_time_limit  # of more data
    refitted = refit_task.options(**resources).remote(Shared(problem), found, config.search.seed, limit)
    try:
        metrics = ray.get(refitted)
    except ray.exceptions.RayError as error:
        logger.error("the refit on all data failed, the summary is without it: %s", str(error).splitlines()[-1])
        return None
    return (metrics or {}).get("test_loss")


@ray.remote(max_retries=1)  # type: ignore[untyped-decorator]
def refit_task(
    problem: Shared[BilevelProblem], config: Mapping[str, Any], seed: int, limit: float | None = None
) -> dict[str, float] | None:
    with time_limit(limit):
        return refit(problem.value, config, seed)


def trial_resources(config: ExperimentConfig) -> dict[str, float] | tune.PlacementGroupFactory:
    lower = config.lower_resources
    return (
        tune.PlacementGroupFactory(lower.bundles, lower.strategy) if isinstance(lower, BundlesConfig) else dict(lower)
    )


def with_room_for_steps(config: ExperimentConfig, problem: BilevelProblem) -> ExperimentConfig:
    """The config, where the cluster's only GPU is a training's, with a share of it for upper-level steps.

    Else each would wait for the other's process to end.
    """
    alone = ray.cluster_resources().get("GPU", 0) == 1 and first_bundle(config).get("gpu") == 1
    if not (alone and config.resources.upper is None and on_gpu(problem)) or isinstance(
        config.lower_resources, BundlesConfig
    ):
        return config
    resources = config.resources.model_copy(
        update={"lower": {**first_bundle(config), "gpu": 1 - SHARE_OF_STEPS}, "upper": {"gpu": SHARE_OF_STEPS}}
    )
    return config.model_copy(update={"resources": resources})


def check_room(config: ExperimentConfig, alone: bool) -> None:
    """Whether there are nodes with what a training and an upper-level step ask for; on a cluster one may join later.

    alone: none will join.

    Raises:
        ConfigError: this machine, alone, has not that much.
    """
    lower = [asked_by(task_options(bundle)) for bundle in bundles(config)]
    upper = [asked_by(task_options(config.upper_resources))]
    for key, what, asked in (("lower", "a training", lower), ("upper", "an upper-level step", upper)):
        if not any(asked) or trainings_that_fit(asked) > 0:
            continue
        wanted = " + ".join(", ".join(f"{name}: {n:g}" for name, n in bundle.items()) for bundle in asked)
        text = f"resources.{key}: {what} asks for {{{wanted}}}"
        if alone:
            has = ray.cluster_resources()
            there = ", ".join(f"{name}: {has.get(name, 0.0):g}" for name in sorted(summed(asked)))
            raise ConfigError(f"{text}, this machine has {{{there}}}; ask for less, or join a cluster by --address")
        logger.warning("%s, which no node of the cluster has; it waits for one that joins", text)


def reuses_processes(config: ExperimentConfig) -> bool:
    """Whether idle processes are kept for the next trials: none that has a GPU, or anything that steps ask for, for
    which one may be waiting, and none where trials are to be tried again, as Tune (2.60) gives a trial up whose process
    died idle, e.g. with its node."""
    held = {name for bundle in bundles(config) for name in asked_by(task_options(bundle))}
    asked = asked_by(task_options(config.upper_resources)).keys()
    return "GPU" not in held and not held & asked and config.search.max_failures == 0


def first_bundle(config: ExperimentConfig) -> dict[str, float]:
    """What the process of a training holds, by Tune's names."""
    return bundles(config)[0]


def bundles(config: ExperimentConfig) -> list[dict[str, float]]:
    """What each process of a training holds, by Tune's names."""
    lower = config.lower_resources
    each = lower.bundles if isinstance(lower, BundlesConfig) else [lower]
    return [{by_tune(name): amount for name, amount in bundle.items()} for bundle in each]


def by_tune(name: str) -> str:
    """Tune's name of a resource."""
    return name.lower() if name in ("CPU", "GPU") else name


@contextmanager
def cluster(address: str | None, cpus: int | None = None) -> Iterator[bool]:
    """A cluster to run on: the one that this process has joined already, the one at `address`, or a local one. Whether
    it is the last, which no other machine will join.

    cpus: of the local one; by default all.
    """
    if ray.is_initialized():
        yield False
        return
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: over Ray Client the search runs in a process that this command does not see; "
            "submit the command to the cluster by `ray job submit`"
        )
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray").setLevel(logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # on Ctrl-C it gives advice for a script, not for a command
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is None:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    else:
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise ConfigError(f"--address {address}: {str(error).splitlines()[0]}") from error
    try:
        with sigterm_as_ctrl_c():
            yield address is None
    finally:
        ray.shutdown()


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Tune saves the experiment on SIGINT only; schedulers of clusters send SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
