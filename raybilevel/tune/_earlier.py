"""Points whose metric is known from earlier work: a Tune experiment of any searcher, or an Optuna study."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import pyarrow as pa
import pyarrow.fs
from ray.tune.utils.util import flatten_dict

from raybilevel._cluster.storage import locate
from raybilevel._lower.checkpoint import without_numpy
from raybilevel._metric_bounds import Bounds
from raybilevel._metrics import FINISHED
from raybilevel._objectives import Others, split
from raybilevel.errors import ConfigError, DataError, SpaceError, StateError
from raybilevel.problem import BilevelProblem
from raybilevel.search import BilevelOptimizer, Observation
from raybilevel.space import check_points, check_values
from raybilevel.tune._points import unflatten
from raybilevel.tune._results import Objective
from raybilevel.tune._snapshot import EXPERIMENT_STATE, TrialRecord, parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """A configuration, nested or flat, and its metric as it was reported, with others beside it."""

    config: Mapping[str, Any]
    value: float
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def observation(self, objective: Objective, bounds: Bounds, others: Others = ()) -> Observation:
        """Not complete: without f and weights it is nothing for the model of v or a hypergradient."""

        def metric(name: str) -> float:
            value = self.metrics.get(name)
            return float(value) if value is not None and is_number(value) else math.nan

        excesses = tuple(bound.excess(metric(bound.metric)) for bound in bounds)
        minimised = tuple(other.minimised(metric(other.metric)) for other in others)
        return Observation(objective.sign * self.value, complete=False, excesses=excesses, others=minimised)


class Study(Protocol):
    """The part of `optuna.Study` that is read."""

    trials: Sequence[Any]
    directions: Sequence[Any]


def of_experiment(folder: str | Path, metric: str) -> list[Evaluated]:
    """The trials of a Tune experiment that ended well, in the order in which they began.

    folder: of the experiment, or its URI.
    metric: as its trials reported it.

    Raises:
        DataError: it is no folder of an experiment.
        ConfigError: no trial reported the metric.
    """
    # Trainables that are not ours report nothing of the kind, and Tune's status has to do.
    ended = [t for t in read_experiment(folder) if t.status == "TERMINATED" and t.result.get(FINISHED, True)]
    results = [(trial.config, flatten_dict(dict(trial.result))) for trial in ended]
    found = [Evaluated(c, float(result[metric]), result) for c, result in results if is_number(result.get(metric))]
    if not found:
        names = sorted({name for _, result in results for name in result if is_number(result[name])})
        reported = f"they reported {', '.join(names)}" if names else "no trial of it ended well"
        raise ConfigError(
            f"{folder}: no trial reported {metric!r} as a finite number; {reported}. Give its name as reported_as"
        )
    return found


def of_study(study: Study, mode: str) -> list[Evaluated]:
    """The complete trials of an Optuna study.

    Raises:
        ConfigError: the study has several objectives, or its direction is not `mode`.
    """
    # By their names, here and below, so that Optuna is not imported.
    directions = [direction.name for direction in study.directions]
    if directions != [{"min": "MINIMIZE", "max": "MAXIMIZE"}[mode]]:
        raise ConfigError(
            f"the study's direction is {', '.join(directions).lower()}, and this search is of mode {mode!r}; give it "
            "the metric and the mode of the study"
        )
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    return [Evaluated(trial.params, float(trial.value)) for trial in complete if is_number(trial.value)]


def evaluated(
    points: Sequence[Mapping[str, Any]], rewards: Sequence[float]
) -> list[tuple[Mapping[str, Any], float, bool]]:
    """Points and their metric, as arguments of `add_evaluated_point`.

    Raises:
        ConfigError: there are not as many of one as of the other, or a reward is no finite number.
    """
    if len(points) != len(rewards):
        raise ConfigError(
            f"evaluated_rewards: expected the metric of each of {len(points)} points_to_evaluate, got {len(rewards)}"
        )
    values = [float(reward) for reward in rewards]
    if not all(map(math.isfinite, values)):
        raise ConfigError(f"evaluated_rewards: expected finite numbers, got {values}; leave those points out")
    return [(point, value, False) for point, value in zip(points, values, strict=True)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_experiment(folder: str | Path) -> list[TrialRecord]:
    """The trials in Tune's newest snapshot in a folder.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    storage = locate(folder)
    try:
        files = storage.filesystem.get_file_info(pyarrow.fs.FileSelector(storage.path))
        # Tune has the time in the names, so that the last one is the newest.
        names = sorted(f.base_name for f in files if f.base_name.startswith(EXPERIMENT_STATE))
        trials = parse(storage.read(names[-1])) if names else None
    except (pa.ArrowException, OSError, StateError) as error:
        raise DataError(f"{folder}: the Tune experiment cannot be read: {error}") from error
    if trials is None:
        raise DataError(f"{folder}: not the folder of a Tune experiment; it has no {EXPERIMENT_STATE}*.json")
    return trials


