"""Hypergradients of the default method against differences of trained F: make bench-hypergradient OUT=DIR.

    python -m benchmarks.hypergradient --out DIR [--kinds WORD ...] [--dtypes float32 float64] [--points N] [--epochs N]

A row is a point of a kind of training (`benchmarks.trainings`). The estimate is what an upper-level step of the default
method finds there. Central differences of F, over trainings with the same seed, are taken with two step lengths. Points
at which these disagree, or at which they are nearly 0, are left out of the count, and the table says so. OUT gets
hypergradient.json. It keeps the differences, which take most of the time, for the next run.
"""

from __future__ import annotations

import argparse
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.families import kept, table, wide_console, write_json
from benchmarks.trainings import KINDS, Digits, problem_of
from raybilevel._lower.training import TrainedLowerLevel, load_checkpoint, train
from raybilevel.methods import Default
from raybilevel.methods._base import UpperStep
from raybilevel.search_state import Proposal, SearchState

STEPS = (0.02, 0.04)
"""Lengths of the differences in the unit cube."""
AGREE = 0.2
"""Differences of both lengths agree if they differ by at most this share of their norm."""
NEARLY_ZERO = 0.01
"""A gradient is nearly 0 if F falls by less than this share of itself from one side of the box to the other."""
POINTS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (0.75, 0.75, 0.75))
"""Where a search begins."""
COSINE, LENGTH, SHARE = 0.95, 2.0, 0.2
"""What is asked of an estimate: its cosine, its length within this factor, its cost in trainings."""


@dataclass(frozen=True)
class Row:
    """A point.

    differences: of trained F, by the shorter step, shape (d,); disagreement: of the longer one's, relative.
    estimate:    empty where the method found none.
    share:       passes of the estimate, in those of the training.
    """

    kind: str
    dtype: str
    point: tuple[float, ...]
    upper_loss: float
    differences: tuple[float, ...]
    disagreement: float
    estimate: tuple[float, ...]
    share: float

    @property
    def left_out(self) -> str:
        """Why the point says nothing of the estimate; empty if it does."""
        if not self.disagreement <= AGREE:
            return "differences disagree"
        return "nearly 0" if norm(self.differences) < NEARLY_ZERO * abs(self.upper_loss) else ""

    @property
    def cosine(self) -> float:
        product = sum(a * b for a, b in zip(self.differences, self.estimate, strict=True))
        return product / ((norm(self.differences) * norm(self.estimate)) or math.inf)

    @property
    def length(self) -> float:
        """Of the estimate, relative to the differences."""
        return norm(self.estimate) / norm(self.differences)

    @property
    def good(self) -> bool:
        return bool(self.estimate) and self.cosine >= COSINE and 1 / LENGTH <= self.length <= LENGTH

    @property
    def misleading(self) -> bool:
        """A wrong sign with a long step."""
        return bool(self.estimate) and self.cosine < 0 and self.length > 1


def norm(vector: Sequence[float]) -> float:
    return math.hypot(*vector)


def trained(problem: Digits, unit: Tensor) -> tuple[TrainedLowerLevel, bytes]:
    return train(problem, problem.space.to_config(unit))


def differences(problem: Digits, unit: Tensor, step: float) -> tuple[float, ...]:
    """Central differences of trained F at a point of the unit cube, shape (d,)."""
    found = []
    for direction in torch.eye(len(unit), dtype=unit.dtype):
        ahead, behind = (trained(problem, unit + sign * step * direction)[0].upper_loss for sign in (1, -1))
        found.append((ahead - behind) / (2 * step))
    return tuple(found)


def estimated(problem: Digits, unit: Tensor) -> tuple[TrainedLowerLevel, tuple[float, ...], float]:
    """A training, its hypergradient by a step of the default method, and the passes of that."""
    found, checkpoint = trained(problem, unit)
    state = SearchState().add(Proposal(tuple(unit.tolist()), "start"))
    state = state.change(
        0,
        status="done",
        finished=0,
        lower_loss=found.lower_loss,
        upper_loss=found.upper_loss,
        lower_gradient=(math.nan,) * len(unit),
        passes=found.passes,
    )
    step = UpperStep(0, "region", 0, state, seed=0, targets=(0,), region=0, radius=0.2)
    result = Default().run(problem, problem.space, {}, step, lambda _: load_checkpoint(checkpoint))
    return found, result.hypergradients[0], result.record.passes


def row(problem: Digits, point: tuple[float, ...], out: Path) -> Row:
    """out: the folder that keeps differences."""
    unit, dtype = torch.tensor(point, dtype=torch.double), str(problem.dtype).removeprefix("torch.")
    settings = f"{problem.kind.name}, {problem.epochs} epochs, {dtype}, at {point} by {STEPS}"
    file = out / "differences" / f"{zlib.crc32(settings.encode()):08x}.json"
    short, long = kept(file, settings, lambda: {str(h): differences(problem, unit, h) for h in STEPS}).values()
    apart = norm([a - b for a, b in zip(short, long, strict=True)]) / (norm(short) or 1.0)
    found, estimate, passes = estimated(problem, unit)
    return Row(problem.kind.name, dtype, point, found.upper_loss, tuple(short), apart, estimate, passes / found.passes)


def shown(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for one in rows:
        figures = (f"{one.cosine:.2f}", f"{one.length:.2f}") if one.estimate else ("none", "")
        yield (
            one.kind,
            one.dtype,
            f"{one.point[0]:g}",
            f"{one.upper_loss:.3f}",
            f"{norm(one.differences):.3f}",
            *figures,
            f"{100 * one.share:.0f} %",
            one.left_out or ("good" if one.good else ""),
        )


COLUMNS = ("training", "dtype", "point", "F", "|dF/dx|", "cosine", "length", "passes", "")


def summary(rows: Sequence[Row]) -> str:
    counted = [one for one in rows if not one.left_out]
    good, misleading = (sum(getattr(one, name) for one in counted) for name in ("good", "misleading"))
    costly = sum(one.share > SHARE for one in rows)
    return (
        f"{good} of {len(counted)} points that count have a cosine of at least {COSINE} and a length within a factor "
        f"of {LENGTH:g}\n{misleading} have a wrong sign and a long step\n"
        f"{costly} of {len(rows)} took more than {100 * SHARE:.0f} % of a training"
    )


def main(given: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hypergradient", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder of hypergradient.json")
    parser.add_argument("--kinds", nargs="+", default=[""], metavar="WORD", help="those whose names have one of these")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"], choices=["float32", "float64"])
    parser.add_argument("--points", type=int, default=len(POINTS), help="of each kind, by default %(default)s")
    parser.add_argument("--epochs", type=int, help="of every training in place of its own")
    options = parser.parse_args(given)
    rows: list[Row] = []
    for kind, dtype in itertools.product(KINDS, options.dtypes):
        if any(word in kind.name for word in options.kinds):
            problem = problem_of(kind, getattr(torch, dtype), options.epochs)
            for point in POINTS[: options.points]:
                rows.append(row(problem, point, options.out))
                write_json(options.out / "hypergradient.json", {"rows": [asdict(one) for one in rows]})
    console = wide_console()
    console.print(table(COLUMNS, list(shown(rows))), highlight=False)
    console.print(summary(rows), highlight=False)


if __name__ == "__main__":
    main()
