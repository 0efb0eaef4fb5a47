"""Memory and time of one hypergradient of a network with millions of weights: make bench-memory OUT=DIR.

    python -m benchmarks.memory --out DIR [--sizes WIDTHxLAYERS ...] [--products N]

The lower level trains a small transformer on sequences whose loss a network of 49 weights weights; the upper level is
its loss on other sequences. Tokens are random, since memory and time do not depend on what they are. Each estimator
takes `--products` products with second derivatives, or as many steps. The unit is a training step of the same
transformer with Adam: its weights, their two moments, and what a gradient makes on the way. DIR gets memory.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.families import table, wide_console, write_json
from benchmarks.hypergradient_peers import PeakBytes, seconds
from raybilevel._lower.variables import weights_of
from raybilevel.functional import weight_decay
from raybilevel.hypergradient import (
    ConjugateGradients,
    DescentSettings,
    Estimator,
    FirstOrder,
    Implicit,
    MinimalResidual,
    NeumannSeries,
    Unrolled,
)
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.problem import Hyperparameters, LargeUpperLevel, Level

SIZES = ("128x6", "512x3")
SEQUENCES, TOKENS, VOCABULARY, HEADS = 16, 64, 200, 4
RATE = 1e-2
"""Of steps and of the Neumann series: below 2 / |H|, so that nothing diverges."""
MOMENTS = 2
"""Vectors of Adam, in weights."""


class Transformer(nn.Module):
    """The logits of the next tokens, (n, tokens, vocabulary), from tokens, (n, tokens)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.zeros(TOKENS, width))
        layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.last = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        found: Tensor = self.last(self.layers(self.tokens(tokens) + self.places, mask=causal, is_causal=True))
        return found


class WeightedSequences(LargeUpperLevel):
    """f = sum_i w_x(l_i) l_i / n + decay |y|^2 / 2 with l_i the loss of sequence i; w_x sees it as a constant."""

    epochs = 1

    def __init__(self, width: int, layers: int, decay: float = 1e-3) -> None:
        self.width, self.layers, self.decay = width, layers, decay
        generator = torch.Generator().manual_seed(0)
        shape = (SEQUENCES, TOKENS + 1)
        self.tokens = {one: torch.randint(VOCABULARY, shape, generator=generator) for one in ("lower", "upper")}

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield self.tokens[level]

    def batch_size(self, batch: Tensor) -> int:
        return len(batch)

    def model(self) -> nn.Module:
        return Transformer(self.width, self.layers)

    def upper_variables(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid())

    @staticmethod
    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        """Of each sequence, shape (n,)."""
        logits: Tensor = model(batch[:, :-1])
        return cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Tensor) -> Tensor:
        losses = self.losses(model, batch)
        weights: Tensor = hyperparameters["upper"](losses.detach()[:, None])[:, 0]
        return (weights * losses).mean() + weight_decay(model.parameters(), self.decay)

    def upper_loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return self.losses(model, batch).mean()


@dataclass(frozen=True)
class Row:
    """weights: of the lower level. memory: in training steps. time: in gradients of f."""

    weights: int
    estimator: str
    peak_bytes: int
    memory: float
    time: float


def estimators(products: int) -> dict[str, Estimator]:
    return {
        "implicit, MINRES": Implicit(MinimalResidual(0.0, limit=products)),
        "implicit, CG": Implicit(ConjugateGradients(0.0, limit=products)),
        "implicit, Neumann": Implicit(NeumannSeries(products, RATE)),
        "first order": FirstOrder(steps=products, rate=RATE),
        "unrolled": Unrolled(products, RATE),
    }


def measured(width: int, layers: int, products: int) -> list[Row]:
    descent = BilevelDescent(WeightedSequences(width, layers), {"start": 0.0}, DescentSettings())
    functions, x = descent.levels, descent.x.detach()
    y = weights_of(descent.model)
    kept = (1 + MOMENTS) * y.numel() * y.element_size()
    gradient_bytes, unit = spent(lambda: functions.lower(x, y))
    rows = []
    for name, estimator in estimators(products).items():
        peak, duration = spent(lambda estimator=estimator: estimator(functions, x, y))  # type: ignore[misc]
        rows.append(Row(y.numel(), name, peak, (kept + peak) / (kept + gradient_bytes), duration / unit))
    return rows


def spent(call: Callable[[], Any]) -> tuple[int, float]:
    """The most bytes alive at once of tensors that a call makes, and its seconds, without the counting."""
    with PeakBytes() as memory:
        call()
    return memory.peak, seconds(call, repeats=1)


def size(text: str) -> tuple[int, int]:
    """WIDTHxLAYERS."""
    width, layers = text.split("x")
    if int(width) % HEADS or int(width) < HEADS or int(layers) < 1:
        raise ValueError(text)
    return int(width), int(layers)


def main(given: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder of memory.json")
    parser.add_argument("--sizes", nargs="+", type=size, default=[size(text) for text in SIZES], metavar="WIDTHxLAYERS")
    parser.add_argument("--products", type=int, default=10, help="with second derivatives, by default %(default)s")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    rows = [row for width, layers in options.sizes for row in measured(width, layers, options.products)]
    shown = [
        (f"{r.weights:,}", r.estimator, f"{r.peak_bytes / 2**20:.0f}", f"{r.memory:.2f}", f"{r.time:.1f}") for r in rows
    ]
    columns = ("weights", "hypergradient", "MiB on the way", "memory / training step", "time / gradient of f")
    wide_console().print(table(columns, shown), highlight=False)
    write_json(options.out / "memory.json", {"products": options.products, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
