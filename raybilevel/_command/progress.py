"""The progress of a run on a terminal: a live table, or one plain line per training."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ray.tune import Callback
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raybilevel._records.conclusion import hyperparameters
from raybilevel.search._diagnostics import Newest, newest
from raybilevel.search_state import SearchState, Training

REFRESH_S = 0.25


class View(Protocol):
    def update(self, state: SearchState, steps_under_way: int) -> None: ...

    def close(self) -> None: ...


class ProgressCallback(Callback):  # type: ignore[misc]
    """Updates a view after each step of Tune's event loop."""

    def __init__(self, show: Callable[[], None]) -> None:
        self._show = show

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._show()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks into its snapshots, and a view belongs to one terminal


ConfigOf = Callable[[Training], Mapping[str, Any]]
"""The hyperparameters of a training, nested."""


@dataclass(frozen=True)
class Shown:
    """What views show of a search.

    title:     of the run.
    trainings: how many there will be.
    resumed:   whether some have ended before.
    config_of: None where a training's point is not its result, as of descents.
    verbose:   also the inside of the method: upper-level steps, multiplier, and what is known of v_hat.
    """

    title: str
    trainings: int
    resumed: bool = False
    config_of: ConfigOf | None = None
    verbose: bool = False

    def best(self, state: SearchState) -> str:
        """The lowest F, and how far it is below that of the first training."""
        best, start = state.best, state.start
        if best is None or start is None:
            return "none yet"
        text = f"F {best.upper_loss:.4g} at training {state.number(best)}{broken(best)}"
        # Of a training that breaks constraints F says little of how far the search has come.
        if best.index != start.index and best.feasible == start.feasible:
            text += f", {gain(start.upper_loss, best.upper_loss)} below training {state.number(start)}"
        return text

    def hyperparameters(self, state: SearchState) -> str:
        """Those of the best training, in their own units."""
        best, start = state.best, state.start
        if best is None or start is None or self.config_of is None:
            return ""
        return hyperparameters(self.config_of(best), self.config_of(start))


def broken(training: Training) -> str:
    """That it breaks a constraint, if so."""
    return "" if training.feasible else ", not feasible"


def gain(before: float, after: float) -> str:
    share = f" ({(before - after) / abs(before):.0%})" if before else ""
    return f"{before - after:.3g}{share}"


def make_view(shown: Shown, console: Console | None = None) -> View:
    console = console or Console(stderr=False)
    return LiveView(shown, console) if console.is_terminal else PlainView(shown, console)


class PlainView:
    """One line per ended training, for logs and pipes."""

    def __init__(self, shown: Shown, console: Console) -> None:
        self.shown, self.console = shown, console
        self.begun = False
        self.counted = self.done = 0
        self.best: Training | None = None
        self.clock = Clock(shown.trainings)
        self._print(shown.title)

    def update(self, state: SearchState, steps_under_way: int) -> None:
        told = state.told
        if told and not self.begun:
            self._begin(state)
        # Several may have ended since the last look, and each has its line.
        for training in told[self.counted :]:
            self._count(training)
            outcome = f"F {training.upper_loss:.4f}{broken(training)}" if training.status == "done" else training.status
            best = "none"
            if self.best:
                best = f"{self.best.upper_loss:.4f} (training {state.number(self.best)}{broken(self.best)})"
            line = (
                f"[{self.counted}/{self.shown.trainings}] training {state.number(training)}  {outcome}  lowest {best}"
            )
            if self.shown.verbose:
                line += f"  {training.proposal.origin}"
                # Of several trainings that ended since, the newest numbers belong to the last.
                line += details(newest(state)) if self.counted == len(told) else ""
            if self.done < self.counted:
                line += f"  failed or stopped {self.counted - self.done}"
            self._print(f"{line}  {self.clock.text(self.counted)}")

    def close(self) -> None:
        sys.stdout.flush()

    def _begin(self, state: SearchState) -> None:
        """What a resumed run knows already, in one line."""
        self.begun = True
        if self.shown.resumed:
            for training in state.told:
                self._count(training)
            self._print(f"going on after {self.counted} trainings; lowest: {self.shown.best(state)}")

    def _count(self, training: Training) -> None:
        self.counted += 1
        if training.status == "done":
            self.done += 1
            if self.best is None or training.rank < self.best.rank:
                self.best = training

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)


class LiveView:
    """A table that is redrawn in place."""

    def __init__(self, shown: Shown, console: Console) -> None:
        self.shown = shown
        self.clock = Clock(shown.trainings)
        self.drawn = 0.0
        # Redirected, so that what others print appears above the table and not in it.
        self.live = Live(console=console, auto_refresh=False, redirect_stdout=True, redirect_stderr=True)
        self.live.start()
        self.newest = (SearchState(), 0)
        self.live.update(self.render(*self.newest), refresh=True)

    def update(self, state: SearchState, steps_under_way: int) -> None:
        self.newest = (state, steps_under_way)
        if time.monotonic() - self.drawn >= REFRESH_S:
            self.drawn = time.monotonic()
            self.live.update(self.render(*self.newest), refresh=True)

    def close(self) -> None:
        self.live.update(self.render(*self.newest), refresh=True)
        self.live.stop()

    def render(self, state: SearchState, steps_under_way: int) -> RenderableType:
        told = state.told
        done, failed = len(state.done), sum(t.status == "failed" for t in told)
        others = len(told) - done - failed
        counts = f"{done} done, {len(state.pending)} running, {failed} failed"
        counts += f", {others} stopped" if others else ""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("lowest", self.shown.best(state))
        if found := self.shown.hyperparameters(state):
            table.add_row("", found)
        table.add_row("trainings", f"{counts}, of {self.shown.trainings}")
        if self.shown.verbose:
            inside = newest(state)
            table.add_row("upper-level steps", f"{len(state.steps)} done, {steps_under_way} running")
            for name, value in numbers(inside).items():
                table.add_row(name, value)
        table.add_row("time", self.clock.text(len(told)))
        table.add_row("", ProgressBar(total=self.shown.trainings, completed=len(told), width=40))
        return Group(Text(self.shown.title, style="bold", overflow="fold"), table)


class Clock:
    """The time since the start, and an estimate of the time left."""

    def __init__(self, trainings: int) -> None:
        self.trainings, self.start = trainings, time.monotonic()
        self.first: tuple[int, float] | None = None

    def text(self, done: int) -> str:
        elapsed = time.monotonic() - self.start
        if self.first is None:  # a resumed run begins with trainings that took none of this time
            self.first = (done, elapsed)
        count, since = done - self.first[0], elapsed - self.first[1]
        if done >= self.trainings:
            return duration(elapsed)
        left = f", about {duration(since / count * (self.trainings - done))} left" if count > 0 else ""
        return f"{duration(elapsed)}{left}"


def details(found: Newest) -> str:
    return "".join(f"  {name} {value}" for name, value in numbers(found).items())


def numbers(found: Newest) -> dict[str, str]:
    """Those that are known, by name; the last two are of methods with a v_hat."""
    known = {"multiplier": found.multiplier, "violation": found.violation, "error of v": found.value_error}
    return {name: f"{value:.3g}" for name, value in known.items() if value is not None}


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
