"""The command line: run, resume, check, new, problems, compare, report, watch, export."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from raybilevel._version import __version__
from raybilevel.errors import ConfigError, DataError, ProblemError, RaybilevelError, SpaceError, StorageError

if TYPE_CHECKING:
    from raybilevel.problem import BilevelProblem

# 130 is 128 + SIGINT, as shells report it.
EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Config = Annotated[Path, typer.Argument(help="A config file, e.g. configs/digits.yaml.", metavar="CONFIG")]
Data = Annotated[
    Path | None, typer.Option(help="Folder of the data files (mnist/, mnist_1k/, cifar10/, ...).", metavar="DIR")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one key of the config, e.g. search.trainings=40.", metavar="KEY=VALUE"),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the results; by default runs/<config>-<time>.", metavar="DIR")
]
Address = Annotated[str | None, typer.Option(help="A Ray cluster, e.g. auto; by default a local one is started.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also show the inside of the method.")]
Json = Annotated[
    bool, typer.Option("--json", help="Write the result as JSON to standard output, and all else to standard error.")
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
    out: Out = None,
    settings: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    address: Address = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Where trials and checkpoints are kept: a folder or URI (s3://bucket/run) that every node sees; "
            "by default --out.",
            metavar="URI",
        ),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run the experiment of a config file."""
    if resume and out is None:
        raise ConfigError("--resume needs --out, the folder of the run to go on with")
    folder = out or Path("runs") / f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    run_experiment(
        config, settings, folder, as_text(data), address, storage, resume=resume, verbose=verbose, as_json=as_json
    )


def run_experiment(
    config: Path,
    settings: Sequence[str] | None,
    folder: Path,
    data: str | None,
    address: str | None,
    storage: str | None,
    *,
    resume: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Run or resume an experiment, and show how it went."""
    console = Console(stderr=as_json)
    say_what_starts(console, address)

    from raybilevel._command import experiment
    from raybilevel._command.output import print_json, show, show_how_to_go_on, show_result
    from raybilevel._config.experiment import read_config

    try:
        summary = experiment.run(
            read_config(config, settings or ()),
            folder,
            data,
            resume=resume,
            address=address,
            storage=storage,
            console=console,
            verbose=verbose,
        )
    # Tune catches Ctrl-C while it runs. Before and after that it is a KeyboardInterrupt.
    except (experiment.InterruptedRunError, KeyboardInterrupt) as error:
        show(console, f"{str(error) or 'stopped'}; what was observed is kept. To go on:")
        show_how_to_go_on(console, folder)
        raise typer.Exit(EXIT_INTERRUPTED) from error
    show_result(console, summary, folder, verbose)
    if as_json:
        print_json(summary)
    if summary["best"] is None:
        raise RaybilevelError(
            "no training succeeded; see the trials' error files in " + str(storage or folder) + "/tune"
        )


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="Folder of a run or of a comparison.", metavar="DIR")],
    trainings: Annotated[
        int | None, typer.Option(help="As --set search.trainings: how many trainings there will be in all.")
    ] = None,
    settings: Set = None,
    data: Data = None,
    address: Address = None,
    storage: Annotated[
        str | None, typer.Option(help="Where trials and checkpoints are kept; by default as before.", metavar="URI")
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Go on with a run or a comparison, with --data, --address and --storage as before unless they are given."""
    from raybilevel._command.folder import read_options
    from raybilevel._records.names import CONFIG_FILE, RECORDS_FOLDER

    config = folder / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(
            f"{folder}: no {CONFIG_FILE} of a run or a comparison to go on with; an experiment that was started from "
            "Python goes on from there, by Tuner.restore"
        )
    before = read_options(folder)
    given = (as_text(data) or before.data, address or before.address, storage or before.storage)
    changes = [*(settings or ()), *([] if trainings is None else [f"search.trainings={trainings}"])]
    if (folder / RECORDS_FOLDER).is_dir():
        if trainings is not None:
            raise ConfigError("--trainings is for a run; of a comparison change the seeds, e.g. --set seeds=5")
        run_comparison(config, changes, None, folder, *given, resume=True, as_json=as_json)
        return
    run_experiment(config, changes, folder, *given, resume=True, verbose=verbose, as_json=as_json)


def say_what_starts(console: Console, address: str | None) -> None:
    """A line before torch, botorch and Ray are imported, which takes seconds."""
    line = "starting Ray ..." if address is None else f"joining the Ray cluster at {address} ..."
    console.print(line, highlight=False, markup=False)


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
    as_json: Json = False,
) -> None:
    """Validate a config file, its problem and its data without training anything."""
    from raybilevel._command.output import print_json
    from raybilevel._config.experiment import read_config
    from raybilevel._config.plan import resolve, this_machine
    from raybilevel._own_problem import is_own

    plan = resolve(read_config(config, settings or ()), as_text(data), this_machine() if address is None else None)
    if is_own(plan.config.problem):  # those that ship can be sent
        from raybilevel._cluster.pickling import check_can_be_sent

        check_can_be_sent(plan.problem)
    if as_json:
        print_json({"config": str(config), "upper_level": plan.upper_level, **plan.config.model_dump(mode="json")})
        return
    typer.echo(
        f"{config}: all right: problem {plan.config.problem}, {plan.upper_level}, method {plan.config.search.method}, "
        f"{plan.trainings} trainings"
    )


