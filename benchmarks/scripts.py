"""The scripts of examples/scripts with several searchers: make bench-scripts OUT=DIR.

    python -m benchmarks.scripts --out DIR [--scripts NAME ...] [--searchers NAME ...] [--trials N] [--seeds N]

Every searcher has the same number of trials, on a local Ray. raybilevel's upper-level steps are charged, in trials, and
what it finds beyond the others' cost does not count. OUT/records.jsonl gets a line for each run, and a run that has one
is not run again. The table is made from these lines alone: the lowest validation loss that a search has seen, its test
loss, and how far raybilevel's lowest validation loss is above that of each other with the same seeds (below it, if
negative), each as a mean over seeds with its interval. A second one says what the ports to raybilevel take. Searchers
whose packages are not installed are left out, which is said.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray

from benchmarks import ports
from benchmarks.botorch_search import BoTorchSearch
from benchmarks.families import shown, table, wide_console
from benchmarks.ports import FOLDER, PORTED
from raybilevel._records.experiment import read_search
from raybilevel.report._statistics import bootstrap, paired_test

SCRIPTS = (
    "cifar_cnn", "mnist_step_lr", "char_gpt", "lightning_digits", "hf_bert", "sgd_classifier", "graph_network",
    "tabular_mlp", "timm_recipe", "torchvision_recipe", "digits_mlp",
)  # fmt: skip
OURS = "raybilevel"
BOTORCH = "botorch"
SEARCHERS = ("random", "optuna-tpe", "optuna-gp", BOTORCH, OURS)
NEEDS = {"optuna-tpe": "optuna", "optuna-gp": "optuna"}
"""The package of a searcher."""
NOT_RUN = "bohb: left out; it learns only of trials that HyperBandForBOHB pauses, and here all run to their end"


@dataclass(frozen=True)
class Key:
    """What tells one run from another."""

    script: str
    searcher: str
    seed: int
    trials: int


@dataclass(frozen=True)
class Trial:
    """What a trial reported last; test_accuracy is None of a regression. `seconds` are those of its training.

    cost: that the search had when it ended, in trials; None where that is its place among the trials.
    """

    val_loss: float
    test_loss: float
    test_accuracy: float | None
    seconds: float
    cost: float | None = None


@dataclass(frozen=True)
class Run:
    """The trials in the order in which they ended, and how many failed; `seconds` are those of the whole run."""

    key: Key
    trials: tuple[Trial, ...]
    failed: int
    seconds: float
    versions: dict[str, str]

    @property
    def best(self) -> Trial | None:
        """The trial of the lowest validation loss within the cost of so many trials; None where all failed."""
        paid = (trial for trial in self.trials if trial.cost is None or trial.cost <= self.key.trials)
        return min(paid, key=lambda trial: trial.val_loss, default=None)

    @property
    def cost(self) -> float:
        """Of all, in trials."""
        charged = (trial.cost for trial in self.trials if trial.cost is not None)
        return max(charged, default=float(len(self.trials) + self.failed))


def read(file: Path) -> list[Run]:
    """The runs of a file of records, of which the last line may be a part of one: its run was stopped."""
    runs = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        trials = tuple(Trial(**trial) for trial in found["trials"])
        runs.append(Run(**{**found, "key": Key(**found["key"]), "trials": trials}))
    return runs


def append(file: Path, run: Run) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Whether the last line is a part of one, which is then ended before the next.
    part = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as records:
        records.write("\n" * part + json.dumps(asdict(run)) + "\n")


def performed(key: Key) -> Run:
    """A run of a script, whose folder is on the path."""
    begun = time.monotonic()
    if key.searcher == OURS:
        results = importlib.import_module(f"{key.script}_bilevel").main(num_samples=key.trials, seed=key.seed)
        costs = costs_of(Path(results.experiment_path))
    else:
        searcher = BoTorchSearch if key.searcher == BOTORCH else key.searcher
        results = importlib.import_module(key.script).main(searcher=searcher, num_samples=key.trials, seed=key.seed)
        costs = {}
    seconds = time.monotonic() - begun
    shutil.rmtree(results.experiment_path)  # under ~/ray_results, where scripts leave it
    ended = sorted((result for result in results if result.error is None), key=lambda one: one.metrics["timestamp"])
    versions = {"python": sys.version.split()[0], "ray": ray.__version__}
    trials = tuple(trial_of(result.metrics, costs) for result in ended)
    return Run(key, trials, len(results) - len(trials), seconds, versions)


def costs_of(experiment: Path) -> dict[str, float]:
    """What raybilevel had spent when each trial ended, by the trial's id."""
    saved = read_search(experiment)
    spent = dict(zip((training.index for training in saved.state.told), saved.state.costs(), strict=True))
    return {trial: spent[index] for trial, index in saved.trials.items() if index in spent}


