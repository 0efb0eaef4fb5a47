"""What the measurements of the problem families share: descents of a config, means over seeds, files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from raybilevel._config.experiment import ExperimentConfig
from raybilevel.errors import ConfigError
from raybilevel.hypergradient import DescentSettings
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.methods import make_method
from raybilevel.problem import BilevelProblem
from raybilevel.report._charts import Chart, Series
from raybilevel.report._statistics import Interval, bootstrap


def descent_method(config: ExperimentConfig) -> DescentSettings:
    """The descent that a config names.

    Raises:
        ConfigError: it names another method.
    """
    descent = make_method(config.search.method, **config.search.settings).descent
    if descent is None:
        raise ConfigError(f"expected search.method to be hypergradient, got {config.search.method}")
    return descent


def descend(problem: BilevelProblem, method: DescentSettings, start: int = 0) -> dict[str, Any]:
    """What a descent from a start reports at its end."""
    return run_to_end(BilevelDescent(problem, {"start": float(start)}, method)).conclude()


def run_to_end(descent: BilevelDescent) -> BilevelDescent:
    """The same, after its last step."""
    while not descent.finished:
        descent.run_step()
    return descent


def arguments_parser(name: str, about: str, config: str, seeds: int) -> argparse.ArgumentParser:
    """The options that all have: config, data, out, seeds, set."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--config", type=Path, default=Path(config), help="a config file, by default %(default)s")
    parser.add_argument("--data", help="folder of the data files")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=seeds, help="how many, by default %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the config")
    return parser


def shown(interval: Interval, digits: int = 3) -> str:
    """A mean and its interval, e.g. 0.912 [0.905, 0.920]."""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.{digits}f}"
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def intervals(rows: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
    """Each figure's mean over seeds, with its bootstrap interval."""
    return {name: bootstrap([row[name] for row in rows]) for name in rows[0]}


def dots(
    name: str, title: str, caption: str, values: Mapping[str, Interval], y_label: str, label: str, digits: int
) -> Chart:
    """A point with its interval for each name."""
    means = [one.mean for one in values.values()]
    # the interval need not be symmetric: the larger side
    widths = [max(one.ends[1] - one.mean, one.mean - one.ends[0]) for one in values.values()]
    said = "; ".join(f"{key} {mean:.{digits}f}" for key, mean in zip(values, means, strict=True))
    series = Series(label, "points", list(range(len(means))), means, error=widths)
    return Chart(name, title, caption, said, "", y_label, (series,), ticks=tuple(values))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column is words, the others figures."""
    made = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    for row in rows:
        made.add_row(*row)
    return made


def wide_console() -> Console:
    return Console(width=160)  # a table in a file keeps its columns


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Intervals become their fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Only intervals and other dataclasses are unknown to json here.
    text = json.dumps(content, indent=2, default=lambda value: asdict(value))
    path.write_text(text + "\n", encoding="utf-8")


def kept(file: Path, settings: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """From the file where it was made with the same settings, else measured and written there, so that a measurement
    that was stopped goes on where it was."""
    saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if saved.get("settings") != settings:
        saved = {"settings": settings, "found": measure()}
        part = file.with_suffix(".part")
        write_json(part, saved)
        # In one step, so that a file that is there is whole.
        part.replace(file)
    found: dict[str, Any] = saved["found"]
    return found
