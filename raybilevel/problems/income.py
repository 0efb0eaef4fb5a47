"""Adult income (a9a): a logistic model on few examples, with a weight decay for each group of features."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_svmlight_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel.errors import ConfigError
from raybilevel.problem import Hyperparameters
from raybilevel.problems._classification import Examples, Minibatch, check_positive, data_folder
from raybilevel.problems._datasets import Published
from raybilevel.problems._logistic import Logistic
from raybilevel.space import Parameter, Space

ORIGIN = "take it from https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html"
# Digests of the unpacked files.
TRAIN = Published("a9a", 2_329_875, "sha256:f5d5ffd8d865ff41328e7ee043e4b020816914ff6843ff15b98905ddbedce906", ORIGIN)
TEST = Published("a9a.t", 1_164_628, "sha256:1f448a153f0320399a7e40836eb207655b0bde0f21fc941cc472193daa9f5de9", ORIGIN)
FEATURES, EXAMPLES = 123, 32_561


class Income(Logistic):
    """Income from census data by a logistic regression, a weight decay for each group of features.

    f = cross-entropy + sum_g weight_decay_g |W_g|^2 / 2 over groups g of neighbouring binary features.

    elastic: adds sum_g l1_g |W_g|_1, smoothed (`Logistic.group_absolute`): an elastic net in each group.
    data: the folder of the data files. Its folder libsvm/ has a9a and a9a.t, gzipped or not.
    """

    features = FEATURES
    classes = 2

    def __init__(
        self,
        data: str | None = None,
        groups: int = 20,
        train: int = 500,
        validation: int = 500,
        split_seed: int = 0,
        elastic: bool = False,
    ) -> None:
        check_positive(train=train, validation=validation, groups=groups)
        if train + validation > EXAMPLES or groups > FEATURES:
            raise ConfigError(
                f"a9a has {EXAMPLES:,} training rows and {FEATURES} features, "
                f"got train + validation = {train} + {validation} and {groups} groups"
            )
        self.data = data_folder(self, data)
        self.groups, self.train, self.validation, self.split_seed = groups, train, validation, split_seed
        self.elastic = elastic

    @property
    def space(self) -> Space:
        highest = {"weight_decay": 10.0, "l1": 0.1} if self.elastic else {"weight_decay": 10.0}
        paths = [(kind, f"g{g}") for kind in highest for g in range(self.groups)]
        return Space(tuple(Parameter(path, 1e-6, highest[path[0]], log=True) for path in paths))

    def load(self) -> dict[str, Examples]:
        x, y = _rows(self.data, TRAIN)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(self.split_seed))
        lower, upper = order[: self.train], order[self.train : self.train + self.validation]
        return {"lower": (x[lower], y[lower]), "upper": (x[upper], y[upper]), "test": _rows(self.data, TEST)}

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Minibatch) -> Tensor:
        loss = cross_entropy(model(batch.x), batch.y)
        loss = loss + self.group_penalty(model, hyperparameters["weight_decay"])
        return loss + self.group_absolute(model, hyperparameters["l1"]) if self.elastic else loss


def _rows(folder: str, file: Published) -> Examples:
    path = file.path(Path(folder) / "libsvm", ".gz", "")
    content = file.read(path)
    file.check(path, content)
    # a9a.t lacks the last feature, and would be a column narrower by itself. Labels are -1 and 1.
    x, y = load_svmlight_file(io.BytesIO(content), n_features=FEATURES)
    return torch.from_numpy(x.toarray()), torch.from_numpy((y > 0).astype(np.int64))
