"""Runs as studies of Optuna, for its dashboard and its importance evaluators."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raybilevel._records.record import Observation, Record, TrialLog
from raybilevel._records.run_folder import search_of
from raybilevel._tree import leaves, named
from raybilevel.errors import ConfigError
from raybilevel.report._sources import check, read_folder
from raybilevel.space import Space

if TYPE_CHECKING:
    from raybilevel.search._state_file import SavedSearch


def export(folder: Path, path: Path) -> list[str]:
    """Write a study for each run of a folder to an SQLite file. Returns their names.

    Raises:
        DataError, RaybilevelError: as for a report.
        ConfigError: Optuna is not installed, or the file exists.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"{error}; an export needs: pip install 'raybilevel[optuna]'") from error
    if path.exists():
        raise ConfigError(f"{path} exists; name a file that does not")
    source = read_folder(folder)
    check(source)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    try:
        return [write_study(record, storage, name_of(record, source.kind, folder)) for record in source.good]
    finally:
        storage.remove_session()
        storage.engine.dispose()


def name_of(record: Record, kind: str, folder: Path) -> str:
    if kind == "run":
        return folder.resolve().name
    return f"{record.problem_name}, {record.method_name}, seed {record.settings.seed}"


def write_study(record: Record, storage: Any, name: str) -> str:
    import optuna

    sign, metric = record.objective
    study = optuna.create_study(
        storage=storage, study_name=name, direction="minimize" if sign > 0 else "maximize", load_if_exists=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([metric])
    for key, value in (("problem", record.problem_name), ("method", record.method_name), ("verdict", record.verdict)):
        study.set_user_attr(key, value)
    saved = search_of(record)
    space, logs = distributions(record, saved), {log.trial: log for log in record.trials}
    # A record has no date: its end stands for now.
    began = datetime.now() - timedelta(seconds=record.seconds)
    trials = [
        trial_of(o, parameters_of(o, space, saved), space, logs.get(o.trial), sign, began) for o in record.observations
    ]
    study.add_trials(trials)
    return name


def distributions(record: Record, saved: SavedSearch | None) -> dict[str, Any]:
    """Optuna's distributions by the names of hyperparameters."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if saved is None:
        return {p.name: FloatDistribution(p.low, p.high, log=p.log) for p in record.space}
    found: dict[str, Any] = {}
    for p in saved.parameters:
        if p.choices:
            found[p.name] = CategoricalDistribution([plain(choice) for choice in p.choices])
        elif p.integer:
            found[p.name] = IntDistribution(int(p.low), int(p.high), log=p.log)
        else:
            found[p.name] = FloatDistribution(p.low, p.high, log=p.log)
    return found


def plain(choice: Any) -> Any:
    """A choice as Optuna can store it: other than plain values become texts."""
    return choice if choice is None or isinstance(choice, bool | int | float | str) else str(choice)


def parameters_of(o: Observation, space: Mapping[str, Any], saved: SavedSearch | None) -> dict[str, Any]:
    """The hyperparameters of a training that are active in it, by their names."""
    values = {named(path): value for path, value in leaves(o.hyperparameters).items()}
    # Rounding may leave a number just outside of its interval, which Optuna refuses.
    found = {
        name: min(max(values[name], bounds.low), bounds.high)
        for name, bounds in space.items()
        if name in values and hasattr(bounds, "low")
    }
    if saved is None:
        return found
    # Not as in the config: JSON has made lists of tuples there.
    active = Space(saved.parameters).active(torch.tensor(o.unit, dtype=torch.double)).tolist()
    chosen = {
        p.name: plain(p.to_value(unit))
        for p, unit, there in zip(saved.parameters, o.unit, active, strict=True)
        if there and p.choices
    }
    return found | chosen


def trial_of(
    o: Observation,
    parameters: Mapping[str, Any],
    space: Mapping[str, Any],
    log: TrialLog | None,
    sign: float,
    began: datetime,
) -> Any:
    """A training as a trial: F, its hyperparameters, F after each epoch, and what else is known as attributes."""
    from optuna.trial import TrialState, create_trial

    # Unlike F of a training, those after an epoch are as the trial reported them, whatever the mode.
    steps = {} if log is None else dict(zip(log.epochs, log.upper_losses, strict=True))
    about = {"training": o.number, "cost": o.cost, "lower_loss": o.lower_loss, **o.metrics}
    ended = began + timedelta(seconds=o.seconds)
    trial = create_trial(
        state={"done": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}[o.status],
        value=None if o.upper_loss is None else sign * o.upper_loss,
        params=dict(parameters),
        distributions={name: space[name] for name in parameters},
        user_attrs={name: value for name, value in about.items() if value is not None},
        intermediate_values={epoch: value for epoch, value in steps.items() if value is not None},
    )
    trial.datetime_start = ended - timedelta(seconds=sum(log.took) if log else 0.0)
    trial.datetime_complete = ended
    return trial
