from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import main, narrowed, parser
from benchmarks.descent import descent
from benchmarks.made_up import Quadratic
from benchmarks.objective import BudgetSpent, Objective
from benchmarks.ours import Drive, bilevel, configured
from benchmarks.reference import implicit_gradient
from benchmarks.suite import PEERS, MethodEntry, ProblemEntry, Run, box_of, execute, read_suite
from raybilevel._records import store as records
from raybilevel._records.record import Hyperparameter, Observation, Record, Settings
from raybilevel.errors import ConfigError, NotFiniteError
from raybilevel.problems.ridge import Ridge
from raybilevel.problems.synthetic import SeveralOptima
from raybilevel.search import BilevelOptimizer

BENCH = Path(__file__).parents[2] / "configs" / "bench" / "algorithm.yaml"


def run_of(method: str, budget: float = 5, seed: int = 0, groups: int = 2, **settings: Any) -> Run:
    problem = ProblemEntry(problem="ridge", options={"groups": groups})
    return Run("ridge", problem, method, MethodEntry(method=method, settings=settings), seed, budget, (3, 5), None)


def centre(dimension: int) -> torch.Tensor:
    return torch.full((dimension,), 0.5, dtype=torch.double)


def test_cost_counts_trainings_and_shares_of_a_training() -> None:
    objective = Objective(problem := Ridge(2), problem.space, seed=0, budget=4)
    objective.value(centre(2))
    objective.charge(objective.passes_per_training / 2)
    assert objective.cost == pytest.approx(1.5)
    objective.value(centre(2))
    assert [o.cost for o in objective.observations()] == pytest.approx([1, 2.5])
    objective.charge(1.5 * objective.passes_per_training)
    with pytest.raises(BudgetSpent):
        objective.value(centre(2))


def test_a_diverged_training_costs_one_and_counts_as_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import objective as module

    objective = Objective(problem := Ridge(2), problem.space, seed=0, budget=9)
    first, second = objective.value(centre(2)), objective.value(centre(2) / 2)

    def diverges(*_: Any) -> None:
        raise NotFiniteError

    monkeypatch.setattr(module, "train", diverges)
    assert objective.value(centre(2)) == max(first, second)
    observed = objective.observations()
    assert observed[2].upper_loss is None and observed[2].cost == 3 and observed[2].incumbent in (0, 1)


def test_implicit_gradient_agrees_with_differences() -> None:
    problem = Ridge(3)
    objective = Objective(problem, problem.space, seed=0, budget=50)
    unit = torch.tensor([0.3, 0.6, 0.5], dtype=torch.double)
    _, checkpoint = objective.train(unit)
    found = implicit_gradient(objective, unit, checkpoint, 1e-10, 5.0)
    for i, step in enumerate(1e-4 * torch.eye(3, dtype=torch.double)):
        difference = (objective.value(unit + step) - objective.value(unit - step)) / 2e-4
        assert found.gradient[i].item() == pytest.approx(difference, rel=2e-3)  # the quotient's error at this step
    assert found.residual is not None and found.residual <= 1e-10 and found.iterations <= 40
    # One gradient of F, the products, and one for the mixed derivative.
    assert objective.charged == objective.observed[1].extra_passes == pytest.approx(found.iterations + 2)


@pytest.mark.parametrize("method", [*(peer for peer in PEERS if peer != "given"), "default", "paper"])
def test_every_method_keeps_to_its_budget_and_repeats_itself(method: str) -> None:
    if method.startswith("optuna"):
        pytest.importorskip("optuna", reason="the extra `bench` is not installed")
    if method == "cma-es":
        pytest.importorskip("cmaes", reason="the extra `bench` is not installed")
    first, second = execute(run_of(method)), execute(run_of(method))
    assert first.status == "done", first.error
    assert [o.unit for o in first.observations] == [o.unit for o in second.observations]
    costs = [o.cost for o in first.observations]
    assert costs == sorted(costs) and costs[0] >= 1
    # The last training begins below the budget, and an upper-level step may come with it.
    assert costs[-1] < 5 + 3
    assert all(o.upper_loss is not None and o.lower_loss is not None and o.metrics for o in first.observations)
    assert first.versions["raybilevel"] and first.settings.seed == 0
    assert Record.model_validate_json(first.model_dump_json()) == first


