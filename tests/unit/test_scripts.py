"""The scripts of examples/scripts, without Ray: their spaces, and a short training of each."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle, tune
from ray.tune.search.sample import Domain
from ray.tune.search.variant_generator import generate_variants
from ray.tune.utils import flatten_dict

FOLDER = Path(__file__).parents[2] / "examples" / "scripts"
NOT_SCRIPTS = {"sample_data", "search_algorithms"}
PORTS = sorted(path.stem.removesuffix("_bilevel") for path in FOLDER.glob("*_bilevel.py"))
SCRIPTS = sorted({path.stem.removesuffix("_bilevel") for path in FOLDER.glob("*.py")} - NOT_SCRIPTS)
NEEDS = {"lightning_digits": "lightning", "hf_bert": "transformers"}
SHORT = {"epochs": 1, "steps": 5, "warmup": 1, "num_train_epochs": 1}
DATA = os.environ.get("RAYBILEVEL_TEST_DATA")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a trainable reports, where there is no Tune to report to."""
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", lambda metrics, checkpoint=None: reports.append(metrics))
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    return reports


@pytest.fixture
def folder_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in {*SCRIPTS, *NOT_SCRIPTS, *(f"{script}_bilevel" for script in PORTS)} & set(sys.modules):
        del sys.modules[name]


def imported(script: str) -> ModuleType:
    library = NEEDS.get(script.removesuffix("_bilevel"), "torch")
    pytest.importorskip(library, reason=f"{library} is not installed")
    return importlib.import_module(script)


def sampled(script: ModuleType, seed: int = 0) -> dict[str, Any]:
    ((_, config),) = generate_variants(script.SPACE, random_state=np.random.RandomState(seed))
    return config | {name: value for name, value in SHORT.items() if name in config}


def searched(script: ModuleType) -> set[str]:
    return {name for name, domain in flatten_dict(script.SPACE).items() if isinstance(domain, Domain)}


def test_readme_names_every_script() -> None:
    assert len(SCRIPTS) == 11
    readme = (FOLDER / "README.md").read_text()
    assert [script for script in SCRIPTS if f"`{script}.py`" not in readme] == []


@pytest.mark.usefixtures("folder_on_path")
@pytest.mark.parametrize("script", SCRIPTS)
def test_searchers_take_the_space_of_a_script(script: str) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    module = imported(script)
    algorithms = importlib.import_module("search_algorithms")
    assert 5 <= len(searched(module)) <= 10
    for name in ("optuna-tpe", "optuna-gp"):
        searcher = algorithms.search_algorithm(name, seed=1)
        searcher.set_search_properties("val_loss", "min", module.SPACE)
        assert searched(module) <= set(flatten_dict(searcher.suggest("trial")))


@pytest.mark.usefixtures("folder_on_path")
def test_an_unknown_searcher_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown searcher 'tpe'; choose one of random, optuna-tpe, optuna-gp"):
        importlib.import_module("search_algorithms").search_algorithm("tpe")


@pytest.mark.usefixtures("folder_on_path")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_trainable_can_be_sent_to_workers(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # There the module is not `__main__`: what is pickled by its name only, such as a cached function, is not found.
    module = imported(script)
    cloudpickle.register_pickle_by_value(module)
    sent = cloudpickle.dumps(module.trainable)
    monkeypatch.setitem(sys.modules, script, ModuleType(script))
    cloudpickle.unregister_pickle_by_value(module)
    assert cloudpickle.loads(sent).__name__ == "trainable"


@pytest.mark.usefixtures("folder_on_path")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's, of torch 2.13
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_short_training_reports_finite_losses_and_the_same_twice(script: str, reports: list[dict[str, Any]]) -> None:
    module = imported(script)
    config = sampled(module)
    module.trainable(dict(config))
    first, count = reports[-1], len(reports)
    assert all(math.isfinite(first[name]) for name in ("val_loss", "test_loss"))
    module.trainable(dict(config))
    assert reports[-1] == first and len(reports) == 2 * count
    module.trainable({**config, "seed": 1})
    assert reports[-1] != first


@pytest.mark.usefixtures("folder_on_path")
@pytest.mark.skipif(DATA is None, reason="RAYBILEVEL_TEST_DATA does not name a folder with the data sets")
@pytest.mark.parametrize(
    ("script", "shape", "classes"),
    [
        ("cifar_cnn", (1000, 3, 32, 32), 10),
        ("mnist_step_lr", (1000, 1, 28, 28), 10),
        ("graph_network", (2708, 1433), 7),
    ],
)
def test_files_of_a_folder_are_read(
    script: str, shape: tuple[int, ...], classes: int, reports: list[dict[str, Any]]
) -> None:
    module = imported(script)
    data = module.load_data(DATA)
    x, y = (data["x"], data["y"]) if "x" in data else data["train"]
    assert x.shape == shape and y.unique().tolist() == list(range(classes))
    module.trainable({**sampled(module), "data": DATA})
    assert reports


@pytest.mark.usefixtures("folder_on_path")
def test_what_is_rolled_out_erased_and_mixed() -> None:
    # Augmentations without effect would go unnoticed.
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(1.0, 65.0).view(1, 1, 8, 8)
    shifted = [imported("cifar_cnn").augmented(image, generator) for _ in range(20)]
    assert any(torch.equal(x[..., 1:], image[..., :-1]) and (x[..., 0] == 0).all() for x in shifted)
    erased = imported("timm_recipe").erased(image.repeat(50, 1, 1, 1), 1.0)
    assert ((erased == 0).sum((1, 2, 3)) == 4).all()
    x = torch.arange(64.0)
    mixed, y = imported("tabular_mlp").mixed((x, 2 * x), 1.0)
    assert torch.equal(y, 2 * mixed) and not torch.equal(mixed, x)
