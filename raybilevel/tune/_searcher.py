"""The Ray Tune searcher: trials are lower-level trainings, upper-level steps run on Ray as well."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import ray
from ray.tune import PlacementGroupFactory
from ray.tune.search import Searcher
from ray.tune.utils.util import flatten_dict

from raybilevel._cluster.pace import Pace
from raybilevel._cluster.resources import bundles_of, most_slots, step_options, trainings_that_fit
from raybilevel._cluster.sent_state import SentState
from raybilevel._cluster.shared import Shared
from raybilevel._cluster.step_call import SharedBySteps, StepCall
from raybilevel._cluster.step_dispatch import NOTHING, StepDispatch
from raybilevel._cluster.storage import Storage
from raybilevel._lower.levels import check_problem
from raybilevel._metrics import FINISHED, GRADIENT, PASSES, TRIAL_PATH
from raybilevel._tune_changes.idle_tune import go_on_while_idle, tune_is_idle
from raybilevel._tune_changes.trial_failures import keep_to_the_trial
from raybilevel.errors import ConfigError, RaybilevelError, SpaceError, StateError
from raybilevel.hypergradient._variables import check_upper_variables
from raybilevel.methods import make_method
from raybilevel.methods._base import Method, UpperResult
from raybilevel.methods._default import Default
from raybilevel.methods._hypergradient import MOST_MODELLED, HypergradientDescent, start_points
from raybilevel.problem import BilevelProblem
from raybilevel.search import _state_file as state_file
from raybilevel.search._optimizer import BilevelOptimizer, Observation
from raybilevel.search_state import SearchState, Training
from raybilevel.space import STARTS, Space, check_points, flatten, nest
from raybilevel.tune import _snapshot as snapshot
from raybilevel.tune._domains import split_param_space
from raybilevel.tune._trainable import checkpoint_path

logger = logging.getLogger(__name__)

UPPER_LOSS = "upper_loss"
FAILED_STEPS_IN_A_ROW = 3
SECONDS_OF_SILENCE = 30.0
SECONDS_BETWEEN_QUESTIONS = 0.9
QUESTIONS_OF_IDLE_TUNE = 60
SECONDS_BETWEEN_LOOKS = 5.0


class BilevelSearch(Searcher):  # type: ignore[misc]
    """Bilevel hyperparameter search for `tune.run` and `tune.Tuner`, with `lower_level_trainable(problem)`.

        tune.Tuner(
            lower_level_trainable(problem),
            param_space={"weight_decay": {"fc1": tune.loguniform(1e-6, 1e1), "fc2": tune.loguniform(1e-6, 1e1)}},
            tune_config=tune.TuneConfig(
                search_alg=BilevelSearch(problem), metric="upper_loss", mode="min", num_samples=40, reuse_actors=True
            ),
        ).fit()

    problem: what is searched, the same as the trainable's.
    space: the search space, for those who do not give it to Tune as `param_space`.
    metric, mode: likewise; "upper_loss" and "min" unless given. Another metric is searched by its values alone, as
        hypergradients are those of the upper-level loss.
    method: "default", "paper" (arXiv:2208.12118), "hypergradient" (with `hypergradient_trainable`: a trial is a whole
        descent), or a method object with settings of your own.
    seed: of everything the search draws.
    max_concurrent: trainings and upper-level steps under way at once; by default as many trainings as fit into the
        cluster at the time, but no more than a quarter of `num_samples` where that is over 16, nor than 16 where it is
        not: each new training is to use what others have found. A cluster that adds nodes on demand needs a number
        here: it adds none for a search that asks for no more than there is.
    lower_resources: what a training asks for, as `tune.with_resources` takes it, by which those that fit are counted;
        by default one GPU where the problem's device is "cuda", else one CPU.
    points_to_evaluate: configurations to train first, nested as the space is.
    upper_resources: Ray resources of an upper-level step, e.g. {"gpu": 0.5, "my_resource": 1}, or options of a Ray
        task ("scheduling_strategy", ...); by default one GPU where the problem's device is "cuda", else none: a step
        takes the place of a training, so it finds a CPU. With reuse_actors=True idle actors keep their GPUs; then
        leave a step its share, e.g. trainings {"gpu": 0.8}, steps {"gpu": 0.2}.
    storage_filesystem: the pyarrow filesystem of the experiment's storage, where it is not a local or shared folder.
    step_time_limit: seconds that an upper-level step may run; one that takes longer hangs, its process is ended, and
        after three more tries it counts as failed. None for no limit.

    Raises:
        ConfigError: an argument is wrong.
        SpaceError, ProblemError: before anything is trained, when the space becomes known.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        space: Mapping[str, Any] | None = None,
        metric: str | None = None,
        mode: str | None = None,
        method: str | Method = "default",
        seed: int = 0,
        max_concurrent: int | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        upper_resources: Mapping[str, Any] | None = None,
        lower_resources: Mapping[str, float] | PlacementGroupFactory | None = None,
        storage_filesystem: pyarrow.fs.FileSystem | None = None,
        step_time_limit: float | None = None,
    ) -> None:
        if not isinstance(problem, BilevelProblem):
            hint = "; pass an instance: BilevelSearch(MyProblem())" if isinstance(problem, type) else ""
            raise ConfigError(f"problem: expected a BilevelProblem, got {problem!r}{hint}")
        if mode not in (None, "min", "max"):
            raise ConfigError(f"mode must be 'min' or 'max', got {mode!r}")
        if max_concurrent is not None and max_concurrent < 1:
            raise ConfigError(f"max_concurrent must be at least 1, got {max_concurrent}")
        if step_time_limit is not None and not step_time_limit > 0:
            raise ConfigError(f"step_time_limit must be positive, got {step_time_limit}")
        super().__init__(metric=metric, mode=mode)
        self._metric: str | None = metric
        self._mode: str | None = mode
        self.problem = problem
        self.method: Method = make_method(method) if isinstance(method, str) else method
        self.seed = seed
        self._slots = self._own_slots = max_concurrent
        self._points = list(points_to_evaluate or ())
        self._resources = step_options(upper_resources, problem)
        self._bundles = bundles_of(lower_resources, problem)
        self._filesystem = storage_filesystem
        self._step_time_limit = step_time_limit
        self._optimizer: BilevelOptimizer | None = None
        self._constants: dict[str, Any] = {}
        self._checkpoints: dict[int, str] = {}
        self._folder = ""
        self._early: list[tuple[Mapping[str, Any], float | None]] = []
        self._samples: int | None = None
        self._most_slots = most_slots(0)
        self._completed: set[str] = set()
        self._resumed: set[str] = set()
        self._told_by_then = 0
        self._begin_session()
        if space is not None:
            self._set_up(space)

    def _begin_session(self) -> None:
        """What belongs to one run on one Ray."""
        keep_to_the_trial()
        go_on_while_idle()
        self._steps = StepDispatch()
        self._shared: ray.ObjectRef | None = None
        self._sent = SentState(ray.put)
        self._reported: dict[str, dict[str, Any]] = {}
        self._job: str | None = None
        self._failed_steps = self._without_hypergradient = 0
        self._failures: Counter[int] = Counter()
        self._pace = Pace()
        self._fatal: RaybilevelError | None = None
        self._made = time.time()
        self._idle_since = self._answered = time.monotonic()
        self._next_look = 0.0
        self._questions = 0
        self._moved = False

    # The contract with Tune.

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        self._samples = spec.get("num_samples")
        self._most_slots = most_slots(self._samples or 0)
        if self._optimizer is not None:  # from `space`, of an earlier run or restored by hand
            self._begin_run()
            return False
        self._metric = metric or self._metric
        self._mode = mode or self._mode
        if not config:
            return True
        self._set_up(config)
        return True

    def _begin_run(self) -> None:
        """Go on with what is known from an earlier run; nothing of that is under way any more."""
        if self._job == job_of_ray():
            self.cancel_steps()
        self._completed.clear()
        self._begin_session()
        optimizer = self._ready()
        optimizer.running.clear()
        optimizer.forget(self._pending())

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Tune's `max_concurrent_trials` or a `ConcurrencyLimiter`, in whose place the search keeps the limit.

        The limiter itself would forget after a crash which trials live: it saves its state later than the search does.
        """
        self._slots = min(max_concurrent, self._own_slots or max_concurrent)
        if self._optimizer is not None:
            self._optimizer.slots = self._slots
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        idle = tune_is_idle()
        if idle is None:  # Tune asks once a second then, else ten times
            idle = time.monotonic() - self._answered > SECONDS_BETWEEN_QUESTIONS
        self._questions = self._questions + 1 if idle else 0
        answer = self._suggest(trial_id)
        self._answered = time.monotonic()
        if answer is not None:
            self._questions = 0
        return answer

    def _suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        optimizer = self._ready()
        self._follow_session()
        self._follow_cluster()
        self._hear()
        self._find_lost()
        if self._fatal is not None:
            self.cancel_steps()
            raise self._fatal
        config = self._ask(trial_id)
        if config is not None:
            self._prepare_steps()
            return config
        before = len(self._steps)
        if self._moved and not self.state.pending and not optimizer.exhausted:
            optimizer.fill()
        self._launch()
        if optimizer.exhausted:
            self.cancel_steps()
            return str(Searcher.FINISHED)
        if len(self._steps) > before:
            self._hear()
        elif self._pace.short and optimizer.has_too_little_for_a_step and isinstance(self.method, Default):
            optimizer.fill()  # else Tune would end the process that is free
        return self._ask(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._heard_of(trial_id)
        self._reported[trial_id] = result
        self._follow_move(result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._heard_of(trial_id)
        reported = self._reported.pop(trial_id, None)
        if error and reported is not None and flatten_dict(dict(reported)).get(FINISHED, False):
            error, result = False, reported  # what failed came after the training
        elif result is None:
            result = reported  # a scheduler ended it while it was paused
        optimizer = self._optimizer
        if optimizer is None:
            return
        if trial_id not in optimizer.trials and not self._adopt(trial_id, reported_config(result)):
            logger.debug("ignoring trial %s, which this search did not suggest", trial_id)
            return
        self._tell(trial_id, None if error else result)
        self._completed.add(trial_id)
        self._collect()
        if self._samples is not None and len(self._completed) >= self._samples:
            self.cancel_steps()
        elif self._fatal is None:
            self._launch()

    def add_evaluated_point(
        self,
        parameters: Mapping[str, Any],
        value: float,
        error: bool = False,
        pruned: bool = False,
        intermediate_values: list[float] | None = None,
    ) -> None:
        """A configuration whose metric is known from elsewhere; it informs the model of F, not the value function."""
        if self._optimizer is None:
            self._early.append((parameters, None if error else value))
            return
        nested = unflatten(parameters)
        check_points([nested], self._optimizer.space, "evaluated points")
        observation = None if error else Observation(self._sign * float(value), complete=False)
        self._optimizer.add(f"evaluated-{len(self._optimizer.state.trainings)}", nested, observation)

    def save(self, checkpoint_path: str) -> None:
        optimizer = self._optimizer
        if optimizer is None:
            return
        state_file.write(
            checkpoint_path,
            state_file.SavedSearch(
                method=type(self.method).__name__,
                settings=state_file.as_json(asdict(self.method)),  # type: ignore[call-overload]
                seed=self.seed,
                slots=optimizer.slots,
                metric=self._metric or UPPER_LOSS,
                mode=self._mode or "min",
                parameters=optimizer.space.parameters,
                constants=json.dumps(self._constants, default=str),
                state=optimizer.state,
                trials=dict(optimizer.trials),
                queue=tuple(optimizer.queue),
                checkpoints=dict(self._checkpoints),
                memory=state_file.encode(optimizer.memory),
            ),
        )

    def restore(self, checkpoint_path: str) -> None:
        """Go on from a saved search.

        Tune calls this on a fresh searcher and would go on with a single trial if it raised; so a state that cannot
        be used is reported as an error in the log, and the search begins anew when Tune gives it the space.
        """
        if not self._restored(checkpoint_path):
            logger.error("the search could not be restored and begins anew")

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Tune's periodic save; the state before is kept as well, and a copy of Tune's own snapshot.

        Tune has just written that, and will write over it while a thread copies it to the storage.
        """
        snapshot.keep_previous(Path(checkpoint_dir, self.CKPT_FILE_TMPL.format(session_str)))
        snapshot.keep_previous(Path(checkpoint_dir, f"{snapshot.EXPERIMENT_STATE}{session_str}.json"))
        super().save_to_dir(checkpoint_dir, session_str)

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Go on from the newest state in a folder that can be read, and from what Tune's snapshot beside it knows.

        Trials of the snapshot that the state does not know, or of whose end it has not heard, are added to it: nothing
        that was observed is lost with a state file, at most the upper-level steps in it. Trials that the snapshot does
        not know will never report, so their points are asked again.
        """
        there = snapshot.synced(Path(checkpoint_dir).glob("*" + self.CKPT_FILE_TMPL.format("*")), self._made)
        newest_first = [
            path
            for current in sorted({path.name.removeprefix(snapshot.PREVIOUS) for path in there})[::-1]
            for path in (Path(checkpoint_dir, current), Path(checkpoint_dir, snapshot.PREVIOUS + current))
            if path in there
        ]
        used = next((path for path in newest_first if self._restored(path)), None)
        if used is None:
            logger.error("no state of the search can be read in %s; it begins anew", checkpoint_dir)
        elif used != newest_first[0]:
            logger.error("the search goes on from an older state, %s", used)
        records = snapshot.read_trials(checkpoint_dir, self._made)
        if records is not None and self._optimizer is not None:
            self._reconcile(records, report=used is None or used != newest_first[0])

    # What else it shows.

    @property
    def state(self) -> SearchState:
        """Every training and upper-level step so far."""
        return self._optimizer.state if self._optimizer is not None else SearchState()

    @property
    def space(self) -> Space:
        return self._ready().space

    @property
    def exhausted(self) -> bool:
        """The method has nothing more to propose."""
        return self._optimizer is not None and self._optimizer.exhausted

    def index_of(self, trial_id: str) -> int | None:
        """The training that a trial is."""
        return self._ready().trials.get(trial_id)

    @property
    def constants(self) -> Mapping[str, Any]:
        return self._constants

    @property
    def steps_under_way(self) -> int:
        return len(self._steps)

    def cancel_steps(self, timeout: float = 0.0) -> None:
        """Cancel upper-level steps under way; they are planned again if the search goes on.

        For the end of a run, so that no step reads a storage that may be gone, or holds a GPU. The search does it by
        itself after the last of Tune's `num_samples` trials, a number that it does not know after a restore. Their
        processes end with them.

        timeout: seconds to wait for their ends.
        """
        self._pace.steps_cancelled()
        self._steps.cancel(timeout)
        if self._optimizer is not None:
            self._optimizer.running.clear()

    def checkpoint_of(self, training: Training) -> str | None:
        """Where a training's weights lie on the experiment's filesystem."""
        return self._checkpoints.get(training.index)

    def config_of(self, training: Training) -> dict[str, Any]:
        """A training's hyperparameters, nested as the space is."""
        return self._ready().config_of(training)

    # How it works.

    @property
    def _sign(self) -> float:
        return -1.0 if self._mode == "max" else 1.0

    def _ready(self) -> BilevelOptimizer:
        if self._optimizer is None:
            raise SpaceError(
                "BilevelSearch has no search space yet; pass param_space to tune.Tuner (config to tune.run), or space "
                "to BilevelSearch"
            )
        return self._optimizer

    def _set_up(self, param_space: Mapping[str, Any]) -> None:
        space, constants = split_param_space(param_space)
        metric, mode = self._metric or UPPER_LOSS, self._mode or "min"
        if metric == UPPER_LOSS and mode == "max":
            raise ConfigError("mode='max' with metric='upper_loss': the upper-level loss is minimised; use mode='min'")
        if space == STARTS:
            check_upper_variables(self.problem, constants)
            self._points = [*self._points, *start_points()]
        else:
            check_problem(self.problem, space, constants)
        check_points(self._points, space)
        if metric != UPPER_LOSS:
            if not isinstance(self.method, Default):
                raise ConfigError(f"this method searches 'upper_loss' only, not metric={metric!r}")
            logger.warning(
                "searching %r by its values alone: hypergradients are those of 'upper_loss', not of this metric", metric
            )
            self.method = replace(self.method, hypergradients=False)
        if space.dimension > MOST_MODELLED and not isinstance(self.method, HypergradientDescent):
            logger.warning(
                "%d hyperparameters are many for a model of the value function; method='hypergradient' with "
                "hypergradient_trainable follows gradients without one", space.dimension,
            )  # fmt: skip
        self._metric, self._mode, self._constants = metric, mode, constants
        slots = self._slots or self._slots_of_cluster()
        self._optimizer = BilevelOptimizer(space, self.method, self.seed, slots, self._points)
        for parameters, value in self._early:
            self.add_evaluated_point(parameters, value if value is not None else 0.0, error=value is None)
        self._early = []

    def _restored(self, path: str | Path) -> bool:
        try:
            self._load(state_file.read(path))
        except RaybilevelError as error:
            logger.error("%s cannot be used: %s", path, error)
            return False
        return True

    def _reconcile(self, records: Sequence[snapshot.TrialRecord], report: bool) -> None:
        """Hear from Tune's snapshot what the saved search missed, in the order in which it happened."""
        optimizer = self._ready()
        heard = 0
        for record in records:
            if record.trial not in optimizer.trials:
                heard += self._adopt(record.trial, record.config)
        over = [r for r in records if r.status in ("TERMINATED", "ERROR") and r.trial in optimizer.trials]
        for record in sorted(over, key=lambda record: record.result.get("timestamp", 0)):
            before = optimizer.state.trainings[optimizer.trials[record.trial]].status
            ended = record.status == "TERMINATED"
            if before in ("pending", "lost") or (before == "failed" and ended):  # it was tried again
                self._tell(record.trial, record.result if ended else None)
                heard += 1
        known = {record.trial for record in records}
        optimizer.forget([trial for trial in self._pending() if trial not in known])
        self._look_around()
        if heard or report:
            logger.warning(
                "%d trials or results were taken over from Tune's snapshot; the search knows %d trainings and %d "
                "upper-level steps", heard, len(optimizer.state.trainings), len(optimizer.state.steps),
            )  # fmt: skip

    def _adopt(self, trial_id: str, config: Mapping[str, Any]) -> bool:
        """Know of a trial that the search does not remember; False if its config is no point of the space."""
        optimizer = self._ready()
        try:
            if not optimizer.space.contains(config):
                return False
        except SpaceError:
            return False
        optimizer.adopt(trial_id, config)
        return True

    def _load(self, saved: state_file.SavedSearch) -> None:
        if saved.method != type(self.method).__name__:
            raise StateError(f"the state is of method {saved.method}, this search is of {type(self.method).__name__}")
        space = Space(saved.parameters)
        if self._optimizer is None:
            self._constants = json.loads(saved.constants)
        elif self._optimizer.space != space:  # the constants are what they are: JSON would make lists of tuples
            raise StateError(
                f"the state is of the space {', '.join(map(str, space.parameters))}; this search is of "
                f"{', '.join(map(str, self._optimizer.space.parameters))}"
            )
        self._metric, self._mode, self.seed = saved.metric, saved.mode, saved.seed
        if isinstance(self.method, Default) and saved.metric != UPPER_LOSS:
            self.method = replace(self.method, hypergradients=False)
        optimizer = BilevelOptimizer(space, self.method, saved.seed, self._slots or saved.slots)
        self._most_slots = max(self._most_slots, saved.slots)
        optimizer.state = saved.state
        optimizer.trials = dict(saved.trials)
        optimizer.queue.clear()
        optimizer.queue.extend(saved.queue)
        optimizer.memory = state_file.decode(saved.memory)
        self._checkpoints = dict(saved.checkpoints)
        self._optimizer = optimizer
        self._look_around()

    def _look_around(self) -> None:
        """After a restore: which trials are to give a word, see `_find_lost`; where the experiment's folder was, and
        whether it is still there."""
        self._resumed = set(self._pending())
        self._told_by_then = len(self.state.told) + len(self._resumed)
        self._folder = next((path.rsplit("/", 2)[0] for path in self._checkpoints.values()), "")
        self._moved = bool(self._folder) and not self._is_there(self._folder)

    def _pending(self) -> list[str]:
        """Trials that are under way, as far as the search knows."""
        optimizer = self._ready()
        pending = {training.index for training in optimizer.state.pending}
        return [trial for trial, index in optimizer.trials.items() if index in pending]

    def _heard_of(self, trial_id: str) -> None:
        self._resumed.discard(trial_id)
        self._questions, self._idle_since = 0, time.monotonic()

    def _ask(self, trial_id: str) -> dict[str, Any] | None:
        """A trial's hyperparameters; None while there are none, or no slot for one more trial."""
        optimizer = self._ready()
        if optimizer.full and trial_id not in optimizer.trials:
            return None
        return optimizer.ask(trial_id)

    def _tell(self, trial_id: str, result: Mapping[str, Any] | None) -> None:
        optimizer = self._ready()
        index = optimizer.trials[trial_id]
        observation = self._observation(trial_id, result)
        optimizer.tell(trial_id, observation)
        if observation is not None and observation.complete and result is not None:
            self._pace.trained(float(result.get("time_total_s", 0.0)), int(result.get("training_iteration", 1)))
            path = checkpoint_path(result)
            if path is not None:
                self._checkpoints[index] = path
        if optimizer.state.trainings[index].status == "failed":
            logger.warning("trial %s failed or has no finite result; the search goes on without it", trial_id)

    def _observation(self, trial_id: str, result: Mapping[str, Any] | None) -> Observation | None:
        """A trial's last result in the terms of the search; None where it has nothing to say."""
        if result is None:
            return None
        flat = flatten_dict(dict(result))
        metric = self._metric or UPPER_LOSS
        if metric not in flat or "lower_loss" not in flat:
            missing = metric if metric not in flat else "lower_loss"
            text = f"trial {trial_id} reported no {missing!r}; is its trainable lower_level_trainable(problem)?"
            if metric in flat and not self.state.done:
                self._fatal = RaybilevelError(f"{text} A Repeater passes on means of the metric alone")
            logger.error("%s It counts as failed", text)
            return None
        upper, passes = self._sign * float(flat[metric]), float(flat.get(PASSES, 0.0))
        if not flat.get(FINISHED, False):
            return Observation(upper, passes=passes, complete=False)
        space = self._ready().space
        gradient = {name: float(flat.get(f"{GRADIENT}/{name}", 0.0)) for name in space.names}
        unit = space.to_unit_gradient(self._ready().config(trial_id), gradient)
        return Observation(upper, float(flat["lower_loss"]), tuple(unit.tolist()), passes)

    def _launch(self) -> None:
        """Start upper-level steps while there are free slots and something to do; none while it is not known where the
        checkpoints are."""
        if self._moved:
            return
        optimizer = self._ready()
        while (step := optimizer.plan()) is not None:
            for index in step.targets:
                if index not in self._checkpoints:
                    logger.warning("training %d left no checkpoint; its hypergradient is left out", index)
                    optimizer.leave_out(index)
            step = replace(step, targets=tuple(index for index in step.targets if index in self._checkpoints))
            paths = {index: self._checkpoints[index] for index in step.targets}
            self._pace.step_begun(step.number)
            try:
                newest, blocks = self._sent.parts(step.state)
                call = StepCall(replace(step, state=newest), paths, optimizer.memory, self._step_time_limit)
                self._steps.begin(self._resources, call, self._share(), blocks)
            except ray.exceptions.RayError as error:  # the object store is full, for instance
                self._end_step(step.number, error)

    def _share(self) -> ray.ObjectRef:
        """What all steps need, in the object store."""
        if self._shared is None:
            shared = SharedBySteps(
                Shared(self.problem), self._ready().space, self._constants, self.method, self._filesystem
            )
            self._shared = ray.put(shared)
        return self._shared

    def _prepare_steps(self) -> None:
        """Start a process for the first step beside the first trainings, where it takes no resources from them."""
        steps = not isinstance(self.method, HypergradientDescent)
        if self._shared is None and steps and ray.is_initialized() and self._resources == NOTHING:
            self._steps.prepare(self._share())

    def _hear(self) -> None:
        """Hear of finished steps, and wait for one that is worth it where there is no next training.

        With no live trial Tune sleeps a second after a None, so then some wait costs nothing.
        """
        if not self._steps:
            return
        if self._ready().queue:
            self._collect()
            return
        idle = not self.state.pending
        until = time.monotonic() + max(self._pace.patience(self._ready().slots), 0.9 if idle else 0.0)
        while True:  # not in one go, so that Ctrl-C is heard
            self._collect(timeout=min(0.5, max(0.0, until - time.monotonic())))
            if not self._steps or self._ready().queue or time.monotonic() >= until:
                break
        if idle:
            self._warn_of_starvation()

    def _collect(self, timeout: float = 0.0) -> None:
        """Hear of finished upper-level steps."""
        for number, found in self._steps.ended(timeout):
            self._end_step(number, found)

    def _end_step(self, number: int, found: UpperResult | Exception) -> None:
        """What is fatal is raised where a trial is asked for: at a trial's end Tune would take it for that trial's."""
        self._pace.step_ended(number)
        optimizer = self._ready()
        step = optimizer.running.get(number)
        result = found if isinstance(found, UpperResult) else None
        optimizer.tell_step(number, result)
        if result is not None:
            reason = "; ".join(result.unreadable.values())
            for index in result.unreadable:
                logger.error("the hypergradient of training %d is left out: %s", index, result.unreadable[index])
            self._failed_steps = 0
            if result.hypergradients:
                none_read = len(result.unreadable) == len(result.hypergradients)
                self._without_hypergradient = self._without_hypergradient + 1 if none_read else 0
        else:
            reason = self._reason(found)
            logger.error("upper-level step %d failed; a space-filling point takes its place: %s", number, reason)
            targets = step.targets if step is not None else ()
            self._failed_steps += 1
            self._without_hypergradient += bool(targets)
            self._failures.update(targets)
            for index in targets:
                if self._failures[index] > 1:
                    optimizer.leave_out(index)
        if max(self._failed_steps, self._without_hypergradient) >= FAILED_STEPS_IN_A_ROW:
            self._fatal = RaybilevelError(
                f"{FAILED_STEPS_IN_A_ROW} upper-level steps in a row failed or found no checkpoint that could be read; "
                f"the search would be a random one. The last error: {reason}"
            )

    def _reason(self, failure: object) -> str:
        limit = self._step_time_limit
        lost = isinstance(failure, ray.exceptions.RayError) and limit is not None
        return f"{failure}" + (f"; a step that takes longer than {limit:g} s loses its process, too" if lost else "")

    def _is_there(self, folder: str) -> bool:
        parent, _, name = folder.rpartition("/")
        try:
            return Storage(self._filesystem or pyarrow.fs.LocalFileSystem(), parent).exists(name)
        except pa.ArrowInvalid:
            return False  # a path of another kind of storage
        except (pa.ArrowException, OSError):
            return True  # steps will say what is wrong with it

    def _follow_move(self, result: Mapping[str, Any]) -> None:
        """The folder of a restored experiment may be elsewhere by now; Tune moves its own paths along, and the next
        report of a training says where it is."""
        folder, _, trial = str(result.get(TRIAL_PATH, "")).rpartition("/")
        self._moved = self._moved and not trial
        before, self._folder = self._folder, folder if trial else self._folder
        if self._folder == before or not before:
            return
        self._checkpoints = {
            index: self._folder + path.removeprefix(before) if path.startswith(f"{before}/") else path
            for index, path in self._checkpoints.items()
        }

    def _follow_session(self) -> None:
        """Tune says nothing of another run, on another Ray, where it has no space to tell."""
        job = job_of_ray()
        if self._job not in (None, job):
            self._begin_run()
        self._job = job

    def _follow_cluster(self) -> None:
        """Without a given number of slots, nodes that join or leave change it."""
        if self._slots is None and ray.is_initialized() and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
            self._ready().slots = self._slots_of_cluster()

    def _slots_of_cluster(self) -> int:
        return max(1, min(self._most_slots, trainings_that_fit(self._bundles)))

    def _warn_of_starvation(self) -> None:
        if self._steps and time.monotonic() - self._idle_since > SECONDS_OF_SILENCE:
            self._idle_since = time.monotonic()
            logger.warning(
                "nothing but %d upper-level steps (%s) has been under way for %.0f s; if they wait for resources that "
                "an idle trial's process holds, leave out reuse_actors=True, or leave them a share, e.g. trainings "
                "{'gpu': 0.8} and upper_resources={'gpu': 0.2} where there is one GPU", len(self._steps),
                self._resources, SECONDS_OF_SILENCE,
            )  # fmt: skip

    def _find_lost(self) -> None:
        """Give up trials that nobody runs, of which Tune says nothing; a late result of theirs would still count.

        All that are under way where Tune has had nothing to run for a minute. Of those under way at a restore, which
        Tune may have been told to leave out, those still silent when more trainings have ended than there were of them
        and two for each slot: there may be fewer slots than before, and some may still be in Tune's queue.
        """
        if self._questions > QUESTIONS_OF_IDLE_TUNE:
            lost = self._pending()
        elif self._resumed and len(self.state.told) - self._told_by_then > 2 * self._ready().slots:
            lost = [trial for trial in self._pending() if trial in self._resumed]
        else:
            return
        self._resumed.clear()
        for trial in lost:
            logger.warning("nobody runs trial %s; its point is trained again", trial)
            self._ready().lose(trial)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without what belongs to one Ray session. Steps under way are planned again."""
        session = type(self).__new__(type(self))
        session._begin_session()
        kept = {name: value for name, value in self.__dict__.items() if name not in session.__dict__}
        if self._optimizer is not None:
            kept["_optimizer"] = self._optimizer.without_running()
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_session()


def job_of_ray() -> str | None:
    """Ray's name for what this process does on the cluster that it has joined."""
    if not ray.is_initialized():
        return None
    job: str = ray.get_runtime_context().get_job_id()
    return job


def reported_config(result: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config that Tune adds to every result, whether it is nested or flat."""
    config = unflatten(result or {}).get("config", {})
    return config if isinstance(config, dict) else {}


def unflatten(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Tune hands evaluated points over flat ("a/b") or nested; nested is what the space reads."""
    return nest({tuple(key for part in path for key in part.split("/")): v for path, v in flatten(parameters).items()})
