from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel._lower.training import LowerLevelTraining, refit
from raybilevel.errors import ConfigError, DataError
from raybilevel.problem import BilevelProblem, move
from raybilevel.problems import _classification as classification
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._classification import LayerDecay, Minibatch
from raybilevel.problems._datasets import Images
from raybilevel.problems.cifar import CifarLenet
from raybilevel.problems.mnist import Mnist, Mnist1K
from raybilevel.problems.mnist_kinds import Mnist1KKinds
from raybilevel.search import check_problem
from raybilevel.space import Parameter, Space, flatten
from tests.problems_for_tests import levels_at

DATA = os.environ.get("RAYBILEVEL_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RAYBILEVEL_TEST_DATA does not name a folder with the data sets")

TWO = {"weight_decay": {"fc1": 0.5, "fc2": 0.02}}
FIVE = {"weight_decay": {"conv1": 0.5, "conv2": 0.02, "fc1": 0.3, "fc2": 0.1, "fc3": 0.9}}


def images(n: int, *shape: int, seed: int = 0) -> Images:
    """n random images; those of a class are alike, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10
    classes = torch.randint(0, 200, (10, *shape), generator=torch.Generator().manual_seed(99))
    noise = torch.randint(0, 56, (n, *shape), generator=generator)
    return Images((classes[labels] + noise).to(torch.uint8), labels)


@pytest.fixture(autouse=True)
def readers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small data sets instead of files, except in tests of the files; of the 1K split, three images are test images."""
    if request.node.get_closest_marker("skipif"):
        return
    test = images(27, 28, 28, seed=1)

    def one_thousand(folder: str) -> tuple[Images, Images]:
        lower, upper = images(150, 28, 28, seed=2), images(70, 28, 28, seed=3)
        lower.images[[4, 40]], upper.images[7] = test.images[[5, 6]], test.images[20]
        return lower, upper

    def cifar10(folder: str, train: int, test: int) -> tuple[Images, Images]:
        return Images(*(t[:train] for t in images(180, 3, 32, 32))), images(min(test, 30), 3, 32, 32, seed=1)

    monkeypatch.setattr(datasets, "mnist", lambda folder: (images(300, 28, 28), test))
    monkeypatch.setattr(datasets, "mnist_test", lambda folder: test)
    monkeypatch.setattr(datasets, "has_mnist_test", lambda folder: True)
    monkeypatch.setattr(datasets, "mnist_1k", one_thousand)
    monkeypatch.setattr(datasets, "cifar10", cifar10)


def mnist(**options: Any) -> Mnist:
    return Mnist(**{"data": "data", "train": 150, "validation": 70, "hidden": (8,), "epochs": 1, **options})


def mnist_1k(**options: Any) -> Mnist1K:
    return Mnist1K(**{"data": "data", "hidden": (8,), "epochs": 1, **options})


def cifar(**options: Any) -> CifarLenet:
    return CifarLenet(**{"data": "data", "train": 100, "validation": 60, "test": 25, "epochs": 1, **options})