def trial_of(metrics: Mapping[str, Any], costs: Mapping[str, float]) -> Trial:
    return Trial(
        metrics["val_loss"],
        metrics["test_loss"],
        metrics.get("test_accuracy"),
        seconds=metrics["time_total_s"],
        cost=costs[metrics["trial_id"]] if costs else None,
    )


def pairs(runs: Sequence[Run], others: Sequence[Run]) -> tuple[list[float], list[float]]:
    """Lowest validation losses of two searchers, on the seeds that both have."""
    first, second = ({run.key.seed: run.best.val_loss for run in each if run.best} for each in (runs, others))
    seeds = sorted(first.keys() & second.keys())
    return [first[seed] for seed in seeds], [second[seed] for seed in seeds]


def rows(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    """A row for each script and searcher that has a run."""
    for script in dict.fromkeys(run.key.script for run in runs):
        of_script = [run for run in runs if run.key.script == script]
        ours = [run for run in of_script if run.key.searcher == OURS]
        for searcher in dict.fromkeys(run.key.searcher for run in of_script):
            given = [run for run in of_script if run.key.searcher == searcher]
            best = [run.best for run in given if run.best]
            trials = [trial for run in given for trial in run.trials]
            mine, theirs = pairs(ours, given)
            yield (
                f"{script}, {searcher}",
                str(len(given)),
                str(sum(run.failed for run in given)),
                mean([run.cost for run in given], digits=1),
                mean([trial.seconds for trial in trials], digits=1),
                mean([trial.val_loss for trial in best]),
                mean([trial.test_loss for trial in best]),
                mean([trial.test_accuracy for trial in best]),
                shown(paired_test(mine, theirs).difference, 4) if mine and searcher != OURS else "",
            )


COLUMNS = (
    "script, searcher", "runs", "failed trials", "cost", "s/trial", "best val loss", "its test loss",
    "its test accuracy", f"{OURS} less it",
)  # fmt: skip


def mean(values: Sequence[float | None], digits: int = 4) -> str:
    known = [value for value in values if value is not None]
    return shown(bootstrap(known), digits) if known else ""


def arguments() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scripts", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder of the records and the table")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="NAME")
    parser.add_argument("--searchers", nargs="+", choices=SEARCHERS, default=SEARCHERS, metavar="NAME")
    parser.add_argument("--trials", type=int, default=25, help="of each search, by default %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="how many, by default %(default)s")
    parser.add_argument("--cpus", type=int, help="trials at a time, by default as many as there are processors")
    return parser


def start_ray(cpus: int | None) -> None:
    """A local Ray, whose workers find the scripts."""
    # Ray's workers take the path from here, not from sys.path.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments().parse_args(given)
    file, console = options.out / "records.jsonl", wide_console()
    absent = {searcher for searcher, package in NEEDS.items() if find_spec(package) is None} & {*options.searchers}
    wanted = [
        Key(script, searcher, seed, options.trials)
        for script in options.scripts
        for seed in range(options.seeds)
        for searcher in options.searchers
        if searcher not in absent and (searcher != OURS or script in PORTED)
    ]
    known = {run.key for run in read(file)}
    missing = [key for key in wanted if key not in known]
    sys.path.insert(0, str(FOLDER))
    if missing:
        start_ray(options.cpus)
    for key in missing:
        append(file, performed(key))
    runs = [run for run in read(file) if run.key in set(wanted)]
    console.print(table(COLUMNS, list(rows(runs))), highlight=False)
    if OURS in options.searchers:
        ported = [ports.port_of(script) for script in options.scripts if script in PORTED]
        console.print(table(ports.COLUMNS, list(ports.rows(ported))), highlight=False)
    for searcher in sorted(absent):
        console.print(f"{searcher}: left out; {NEEDS[searcher]} is not installed", highlight=False)
    console.print(NOT_RUN, highlight=False)
    console.print(f"records in {file}", highlight=False)


if __name__ == "__main__":
    main()