@app.command()
def problems(
    where: Annotated[
        str | None,
        typer.Argument(help="A module or a file of problems of your own; by default those that ship.", metavar="WHERE"),
    ] = None,
    as_json: Json = False,
) -> None:
    """List problems and their options."""
    from raybilevel._command.output import print_json
    from raybilevel._own_problem import classes_in
    from raybilevel.problems import PROBLEMS, option_names

    kinds = PROBLEMS if where is None else {f"{where}:{name}": kind for name, kind in classes_in(where).items()}
    if not kinds:
        raise ConfigError(f"{where} has no class of a BilevelProblem")
    if as_json:
        print_json([{"problem": name, "options": option_names(kind)} for name, kind in sorted(kinds.items())])
        return
    for name, kind in sorted(kinds.items()):
        typer.echo(about_problem(name, kind))


def about_problem(name: str, kind: type[BilevelProblem]) -> str:
    """A problem in one line: what it is, its options with their defaults, and whether it reads data files."""
    import inspect

    from raybilevel.problems import options_of

    options = options_of(kind)
    about = (kind.__doc__ or "").strip().splitlines() or ["no description"]
    shown = [
        key if default is inspect.Parameter.empty else f"{key}={default}"
        for key, default in options.items()
        if key != "data"
    ]
    data = "; reads files of --data" if "data" in options else ""
    return f"{name}: {about[0].rstrip(':.')}{data} ({', '.join(shown) or 'no options'})"


@app.command()
def new(
    path: Annotated[Path, typer.Argument(help="The file to write, e.g. my_problem.py.", metavar="FILE")],
) -> None:
    """Write a problem of your own to start from, and its config. Both run as they are."""
    from raybilevel._command.new import write_template

    config = write_template(path)
    typer.echo(f"wrote {path} and {config}; next:")
    for command in ("check", "run"):
        typer.echo(f"  {shlex.join(['raybilevel', command, str(config)])}")


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="A config file, e.g. configs/compare/quick.yaml.", metavar="CONFIG")],
    data: Data = None,
    out: Out = None,
    settings: Set = None,
    scale: Annotated[str | None, typer.Option(help="One of the config's `scales`, e.g. small.", metavar="NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in --out.")] = False,
    address: Address = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Where trials under way are kept, on a cluster of several nodes: a folder or URI (s3://bucket/folder) "
            "that all of them see.",
            metavar="URI",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare methods on problems under one budget; a record a run, then the tables and the report."""
    if resume and out is None:
        raise ConfigError("--resume needs --out, the folder of the comparison to go on with")
    folder = out or Path("runs") / f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    run_comparison(config, settings, scale, folder, as_text(data), address, storage, resume=resume, as_json=as_json)


def run_comparison(
    config: Path,
    settings: Sequence[str] | None,
    scale: str | None,
    folder: Path,
    data: str | None,
    address: str | None,
    storage: str | None,
    *,
    resume: bool,
    as_json: bool,
) -> None:
    """Run or resume a comparison, and show its tables."""
    console = Console(stderr=as_json)
    say_what_starts(console, address)

    from raybilevel._command.folder import Options, keep_options
    from raybilevel._command.output import print_json, show, show_how_to_go_on
    from raybilevel._compare import command
    from raybilevel._compare.config import read_comparison

    comparison = read_comparison(config, settings or (), scale)
    # Workers run in other directories.
    absolute = None if data is None else str(Path(data).expanduser().absolute())
    runs = comparison.runs(absolute)
    command.prepare(comparison, folder, resume)
    keep_options(Options(absolute, address, storage), folder, resume)
    bad, interrupted = command.run_all(runs, folder, address, comparison.cpus, console, storage)
    if interrupted:
        show(console, "stopped; every run that ended is kept. To go on:")
        show_how_to_go_on(console, folder)
        raise typer.Exit(EXIT_INTERRUPTED)
    tables = command.show_tables(folder, console)
    if as_json:
        print_json([{"table": t.name, "title": t.title, "columns": t.headers, "rows": t.plain_rows} for t in tables])
    if bad:
        raise RaybilevelError(f"{bad} of {len(runs)} runs failed; see {folder / 'records'}, and --resume to try again")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, a comparison or a Tune experiment.", metavar="DIR")],
    open_it: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Write report.html, figures (SVG, PNG) and tables (CSV, Markdown) into the folder of a run, a comparison or a
    Tune experiment with BilevelSearch, whatever program started it."""
    import webbrowser

    from raybilevel import report

    page = report.write(folder)
    typer.echo(str(page))
    if open_it:
        webbrowser.open(page.resolve().as_uri())


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, a comparison or a Tune experiment.", metavar="DIR")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; by default a free one.", metavar="N")] = 0,
    open_it: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Serve the report's page on this machine, and bring it up to date while the run is on. Ctrl-C ends it."""
    import webbrowser

    from raybilevel.report._watch import Server

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    try:
        server = Server(folder, port)
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}; name another one, or none for a free one") from error
    with server:
        typer.echo(server.url)
        if open_it:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("stopped")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, a comparison or a Tune experiment.", metavar="DIR")],
    to: Annotated[Path, typer.Option(help="The SQLite file to write, e.g. optuna.db.", metavar="FILE")],
) -> None:
    """Write a run as a study of Optuna, which its dashboard opens. A comparison gives a study for each run."""
    from raybilevel.report._optuna import export as write_studies

    if not to.parent.is_dir():
        raise ConfigError(f"--to {to}: there is no folder {to.parent}; make it, or name another file")
    for name in write_studies(folder, to):
        typer.echo(f"{to}: study {name!r}")


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