def take(
    optimizer: BilevelOptimizer,
    evaluated: Sequence[Evaluated],
    objective: Objective,
    bounds: Bounds = (),
    others: Others = (),
) -> None:
    """Have a search know the points that lie in its space. The others are left out, with a warning.

    Raises:
        SpaceError: none lies in it.
    """
    reasons = []
    for number, point in enumerate(evaluated):
        config = unflatten(point.config)
        try:
            check_values(config, optimizer.space, f"earlier trials[{number}]")
        except SpaceError as error:
            reasons.append(str(error))
            continue
        optimizer.add(
            f"evaluated-{len(optimizer.state.trainings)}", config, point.observation(objective, bounds, others)
        )
    if not reasons:
        return
    if len(reasons) == len(evaluated):
        raise SpaceError(f"none of {len(evaluated)} earlier trials lies in the space of this search: {reasons[0]}")
    logger.warning(
        "%d of %d earlier trials do not lie in the space of this search and are left out: %s",
        len(reasons), len(evaluated), reasons[0],
    )  # fmt: skip


class BeginsFromEarlier:
    """A search that may begin with the trials of earlier work."""

    _optimizer: BilevelOptimizer | None
    _bounds: Bounds = ()
    _others: Others = ()
    _earlier: Sequence[Evaluated] = ()
    _early: list[tuple[Mapping[str, Any], float, bool]]
    """Single points: configuration, metric, whether the trial failed."""

    @property
    @abstractmethod
    def _objective(self) -> Objective: ...

    @classmethod
    def from_experiment(
        cls, folder: str | Path, problem: BilevelProblem, reported_as: str | None = None, **options: Any
    ) -> Self:
        """A search that knows the trials of an earlier Tune experiment, of whatever searcher.

        Those that ended well are points of the model of F, by their values alone. A trial that a scheduler stopped
        counts with the value that it had. Trials outside of the space are left out.

            search = BilevelSearch.from_experiment(results.experiment_path, problem, reported_as="val_loss")

        folder:      of the experiment, or its URI.
        reported_as: what that experiment called the metric of this search; by default the same.
        options:     arguments of `BilevelSearch`.

        Raises:
            DataError: it is no folder of an experiment.
            ConfigError: no trial reported the metric.
            SpaceError: when the space becomes known, and no trial lies in it.
        """
        metric = reported_as or split(options.get("metric"), options.get("mode"))[0] or problem.upper_metric
        return cls._knowing(of_experiment(folder, metric), problem, options)

    @classmethod
    def from_study(cls, study: Study, problem: BilevelProblem, **options: Any) -> Self:
        """A search that knows the complete trials of an Optuna study, by their values; see `from_experiment`.

        study:   an `optuna.Study` whose parameters have the names of the space, nested ones joined by slashes
            ("weight_decay/fc1").
        options: arguments of `BilevelSearch`.

        Raises:
            ConfigError: the study has several objectives, or another direction than this search.
            SpaceError: when the space becomes known, and no trial lies in it.
        """
        return cls._knowing(of_study(study, options.get("mode") or "min"), problem, options)

    @classmethod
    def _knowing(cls, points: Sequence[Evaluated], problem: BilevelProblem, options: dict[str, Any]) -> Self:
        search = cls(problem, **options)  # type: ignore[call-arg]
        search._earlier = points
        search._take_earlier()
        return search

    def add_evaluated_point(
        self,
        parameters: Mapping[str, Any],
        value: float,
        error: bool = False,
        pruned: bool = False,
        intermediate_values: list[float] | None = None,
    ) -> None:
        """A configuration whose metric is known from elsewhere; it informs the model of F, not the value function."""
        self._early.append((parameters, value, error))
        if self._optimizer is not None:
            self._add_evaluated(*self._early[-1])

    def _add_evaluated(self, parameters: Mapping[str, Any], value: float, error: bool) -> None:
        optimizer = self._optimizer
        assert optimizer is not None
        nested = without_numpy(unflatten(parameters))
        check_points([nested], optimizer.space, "evaluated points")
        point = Evaluated(nested, float(value))
        observation = None if error else point.observation(self._objective, self._bounds, self._others)
        optimizer.add(f"evaluated-{len(optimizer.state.trainings)}", nested, observation)

    def _take_earlier(self) -> None:
        """Once the space is known, and not before."""
        if self._optimizer is not None:
            for point in self._early:
                self._add_evaluated(*point)
            take(self._optimizer, self._earlier, self._objective, self._bounds, self._others)
