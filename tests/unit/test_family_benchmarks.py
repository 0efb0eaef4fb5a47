"""The measurements of problem families, at their smallest: what they write, and how they are told wrong settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raybilevel.benchmark import equilibrium, treatment
from raybilevel.benchmark.families import shown
from raybilevel.errors import ConfigError
from raybilevel.problems import make_problem
from raybilevel.report.statistics import bootstrap

ROOT = Path(__file__).parents[2]


def small(name: str, out: Path, **changes: object) -> list[str]:
    settings = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    arguments = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--out", str(out), "--seeds", "2"]
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