def test_images_are_moved_by_the_generator_alone() -> None:
    problem = mnist(shift=2, batch=None)
    (plain,), (again,) = problem.batches("lower", None), mnist(batch=None).batches("lower", None)
    assert torch.equal(plain.x, again.x)
    (moved,), (other,) = (problem.batches("lower", torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(moved.x, other.x)
    offsets = set()
    for image, original in zip(moved.x.reshape(-1, 28, 28), plain.x.reshape(-1, 28, 28), strict=True):
        inside = original[2:-2, 2:-2]
        offsets |= {
            (i, j) for i in range(5) for j in range(5) if torch.equal(image[i : i + 24, j : j + 24], inside)
        }  # fmt: skip
        assert image.sum() <= original.sum()
    assert len(offsets) == 25
    with pytest.raises(ConfigError, match="shift must be at least 0, got -1"):
        mnist(shift=-1)


ALL = pytest.mark.parametrize(("make", "config"), [(mnist, TWO), (mnist_1k, TWO), (cifar, FIVE)])


def seeded_model(problem: BilevelProblem) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return problem.model().to(problem.dtype)


def weights(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight").detach()


@ALL
def test_it_meets_the_contract_of_a_problem(make: Any, config: dict[str, Any]) -> None:
    space = Space(tuple(Parameter(path, 4.5e-5, 1.0, log=True) for path in flatten(config)))
    check_problem(make(), space)


@ALL
def test_one_epoch_lowers_the_loss_and_a_refit_works(make: Any, config: dict[str, Any]) -> None:
    problem = make(learning_rate=0.1)
    training = LowerLevelTraining(problem, config)
    before = training.losses()
    training.run_epoch()
    after = training.losses()
    assert after["lower_loss"] < before["lower_loss"] and after["upper_loss"] < before["upper_loss"]
    metrics = {"test_loss", "test_accuracy"}
    assert set(after) == {"lower_loss", "upper_loss", *metrics} and set(refit(problem, config) or {}) == metrics


@ALL
@pytest.mark.parametrize("scale", ["paper", "batch"])
def test_the_gradient_in_the_hyperparameters_agrees_with_differences(make: Any, config: Any, scale: str) -> None:
    problem = make()
    problem.dtype, problem.penalty_scale = torch.double, scale
    levels, x, y = levels_at(problem, seeded_model(problem), config)
    gradient = levels.lower(x, y).in_x
    for entry, step in zip(gradient, 0.01 * torch.eye(len(x), dtype=torch.double), strict=True):
        up, down = (levels.value("lower", end, y) for end in (x + step, x - step))
        # f is linear in the weight decays, so that differences are exact up to rounding: 1e-16 / h against 1e-3
        assert entry.item() == pytest.approx((up - down) / 0.02, rel=1e-9)


@ALL
def test_the_lower_level_is_the_published_function(make: Any, config: dict[str, Any]) -> None:
    problem = make()
    problem.dtype = torch.double
    model = seeded_model(problem)
    x, y = problem.splits["lower"]
    norms = {name: weights(model, name).square().sum().item() for name in config["weight_decay"]}
    penalty = sum(decay * norms[name] for name, decay in config["weight_decay"].items())
    with torch.no_grad():
        expected = cross_entropy(model(x), y).item() + penalty / (4 * len(x))
    levels, decays, y_ = levels_at(problem, model, config)
    assert levels.value("lower", decays, y_) == pytest.approx(expected, rel=1e-12)


def test_in_the_scale_of_the_code_the_penalty_is_divided_by_the_batch() -> None:
    problem = mnist(penalty_scale="batch", batch=64)
    problem.dtype = torch.double
    model = seeded_model(problem)
    penalty = 0.5 * weights(model, "fc1").square().sum() + 0.02 * weights(model, "fc2").square().sum()
    sizes = []
    for batch in problem.batches("lower", None):
        found = problem.lower_loss(model, TWO, batch) - cross_entropy(model(batch.x), batch.y)
        assert found.item() == pytest.approx(penalty.item() / (4 * len(batch.x)), rel=1e-9)
        sizes.append(len(batch.x))
    assert sizes == [64, 64, 22]


def test_in_a_refit_the_penalty_is_divided_by_the_examples_of_the_refit() -> None:
    problem = mnist()
    problem.dtype = torch.double
    model, (batch, *_) = seeded_model(problem), problem.refit_batches(torch.Generator().manual_seed(0))
    assert batch.examples == 220 and len(batch.x) == 64
    penalty = 0.5 * weights(model, "fc1").square().sum() + 0.02 * weights(model, "fc2").square().sum()
    found = problem.lower_loss(model, TWO, batch) - cross_entropy(model(batch.x), batch.y)
    assert found.item() == pytest.approx(penalty.item() / (4 * 220), rel=1e-9)


def test_one_weight_decay_for_all_layers_is_equal_ones_per_layer() -> None:
    one, each = mnist(share="all"), mnist()
    model = seeded_model(one)
    equal = {"weight_decay": {"fc1": 0.3, "fc2": 0.3}}
    found = []
    for problem, config in ((one, {"weight_decay": 0.3}), (each, equal)):
        levels, x, y = levels_at(problem, model, config)
        found.append(levels.lower(x, y))
    # float32
    assert found[0].value == pytest.approx(found[1].value, rel=1e-6)
    assert found[0].in_x.sum().item() == pytest.approx(found[1].in_x.sum().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("share", "config", "message"),
    [
        ("all", TWO, "must be one number"),
        ("all", {}, "must be one number, got None"),
        ("layer", {}, "exactly the entries fc1, fc2, got None"),
        ("layer", {"weight_decay": 0.3}, "exactly the entries fc1, fc2, got 0.3"),
        ("layer", {"weight_decay": {"fc1": 0.3}}, "exactly the entries fc1, fc2, got fc1"),
        ("layer", {"weight_decay": {"fc1": 0.3, "fc2": 0.3, "fc3": 0.3}}, "got fc1, fc2, fc3"),
    ],
)
def test_weight_decays_that_do_not_fit_the_layers(share: str, config: dict[str, Any], message: str) -> None:
    problem = mnist(share=share)
    with pytest.raises(ConfigError, match=message):
        problem.lower_loss(problem.model(), config, next(iter(problem.batches("lower", None))))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mnist, {"data": None}, "--data"),
        (mnist_1k, {"data": None}, "--data"),
        (cifar, {"data": None}, "--data"),
        (mnist, {"train": 0}, "at least one each"),
        (mnist, {"train": 50_000, "validation": 10_001}, "60,000 training images"),
        (mnist, {"share": "some"}, "unknown share 'some'; choose one of all, layer"),
        (mnist_1k, {"penalty_scale": "mean"}, "unknown penalty_scale 'mean'; choose one of paper, batch"),
        (mnist, {"hidden": (100, 0)}, "hidden must be positive"),
        (mnist, {"momentum": 1.0}, "momentum must be from 0 to below 1, got 1.0"),
        (cifar, {"test": 0}, "test must be positive, got 0"),
        (cifar, {"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
    ],
)
def test_settings_that_make_no_sense(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


@ALL
def test_a_pickled_problem_carries_no_data(make: Any, config: dict[str, Any]) -> None:
    problem = make()
    lower = problem.splits["lower"]
    pickled = pickle.dumps(problem)
    assert len(pickled) < 1000 and problem.splits["lower"] is lower
    copy = pickle.loads(pickled)
    assert "splits" not in vars(copy)
    assert torch.equal(copy.splits["lower"][0], lower[0])


def test_the_folder_is_found_from_any_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert mnist_1k().data == str(tmp_path / "data")


def test_a_minibatch_survives_the_move_to_a_device() -> None:
    problem = mnist()
    batch = next(iter(problem.batches("upper", None)))
    moved = move(batch, "cpu", torch.double)
    assert isinstance(moved, Minibatch) and moved.examples == 70
    assert moved.x.dtype == torch.double and moved.y.dtype == torch.int64
    assert problem.batch_size(moved) == 64


def test_mnist_has_a_box_with_every_decay_of_its_layers() -> None:
    deep = Mnist1K("data", hidden=(8, 8))
    assert deep.space.names == tuple(f"weight_decay/fc{layer}" for layer in (1, 2, 3))
    assert {(p.low, p.high, p.log) for p in deep.space.parameters} == {(math.exp(-10), math.exp(5), True)}
    assert Mnist1K("data", share="all").space.names == ("weight_decay",)
    kinds = Mnist1KKinds("data", hidden=(8,)).space.names
    assert kinds == ("weight_decay/fc1", "weight_decay/fc2", "bias_decay/fc1", "bias_decay/fc2")


def test_mnist_splits_are_disjoint_and_depend_on_the_seed() -> None:
    problem, again, other = mnist(), mnist(), mnist(split_seed=1)
    lower, upper, test = (problem.splits[name] for name in ("lower", "upper", "test"))
    assert lower[0].shape == (150, 784) and upper[0].shape == (70, 784) and test[0].shape == (27, 784)
    assert lower[0].min() >= 0 and 0.9 < lower[0].max() <= 1
    assert len({row.numpy().tobytes() for x in (lower[0], upper[0]) for row in x}) == 220
    assert torch.equal(lower[0], again.splits["lower"][0]) and not torch.equal(lower[0], other.splits["lower"][0])
    assert torch.equal(problem.splits["refit"][0], torch.cat([lower[0], upper[0]]))


def test_mnist_1k_leaves_its_own_images_out_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = mnist_1k().splits["test"]
    kept = [i for i in range(27) if i not in (5, 6, 20)]
    test = datasets.mnist_test("data")
    assert torch.equal(x, test.images[kept].flatten(1) / 255) and torch.equal(y, test.labels[kept])

    monkeypatch.setattr(datasets, "has_mnist_test", lambda folder: False)
    problem = mnist_1k()
    assert problem.evaluate(problem.model()) == {}


@ALL
def test_metrics_do_not_depend_on_the_chunks(make: Any, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make()
    problem.dtype = torch.double
    model = seeded_model(problem)
    x, y = problem.splits["test"]
    monkeypatch.setattr(classification, "TEST_CHUNK", 7)
    with torch.no_grad():
        logits, metrics = model(x), problem.evaluate(model)
    assert metrics["test_loss"] == pytest.approx(cross_entropy(logits, y).item(), rel=1e-12)
    assert metrics["test_accuracy"] == pytest.approx((logits.argmax(1) == y).double().mean().item(), rel=1e-12)


def test_the_perceptron() -> None:
    model = mnist(hidden=(9, 8)).model()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {
        "fc1.weight": (9, 784),
        "fc1.bias": (9,),
        "fc2.weight": (8, 9),
        "fc2.bias": (8,),
        "fc3.weight": (10, 8),
        "fc3.bias": (10,),
    }
    assert weights(model, "fc1").abs().max() <= (6 / (784 + 9)) ** 0.5  # Glorot & Bengio (2010), equation 16
    assert model.get_parameter("fc1.bias").count_nonzero() == 0
    assert [type(layer).__name__ for layer in model.children()] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]


def test_lenet() -> None:
    model = cifar().model()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    # LeCun et al. (1998) for three input channels and with the second convolution connected to all maps
    assert sum(parameter.numel() for parameter in model.parameters()) == 456 + 2416 + 48120 + 10164 + 850


@ALL
def test_the_optimizer(make: Any, config: Any) -> None:
    problem: LayerDecay = make()
    group = problem.optimizer(problem.model()).param_groups[0]
    expected = (0.05, 0.9) if isinstance(problem, CifarLenet) else (0.5, 0.08)
    assert (group["lr"], group["momentum"]) == expected and group["nesterov"] and group["weight_decay"] == 0
    plain = make(momentum=0.0)
    assert not plain.optimizer(plain.model()).param_groups[0]["nesterov"]


def test_cifar_is_normalised_by_the_training_split_and_its_test_set_capped() -> None:
    splits = cifar().splits
    lower, upper, test = (splits[name][0] for name in ("lower", "upper", "test"))
    assert lower.shape == (100, 3, 32, 32) and upper.shape == (60, 3, 32, 32) and test.shape == (25, 3, 32, 32)
    assert lower.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)  # float32
    assert lower.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert upper.mean((0, 2, 3)).abs().min() > 1e-4
    assert len(cifar(test=2000).splits["test"][0]) == 30
    assert not torch.equal(lower, cifar(split_seed=1).splits["lower"][0])


def test_cifar_files_with_too_few_images() -> None:
    with pytest.raises(ConfigError, match=r"hold 180 training images; train \+ validation .* got 100 \+ 81"):
        cifar(validation=81).splits  # noqa: B018


# On the published files


@needs_data
def test_mnist_1k_on_its_files() -> None:
    problem = Mnist1K(DATA, epochs=1)
    shapes = {name: tuple(x.shape) for name, (x, _) in problem.splits.items()}
    # 142 of the 1,000 are official test images, one of them twice
    assert shapes == {"lower": (600, 784), "upper": (400, 784), "refit": (1000, 784), "test": (10_000 - 141, 784)}
    (official, _), seen = datasets.mnist_test(DATA or ""), problem.splits["refit"][0]
    pixels = {image.numpy().tobytes() for image in official}
    assert sum((image * 255).round().to(torch.uint8).numpy().tobytes() in pixels for image in seen) == 142

    training = LowerLevelTraining(problem, TWO)
    before = training.losses()
    training.run_epoch()
    after = training.losses()
    assert after["lower_loss"] < before["lower_loss"] and after["test_accuracy"] > before["test_accuracy"]


@needs_data
def test_mnist_on_its_files() -> None:
    problem = Mnist(DATA, epochs=1)
    shapes = {name: tuple(x.shape) for name, (x, _) in problem.splits.items()}
    assert shapes == {"lower": (3000, 784), "upper": (2000, 784), "refit": (5000, 784), "test": (10_000, 784)}
    training = LowerLevelTraining(problem, TWO)
    training.run_epoch()
    assert training.losses()["test_accuracy"] > 0.8


@needs_data
def test_cifar_on_its_files() -> None:
    pytest.importorskip("PIL", reason="pillow, which reads the JPEG images, is not installed")
    problem = CifarLenet(DATA, train=500, validation=200, test=200, epochs=1)
    shapes = {name: tuple(x.shape) for name, (x, _) in problem.splits.items()}
    assert shapes["refit"] == (700, 3, 32, 32) and shapes["test"] == (200, 3, 32, 32)
    training = LowerLevelTraining(problem, FIVE)
    before = training.losses()
    training.run_epoch()
    assert training.losses()["lower_loss"] < before["lower_loss"]


@needs_data
def test_a_folder_without_the_files(tmp_path: Path) -> None:
    for problem in (Mnist(str(tmp_path)), Mnist1K(str(tmp_path)), CifarLenet(str(tmp_path))):
        with pytest.raises(DataError, match=str(tmp_path)):
            problem.splits  # noqa: B018
