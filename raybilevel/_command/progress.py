"""The progress of a run on a terminal: a live table, or one plain line per training."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from ray.tune import Callback
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raybilevel.search._diagnostics import Newest, newest
from raybilevel.search_state import SearchState

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


def make_view(title: str, trainings: int, console: Console | None = None) -> View:
    console = console or Console(stderr=False)
    return LiveView(title, trainings, console) if console.is_terminal else PlainView(title, trainings, console)


class PlainView:
    """One line per ended training, for logs and pipes."""

    def __init__(self, title: str, trainings: int, console: Console) -> None:
        self.trainings, self.console = trainings, console
        self.shown = self.done = 0
        self.best = math.inf
        self.clock = Clock(trainings)
        self._print(title)

    def update(self, state: SearchState, steps_under_way: int) -> None:
        told = state.told
        for training in told[self.shown :]:
            self.shown += 1
            outcome = f"F {training.upper_loss:.4f}" if training.status == "done" else training.status
            if training.status == "done":
                self.done, self.best = self.done + 1, min(self.best, training.upper_loss)
            best = f"{self.best:.4f}" if self.done else "nan"
            line = f"[{self.shown}/{self.trainings}] {training.proposal.origin:<6} {outcome}  best {best}"
            # Of several trainings that ended since, the newest numbers belong to the last.
            if self.shown == len(told):
                line += details(newest(state))
            if self.done < self.shown:
                line += f"  failed or stopped {self.shown - self.done}"
            self._print(f"{line}  {self.clock.text(self.shown)}")

    def close(self) -> None:
        sys.stdout.flush()

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)


class LiveView:
    """A table that is redrawn in place."""

    def __init__(self, title: str, trainings: int, console: Console) -> None:
        self.title, self.trainings = title, trainings
        self.clock = Clock(trainings)
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
        told, found = state.told, newest(state)
        failed = sum(t.status == "failed" for t in told)
        counts = f"{len(told) - failed} done, {len(state.pending)} running, {failed} failed"
        best = state.best
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        table.add_row("trainings", f"{counts}, of {self.trainings}")
        table.add_row("upper-level steps", f"{len(state.steps)} done, {steps_under_way} running")
        table.add_row("best F so far", f"{best.upper_loss:.5g}  (training {best.index})" if best else "none yet")
        table.add_row("multiplier", number(found.multiplier))
        table.add_row("violation", number(found.violation))
        table.add_row("error of v at the newest point", number(found.value_error))
        table.add_row("time", self.clock.text(len(told)))
        table.add_row("", ProgressBar(total=self.trainings, completed=len(told), width=40))
        return Group(Text(self.title, style="bold"), table)


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
    text = "" if found.multiplier is None else f"  multiplier {number(found.multiplier)}"
    text += "" if found.violation is None else f"  violation {number(found.violation)}"
    return text + ("" if found.value_error is None else f"  error of v {number(found.value_error)}")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
