"""Resources of trainings and upper-level steps, from a config to what Tune and Ray are given."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from raybilevel._cluster.resources import bundles_of, fitting, most_slots, task_options
from raybilevel._cluster.storage import locate
from raybilevel._command.cluster import cluster
from raybilevel._command.folder import prepare_folder
from raybilevel._command.resources import for_tune
from raybilevel._config.experiment import ExperimentConfig, read_config, resolved
from raybilevel._config.resources import ResourcesConfig
from raybilevel._records.names import CONFIG_FILE, TUNE_FOLDER
from raybilevel.errors import ConfigError
from tests.tiny_problems import Parabola


def config(lower: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {"problem": "digits", "space": {}, "search": {"trainings": 1}, "resources": {"lower": lower}}
    )


def test_fractions_and_custom_resources() -> None:
    training = ResourcesConfig(lower={"cpu": 2, "gpu": 0.5, "fast_disk": 1}).of_training(on_gpu=False)
    assert for_tune(training) == {"cpu": 2, "gpu": 0.5, "fast_disk": 1}
    assert task_options(training.first) == {"num_cpus": 2, "num_gpus": 0.5, "resources": {"fast_disk": 1}}


def test_bundles_become_a_placement_group(tmp_path: Path) -> None:
    given = config({"bundles": [{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}], "strategy": "STRICT_PACK"})
    training = given.resources.of_training(given.on_gpu)
    assert for_tune(training) == tune.PlacementGroupFactory([{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}], "STRICT_PACK")
    assert training.first == {"CPU": 1, "GPU": 1}  # what a process holds, and so keeps from an upper-level step
    (tmp_path / "config.yaml").write_text(resolved(given).replace("space: {}", "space: {a: {uniform: [0, 1]}}"))
    assert read_config(tmp_path / "config.yaml").resources == given.resources  # as --resume compares them


@pytest.mark.parametrize(
    ("device", "lower", "upper"),
    [(None, {"CPU": 1}, {}), ("cuda:0", {"CPU": 1, "GPU": 1}, {"GPU": 1}), ("mps", {"CPU": 1}, {})],
)
def test_a_training_on_a_gpu_requests_one(device: str | None, lower: Any, upper: Any) -> None:
    raw = {"problem": "digits", "options": {"device": device}, "search": {"trainings": 1}}
    given = ExperimentConfig.model_validate(raw)
    assert given.resources.of_training(given.on_gpu).bundles == (lower,)
    assert given.resources.of_step(given.on_gpu) == upper
    asked = ResourcesConfig(lower={"gpu": 0.25}, upper={"cpu": 1})
    assert asked.of_training(given.on_gpu).bundles == ({"GPU": 0.25},) and asked.of_step(given.on_gpu) == {"CPU": 1}


@pytest.mark.parametrize(
    ("lower", "words"),
    [
        ("{bundles: []}", r"resources\.lower\.bundles: "),
        ("{bundles: [{CPU: 1}], strategy: TIGHT}", r"resources\.lower\.strategy: "),
        ("{bundles: [{GPU: 1.5}]}", r"resources\.lower\.bundles\.0: GPU: .* whole number of them, got 1.5"),
        ("{cpu: many}", r"resources\.lower\.cpu: "),
        ("{GPUs: 1}", r"resources\.lower: GPUs: no such resource; write gpu"),
        ("{disk: -1}", r"resources\.lower: disk: expected an amount of at least 0, got -1"),
    ],
)
def test_wrong_resources_are_named(lower: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"problem: digits\nspace: {{a: {{uniform: [0, 1]}}}}\nsearch: {{trainings: 1}}\nresources: {{lower: {lower}}}\n"
    )
    with pytest.raises(ConfigError, match=words) as caught:
        read_config(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("lower", "nodes", "count"),
    [
        ({"cpu": 1}, [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}, {"memory": 9.0}], 16),
        ({"cpu": 4}, [{"CPU": 16.0}], 4),
        ({"cpu": 4}, [{"CPU": 3.0}, {"CPU": 5.0}], 1),
        ({"gpu": 0.25}, [{"CPU": 4.0, "GPU": 4.0}], 16),
        ({"cpu": 1, "gpu": 0.8}, [{"CPU": 8.0, "GPU": 1.0}] * 3 + [{"CPU": 8.0}], 3),
        ({"cpu": 1, "GPU": 0.1}, [{"CPU": 64.0, "GPU": 1.0}], 10),
        ({"fast_disk": 1, "cpu": 0}, [{"CPU": 8.0, "fast_disk": 2.0}, {"CPU": 8.0}], 2),
        ({}, [{"CPU": 3.0}], 3),
        ({"gpu": 1}, [{"CPU": 8.0}], 0),
        (tune.PlacementGroupFactory([{"CPU": 1}, {"CPU": 1, "GPU": 1}]), [{"CPU": 3.0}, {"CPU": 3.0, "GPU": 2.0}], 2),
    ],
)
def test_trainings_that_fit_on_the_nodes(lower: Any, nodes: list[dict[str, float]], count: int) -> None:
    assert fitting(nodes, bundles_of(lower, Parabola())) == count


def test_a_training_requests_a_gpu_if_its_problem_is_on_one() -> None:
    problem = Parabola()
    assert bundles_of(None, problem) == [{"CPU": 1.0}]
    problem.device = "cuda"
    assert bundles_of(None, problem) == [{"GPU": 1.0}]


@pytest.mark.parametrize(("trainings", "most"), [(0, 16), (40, 16), (64, 16), (100, 25), (4000, 1000)])
def test_the_limit_of_concurrent_trainings_grows_with_their_number(trainings: int, most: int) -> None:
    assert most_slots(trainings) == most


def test_a_step_requests_no_cpu_by_default() -> None:
    assert task_options({}) == {"num_cpus": 0}
    assert task_options({"num_gpus": 1, "scheduling_strategy": "SPREAD"}) == {
        "num_cpus": 0, "num_gpus": 1, "scheduling_strategy": "SPREAD",
    }  # fmt: skip
    assert task_options({"CPU": 1, "resources": {"a": 1}, "b": 2}) == {"num_cpus": 1, "resources": {"a": 1, "b": 2}}


def test_ray_client_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match="ray job submit"), cluster("ray://192.0.2.1:10001"):
        pass


def test_an_address_at_which_nothing_answers_is_said_at_once() -> None:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        for address in (f"127.0.0.1:{bound.getsockname()[1]}", "127.0.0.1:port", "127.0.0.1:99999999"):
            with pytest.raises(ConfigError, match=f"--address {address}: nothing answers there"), cluster(address):
                pass


def test_a_run_resumes_with_all_that_leaves_what_is_known(tmp_path: Path) -> None:
    (tmp_path / TUNE_FOLDER).mkdir()
    text = "problem: digits\nspace: {a: {uniform: [0, 1]}}\nsearch: {trainings: 9, max_concurrent: 4}\n"
    (tmp_path / CONFIG_FILE).write_text(text)

    def resume(*changes: str) -> None:
        given = read_config(tmp_path / CONFIG_FILE, changes)
        prepare_folder(tmp_path, given, resume=True, place=locate(tmp_path))

    resume("search.max_concurrent=8")
    resume("search.trainings=20", "search.max_failures=2", "search.step_time_limit=60", "resources.lower.cpu=2")
    kept = read_config(tmp_path / CONFIG_FILE)
    assert (kept.search.trainings, kept.search.max_concurrent) == (20, 8)
    with pytest.raises(ConfigError) as refused:
        resume("search.seed=1", "space.a={uniform: [0, 2]}", "options.train=7", "search.trainings=30")
    for words in ("options.train was 'not there' and is 7", "space.a.uniform was [0, 1] and is [0, 2]",
                  "search.seed was 0 and is 1", "Only resources and search.epoch_time_limit"):  # fmt: skip
        assert words in str(refused.value)
    assert "trainings was" not in str(refused.value)
    assert read_config(tmp_path / CONFIG_FILE) == kept


def test_a_run_resumes_in_another_folder_with_the_config_from_its_storage(tmp_path: Path) -> None:
    text = "problem: digits\nspace: {a: {uniform: [0, 1]}}\nsearch: {trainings: 9}\n"
    (tmp_path / "mine.yaml").write_text(text)
    given, storage = read_config(tmp_path / "mine.yaml"), locate(tmp_path / "storage")
    prepare_folder(tmp_path / "one", given, resume=False, place=storage)
    (tmp_path / "storage" / TUNE_FOLDER).mkdir()
    prepare_folder(tmp_path / "other", given, resume=True, place=storage)
    kept = [tmp_path / folder / CONFIG_FILE for folder in ("one", "storage", "other")]
    assert [read_config(path) for path in kept] == [given] * 3
    changed = read_config(tmp_path / "mine.yaml", ["search.seed=1"])
    with pytest.raises(ConfigError, match="differs"):
        prepare_folder(tmp_path / "third", changed, resume=True, place=storage)


def test_a_run_resumes_if_the_config_spells_out_a_default(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("problem: digits\nspace: {a: {uniform: [0, 1]}}\nsearch: {trainings: 9}\n")
    given = read_config(tmp_path / "mine.yaml", ["search.method=auto", "search.seed=0"])
    prepare_folder(tmp_path, given, resume=False, place=locate(tmp_path))
    (tmp_path / TUNE_FOLDER).mkdir()
    prepare_folder(tmp_path, read_config(tmp_path / "mine.yaml"), resume=True, place=locate(tmp_path))


def test_the_folder_of_a_run_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write to .*file/out"):
        prepare_folder(tmp_path / "file" / "out", config({"cpu": 1}), resume=False, place=locate(tmp_path))
