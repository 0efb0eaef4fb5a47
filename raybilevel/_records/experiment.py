"""A Tune experiment of `BilevelSearch`, started by whatever program: its summary and its record."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.fs
from pydantic import TypeAdapter, ValidationError

from raybilevel import _objectives
from raybilevel._lower.paired import Gains, Weights, paired_gains
from raybilevel._lower.training import CHECKPOINT_FILE, load_checkpoint
from raybilevel._metric_bounds import as_written
from raybilevel._metrics import HYPERPARAMETERS
from raybilevel._records.names import SEARCH_STATE, TUNE_STATE
from raybilevel._records.record import Record, Settings
from raybilevel._records.run_folder import Lines, newest_state, record_of, searched_in, start_of, trial_results
from raybilevel._records.shared_value import Compared
from raybilevel._records.summary import summary_of
from raybilevel.errors import CheckpointError, ConfigError, DataError
from raybilevel.methods import Method
from raybilevel.methods._registry import METHODS
from raybilevel.problem import BilevelProblem
from raybilevel.search_state import SearchState
from raybilevel.space import Space

if TYPE_CHECKING:
    from raybilevel.search._state_file import SavedSearch

logger = logging.getLogger(__name__)


def summarise(
    results: Any,
    method: Method | None = None,
    test_loss_refit: float | None = None,
    problem: BilevelProblem | None = None,
) -> dict[str, Any]:
    """What a Tune experiment with `BilevelSearch` found.

        results = tune.Tuner(...).fit()
        summary = raybilevel.summarise(results)
        print("\\n".join(summary["in_words"]), summary["verdict"], summary["best"]["hyperparameters"], sep="\\n")

    results:         what `Tuner.fit` or `tune.run` returned, or the folder of the experiment, ended or not.
    method:          of the search. It is needed only if it is one of your own.
    test_loss_refit: the test loss after a refit, which the summary then mentions; see `refit`.
    problem:         of the search. With it the weights of the start, of the best shared value and of the result are
        loaded, and the summary has the standard error of the gains over examples.

    Returns:
        What `raybilevel run` writes to summary.json: plain values that JSON can hold. The documents describe each key
        on the page "summary.json".

    Raises:
        DataError: the experiment has no state of a `BilevelSearch`.
        StateError: the state cannot be read.
        ConfigError: the method is one of your own and was not given.
    """
    with local_folder(results) as folder:
        saved, lines = read_search(folder), trial_results(folder)
        about = {"problem": folder.name, "method": saved.method, "seed": saved.seed}
        method = method or method_of(saved)
        gains = Gains() if problem is None else gains_of(problem, saved, lines, method, filesystem_of(results))
        return summary_of_saved(saved, lines, about, method, test_loss_refit, gains)


def gains_of(
    problem: BilevelProblem,
    saved: SavedSearch,
    results: Mapping[str, Lines],
    method: Method,
    filesystem: pyarrow.fs.FileSystem,
) -> Gains:
    """Of the result, as far as there are checkpoints of what it is compared with."""
    best = method.incumbent(saved.state)
    if best is None or method.descent is not None:
        return Gains()
    compared = Compared.of(saved.state, Space(saved.parameters))
    trials = {index: trial for trial, index in saved.trials.items()}
    ends = {}
    for training in (best, *compared.beside(best)):
        lines = results.get(trials.get(training.index, ""))
        if not lines or training.index not in saved.checkpoints:
            continue
        try:
            with filesystem.open_input_file(f"{saved.checkpoints[training.index]}/{CHECKPOINT_FILE}") as file:
                ends[training.index] = Weights(lines[-1]["config"], load_checkpoint(file.read())["model"])
        except (OSError, pyarrow.ArrowException, CheckpointError) as error:
            logger.warning("the standard error of the gain is not known: %s", error)
    result = ends.pop(best.index, None)
    return Gains() if result is None else compared.gains(paired_gains(problem, ends, result))


def read_experiment(folder: Path) -> Record:
    """The folder of an experiment as a record.

    Raises:
        DataError, StateError: as `summarise`.
    """
    saved, results = read_search(folder), trial_results(folder)
    name = folder.resolve().name
    try:
        about = {"problem": name, "method": saved.method, "seed": saved.seed}
        summary = summary_of_saved(saved, results, about, method_of(saved))
    except ConfigError:  # a method of the user's own, which this process does not have
        summary = {}
    state = asked(saved.state)
    return record_of(
        Settings(
            problem=name,
            options={},
            method=saved.method,
            method_settings=json.loads(saved.settings),
            seed=saved.seed,
            budget=float(len(state)),
        ),
        saved,
        results,
        # A record without a summary is that of an experiment that still runs.
        {} if any(training.status == "pending" for training in state) else summary,
    )


def asked(state: SearchState) -> list[Any]:
    """Trainings of the experiment itself, without points whose F was known from elsewhere."""
    return [training for training in state.trainings if state.number(training)]


def read_search(folder: Path) -> SavedSearch:
    """The newest state of the search.

    Raises:
        DataError: there is none.
        StateError: it cannot be read, e.g. since it is of another searcher.
    """
    saved = newest_state(folder)
    if saved is None:
        raise DataError(
            f"{folder}: no state of a search in it; is it the folder of a Tune experiment, and its search_alg a "
            "BilevelSearch? Tune writes the first state within seconds"
        )
    return saved


def summary_of_saved(
    saved: SavedSearch,
    results: Mapping[str, Lines],
    about: Mapping[str, Any],
    method: Method,
    test_loss_refit: float | None = None,
    gains: Gains | None = None,
) -> dict[str, Any]:
    began = start_of(results)
    last = {
        # Those that a descent found stand in its results.
        saved.trials[trial]: {HYPERPARAMETERS: searched_in(saved, lines), **lines[-1]}
        for trial, lines in results.items()
        if trial in saved.trials
    }
    return summary_of(
        saved.state,
        Space(saved.parameters),
        method,
        last,
        saved.checkpoints,
        {
            **about,
            "metric": saved.metric,
            "mode": saved.mode,
            "constraints": as_written(saved.constraints),
            "other_objectives": _objectives.as_written(saved.others),
        },
        test_loss_refit,
        max((float(lines[-1]["timestamp"]) for lines in results.values()), default=began) - began,
        gains,
    )


def method_of(saved: SavedSearch) -> Method:
    """The method with the settings with which the search began.

    Raises:
        ConfigError: it is none of raybilevel's own.
    """
    if saved.method not in METHODS:
        raise ConfigError(f"the search is of method {saved.method}, one of your own; pass it on as `method`")
    try:
        method: Method = TypeAdapter(METHODS[saved.method]).validate_json(saved.settings)
    except ValidationError as error:
        raise ConfigError(f"method {saved.method}: settings of another version ({error.errors()[0]['msg']})") from error
    return method


@contextmanager
def local_folder(results: Any) -> Iterator[Path]:
    """The folder of an experiment. If it is on another filesystem, a copy of its states and results."""
    if isinstance(results, str | Path):
        yield Path(results)
        return
    path, filesystem = str(results.experiment_path), filesystem_of(results)
    if Path(path).is_dir() or isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, path.rstrip("/").rpartition("/")[2])
        for file in filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True)):
            name = Path(file.base_name)
            if any(name.match(wanted) for wanted in ("result.json", f"{SEARCH_STATE}*", TUNE_STATE)):
                target = folder / file.path.removeprefix(path).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                with filesystem.open_input_stream(file.path) as stream:
                    target.write_bytes(stream.read())
        yield folder


def filesystem_of(results: Any) -> pyarrow.fs.FileSystem:
    """Where an experiment lies, to which the paths of its checkpoints belong."""
    experiment = getattr(results, "_experiment_analysis", results)  # a ResultGrid has an ExperimentAnalysis
    return getattr(experiment, "_fs", None) or pyarrow.fs.LocalFileSystem()
