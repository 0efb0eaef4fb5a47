"""A learned initialisation, from which a few examples of new classes are enough."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, layer_norm, relu

from raybilevel.errors import ConfigError
from raybilevel.hypergradient import BilevelFunctions, solve_lower
from raybilevel.problem import Hyperparameters, LargeUpperLevel, Level
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._classification import check_positive, data_folder
from raybilevel.problems._datasets import Images

# Two poolings make 3 x 3 pixels of 14 x 14.
SIDE, FEATURES = 14, 32 * 3 * 3
TURNS = 4


class Tasks(NamedTuple):
    """T tasks.

    x, y:             images to learn from, (T, n, 14, 14), and their labels, (T, n).
    query_x, query_y: images for the evaluation, (T, q, 14, 14), and their labels, (T, q).
    classes:          the class of each label, (T, ways), as a number made of digit and turn.
    """

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor
    classes: Tensor


class Initialisation(nn.Module):
    """The upper-level variable: a small convolutional network that all tasks share, and the weights of its last layer,
    from which every task starts."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(FEATURES, ways)
        nn.init.zeros_(self.head.weight)  # no class is preferred
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """The features of images, (T, n, 14, 14) -> (T, n, 288), with mean 0 and deviation 1."""
        found = images.reshape(-1, 1, SIDE, SIDE)
        for layer in (self.first, self.second):
            found = avg_pool2d(relu(layer(found)), 2)
        return layer_norm(found.flatten(1), (FEATURES,)).view(*images.shape[:2], FEATURES)


# The last layer alone: where a task changed a whole network, accuracy fell below that of random weights (families.md).
class Deviations(nn.Module):
    """The lower-level variable: the deviation of every task's last layer from the initialisation. It starts at zero."""

    def __init__(self, tasks: int, ways: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tasks, ways, FEATURES))
        self.bias = nn.Parameter(torch.zeros(tasks, ways))


