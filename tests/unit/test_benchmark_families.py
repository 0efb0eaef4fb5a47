"""The measurements of the problem families, at their smallest: what they write, compare and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import architecture, equilibrium, graph, treatment
from benchmarks.families import shown
from raybilevel.errors import ConfigError
from raybilevel.problems import _datasets as datasets
from raybilevel.problems import make_problem
from raybilevel.report._statistics import bootstrap
from tests.unit.test_graph import blocks

CONFIGS = Path(__file__).parents[2] / "configs"


def small(name: str, out: Path, **changes: object) -> list[str]:
    settings = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    arguments = ["--config", str(CONFIGS / f"{name}.yaml"), "--out", str(out), "--seeds", "2"]
    return [*arguments, *(part for setting in settings for part in ("--set", setting))]


def test_treatment_effects_are_written_with_their_intervals(tmp_path: Path) -> None:
    changes = {"options__units": 100, "search__settings__steps": 2}
    treatment.main(small("treatment_effects", tmp_path, **changes))
    found = json.loads((tmp_path / "treatment.json").read_text())
    assert found["seeds"] == 2 and set(found["ate_error"]) == set(treatment.ESTIMATORS.values())
    ours = [row[treatment.OURS] for row in found["rows"]["ate_error"]]
    assert found["ate_error"][treatment.OURS]["mean"] == pytest.approx(sum(ours) / 2)
    assert (tmp_path / "figures" / "treatment_effects.svg").is_file()


def test_equilibria_are_written_with_memory_and_accuracy(tmp_path: Path) -> None:
    changes = {"options": "{train: 30, hidden: 4}", "search__settings__steps": 2}
    equilibrium.main(small("equilibrium", tmp_path, **changes))
    found = json.loads((tmp_path / "equilibrium.json").read_text())
    assert set(found["accuracy"]) == {"equilibrium", "plain"}
    assert len(found["gradients"]) == 2 * len(equilibrium.ITERATIONS)
    assert (tmp_path / "figures" / "equilibrium_saved_bytes.png").is_file()


def test_only_descents_are_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hypergradient"):
        treatment.main(small("digits", tmp_path, search__method="paper"))
    assert shown(bootstrap([0.5])) == "0.500" and shown(bootstrap([1.0, 1.0]), 1) == "1.0 [1.0, 1.0]"


def test_a_device_is_an_option_of_every_problem() -> None:
    assert make_problem("ridge", {"device": "meta"}).device == "meta"
    assert make_problem("ridge").device == "cpu"


def test_graphs_are_measured_once_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "planetoid", lambda folder, name: blocks())
    monkeypatch.setattr("raybilevel.problems.graph.GraphStructure.epochs", 1)
    arguments = [
        "--data", "data", "--out", str(tmp_path), "--seeds", "1", "--graphs", "cora", "--missing", "0.5",
        "--config", str(CONFIGS / "graph_structure.yaml"), "--set", "search.settings.steps=1",
    ]  # fmt: skip
    graph.main(arguments)
    found = json.loads((tmp_path / "graph.json").read_text())
    (result,) = found["results"]
    means = {name: result["means"][name]["mean"] for name in graph.COLUMNS}
    assert all(0 <= value <= 1 for value in means.values())
    better = max(means["given"], means["neighbours"])
    assert result["gain"]["mean"] == pytest.approx(means["learned"] - better)
    assert (tmp_path / "figures" / "graph_cora.svg").is_file()
    monkeypatch.setattr(graph, "accuracies", lambda *_: pytest.fail("measured again"))
    graph.main(arguments)
    assert json.loads((tmp_path / "graph.json").read_text()) == found


def test_architectures_are_compared_at_equal_cost(tmp_path: Path) -> None:
    small = ["train=40", "validation=30", "nodes=1", "channels=2", "epochs=2", "search_epochs=1", "batch=20"]
    arguments = ["--config", str(CONFIGS / "architecture.yaml"), "--out", str(tmp_path), "--seeds", "1"]
    for key in [*(f"options.{one}" for one in small), "search.settings.steps=1"]:
        arguments += ["--set", key]
    architecture.main(arguments)
    (row,) = json.loads((tmp_path / "architecture.json").read_text())["rows"]
    ours, drawn = row["learned"], row["random"]
    # the epoch before the step; the product that is compared with differences at six lengths, as many as are tried in
    # float32; the unrolled gradient step, two products, f as reported, and F at 30 / 40
    assert ours["cost_gradients"] == pytest.approx(1 + (2 + 1 + 6 + 1 + 1 + 2 + 1 + 30 / 40) / 2)
    # 3x3 from 1 to 2 channels on 64 pixels, and the edge's operations: kernels of 10, or 2 on average, on 80 pixels
    ratio = (9 * 2 * 64 + 10 * 4 * 80) / (9 * 2 * 64 + 2 * 4 * 80)
    assert ours["cost_operations"] == pytest.approx(1 + ratio * (ours["cost_gradients"] - 1))
    assert len(drawn) == -(-ours["cost_operations"] // 1)
    lowest = min(drawn, key=lambda one: one["validation_loss"])
    assert row["test"]["random_by_operations"] == lowest["test_accuracy"]
    assert (tmp_path / "figures" / "architecture_digits.svg").is_file()
