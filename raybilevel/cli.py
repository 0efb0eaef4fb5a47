"""The command line: run, check, problems, compare, report."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from raybilevel._version import __version__
from raybilevel.errors import ConfigError, DataError, ProblemError, RaybilevelError, SpaceError, StorageError

# 130 is 128 + SIGINT, as shells report it.
EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Config = Annotated[Path, typer.Argument(help="A config file, e.g. configs/digits.yaml.", metavar="CONFIG")]
Data = Annotated[
    Path | None, typer.Option(help="Folder of the data files (mnist/, mnist_1k/, cifar10/, ...).", metavar="DIR")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one key of the config, e.g. search.trainings=40.", metavar="KEY=VALUE"),
]


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"raybilevel {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        # Eager: before anything is said of a command that is missing.
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Bilevel hyperparameter optimization on Ray clusters."""


@app.command()
def run(
    config: Config,
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; by default runs/<config>-<time>.", metavar="DIR")
    ] = None,
    settings: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster, e.g. auto; by default a local one is started.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Where trials and checkpoints are kept: a folder or URI (s3://bucket/run) that every node sees; "
            "by default --out.",
            metavar="URI",
        ),
    ] = None,
) -> None:
    """Run the experiment of a config file."""
    from raybilevel._command import experiment
    from raybilevel._command.output import show_how_to_go_on, show_result
    from raybilevel._config.experiment import read_config

    if resume and out is None:
        raise ConfigError("--resume needs --out, the folder of the run to go on with")
    folder = out or Path("runs") / f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    console = Console()
    try:
        summary = experiment.run(
            read_config(config, settings or ()),
            folder,
            as_text(data),
            resume=resume,
            address=address,
            storage=storage,
            console=console,
        )
    # Tune catches Ctrl-C while it runs. Before and after that it is a KeyboardInterrupt.
    except (experiment.InterruptedRunError, KeyboardInterrupt) as error:
        console.print(f"{str(error) or 'stopped'}; what was observed is kept. To go on:", markup=False)
        show_how_to_go_on(console, "run", folder, data, address, storage)
        raise typer.Exit(EXIT_INTERRUPTED) from error
    show_result(console, summary, folder)
    if summary["best"] is None:
        raise RaybilevelError(
            "no training succeeded; see the trials' error files in " + str(storage or folder) + "/tune"
        )


@app.command()
def check(
    config: Config,
    data: Data = None,
    settings: Set = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="As for run: a Ray cluster, of which this machine does not know what it has.", metavar="TEXT"
        ),
    ] = None,
) -> None:
    """Validate a config file, its problem and its data without training anything."""
    from raybilevel._config.experiment import read_config
    from raybilevel._config.plan import resolve, this_machine

    plan = resolve(read_config(config, settings or ()), as_text(data), this_machine() if address is None else None)
    typer.echo(
        f"{config}: all right: problem {plan.config.problem}, {plan.upper_level}, method {plan.config.search.method}, "
        f"{plan.trainings} trainings"
    )


@app.command()
def problems() -> None:
    """List the problems that ship."""
    from raybilevel.problems import PROBLEMS, option_names

    table = Table(box=None, pad_edge=False)
    for column in ("problem", "what it is", "options"):
        table.add_column(column, overflow="fold")
    for name, problem in sorted(PROBLEMS.items()):
        about = (problem.__doc__ or "").strip().splitlines()[0].rstrip(":.")
        table.add_row(name, about, ", ".join(option_names(problem)))
    Console().print(table)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="A config file, e.g. configs/compare/quick.yaml.", metavar="CONFIG")],
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the records; by default runs/<config>-<time>.", metavar="DIR")
    ] = None,
    settings: Set = None,
    scale: Annotated[str | None, typer.Option(help="One of the config's `scales`, e.g. small.", metavar="NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in --out.")] = False,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster, e.g. auto; by default a local one is started.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Where trials under way are kept, on a cluster of several nodes: a folder or URI (s3://bucket/folder) "
            "that all of them see.",
            metavar="URI",
        ),
    ] = None,
) -> None:
    """Compare methods on problems under one budget; a record a run, then the tables and the report."""
    from raybilevel._command.output import show_how_to_go_on
    from raybilevel._compare import command
    from raybilevel._compare.config import read_comparison

    if resume and out is None:
        raise ConfigError("--resume needs --out, the folder of the comparison to go on with")
    folder = out or Path("runs") / f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    comparison = read_comparison(config, settings or (), scale)
    # Workers run in other directories.
    absolute = None if data is None else str(data.expanduser().absolute())
    runs = comparison.runs(absolute)
    command.prepare(comparison, folder, resume)
    console = Console()
    bad, interrupted = command.run_all(runs, folder, address, comparison.cpus, console, storage)
    if interrupted:
        console.print("stopped; every run that ended is kept. To go on:", markup=False)
        show_how_to_go_on(console, "compare", folder, data, address, storage)
        raise typer.Exit(EXIT_INTERRUPTED)
    command.show_tables(folder, console)
    if bad:
        raise RaybilevelError(f"{bad} of {len(runs)} runs failed; see {folder / 'records'}, and --resume to try again")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run or of a comparison.", metavar="DIR")],
    open_it: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Write report.html, figures (SVG, PNG) and tables (CSV, Markdown) into a folder of a run or a comparison."""
    import webbrowser

    from raybilevel import report

    page = report.write(folder)
    typer.echo(str(page))
    if open_it:
        webbrowser.open(page.resolve().as_uri())


def as_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def main() -> None:
    """The `raybilevel` command: 0 on success, 1 on failure, 2 on a usage or config error, 130 when interrupted."""
    # Importing Ray is slow, so the commands import what they need.
    try:
        app()
    except (ConfigError, SpaceError, ProblemError, DataError, StorageError) as error:
        fail(error, EXIT_USAGE)
    except RaybilevelError as error:
        fail(error, EXIT_FAILURE)


def fail(error: Exception, status: int) -> None:
    for line in str(error).splitlines():
        typer.echo(f"raybilevel: {line}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
