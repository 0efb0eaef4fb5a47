"""The Ray Tune searcher: trials are lower-level trainings, upper-level steps run on Ray as well."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
from ray.tune import PlacementGroupFactory
from ray.tune.search import Searcher

from raybilevel._cluster.identity import identity_of
from raybilevel._cluster.pickling import check_can_be_sent
from raybilevel._cluster.resources import bundles_of, step_options
from raybilevel._cluster.shared import Shared
from raybilevel._cluster.step_call import SharedBySteps
from raybilevel._define_by_run import SpaceFunction
from raybilevel._lower.checkpoint import without_numpy
from raybilevel._metric_bounds import Bounds, read_bounds
from raybilevel._metrics import LOWER_LOSS
from raybilevel._objectives import Others, split
from raybilevel._tune_changes.placeholders import filled, table_of_tune_run, take_over
from raybilevel.errors import ConfigError, RaybilevelError
from raybilevel.methods import Method, make_method
from raybilevel.problem import BilevelProblem
from raybilevel.search import BilevelOptimizer
from raybilevel.search import _state_file as state_file
from raybilevel.search._calls import HyperparameterNotGivenError
from raybilevel.space import flatten, nest
from raybilevel.tune._checkpoints import Checkpoints
from raybilevel.tune._earlier import BeginsFromEarlier, evaluated
from raybilevel.tune._points import reported_config, trained_in_the_space
from raybilevel.tune._results import MetricError, Objective, ran_to_its_end
from raybilevel.tune._resume import ResumableSearcher, adopt_records, check_saved
from raybilevel.tune._runs import FollowsRuns
from raybilevel.tune._saved_space import pack, unpack
from raybilevel.tune._session import Session
from raybilevel.tune._setup import method_for, other_objective, set_up, warn_of_another_problem, warn_of_stops
from raybilevel.tune._slots import Slots
from raybilevel.tune._snapshot import TrialRecord
from raybilevel.tune._steps import StepRunner

logger = logging.getLogger(__name__)


class BilevelSearch(FollowsRuns, BeginsFromEarlier, ResumableSearcher):
    """Bilevel hyperparameter search for `tune.run` and `tune.Tuner`, with `lower_level_trainable(problem)`.

        tune.Tuner(
            lower_level_trainable(problem),
            param_space={"weight_decay": {"fc1": tune.loguniform(1e-6, 1e1), "fc2": tune.loguniform(1e-6, 1e1)}},
            tune_config=tune.TuneConfig(
                search_alg=BilevelSearch(problem), metric="upper_loss", mode="min", num_samples=40, reuse_actors=True
            ),
        ).fit()

    problem: what is searched, the same as the trainable's.
    space: the search space, for those who do not give it to Tune as `param_space`; or a define-by-run function, which
        asks a trial for its hyperparameters, as `OptunaSearch` takes it.
    metric, mode: likewise; the problem's `upper_metric`, which is "upper_loss", and "min" unless given. A metric other
        than F is searched by its values alone, as hypergradients are those of F. A list of metrics, with a list of
        modes, searches their Pareto front (`pareto_front`): then Tune is given neither. Hypergradients serve the first.
    method: "default", "paper" (arXiv:2208.12118), "hypergradient" (with `hypergradient_trainable`: a trial is a whole
        descent), or a method object with settings of your own.
    seed: of everything the search draws.
    max_concurrent: trainings and upper-level steps under way at once. By default as many trainings as fit into the
        cluster at the time, at most 16 or a quarter of `num_samples`, whichever is more: each new training is to use
        what others have found. A cluster that adds nodes on demand needs a number here: it adds none for a search that
        asks for no more than there is.
    lower_resources: what a training asks for, as `tune.with_resources` takes it, by which those that fit are counted;
        by default one GPU where the problem's device is "cuda", else one CPU.
    points_to_evaluate: configurations to train first, nested as the space is.
    evaluated_rewards: the metric at each of `points_to_evaluate`, which are not trained then. The model of F has them.
    upper_resources: Ray resources of an upper-level step, e.g. {"gpu": 0.5, "my_resource": 1}, or options of a Ray
        task ("scheduling_strategy", ...); by default one GPU where the problem's device is "cuda", else none: a step
        takes the place of a training, so it finds a CPU. With reuse_actors=True idle workers keep their GPUs. Then
        leave a step its share, e.g. trainings {"gpu": 0.8}, steps {"gpu": 0.2}.
    storage_filesystem: the pyarrow filesystem of the experiment's storage, where it is not a local or shared folder.
    constraints: bounds on metrics that trials report, e.g. {"latency_ms": "<= 5", "recall": ">= 0.9"}. The best is the
        best of the trainings that keep them all; see `Training.feasible`. A trial that was stopped early and has not
        reported them is not known to.
    priors: where you expect the optimum, nested as the space is: of a number a value and a standard deviation, e.g.
        {"lr": (1e-3, 0.5)}, in decades on a logarithmic scale; of a choice a weight for each of its values.
    step_time_limit: seconds that an upper-level step may run. One that runs for longer is treated as hung: its
        worker is killed, and after three retries it counts as failed. None for no limit.

    Raises:
        ConfigError: an argument is wrong.
        ProblemError: the problem cannot be pickled.
        SpaceError, ProblemError: before anything is trained, when the space becomes known.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        space: Mapping[str, Any] | SpaceFunction | None = None,
        metric: str | Sequence[str] | None = None,
        mode: str | Sequence[str] | None = None,
        method: str | Method = "default",
        seed: int = 0,
        max_concurrent: int | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        upper_resources: Mapping[str, Any] | None = None,
        lower_resources: Mapping[str, float] | PlacementGroupFactory | None = None,
        storage_filesystem: pyarrow.fs.FileSystem | None = None,
        step_time_limit: float | None = None,
        evaluated_rewards: Sequence[float] | None = None,
        constraints: Mapping[str, str] | None = None,
        priors: Mapping[str, Any] | None = None,
    ) -> None:
        metric, mode, self._others = split(metric, mode)
        check_arguments(problem, mode, max_concurrent, step_time_limit)
        super().__init__(metric=metric, mode=mode)
        self._metric: str | None = metric
        self._mode: str | None = mode
        self.problem = problem
        self._identity = identity_of(problem)
        self.method: Method = make_method(method) if isinstance(method, str) else method
        self.seed = seed
        self._space, self._objective_given = space, metric is not None or mode is not None
        self._points = [without_numpy(point) for point in points_to_evaluate or ()]
        self._step_options = step_options(upper_resources, problem)
        self._step_time_limit = step_time_limit
        self._filesystem = storage_filesystem
        self._bounds, self._priors = read_bounds(constraints), priors or {}
        self._slots = Slots(max_concurrent, bundles_of(lower_resources, problem))
        self._checkpoints = Checkpoints(storage_filesystem)
        self._optimizer: BilevelOptimizer | None = None
        self.constants: Mapping[str, Any] = {}
        self._not_given: HyperparameterNotGivenError | None = None
        self._early = []
        if evaluated_rewards is not None:
            self._early, self._points = evaluated(self._points, evaluated_rewards), []
        self._samples: int | None = None
        self._completed: set[str] = set()
        self._begin_session()
        if space is not None:
            try:
                self._set_up(space)
            except HyperparameterNotGivenError as error:  # Tune's `param_space` may have it, as a constant
                self._not_given = error

    def _begin_session(self) -> None:
        """What belongs to one run on one Ray."""
        self._session = Session(StepRunner(self._shared_by_steps, self._step_options, self._step_time_limit))

    # The contract with Tune.

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        self._samples = spec.get("num_samples")
        self._slots.begin_run(self._samples)
        if self._optimizer is not None or self._not_given is not None:  # from `space`, an earlier run, or by hand
            self._take(metric, mode, config or {})
            self._begin_run()
            return False
        asked = Objective(metric or self._metric or self.problem.upper_metric, mode or self._mode or "min")
        if self._objective_given and asked != self._objective:
            raise ConfigError(other_objective(asked, self._objective))
        self._metric, self._mode = metric or self._metric, mode or self._mode
        if config:
            self._set_up(config)
        return True

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Tune's `max_concurrent_trials` or a `ConcurrencyLimiter`, in whose place the search keeps the limit.

        The limiter itself would forget after a crash which trials live: it saves its state later than the search does.
        """
        limit = self._slots.limit_to(max_concurrent)
        if self._optimizer is not None:
            self._optimizer.slots = limit
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        run = self._follow_run()
        self._session.lost.asked(run.idle if run is not None else None)
        # A search in which a training has succeeded is not ended for failures.
        if run is not None and not self.state.measured and (error := self._session.failures.always(run.error_file)):
            self._session.fatal = error
        answer = self._suggest(trial_id)
        self._session.lost.answered(answer is not None)
        if isinstance(answer, dict) and self._space is not None:  # whose constants Tune does not know
            return nest({**flatten(self.constants), **flatten(answer)})
        return answer

    def _suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        optimizer = self._ready()
        session, steps = self._session, self._session.steps
        if self._slots.limit is None and session.should_check_cluster:
            optimizer.slots = self._slots.now
        # First of all: what a step proposes may be the next trial.
        steps.hear(optimizer)
        # Their configurations are the next to be asked for, so before `ask_if_free`.
        for lost in session.lost.find(optimizer):
            logger.warning("trial %s was lost; resubmitting its configuration", lost)
            optimizer.lose(lost)
        if session.fatal is not None:
            self.cancel_steps()
            raise session.fatal
        if (config := optimizer.ask_if_free(trial_id)) is not None:
            if self.method.upper_steps is not None:
                steps.prepare()
            return config
        if self._checkpoints.moved and not optimizer.state.pending and not optimizer.exhausted:
            optimizer.fill()  # whose trial will report where the folder is
        launched = steps.launch(optimizer, self._checkpoints)
        if optimizer.exhausted:
            self.cancel_steps()
            return str(Searcher.FINISHED)
        if launched:
            steps.hear(optimizer)
        elif steps.pace.short and self.method.fills_slots and optimizer.has_too_little_for_a_step:
            optimizer.fill()  # else Tune would end the worker that is free
        return optimizer.ask_if_free(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._session.heard_of(trial_id)
        # Kept, since Tune ends a paused trial without its result.
        self._session.reported[trial_id] = result
        self._checkpoints.follow(result)
        self._compare_problems(result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._follow_run()
        self._session.heard_of(trial_id)
        reported = self._session.reported.pop(trial_id, None)
        if error and reported is not None and ran_to_its_end(reported):
            error, result = False, reported  # what failed came after the training
        elif result is None:
            result = reported  # a scheduler ended it while it was paused
        self._compare_problems(result or {})
        if (optimizer := self._optimizer) is None:
            return
        if not optimizer.adopt(trial_id, reported_config(result)):
            logger.debug("ignoring trial %s, which this search did not suggest", trial_id)
            return
        self._tell(trial_id, None if error else result)
        self._completed.add(trial_id)
        # Without a wait: Tune has other events to handle.
        self._session.steps.collect(optimizer)
        if self._is_complete:
            self.cancel_steps()
        elif self._session.fatal is None and ray.is_initialized():  # a step would start a Ray of its own
            self._session.steps.launch(optimizer, self._checkpoints)

    def save(self, checkpoint_path: str) -> None:
        if self._optimizer is None:
            return
        saved = state_file.SavedSearch(
            **vars(self._optimizer.saved()),
            **asdict(self._objective),
            constants=json.dumps(self.constants, default=str),
            checkpoints=dict(self._checkpoints.paths),
            space=pack(self.space, self.constants),
            constraints=self._bounds,
            others=self._others,
        )
        state_file.write(checkpoint_path, saved)

    @property
    def made(self) -> float:
        return self._session.began

    def load(self, path: str | Path) -> None:
        saved = state_file.read(path)
        check_saved(
            saved, None if self._optimizer is None else self.space, self._metric, self._mode, self._bounds, self._others
        )
        # As `set_up` made it when that search began.
        method = method_for(self.method, self.problem, saved.metric)
        space, constants = None if self._optimizer is None else self.space, self.constants
        if space is None:  # else they are what they are
            constants = json.loads(saved.constants)
            if saved.space is not None:  # else all of it is in the other fields
                space, constants = unpack(saved.space)
        optimizer = BilevelOptimizer.from_saved(saved, method, self._slots.limit, space)
        self.constants = constants
        self._optimizer, self.method = optimizer, method
        self._metric, self._mode, self.seed = saved.metric, saved.mode, saved.seed
        self._slots.restore(saved.slots)
        self._checkpoints.paths = dict(saved.checkpoints)
        self._look_around()

    def catch_up(self, records: Sequence[TrialRecord]) -> int | None:
        if self._optimizer is None:
            return None
        heard = adopt_records(self._optimizer, records, self._tell)
        self._look_around()
        return heard

    def _look_around(self) -> None:
        """After a restore: which trials are to be heard of, and whether the experiment's folder is where it was."""
        optimizer = self._ready()
        self._session.lost.restored(optimizer.pending_trials, len(optimizer.state.told))
        self._checkpoints.look()

    def cancel_steps(self, timeout: float = 0.0) -> None:
        """Cancel upper-level steps under way; they are planned again if the search goes on.

        For the end of a run, so that no step reads a storage that may be gone, or holds a GPU. The search does it by
        itself at the end of a run of Tune. Their workers end with them.

        timeout: seconds to wait for their ends.
        """
        self._session.steps.cancel(timeout)
        if self._optimizer is not None:
            self._optimizer.running.clear()

    # How it works.

    def _set_up(
        self, param_space: Mapping[str, Any] | SpaceFunction, constants: Mapping[str, Any] | None = None
    ) -> None:
        """constants: beside those in `param_space`."""
        objective = self._objective
        table = table_of_tune_run()
        if table is not None and isinstance(param_space, Mapping):
            param_space = filled(param_space, table)
        if table is not None and constants:
            constants = filled(constants, table)
        found = set_up(
            self.problem,
            param_space,
            constants or {},
            objective,
            self.method,
            self._points,
            self._samples,
            self._bounds,
            self._others,
            self._priors,
        )
        # A space of the search's own is not in Tune's table, which has constants alone then.
        if table is not None and self._space is None:
            take_over(table, flatten(found.constants))
        self._metric, self._mode, self._not_given = objective.metric, objective.mode, None
        self.constants, self.method = found.constants, found.method
        self._optimizer = BilevelOptimizer(found.space, found.method, self.seed, self._slots.now, self._points)
        # Last, as it needs the space.
        self._take_earlier()

    def _shared_by_steps(self) -> SharedBySteps:
        method = self.method.upper_steps
        assert method is not None  # it has planned a step
        return SharedBySteps(Shared(self.problem), self.space, dict(self.constants), method, self._filesystem)

    def _compare_problems(self, result: Mapping[str, Any]) -> None:
        if not self._session.warned_of_another_problem:
            self._session.warned_of_another_problem = warn_of_another_problem(self.problem, self._identity, result)

    def _tell(self, trial_id: str, result: Mapping[str, Any] | None) -> None:
        """A trial's last result; None where it failed."""
        optimizer = self._ready()
        observation = cause = None
        if result is not None and not trained_in_the_space(optimizer, trial_id, result):
            result = None
        if result is not None and self.problem.own_loop:
            # A loop that was stopped before `conclude` reports what its user does.
            result = {LOWER_LOSS: math.nan, **result}
        try:
            if result is not None:
                unit = optimizer.state.trainings[optimizer.trials[trial_id]].unit
                observation = self._objective.observe(
                    trial_id, result, optimizer.space, unit, self._bounds, self._others
                )
        except MetricError as error:
            logger.error("%s It counts as failed", error)
            cause = str(error).removeprefix(f"trial {trial_id} ")
            if not optimizer.state.done and (fatal := always_missing(error, self._bounds, self._others)) is not None:
                self._session.fatal = fatal
        optimizer.tell(trial_id, observation)
        index = optimizer.trials[trial_id]
        if observation is not None and observation.complete and result is not None:
            seconds, reports = result.get("time_total_s", 0.0), result.get("training_iteration", 1)
            self._session.steps.pace.trained(float(seconds), int(reports))
            # Of whole trainings only: steps never descend from weights of a stopped one.
            self._checkpoints.add(index, result)
        if optimizer.state.trainings[index].status == "failed":
            logger.warning("trial %s failed or has no finite result; the search goes on without it", trial_id)
            self._session.failures.failed(trial_id, cause)
        if not self._session.warned_of_stops and self.method.upper_steps is not None:
            self._session.warned_of_stops = warn_of_stops(self.state, self.problem, self.method)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without what belongs to one Ray session. Steps under way are planned again."""
        optimizer = None if self._optimizer is None else self._optimizer.without_running()
        return {**self.__dict__, "_session": None, "_optimizer": optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_session()


def always_missing(error: MetricError, bounds: Bounds, others: Others) -> RaybilevelError | None:
    """The end of a search whose first trial lacks a metric that all will lack; None if others may have it."""
    if error.missing and error.metric == LOWER_LOSS:
        return RaybilevelError(f"{error} A Repeater passes on means of the metric alone")
    asked = {bound.metric for bound in bounds} | {other.metric for other in others}
    return error if error.missing and error.metric in asked else None


def check_arguments(
    problem: object, mode: str | None, max_concurrent: int | None, step_time_limit: float | None
) -> None:
    """What `BilevelSearch` refuses before anything else."""
    if not isinstance(problem, BilevelProblem):
        hint = "; pass an instance: BilevelSearch(MyProblem())" if isinstance(problem, type) else ""
        raise ConfigError(f"problem: expected a BilevelProblem, got {problem!r}{hint}")
    check_can_be_sent(problem)
    if mode not in (None, "min", "max"):
        raise ConfigError(f"mode must be 'min' or 'max', got {mode!r}")
    if max_concurrent is not None and max_concurrent < 1:
        raise ConfigError(f"max_concurrent must be at least 1, got {max_concurrent}")
    if step_time_limit is not None and not step_time_limit > 0:
        raise ConfigError(f"step_time_limit must be positive, got {step_time_limit}")
