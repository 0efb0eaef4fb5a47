"""A run from a config: trials and upper-level steps on Ray, then the refit and the summary."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console

from raybilevel._cluster.own_code import send_along
from raybilevel._cluster.storage import Storage, check_access, locate
from raybilevel._command.cluster import cluster
from raybilevel._command.folder import Options, keep, keep_options, prepare_folder
from raybilevel._command.gain import Ended, gains_over
from raybilevel._command.output import show
from raybilevel._command.progress import Shown, make_view
from raybilevel._command.refit import chosen_for_refit, loss_after_refit
from raybilevel._command.resources import check_room, with_room_for_steps
from raybilevel._command.trials import configuration, searcher_of, train_all, trial_results
from raybilevel._config.experiment import ExperimentConfig
from raybilevel._config.plan import Plan, resolve, this_machine
from raybilevel._lower.paired import Gains
from raybilevel._own_problem import file_of, is_own
from raybilevel._records.names import SUMMARY_FILE, TUNE_FOLDER
from raybilevel._records.shared_value import Compared
from raybilevel._records.summary import as_text, summary_of
from raybilevel.errors import RaybilevelError
from raybilevel.problem import BilevelProblem
from raybilevel.search_state import Training
from raybilevel.tune._searcher import BilevelSearch
from raybilevel.tune._snapshot import prepare_resume


class InterruptedRunError(RaybilevelError):
    """The run was stopped by Ctrl-C. Its results are kept, and `--resume` continues it."""


def run(
    config: ExperimentConfig,
    out: Path,
    data: str | None = None,
    resume: bool = False,
    address: str | None = None,
    storage: str | None = None,
    console: Console | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Run or resume an experiment in the folder `out`. Returns the summary, which is also written there.

    verbose: whether the view of the progress shows the inside of the method.

    address: of a Ray cluster; by default a local one is started.
    storage: a folder or URI for trials and checkpoints that every node sees; by default `out`. The config and the
        summary are kept there as well, so the run survives the loss of this machine: `resume` with another `out`
        continues it.

    Raises:
        ConfigError: the config, the folder or `resume` is wrong, or this machine lacks the resources; nothing was run.
        StorageError: the storage cannot be written, or nodes of the cluster do not see it; nothing was run.
        StateError: the state to resume is damaged beyond repair; nothing was run.
        InterruptedRunError: Ctrl-C, or SIGTERM.
    """
    local = address is None and not ray.is_initialized()
    # Before the folder and Ray: a mistake leaves nothing behind.
    plan = resolve(config, data, this_machine() if local else None)
    place = locate(storage or out)
    prepare_folder(out, plan.config, resume, place)
    # Absolute: `raybilevel resume` may be called in another directory.
    keep_options(Options(data and str(Path(data).expanduser().absolute()), address, storage), out, resume)
    console = console or Console()
    if is_own(plan.config.problem):
        send_along(type(plan.problem))
    began = time.monotonic()
    with cluster(address, say=functools.partial(show, console)) as alone:
        check_access(place)
        # Only on a cluster is it known how many GPUs there are.
        plan = with_room_for_steps(plan)
        check_room(plan.training, plan.step, alone)
        searcher = searcher_of(plan, place)
        if resume:
            prepare_resume(place.filesystem, f"{place.path}/{TUNE_FOLDER}")
        view = make_view(shown_of(plan, resume, verbose), console)
        analysis = train_all(plan, searcher, place, resume, view)
        told = len(searcher.state.told)
        if told < plan.trainings and not searcher.exhausted:
            # On SIGINT Tune saves its state and returns as if the run were complete.
            raise InterruptedRunError(f"stopped after {told} of {plan.trainings} trainings")
        if type(plan.problem).refit_batches is not BilevelProblem.refit_batches and not plan.space.of_starts:
            show(console, "training once more, on all data, with the best hyperparameters ...")
        summary = conclude(plan, searcher, analysis, place, began)
    # Last: a folder with a summary is that of a run that is done.
    keep(SUMMARY_FILE, as_text(summary), out, place)
    return summary


def shown_of(plan: Plan, resumed: bool, verbose: bool) -> Shown:
    """What the view of the progress shows of a plan."""

    def config_of(training: Training) -> dict[str, Any]:
        return plan.space.to_config(torch.tensor(training.unit, dtype=torch.double))

    title = f"{file_of(plan.config.problem)}: {plan.upper_level}, method {plan.config.search.method}"
    is_result = plan.method.descent is None
    return Shown(title, plan.trainings, resumed, config_of if is_result else None, verbose)


def conclude(plan: Plan, searcher: BilevelSearch, analysis: Any, place: Storage, began: float) -> dict[str, Any]:
    """Refit, and summarise a run that has ended.

    began: start of the run, by `time.monotonic`.
    """
    results = trial_results(searcher, analysis)
    best = searcher.method.incumbent(searcher.state)
    test_loss_refit, gains, for_refit = None, Gains(), None
    if best is not None and not plan.space.of_starts:
        gains = gains_of(plan, searcher, best, results, place)
        for_refit = chosen_for_refit(plan, configuration(searcher, best, results), searcher.state.shrinkage)
        test_loss_refit = loss_after_refit(plan, for_refit.config)
    return summary_of(
        searcher.state,
        plan.space,
        searcher.method,
        results,
        {t.index: path for t in searcher.state.done if (path := searcher.checkpoint_of(t))},
        {
            "problem": plan.config.problem,
            "method": plan.config.search.method,
            "seed": plan.seed,
            "constraints": dict(plan.constraints),
            "other_objectives": dict(plan.other_objectives),
        },
        test_loss_refit,
        time.monotonic() - began,
        gains,
        for_refit,
    )


def gains_of(
    plan: Plan, searcher: BilevelSearch, best: Training, results: Mapping[int, Mapping[str, Any]], place: Storage
) -> Gains:
    """Of the result, as far as there are checkpoints of what it is compared with."""
    compared = Compared.of(searcher.state, plan.space)
    ends = {
        training.index: Ended(configuration(searcher, training, results), path)
        for training in (best, *compared.beside(best))
        if (path := searcher.checkpoint_of(training)) is not None
    }
    result = ends.pop(best.index, None)
    if result is None or not ends:
        return Gains()
    return compared.gains(gains_over(plan, ends, result, place.filesystem))