def test_the_last_training_is_told_though_the_clock_is_ahead() -> None:
    class Dearer(Objective):
        """Each training takes more passes than the one before, so that its share of the mean is above 1."""

        def train(self, unit: torch.Tensor, trace: Any = None) -> Any:
            trained, checkpoint = super().train(unit, trace)
            passes = 4.0 ** len(self.observed)
            self.observed[-1] = self.observed[-1].model_copy(update={"passes": passes})
            return replace(trained, passes=passes), checkpoint  # type: ignore[type-var]

    objective = Dearer(problem := Ridge(groups=2), problem.space, 0, 2.5)
    drive = Drive(objective, BilevelOptimizer(problem.space, configured("default", {}), 0, 1), 1)
    drive.run()
    assert drive.clock > 2.5
    assert len(drive.ended) == len(drive.optimizer.state.done) == len(objective.observed)


@pytest.mark.parametrize("slots", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_slots_share_the_time(slots: int) -> None:
    problem = Ridge(groups=2)
    objective = Objective(problem, problem.space, 0, 8.0 * slots)
    steps = bilevel(objective, 0, "default", {}, slots)
    observations = objective.observations()
    times = [o.cost for o in observations]
    assert times == sorted(times)
    assert times[-1] <= 8.0 + 3  # what is under way when the time is up is not waited for
    spent = sum(o.passes for o in observations) + sum(step.passes for step in steps)
    mean = sum(o.passes for o in observations) / len(observations)
    assert 0.6 * slots * times[-1] < spent / mean <= slots * (times[-1] + 3)  # few slots stand idle
    best = [observations[o.incumbent].upper_loss for o in observations]
    lowest = [min(o.upper_loss for o in observations[: i + 1]) for i in range(len(observations))]
    # The method may return a training whose F is a trifle higher, where its model says that luck lowered the other.
    spread = max(o.upper_loss for o in observations) - min(lowest)
    assert best == pytest.approx(lowest, abs=5e-4 * spread)


def test_seeds_and_ablations_make_a_difference() -> None:
    units = [[o.unit for o in execute(run).observations] for run in (run_of("random"), run_of("random", seed=1))]
    assert units[0] != units[1]
    steps = execute(run_of("default", budget=9, hypergradients=False)).steps
    assert steps and all(not step.hypergradients for step in steps)


def test_methods_and_problems_may_have_seeds_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "seeds: 2\nmethods: {random: {method: random}, diagonal: {method: diagonal, seeds: 1}}\n"
        "problems: {a: {problem: ridge, options: {groups: 5}}, b: {problem: ridge, options: {groups: 30}, seeds: 3}}\n"
    )
    suite = read_suite(path)
    found = [(run.problem_name, run.method_name) for run in suite.runs(None)]
    counts = [found.count((p, m)) for p in ("a", "b") for m in ("random", "diagonal")]
    assert counts == [2, 1, 3, 1]
    asked = narrowed(suite, parser().parse_args([str(path), "--out", str(tmp_path), "--seeds", "4"]))
    assert len(asked.runs(None)) == 16


def test_a_failure_is_recorded_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import suite

    def fails(*_: Any) -> None:
        raise ValueError("no such luck")

    monkeypatch.setitem(suite.PEERS, "random", suite.Peer(fails))
    record = execute(run_of("random"))
    assert record.status == "failed" and "no such luck" in record.error
    assert "FAILED: ValueError: no such luck" in report.markdown([record, execute(run_of("diagonal"))], (3, 5))


