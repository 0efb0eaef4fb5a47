"""Problems whose trainings and upper-level steps go wrong in every way that a machine knows."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from tests.tiny_problems import Parabola

FAULTS = ("raise", "exit", "os._exit", "kill -9", "out of memory", "NaN")
HANGS = ("hang", "never reports")


def enter(folder: str, name: str) -> int:
    """Add an entry to a list that processes share; how many there were."""
    number = 0
    while True:
        try:
            with open(Path(folder, f"{name} {number}"), "x"):
                return number
        except FileExistsError:
            number += 1


def say_where(folder: str, name: str) -> None:
    """Leave the id of the node that this runs on in a file, which others find whole or not at all."""
    written = Path(folder, f"{name} {os.getpid()}")
    written.write_text(ray.get_runtime_context().get_node_id())
    os.replace(written, Path(folder, name))


class Faulty(Parabola):
    """Every second training goes wrong, each in another way, in its second epoch, or in its first and never reports."""

    epochs = 3

    def __init__(self, folder: str, faults: tuple[str, ...]) -> None:
        super().__init__()
        self.folder, self.made_in = folder, os.getpid()
        # Passes of one training after another: 0 1 2, 3 4, 5 6 7, 8 9, ...
        self.faults = {5 * n + (3 if fault == "never reports" else 4): fault for n, fault in enumerate(faults)}

    def lower_loss(self, model: Any, hyperparameters: Any, batch: Any) -> Tensor:
        return super().lower_loss(model, hyperparameters, batch) + batch[0].sum()

    def batches(self, level: Any, generator: Any) -> Any:
        if generator is None or os.getpid() == self.made_in:  # no pass of a training; the check's, in the driver
            return super().batches(level, generator)
        fault = self.faults.get(enter(self.folder, "pass"))
        if fault is not None:
            enter(self.folder, fault)
        match fault:
            case "raise":
                raise RuntimeError("on purpose")
            case "exit":
                sys.exit(1)
            case "os._exit":
                os._exit(1)
            case "kill -9":
                os.kill(os.getpid(), signal.SIGKILL)
            case "out of memory":
                torch.empty(2**60)
            case "hang" | "never reports":
                time.sleep(3600)
            case "NaN":
                return iter([(torch.full((1,), math.nan, dtype=torch.double),)])
        return super().batches(level, generator)


class Slow(Parabola):
    """A training and an upper-level step that say where they are and go on for long enough to lose the node.

    lost_at: number of the pass, of all trainings, that goes on; None for none. The step goes on once the file "go" is
        there.
    """

    epochs = 8

    def __init__(
        self, folder: str, lost_at: int | None = None, step_seconds: float = 0.0, epoch_seconds: float = 0.2
    ) -> None:
        super().__init__()
        self.folder, self.lost_at, self.made_in = folder, lost_at, os.getpid()
        self.step_seconds, self.epoch_seconds = step_seconds, epoch_seconds

    def batches(self, level: Any, generator: Any) -> Any:
        if generator is not None and os.getpid() != self.made_in:  # the driver checks, and trains nothing
            Path(self.folder, f"node {ray.get_runtime_context().get_node_id()}").touch()
            lost = enter(self.folder, "pass") == self.lost_at
            if lost:
                say_where(self.folder, "training is on")
            time.sleep(120 if lost else self.epoch_seconds)
        return super().batches(level, generator)

    def upper_loss(self, model: Any, batch: Any) -> Tensor:
        # Only an upper-level step differentiates F.
        if torch.is_grad_enabled() and Path(self.folder, "go").exists() and enter(self.folder, "step") == 0:
            say_where(self.folder, "step is on")
            time.sleep(self.step_seconds)
        return super().upper_loss(model, batch)
