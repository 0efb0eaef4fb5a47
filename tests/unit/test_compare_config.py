from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raybilevel._compare.config import CompareConfig, read_comparison
from raybilevel._compare.methods import COMBINED, Parts, parse
from raybilevel.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted((CONFIGS / "compare").glob("*.yaml"))


def written(folder: Path, **changes: Any) -> Path:
    content = {
        "budget": {"trainings": 6},
        "methods": ["raybilevel", "random"],
        "problems": {"ridge": {"problem": "ridge", "options": {"groups": 2}}},
        **changes,
    }
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_ships_is_whole_at_every_scale(path: Path) -> None:
    scales = (yaml.safe_load(path.read_text()).get("scales") or {}).keys()
    for scale in (None, *scales):
        runs = read_comparison(path, scale=scale).runs("some/folder")
        assert runs
        assert len({run.path for run in runs}) == len(runs)


def test_a_method_is_a_searcher_and_a_scheduler() -> None:
    assert parse("asha") == Parts("random", "asha")
    assert parse("optuna+asha") == Parts("optuna", "asha")
    assert parse("raybilevel-paper+median-stopping") == Parts("raybilevel-paper", "median-stopping")
    assert parse("bohb") == Parts("bohb", "bohb")
    for name in COMBINED:
        parse(name)
    for wrong in ("ahsa", "optuna+pbt", "bohb+asha", "optuna+"):
        with pytest.raises(ConfigError, match=r"unknown method .*choose one of"):
            parse(wrong)


def test_runs_put_the_seeds_outermost_and_take_the_problems_own_box(tmp_path: Path) -> None:
    runs = read_comparison(written(tmp_path, seeds=2)).runs(None)
    assert [(r.method_name, r.seed) for r in runs] == [
        ("raybilevel", 0), ("random", 0), ("raybilevel", 1), ("random", 1),
    ]  # fmt: skip
    assert runs[0].experiment.space == {"decay": {f"g{g}": {"loguniform": [1e-4, 10.0]} for g in range(2)}}
    assert runs[0].settings.budget_unit == "trainings"


def test_a_problem_may_have_its_own_budget_seeds_and_methods(tmp_path: Path) -> None:
    own = {"problem": "ridge", "budget": {"epochs": 9}, "seeds": 3, "methods": ["random"]}
    config = read_comparison(written(tmp_path, seeds=1, problems={"one": {"problem": "ridge"}, "own": own}))
    runs = [r for r in config.runs(None) if r.problem_name == "own"]
    assert [(r.method_name, r.seed, r.budget.unit, r.budget.amount) for r in runs] == [
        ("random", seed, "epochs", 9) for seed in range(3)
    ]
    only = read_comparison(written(tmp_path, only=["one"], problems={"one": {"problem": "ridge"}, "own": own}))
    assert {r.problem_name for r in only.runs(None)} == {"one"}


def test_what_is_kept_with_the_records_needs_no_other_file(tmp_path: Path) -> None:
    config = read_comparison(CONFIGS / "compare" / "quick.yaml")
    kept = tmp_path / "config.yaml"
    kept.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert read_comparison(kept) == config
    assert [r.path for r in read_comparison(kept).runs(None)] == [r.path for r in config.runs(None)]


def test_a_record_is_known_by_what_decides_its_result(tmp_path: Path) -> None:
    path = written(tmp_path)
    paths = {r.path for r in read_comparison(path).runs("here")}
    assert paths == {r.path for r in read_comparison(path, ["marks=[2]"]).runs("there")}
    assert not paths & {r.path for r in read_comparison(path, ["budget.trainings=7"]).runs("here")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"trainings": 3, "epochs": 4}}, "budget: give exactly one of trainings, epochs"),
        ({"budget": {}}, "give exactly one"),
        ({"budget": {"hours": 3}}, "budget.hours: no such key"),
        ({"methods": ["ahsa"]}, "unknown method 'ahsa'; choose one of"),
        ({"methods": {"a": {"method": "raybilevel", "searcher": {"speed": 3}}}}, "no setting 'speed'"),
        ({"methods": {"a": {"method": "random", "searcher": {"speed": 3}}}}, "has no settings"),
        ({"methods": {"a": {"method": "random", "scheduler": {"max_t": 3}}}}, "the method has none"),
        ({"problems": {"x": {"problem": "ridge", "methods": ["asha"]}}}, "which is not among `methods`"),
        ({"only": ["y"]}, "`only` names the problem 'y'"),
        ({"problems": ["ridge"]}, "problems: Input should be a valid dictionary"),
        ({"problems": {"x": {"problem": "ridge", "seed": 3}}}, "problems.x.seed: no such key; choose one of problem,"),
        ({"problems": {"x": {"config": "no.yaml"}}}, "cannot read"),
        ({"methods": "random"}, "methods: Input should be a valid dictionary"),
        ({"problems": {"x": {"config": "no.yaml", "problem": "ridge"}}}, "give either"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_comparison(written(tmp_path, **changes))


def test_what_is_wrong_with_a_problem_is_named(tmp_path: Path) -> None:
    for problem, words in (
        ({"problem": "rigde"}, "problem 'x': unknown problem 'rigde'"),
        ({"problem": "digits"}, "problem 'x': digits has no box of its own; give its `space`"),
        ({"problem": "ridge", "options": {"gruops": 2}}, "problem 'x'.*no option 'gruops'"),
        ({"problem": "ridge", "space": {"decay": {"loguniform": [2, 1]}}}, "problem 'x'.*decay"),
        ({"problem": "ridge", "space": {"decay": 1.0}}, "problem 'x': its `space` has no hyperparameter"),
    ):
        with pytest.raises(ValueError, match=words):
            read_comparison(written(tmp_path, problems={"x": problem})).runs(None)
    with pytest.raises(ConfigError, match=r"one run; use `raybilevel run .*digits.yaml`"):
        read_comparison(CONFIGS / "digits.yaml")
    for scales in (["small"], {"small": 3}):
        with pytest.raises(ConfigError, match="scales: expected names with the keys that each replaces"):
            read_comparison(written(tmp_path, scales=scales), scale="small")
    with pytest.raises(ConfigError, match="no scale 'huge'; it has small"):
        read_comparison(written(tmp_path, scales={"small": {"seeds": 1}}), scale="huge")


def test_a_scale_replaces_top_level_keys(tmp_path: Path) -> None:
    path = written(tmp_path, seeds=5, scales={"small": {"seeds": 1, "budget": {"epochs": 4}}})
    assert read_comparison(path).seeds == 5
    small = read_comparison(path, scale="small")
    assert (small.seeds, small.budget.unit) == (1, "epochs")
    assert isinstance(small, CompareConfig)
