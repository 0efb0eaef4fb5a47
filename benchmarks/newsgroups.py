"""Posts of five newsgroups: a logistic model on few of them, penalties per group of words, a weight for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel.errors import DataError
from raybilevel.problem import Hyperparameters
from raybilevel.problems._classification import Examples, Minibatch, check_positive, data_folder
from raybilevel.problems._logistic import Logistic
from raybilevel.space import Parameter, Space

CLASSES = (
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
)


class Newsgroups(Logistic):
    """f = mean_i weight_y(i) * cross-entropy(z_i, y_i) + sum_g weight_decay_g |W_g|^2 / 2 over groups g of words.

    Inputs are the TF-IDF of the words that are in most training posts. Groups are of words that are about as frequent.
    F and the test loss have no weights. Test posts are the later ones of the published split by date, so they differ
    in more than chance.

    elastic: adds sum_g l1_g |W_g|_1, smoothed (`Logistic.group_absolute`): an elastic net in each group.
    data: the folder of the data files. Its folder newsgroups20/ has 20news_bydate.npz, with the posts of scikit-learn's
        `fetch_20newsgroups` (headers and quotes included) as `data`, uint8, one after another, `offsets` of the posts
        and of the end, `labels`, `is_test` and `target_names`.
    """

    classes = len(CLASSES)

    def __init__(
        self,
        data: str | None = None,
        groups: int = 10,
        words: int = 1000,
        train: int = 300,
        validation: int = 300,
        split_seed: int = 0,
        elastic: bool = False,
    ) -> None:
        check_positive(groups=groups, words=words, train=train, validation=validation)
        self.data = data_folder(self, data)
        self.groups, self.features, self.split_seed = groups, words, split_seed
        self.train, self.validation, self.elastic = train, validation, elastic

    @property
    def space(self) -> Space:
        bounds = {"weight_decay": (1e-5, 1.0), "l1": (1e-6, 1e-2)} if self.elastic else {"weight_decay": (1e-5, 1.0)}
        paths = [(kind, f"g{g}") for kind in bounds for g in range(self.groups)]
        penalties = [Parameter(path, *bounds[path[0]], log=True) for path in paths]
        weights = [Parameter(("weight", f"c{c}"), 0.1, 10.0, log=True) for c in range(self.classes)]
        return Space((*penalties, *weights))

    def load(self) -> dict[str, Examples]:
        posts, labels, is_test = _posts(Path(self.data) / "newsgroups20" / "20news_bydate.npz")
        known, later = np.flatnonzero(~is_test), np.flatnonzero(is_test)
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(self.split_seed)).numpy()
        lower, rest = known[order[: self.train]], known[order[self.train :]]
        splits = {"lower": lower, "upper": rest[: self.validation], "test": later}
        words = TfidfVectorizer(sublinear_tf=True, max_features=self.features)
        words.fit([posts[i] for i in lower])
        # From the most frequent word to the rarest, so that neighbours are alike.
        columns = np.argsort(words.idf_, kind="stable")
        if len(columns) < self.features:
            raise DataError(f"{self.train} posts have {len(columns)} words, expected at least {self.features}")
        return {
            level: (
                torch.from_numpy(words.transform([posts[i] for i in members]).toarray()[:, columns]),
                torch.from_numpy(labels[members]),
            )
            for level, members in splits.items()
        }

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Minibatch) -> Tensor:
        weight = torch.stack([hyperparameters["weight"][f"c{c}"] for c in range(self.classes)])
        loss = (weight[batch.y] * cross_entropy(model(batch.x), batch.y, reduction="none")).mean()
        loss = loss + self.group_penalty(model, hyperparameters["weight_decay"])
        return loss + self.group_absolute(model, hyperparameters["l1"]) if self.elastic else loss


def _posts(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Posts of CLASSES, their places in it, and whether they are of the test set."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content, ends, names = file["data"], file["offsets"], list(file["target_names"])
            labels, is_test = file["labels"], file["is_test"] == 1
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; see the documentation of Newsgroups for its keys") from error
    place = np.array([CLASSES.index(name) if name in CLASSES else -1 for name in names])[labels]
    members = np.flatnonzero(place >= 0)
    posts = [content[ends[i] : ends[i + 1]].tobytes().decode("latin-1") for i in members]
    return posts, place[members], is_test[members]