def test_where_every_training_failed_the_table_says_so() -> None:
    failed = Observation(status="failed", unit=(0.5,), hyperparameters={"a": 1.0}, cost=1.0)
    text = report.markdown([record([]).model_copy(update={"observations": (failed, failed)})], (5,))
    assert "F\\* = unknown" in text and "2 trainings diverged" in text


def test_a_problem_without_a_box_is_refused() -> None:
    with pytest.raises(ConfigError, match="Quadratic has no `space` of its own"):
        box_of(Quadratic())


ENDLESS = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from benchmarks.pool import end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), end_with_parent)
    pool.submit(os.getpid).result()
    pool.submit(time.sleep, 600)
    print("begun", flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "begun\n"
        parent.kill()
        parent.communicate(timeout=60)  # until the worker's end of the pipe is closed, too


def small_suite(folder: Path) -> Path:
    path = folder / "suite.yaml"
    path.write_text(
        """
budget: 4
seeds: 2
marks: [2, 4]
workers: 1
methods: {random: {method: random}, lbfgsb: {method: lbfgsb-centre}, grid: {method: grid}}
problems:
  ridge: {problem: ridge, options: {groups: 3}, caps: {lbfgsb: 2}}
"""
    )
    return path


def test_the_command_resumes_and_redoes_what_is_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = small_suite(tmp_path), tmp_path / "out"
    arguments = [str(config), "--out", str(out)]
    # As a program first: its workers are new processes, which do not have what its own module defines.
    program = [sys.executable, "-m", "benchmarks", *arguments]
    ended = subprocess.run(program, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    told = ended.stdout
    written = sorted(out.glob("records/ridge/*.json"))
    assert len(written) == 4  # no grid in three dimensions
    assert (out / "figures" / "ridge.svg").stat().st_size > 1000
    assert "| random |" in told and "(regret)" in told and (out / "table.md").read_text() in told
    good = written[1].read_text()
    written[0].write_text(good[: len(good) // 2])
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert f"{written[0]}: half-written" in told and "3 of them have a record" in told
    assert records.read(written[0]).status == "done"
    assert written[1].read_text() == good
    assert (written[0].with_name(f"{written[0].name}.old1")).exists()


def test_the_command_narrows_the_suite_and_refuses_unknown_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(small_suite(tmp_path))
    assert main([config, "--out", str(tmp_path), "--methods", "sobol"]) == 2
    assert "no method 'sobol' in the config; it has random, lbfgsb, grid" in capsys.readouterr().err
    assert main([config, "--out", str(tmp_path), "--methods", "random", "--seeds", "1", "--budget", "2"]) == 0
    (record,) = records.read_all(tmp_path)[0]
    assert record.settings.budget == 2 and len(record.observations) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("problems: {a: {problem: ridge}}", "methods: Field required"),
        ("methods: {}\nproblems: {a: {problem: rigde}}", "unknown problem 'rigde'"),
        ("methods: {m: {method: tpe}}\nproblems: {}", "unknown method 'tpe'"),
        ("methods: {m: {method: given}}\nproblems: {}", "'given': missing a required argument: 'points'"),
        ("methods: {m: {method: random, settings: {points: []}}}\nproblems: {}", "unexpected keyword"),
        ("methods: {m: {method: default, settings: {warp: 1}}}\nproblems: {}", "no setting 'warp'"),
        ("methods: {m: {method: random}}\nproblems: {a: {problem: ridge, caps: {n: 1}}}", "'n'"),
        ("methods: {m: {method: random, only: [b]}}\nproblems: {a: {problem: ridge}}", "'b'"),
        ("speed: 1\nmethods: {}\nproblems: {}", "speed: no such key"),
    ],
)
def test_a_wrong_config_names_the_key(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_suite(path)


def test_the_shipped_suite_is_valid_and_has_the_grid_for_one_and_two_only() -> None:
    runs = read_suite(BENCH).runs(None)
    assert {r.problem_name for r in runs if r.method_name == "grid"} <= {
        "digits-1",
        "digits-2",
        "many-minimisers",
        "many-minimisers-optimistic",
        "mlp-1",
        "mlp-2",
        "ridge-1",
        "several-optima-2",
    }
    assert len({run.path for run in runs}) == len(runs)


def test_an_ablation_runs_on_its_own_problems_only(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "methods: {default: {method: default}, random: {method: random}, part: {method: default, only: [b]}}\n"
        "problems: {a: {problem: ridge}, b: {problem: ridge, methods: [random]}}"
    )
    runs = [(run.problem_name, run.method_name) for run in read_suite(path).runs(None) if run.seed == 0]
    assert runs == [("a", "default"), ("a", "random"), ("b", "random"), ("b", "part")]


def record(uppers: list[float], budget: float = 10, exhausted: bool = False, optimum: float | None = None) -> Record:
    observations = tuple(
        Observation(
            status="done", unit=(0.5,), hyperparameters={"a": 1.0}, upper_loss=upper, metrics={"test_loss": upper},
            cost=2.0 * number, incumbent=min(range(number), key=lambda j: uppers[j]),
        )
        for number, upper in enumerate(uppers, 1)
    )  # fmt: skip
    return Record(
        kind="benchmark", status="done", problem_name="p", method_name="m", epochs_per_training=1, seconds=1.0,
        settings=Settings(problem="p", options={}, method="random", seed=0, budget=budget), exhausted=exhausted,
        space=(Hyperparameter(name="a", low=0.0, high=1.0, log=False),), observations=observations, optimum=optimum,
    )  # fmt: skip


def test_table_worked_out_by_hand() -> None:
    runs = [record([3.0, 2.0]), record([4.0, 5.0])]
    assert report.upper_at(runs[0], 1.9) is None
    assert [report.upper_at(r, 5) for r in runs] == [2, 4]
    assert report.upper_at(runs[0], 20) is None  # never run that far
    assert report.upper_at(record([3.0], exhausted=True), 20) == 3
    interval = report.Interval.of([2.0, 4.0])
    assert interval.mean == 3 and interval.half == pytest.approx(12.706, rel=1e-4)  # t_{0.975, 1} * sqrt(2) / sqrt(2)
    assert "3 ±1e+01 (50 %)" in report.markdown(runs, (5, 20))
    assert report.curve([record([3.0, 2.0], optimum=2.0), record([4.0, 5.0], optimum=2.0)]) == (
        [2, 4, 10],
        [0.5, 1e-6, 1e-6],
        [0.75, pytest.approx(0.5), pytest.approx(0.5)],
        [1, 1, 1],
    )


def test_regret_may_be_of_each_seed_on_its_own() -> None:
    runs = [record([3.0, 2.0], optimum=1.0), record([4.0, 5.0], optimum=4.0)]
    text = report.markdown(runs, (5, 10))
    assert "F\\* = 1 to 4" in text
    assert "3 ±1e+01 (50 %)" in text  # of 100 % and 0 %


def test_known_optimum_counts_as_best_seen() -> None:
    problem = SeveralOptima(2)
    objective = Objective(problem, problem.space, 0, 2)
    objective.value(centre(2))
    known = record([3.0], optimum=problem.optimum)
    assert report.best_seen([known]) == problem.optimum


def test_a_descent_is_charged_and_ends_with_a_training_at_its_best_x() -> None:
    objective = Objective(problem := Ridge(5), problem.space, seed=0, budget=60)
    descent(objective, 0)
    first, last = (o.upper_loss for o in objective.observed)
    assert first is not None and last is not None and last < 0.6 * first
    assert objective.observed[1].extra_passes == objective.charged > 0
    # It ends within its budget, where that does not hold all steps.
    short = Objective(problem, problem.space, seed=0, budget=10)
    descent(short, 0)
    assert short.charged < objective.charged and 8 < short.observations()[1].cost <= 10
