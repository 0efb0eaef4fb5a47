"""A problem's own code while it is checked: what it raises, and which hyperparameters it reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from raybilevel._tree import Path
from raybilevel.errors import ProblemError, RaybilevelError
from raybilevel.problem import BilevelProblem
from raybilevel.space import flatten

DTYPE = "weights and batches are cast to the problem's dtype; cast other tensors as well, or set dtype"
HINTS = (
    ("Expected more than 1 value per channel", "batch normalisation needs two examples; drop a last batch of one"),
    ("must be float, not Tensor", "hyperparameters are tensors; raybilevel.functional has functions that take them"),
    ("must be float, but found element of type Tensor", "raybilevel.functional has functions that take tensors"),
    ("Can't call numpy() on Tensor that requires grad", "torch's own functions keep the gradient, e.g. torch.sqrt"),
    ("have the same dtype", DTYPE),
    ("expected scalar type", DTYPE),
    ("Found dtype", DTYPE),
    ("not compiled with CUDA", "the check runs where the search is made; place tensors on the device of the batch"),
    ("Found no NVIDIA driver", "the check runs where the search is made; place tensors on the device of the batch"),
    (
        "backward through the graph a second time",
        "a loss keeps something between calls; compute it anew, and leave the hyperparameters as they are given",
    ),
    ("to be on the same device", "place tensors on the device of the batch"),
)
"""What to do about messages of torch that do not say it."""


class MissingHyperparameterError(KeyError):
    """A loss asks for a hyperparameter that is not there. A problem may catch it, as it may a `KeyError`."""


class HyperparameterNotGivenError(ProblemError):
    """The same, as what is wrong with a search."""


class Given(dict[str, Any]):
    """Hyperparameters, nested, that note which of them are read.

    read: the paths, shared by all of a tree. Whoever goes through all entries has read all.
    """

    def __init__(self, tree: Mapping[str, Any], path: tuple[str, ...] = (), read: set[Path] | None = None) -> None:
        self.path = path
        self.read: set[Path] = set() if read is None else read
        super().__init__(
            {
                key: Given(entry, (*path, key), self.read) if isinstance(entry, Mapping) else entry
                for key, entry in tree.items()
            }
        )

    def __getitem__(self, key: str) -> Any:
        entry = super().__getitem__(key)
        self.read.add((*self.path, key))
        return entry

    def __missing__(self, key: str) -> Any:
        raise MissingHyperparameterError("/".join((*self.path, str(key))))

    # With an __iter__ of its own, {**given} and dict(given) go through `keys`: else CPython copies the entries unseen.
    def __iter__(self) -> Iterator[str]:
        self.read.update((*self.path, key) for key in super().__iter__())
        return super().__iter__()

    # dict's own `get` and `pop` do not go through __getitem__.
    def get(self, key: str, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            self.read.add((*self.path, key))
        return super().pop(key, *default)

    def keys(self) -> Any:
        self.read.update((*self.path, key) for key in super().__iter__())
        return super().keys()

    def values(self) -> Any:
        self.keys()
        return super().values()

    def items(self) -> Any:
        self.keys()
        return super().items()

    def unread(self, constants: Mapping[str, Any]) -> list[str]:
        """Names of the constants that nobody has read."""
        return sorted("/".join(path) for path in flatten(constants) if path not in self.read)


@contextmanager
def calling(
    problem: BilevelProblem, what: str, advise: Callable[[Exception], str] = lambda error: ""
) -> Iterator[None]:
    """Within it a problem's own code runs.

    what:   which, e.g. "lower_loss".
    advise: what to do about an error, where that is known; else empty.

    Raises:
        ProblemError: it raised something; the line names the method, the error and, where it is known, what to do.
    """
    name = type(problem).__name__
    try:
        yield
    # It says already what is wrong and where.
    except RaybilevelError:
        raise
    except MissingHyperparameterError as error:
        raise HyperparameterNotGivenError(
            f"space: {name} reads the hyperparameter {error}, which is not there; give it a domain or a constant"
        ) from error
    except Exception as error:  # whatever a problem's own code raises
        said = (str(error).strip().splitlines() or ["no message"])[0]
        advice = next((advice for text, advice in HINTS if text in str(error)), "") or advise(error)
        raise ProblemError(f"{name}.{what} raised {type(error).__name__}: {said}{advice and f'; {advice}'}") from error


def where_it_can_run(problem: BilevelProblem) -> BilevelProblem:
    """The problem; where its device is not on this machine, which may be a driver without one, a copy on the CPU.

    Raises:
        ProblemError: torch knows no such device.
    """
    name = type(problem).__name__
    try:
        device = torch.device(problem.device)
    except (RuntimeError, TypeError) as error:
        raise ProblemError(
            f"{name}.device must be a device of torch, e.g. 'cpu', 'cuda' or 'cuda:0', got {problem.device!r}"
        ) from error
    if is_here(device):
        return problem
    on_cpu = copy.copy(problem)
    on_cpu.device = "cpu"
    return on_cpu


def is_here(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    try:
        module = torch.get_device_module(device)
    except RuntimeError:  # of no accelerator
        return False
    return bool(module.is_available()) and (device.index or 0) < module.device_count()
