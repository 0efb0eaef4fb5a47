"""A self-contained page about a run or a comparison, and its figures and tables as files."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybilevel._records.conclusion import so_far
from raybilevel._records.record import Record
from raybilevel._version import __version__
from raybilevel.errors import ConfigError
from raybilevel.report import _comparison as comparison
from raybilevel.report import _frames as frames
from raybilevel.report import _result as result
from raybilevel.report import _single as single
from raybilevel.report._charts import Chart
from raybilevel.report._sources import Source, check, read_folder
from raybilevel.report._tables import Table, table_csv, write_tables

if TYPE_CHECKING:
    import pandas as pd

PAGE, FIGURES, TABLES = "report.html", "figures", "tables"
MOST_CARDS = 6
"""Rows of a table with many columns up to which a phone shows each as a list."""
FOLDS = {
    "run": ("Inside of the method", "The numbers of the method itself, for a search that did not find what it should."),
    "comparison": ("Single runs", "Of each method on each problem the run with the lowest seed."),
}
"""By the kind of folder, the heading of the folded sections and a sentence below it."""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    last:   tables below the figures.
    folded: whether a click is needed to open it. Its figures are drawn only then.
    files:  whether its figures are also written as files.
    """

    title: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    words: str = ""
    last: Sequence[Table] = ()
    folded: bool = False
    files: bool = True

    @property
    def anchor(self) -> str:
        return file_name(self.title)


@dataclass(frozen=True)
class Loaded:
    """The content of a folder, for a notebook.

    observations: one row per ended training: problem, method, seed, losses, costs, metrics and hyperparameters.
    figures:      plotly figures by name.
    tables:       by name.
    wrong:        one line for each file that was skipped.
    """

    observations: pd.DataFrame
    figures: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    wrong: Sequence[str] = field(default=())


def load(folder: str | Path) -> Loaded:
    """The observations, figures and tables of a folder of `raybilevel run` or `raybilevel compare`, or of a Tune
    experiment with `BilevelSearch`.

    Raises:
        DataError: the folder is of neither.
        RaybilevelError: no training has been completed yet.
        ConfigError: plotly is not installed.
    """
    import pandas as pd

    # First, so that a missing package is said before anything is read.
    plotly_figure = drawing()
    source = read_folder(Path(folder))
    check(source)
    sections = sections_of(source)
    return Loaded(
        frames.observations(source.good),
        {chart.name: plotly_figure(chart) for section in sections for chart in section.charts},
        {t.name: pd.DataFrame(t.plain_rows, columns=list(t.headers)) for s in sections for t in (*s.tables, *s.last)},
        source.wrong,
    )


def write(folder: str | Path) -> Path:
    """Write `report.html`, `figures/` (SVG, PNG, CSV) and `tables/` (CSV, Markdown) to the folder.

    Returns the path of the page.

    Raises:
        DataError, RaybilevelError, ConfigError: as for `load`.
    """
    from raybilevel.report._static import write_figures

    plotly_figure = drawing()
    folder = Path(folder)
    source = read_folder(folder)
    check(source)
    sections = sections_of(source)
    page = render(source, sections, plotly_figure)
    (folder / PAGE).write_text(page, encoding="utf-8")
    write_figures((chart for section in sections if section.files for chart in section.charts), folder / FIGURES)
    tables = [table for section in sections for table in (*section.tables, *section.last)]
    write_tables(tables, frames.observations(source.good), folder / TABLES)
    return folder / PAGE


def drawing() -> Any:
    """The function that draws with plotly.

    Raises:
        ConfigError: the packages of the extra `report` are missing.
    """
    try:
        from raybilevel.report._interactive import plotly_figure
    except ImportError as error:
        raise ConfigError(f"{error}; a report needs: pip install 'raybilevel[report]'") from error
    return plotly_figure


def sections_of(source: Source) -> list[Section]:
    """The sections of the page in their order."""
    if source.kind == "run":
        return sections_of_run(source.records[0])
    good, counted, sections = source.good, source.done, []
    problems = comparison.charts(counted)
    tables = comparison.tables(counted, source.records)
    for problem in dict.fromkeys(r.problem_name for r in counted):
        names = {f"{problem}-cost", f"{problem}-time"}
        sections.append(
            Section(
                problem,
                [c for c in problems if c.name in names],
                [t for t in tables if t.name == f"{problem}-winners"],
                about_problem([r for r in counted if r.problem_name == problem]),
            )
        )
    rest = [c for c in problems if c.name == "overhead"]
    sections.append(Section("All problems", rest, [t for t in tables if not t.name.endswith("-winners")]))
    for record in first_seeds(good):
        head = f"{record.problem_name}: {record.method_name}, seed {record.settings.seed}"
        note = "" if record.status == "done" else f"This run is {record.status}; it is in no table."
        prefix = file_name(head) + "-"
        charts = [c for kind in (single.charts, single.inside_charts, single.cost_charts) for c in kind(record, prefix)]
        # Files only for raybilevel's own methods: those of all methods would be hundreds, and the page has them.
        sections.append(Section(head, charts, (), note, folded=True, files=record.search is not None))
    return sections


