from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.newsgroups import CLASSES, Newsgroups
from raybilevel._lower.training import LowerLevelTraining, train
from raybilevel.errors import DataError
from raybilevel.search import check_problem

NAMES = ["alt.atheism", *CLASSES]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Made-up posts in the published form. Those of a class have a word of their own, and posts are numbered."""
    draws = np.random.default_rng(0)
    labels = draws.permuted(np.arange(180) % len(NAMES))
    common = [f"w{i}" for i in range(20)]
    posts = [
        " ".join([f"post{i}", *draws.choice(common, 8), *[f"class{c}"] * 3]).encode("latin-1")
        for i, c in enumerate(labels)
    ]
    folder = tmp_path / "newsgroups20"
    folder.mkdir()
    np.savez(
        folder / "20news_bydate.npz",
        data=np.frombuffer(b"".join(posts), np.uint8),
        offsets=np.cumsum([0, *map(len, posts)]),
        labels=labels.astype(np.uint8),
        is_test=(np.arange(180) >= 120).astype(np.uint8),
        target_names=np.array(NAMES),
    )
    return str(tmp_path)


def small(data: str, **options: Any) -> Newsgroups:
    return Newsgroups(data, **{"groups": 3, "words": 27, "train": 50, "validation": 40, **options})


def test_it_is_a_problem_with_decays_and_class_weights(data: str) -> None:
    problem = small(data)
    check_problem(problem, problem.space)
    assert problem.space.dimension == 3 + 5
    found, *_ = train(problem, problem.space.to_config(torch.full((8,), 0.6, dtype=torch.double)))
    assert found.upper_loss < np.log(5) and found.passes < 500
    assert {level: len(y) for level, (_, y) in problem.splits.items()} == {
        "lower": 50, "upper": 40, "test": 51, "refit": 90,
    }  # fmt: skip


def test_an_elastic_penalty_takes_words_out(data: str) -> None:
    problem = small(data, elastic=True)
    assert problem.space.dimension == 2 * 3 + 5
    check_problem(problem, problem.space)
    config = problem.space.to_config(torch.full((11,), 0.6, dtype=torch.double))
    config["l1"]["g2"] = 1.0
    training = LowerLevelTraining(problem, config)
    training.run()
    # (classes, words) of the groups
    weight = training.model.get_parameter("weight").detach().abs().reshape(5, 3, 9)
    assert weight[:, 2].max() < 0.01 < weight[:, 0].max()


def test_groups_are_of_words_from_the_most_frequent_on(data: str) -> None:
    x, _ = small(data).splits["lower"]
    frequency = (x > 0).sum(0)
    assert frequency[0] >= frequency[-1] and (frequency.diff() <= 0).all()


def test_splits_differ_and_test_posts_do_not(data: str) -> None:
    first, again, second = small(data), small(data), small(data, split_seed=1)
    assert torch.equal(first.splits["lower"][0], again.splits["lower"][0])
    assert not torch.equal(first.splits["lower"][1], second.splits["lower"][1])
    assert torch.equal(first.splits["test"][1], second.splits["test"][1])


def test_missing_data_are_named(data: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*20news_bydate\.npz"):
        small(str(tmp_path / "nowhere")).splits  # noqa: B018
    with pytest.raises(DataError, match="expected at least 1000"):
        small(data, words=1000).splits  # noqa: B018