def logits(head: nn.Linear, weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
    """The logits of every task's last layer for its features, (T, n, 288) -> (T, n, ways)."""
    return torch.baddbmm((head.bias + bias)[:, None], features, (head.weight + weight).mT)


def mean_loss(found: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(found.flatten(0, 1), labels.flatten())


class FewShot(LargeUpperLevel):
    """Weights x from which a network learns `ways` new classes from `shots` examples of each:

        f(x, y) = mean_t [CE of task t's examples at x + y_t + nearness |y_t|^2 / 2],
        F(x, y) = mean_t CE of task t's other images at x + y_t

    y_t is task t's deviation from x, which starts at zero. This is implicit MAML (Rajeswaran, Finn, Kakade & Levine
    2019, arXiv:1909.04630). A task learns only the last layer, as in ANIL (Raghu, Raghu, Bengio & Vinyals 2020,
    arXiv:1909.09157), so f is convex in y. Images are MNIST digits averaged over 2x2 pixels. A class of the training
    tasks is a digit of `learn` from the training images, in one of four orientations as in Santoro et al. 2016. (Some
    look alike: a 0 on its side is a 0.) Test tasks have all other digits, upright, from the test images.

    data:     the folder of the data files.
    tasks, test_tasks: numbers of tasks.
    queries:  images for the evaluation, of each class of a task.
    turns:    whether the training tasks have digits in four orientations, or upright ones only.
    nearness: weight of the deviation in f. The larger it is, the nearer a task stays to the initialisation.
    """

    epochs = 1

    def __init__(
        self,
        data: str | None = None,
        learn: Sequence[int] = (0, 1, 2, 3, 4),
        ways: int = 5,
        shots: int = 1,
        queries: int = 5,
        tasks: int = 100,
        test_tasks: int = 200,
        turns: bool = True,
        nearness: float = 0.01,
        split_seed: int = 0,
    ) -> None:
        check_positive(shots=shots, queries=queries, tasks=tasks, test_tasks=test_tasks)
        check_positive(nearness=nearness)
        self.data = data_folder(self, data)
        self.learn, self.ways, self.shots, self.queries = tuple(sorted(set(learn))), ways, shots, queries
        self.tasks, self.test_tasks, self.turns = tasks, test_tasks, turns
        self.nearness, self.split_seed = nearness, split_seed
        if not set(self.learn) <= set(range(10)):
            raise ConfigError(f"learn: digits from 0 to 9, got {list(learn)}")
        if not 2 <= ways <= min(len(self.learn) * (TURNS if turns else 1), len(self.others)):
            raise ConfigError(f"too few classes for tasks of {ways}: learn={list(learn)}, turns={turns}")

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(digit for digit in range(10) if digit not in self.learn)

    @cached_property
    def splits(self) -> dict[str, Tasks]:
        train, test = datasets.mnist(self.data)
        generator = torch.Generator().manual_seed(self.split_seed)
        return {
            "learn": self.drawn(train, self.learn, self.tasks, self.turns, generator),
            "test": self.drawn(test, self.others, self.test_tasks, False, generator),
        }

    def drawn(self, split: Images, digits: Sequence[int], count: int, turns: bool, generator: torch.Generator) -> Tasks:
        """`count` tasks with random classes and images."""
        images = avg_pool2d(split.images[:, None].to(self.dtype) / 255, 2)[:, 0]
        members = {digit: (split.labels == digit).nonzero().flatten() for digit in digits}
        classes = [(digit, turn) for digit in digits for turn in range(TURNS if turns else 1)]
        each = self.shots + self.queries
        drawn, taken = [], []
        for _ in range(count):
            chosen = torch.randperm(len(classes), generator=generator)[: self.ways].tolist()
            taken.append([classes[number][0] * TURNS + classes[number][1] for number in chosen])
            rows = []
            for digit, turn in (classes[number] for number in chosen):
                # Without replacement: an image to learn from must not be among the queries.
                picked = members[digit][torch.randperm(len(members[digit]), generator=generator)[:each]]
                rows.append(torch.rot90(images[picked], turn, (1, 2)))
            drawn.append(torch.stack(rows))
        found = torch.stack(drawn)  # (T, ways, each, 14, 14)
        # Each task numbers its classes anew, from 0 to ways - 1.
        labels = torch.arange(self.ways)[None, :, None].expand(count, -1, each)
        parts = (slice(self.shots), slice(self.shots, None))
        shown, asked = ((found[:, :, part].flatten(1, 2), labels[:, :, part].flatten(1)) for part in parts)
        return Tasks(*shown, *asked, torch.tensor(taken))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "splits"}

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Tasks]:
        yield self.splits["learn"]

    def upper_variables(self) -> nn.Module:
        return Initialisation(self.ways)

    def model(self) -> nn.Module:
        return Deviations(self.tasks, self.ways)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Tasks) -> Tensor:
        start, (weight, bias) = hyperparameters["upper"], model.parameters()
        return self.task_loss(start.head, weight, bias, start.features(batch.x), batch.y, self.nearness)

    @staticmethod
    def task_loss(
        head: nn.Linear, weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, nearness: float
    ) -> Tensor:
        near = (weight.square().sum() + bias.square().sum()) / len(features)
        return mean_loss(logits(head, weight, bias, features), labels) + nearness / 2 * near

    def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Tasks) -> Tensor:
        start, (weight, bias) = hyperparameters["upper"], model.parameters()
        return mean_loss(logits(start.head, weight, bias, start.features(batch.query_x)), batch.query_y)

    def accuracies(self, start: Initialisation, split: str, nearness: float) -> Tensor:
        """The accuracy of each task of a split on its query images, (T,), after learning from the others."""
        tasks = Tasks(*(part.to(self.device) for part in self.splits[split]))
        head = copy.deepcopy(start.head).requires_grad_(False)
        with torch.no_grad():
            known, asked = start.features(tasks.x), start.features(tasks.query_x)
        shape = (len(tasks.x), self.ways, FEATURES)
        cut = math.prod(shape)

        def parts(flat: Tensor) -> tuple[Tensor, Tensor]:
            # The weights of all tasks, then their biases.
            return flat[:cut].view(shape), flat[cut:].view(shape[:2])

        def lower(_: Tensor, flat: Tensor) -> Tensor:
            return self.task_loss(head, *parts(flat), known, tasks.y, nearness)

        # zero[:0] below is an x without entries: the initialisation stays as it is.
        zero = torch.zeros(cut + len(tasks.x) * self.ways).to(known)
        with torch.enable_grad():
            flat = solve_lower(BilevelFunctions([], [lower]), zero[:0], zero, 1e-3, limit=100).y
        return (logits(head, *parts(flat), asked).argmax(2) == tasks.query_y).double().mean(1)

    def evaluate(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
        """`test_accuracy`: the mean over tasks with digits that are in no training task."""
        return {"test_accuracy": self.accuracies(hyperparameters["upper"], "test", self.nearness).mean().item()}