def sections_of_run(record: Record) -> list[Section]:
    sections = [
        Section("Result", single.charts(record), result.tables(record), last=[result.improvements(record)]),
        Section("Time and cost", single.cost_charts(record)),
        Section(
            "Multipliers, violation, errors of the models",
            single.inside_charts(record),
            [t for t in [result.diagnostics(record)] if t.rows],
            folded=True,
        ),
    ]
    return [section for section in sections if section.charts or section.tables]


def conclusion(source: Source) -> list[str]:
    """What to make of it, in a few sentences."""
    if source.kind == "comparison":
        return comparison.conclusion(source.done)
    record = source.records[0]
    return list(record.in_words or so_far(record).lines)


def first_seeds(records: Sequence[Record]) -> list[Record]:
    """The run with the lowest seed of each method on each problem."""
    order = comparison.method_order(records)
    found: dict[tuple[str, str], Record] = {}
    for record in sorted(records, key=lambda r: r.settings.seed):
        found.setdefault((record.problem_name, record.method_name), record)
    problems = list(dict.fromkeys(r.problem_name for r in records))
    return sorted(found.values(), key=lambda r: (problems.index(r.problem_name), order.index(r.method_name)))


def about(source: Source) -> str:
    """What was run, in a line."""
    if source.kind == "comparison":
        return ""
    record = source.records[0]
    cost = f"{record.observations[-1].cost:.1f}" if record.observations else "0"
    told = f"Verdict: {record.verdict}" if record.verdict else "It has not ended yet, or was stopped"
    return (
        f"{record.problem_name}, method {record.method_name}, {len(record.space)} hyperparameters. "
        f"{len(record.observations)} of {record.settings.budget:g} trainings, at the cost of {cost}. {told}."
    )


def about_problem(records: Sequence[Record]) -> str:
    settings = records[0].settings
    options = ", ".join(f"{k} = {v}" for k, v in settings.options.items())
    names = [p.name for p in records[0].space]
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"Problem {settings.problem}{f' ({options})' if options else ''}; tuned: {shown}."


def render(source: Source, sections: Sequence[Section], plotly_figure: Any, stamp: str = "") -> str:
    """The HTML of the page, with data, scripts and styles inside.

    stamp: of a page that is served: it is loaded again when the server has another one.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    # With StrictUndefined a name that the template misspells is an error, and not an empty text.
    loader = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    loader.filters["bold"] = bold
    template = loader.from_string(resources.files("raybilevel.report").joinpath("page.html.j2").read_text("utf-8"))
    title = f"{'Comparison' if source.kind == 'comparison' else 'Run'}: {source.folder.resolve().name}"
    data = frames.observations(source.good)
    page: str = template.render(
        title=title,
        stamp=stamp,
        conclusion=[line.partition(": ") for line in conclusion(source)],
        about=about(source),
        folds=FOLDS[source.kind],
        sections=[
            {
                "title": s.title,
                "anchor": s.anchor,
                "words": s.words,
                "folded": s.folded,
                "tables": [{"table": t, "csv": link(table_csv(t))} for t in s.tables],
                "last": [{"table": t, "csv": link(table_csv(t))} for t in s.last],
                "charts": [
                    {"chart": c, "csv": link(c.data().to_csv(index=False)), "json": script_json(plotly_figure(c))}
                    for c in s.charts
                ],
            }
            for s in sections
        ],
        observations=link(data.to_csv(index=False)),
        count=len(data),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=__version__,
        versions=versions_of(source.records),
        machines=machines_of(source.records),
        wrong=source.wrong,
        most_cards=MOST_CARDS,
        plotly=get_plotlyjs(),
    )
    return page


def versions_of(records: Sequence[Record]) -> dict[str, str]:
    """The versions of each package in the records."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in record.versions.items():
            if version is not None:
                found.setdefault(name, set()).add(str(version))
    return {name: ", ".join(sorted(versions)) for name, versions in found.items()}


def machines_of(records: Sequence[Record]) -> list[str]:
    found: dict[str, None] = {}
    for m in (record.machine for record in records):
        if m is not None:
            gpus = f", {m.gpus:g} GPUs ({', '.join(m.accelerators)})" if m.gpus else ""
            found[f"{m.nodes} node{'s' if m.nodes != 1 else ''}, {m.cpus:g} CPUs{gpus}, {m.system}"] = None
    return list(found)


def script_json(figure: Any) -> str:
    """A figure as JSON for a script element. "<" is escaped, as a text with "</script>" would end the element."""
    return str(figure.to_json()).replace("<", "\\u003c")


def link(content: str) -> str:
    return "data:text/csv;base64," + base64.b64encode(content.encode()).decode()


def bold(text: str) -> Any:
    """A cell as HTML, in which `**best**` is bold and a line may break after a slash or an underscore."""
    from markupsafe import Markup, escape

    found = re.fullmatch(r"\*\*(.*)\*\*", text)
    if found:
        return Markup("<b>{}</b>").format(found[1])
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[/_])", text))


def file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-")
