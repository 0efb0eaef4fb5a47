"""The ports of examples/scripts to raybilevel, without Ray: what is searched with gradients, and what is concluded."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from benchmarks.ports import PORTED, Port, lines_for_tuning, lines_of, lines_of_imports, port_of, returns_of, rows
from tests.unit.test_scripts import SCRIPTS, folder_on_path, imported, reports, sampled  # noqa: F401  # fixtures

pytestmark = pytest.mark.usefixtures("folder_on_path")

WITH_GRADIENTS = {
    "char_gpt": {"label_smoothing"},
    "cifar_cnn": {"weight_decay", "label_smoothing"},
    "digits_mlp": {"weight_decay/hidden", "weight_decay/last"},
    "graph_network": {"weight_decay/first", "weight_decay/others", "label_smoothing"},
    "hf_bert": {"label_smoothing_factor"},
    "lightning_digits": {"weight_decay", "label_smoothing"},
    "mnist_step_lr": {"weight_decay/conv", "weight_decay/fc"},
    "sgd_classifier": {"alpha", "positive_weight"},
    "tabular_mlp": {"huber_delta", "weight_decay"},
    "timm_recipe": {"smoothing"},
    "torchvision_recipe": {
        "weight_decay", "norm_weight_decay", "bias_weight_decay", "label_smoothing", "class_balance",
    },
}  # fmt: skip


def test_every_script_has_a_port() -> None:
    assert list(PORTED) == SCRIPTS


@pytest.mark.parametrize("script", PORTED)
def test_what_stands_in_the_loss_is_searched_with_gradients_and_nothing_is_refused(script: str) -> None:
    imported(f"{script}_bilevel")
    port = port_of(script)
    assert set(port.with_gradients) == WITH_GRADIENTS[script]
    assert len(port.by_values) >= 3 and not port.refused
    # Of an untuned script a port changes at most one and a half times as many lines as OptunaSearch does.
    assert 0 < port.untuned <= 1.5 * port.untuned_twin


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's, of torch 2.13
@pytest.mark.parametrize("script", PORTED)
def test_a_port_concludes_the_model_that_the_script_has_judged(
    script: str,
    reports: list[dict[str, Any]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = imported(f"{script}_bilevel")
    concluded: list[dict[str, Any]] = []
    monkeypatch.setattr("raybilevel.tune._conclude.send", lambda metrics, *rest: concluded.append(metrics))
    data = {"data": None} if "data" in inspect.signature(port.main).parameters else {}
    port.trainable({**sampled(imported(script)), **data})
    (end,) = concluded
    judged = {name: reports[-1][name] for name in end if name.startswith(("val_", "test_"))}
    assert judged.keys() >= {"val_loss", "test_loss"}
    assert {name: end[name] for name in judged} == pytest.approx(judged, rel=1e-5)
    assert end["lower_level_finished"] and end["upper_loss"] == end["val_loss"]


def test_lines_are_those_of_code() -> None:
    source = 'def f():\n    """Says\n    what."""\n\n    return 1\n\n\ndef g():\n    # why\n    return 1\n'
    assert lines_of(source) == {"def f():": 1, "def g():": 1, "return 1": 2}


def test_lines_for_tuning_are_those_that_name_tune() -> None:
    source = """
from ray import tune
SPACE = {
    "lr": tune.uniform(0, 1),
    "epochs": 3,
}
def fit(config):
    if state := tune.get_checkpoint():
        load(state)
    tune.report(
        {"loss": 1.0}
    )
    return 1, 2
"""
    # The import, the domain, the line of `if`, and three of the report.
    assert lines_for_tuning(source) == 6
    assert returns_of("fit", source) == 1 and returns_of("train", source) == 0
    assert lines_of_imports(source, {"ray"}) == {"from ray import tune": 1}


def test_a_port_is_counted() -> None:
    assert list(rows([Port("timm_recipe", 12, 30, 20, ("smoothing",), ("lr", "drop"), ())])) == [
        ("timm_recipe", "12", "3", "30", "20", "1.50", "1", "2", "0")
    ]
