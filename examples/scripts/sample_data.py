"""The data of the scripts, as tensors, split into training, validation and test data.

Folders hold files as their publishers gave them: MNIST's four `.gz` files, and arrays of CIFAR-10 and Cora as `.npz`.
Each process reads a data set once. The cache is here, since a cached function of a script cannot be sent to workers.
"""

import gzip
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.datasets import load_digits

MNIST_HEADERS = {"images-idx3": 16, "labels-idx1": 8}  # bytes


def split(x, y, train, val, seed=0):
    """{"train", "val", "test": (x, y)} of a shuffled data set; the rest is test data."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = zip(("train", "val", "test"), order.tensor_split([train, train + val]), strict=True)
    return {name: (x[rows], y[rows]) for name, rows in parts}


@lru_cache
def digits(train=500, val=500):
    """scikit-learn's 1797 digits: images of shape (n, 1, 8, 8), standardised, and labels."""
    x, y = load_digits(return_X_y=True)
    return split(standardised(torch.tensor(x).view(-1, 1, 8, 8)), torch.tensor(y), train, val)


@lru_cache
def mnist(folder, train=1000, val=1000, test=2000):
    """The first of MNIST's 60,000 training images, shape (n, 1, 28, 28)."""

    def read(kind, shape):
        path = Path(folder) / "mnist" / f"train-{kind}-ubyte.gz"
        values = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=MNIST_HEADERS[kind])
        return torch.tensor(values.reshape(shape)[: train + val + test])

    images, labels = read("images-idx3", (-1, 1, 28, 28)), read("labels-idx1", (-1,))
    return split(standardised(images), labels.long(), train, val)


@lru_cache
def cifar10(folder, train=1000, val=1000):
    """The first 4000 of CIFAR-10's training images, shape (n, 3, 32, 32)."""
    with np.load(Path(folder) / "cifar10" / "cifar10_train_first4000_lossless.npz") as file:
        x, y = (torch.tensor(file[name]) for name in ("x", "y"))
    return split(standardised(x.permute(0, 3, 1, 2)), y.long(), train, val)


@lru_cache
def cora(folder):
    """Citations among papers: words x, topics y, edges (2, m) in both directions, and the nodes of each part."""
    with np.load(Path(folder) / "planetoid" / "cora.npz") as file:
        words = csr_array((file["x_data"], file["x_indices"], file["x_indptr"]), shape=file["x_shape"])
        x = torch.tensor(words.toarray())
        edges, y = torch.tensor(file["edges"]).long().T, torch.tensor(file["labels"]).long()
        nodes = {name: torch.tensor(file[f"{name}_idx"]).long() for name in ("train", "val", "test")}
    return {"x": x / x.sum(1, keepdim=True), "edges": torch.cat([edges, edges.flip(0)], 1), "y": y, **nodes}


def communities(nodes=600, classes=4, features=32):
    """A stochastic block model: five neighbours of a node's own class, three of others, features in much noise."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(nodes) % classes
    same = y[:, None] == y
    probability = torch.where(same, 5 * classes / nodes, 3 * classes / (classes - 1) / nodes)
    upper = torch.rand(nodes, nodes, generator=generator).lt(probability).triu(1)
    centres = torch.randn(classes, features, generator=generator)
    x = 0.4 * centres[y] + torch.randn(nodes, features, generator=generator)
    order = torch.randperm(nodes, generator=generator)
    train, val, test = order.tensor_split([60, 260])
    return {"x": x, "edges": (upper | upper.T).nonzero().T, "y": y, "train": train, "val": val, "test": test}


def standardised(images):
    images = images.float()
    return (images - images.mean()) / images.std()


def shuffled_batches(x, y, size, generator):
    """One pass in minibatches, in a random order."""
    for rows in torch.randperm(len(x), generator=generator).split(size):
        yield x[rows], y[rows]
