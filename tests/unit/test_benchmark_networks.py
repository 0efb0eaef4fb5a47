from __future__ import annotations

import os
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from benchmarks import networks
from benchmarks.networks import METHODS, OURS, SEARCHES, Outcome, outcome, report, runs
from benchmarks.regularised import RegularisedNetwork
from benchmarks.suite import ProblemEntry, Run, execute
from raybilevel._lower.training import train
from raybilevel._records.record import Record

DATA = os.environ.get("RAYBILEVEL_TEST_DATA")


def digits(retrainings: int = 2, seed: int = 11) -> Run:
    """A short search of the benchmark's form, whose problem needs no files."""
    (run,) = runs(None, 1, ["mnist-1k-2"], [OURS])
    problem = ProblemEntry(problem="digits_logistic", options={"groups": 2})
    return replace(run, problem=problem, seed=seed, budget=3.0, marks=(1.0,), retrainings=retrainings)


def test_every_method_has_the_same_seeds_and_splits() -> None:
    found = runs("data", 2, list(SEARCHES), list(METHODS))
    assert len(found) == len({run.path for run in found}) == 2 * len(SEARCHES) * len(METHODS)
    assert {run.seed for run in found} == {11, 12}
    splits = {run.problem.options.get("split_seed") for run in found if run.problem_name == "regularised-8"}
    assert splits == {11, 12}
    assert {run.budget for run in found if run.problem_name == "mnist-1k-1"} == {20}


def test_a_result_is_trained_again_under_other_seeds() -> None:
    record = execute(digits())
    at = {record.observations[0].incumbent, record.observations[-1].incumbent}
    assert record.retrained.keys() == at and not record.refits
    last = record.retrained[record.observations[-1].incumbent]
    assert len(last) == 2
    found = outcome(record, 3.0)
    assert found.upper == pytest.approx(fmean(one["upper_loss"] for one in last))
    assert found.test == pytest.approx(fmean(one["test_loss"] for one in last))
    # A convex training has the same F under each seed.
    assert found.seen == record.observations[record.observations[-1].incumbent].upper_loss
    assert found.upper == pytest.approx(found.seen, rel=1e-3)
    assert execute(digits(retrainings=0)).retrained == {}


def test_without_trainings_that_came_to_their_end_there_is_no_result() -> None:
    with pytest.raises(ValueError, match="seed 11: no result"):
        outcome(execute(digits(retrainings=0)), 3.0)


def test_the_table_has_the_difference_of_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(record: Record, mark: float) -> Outcome:
        worse = 0.0 if record.method_name == OURS else 0.1
        return Outcome(0.2, 0.3 + worse, 0.5 + mark)

    monkeypatch.setattr(networks, "outcome", known)
    record = execute(digits(retrainings=0))
    done = {"mnist-1k-2": {m: {s: record.model_copy(update={"method_name": m}) for s in (11, 12)} for m in METHODS}}
    lines = report(done).splitlines()
    assert "| mnist-1k-2 | 5 | raybilevel | 2 | 0.200 | 0.300 | 5.500 |  |" in lines
    assert "| mnist-1k-2 | 10 | random | 2 | 0.200 | 0.400 | 10.500 | 0.100 [0.100, 0.100] win |" in lines
    assert sum(line.startswith("| mnist-1k-2 |") for line in lines) == 3 * len(METHODS)


@pytest.mark.skipif(not DATA, reason="RAYBILEVEL_TEST_DATA does not name a folder with the data sets")
def test_a_regularised_network_trains() -> None:
    problem = RegularisedNetwork(DATA, epochs=2)
    config = problem.space.to_config(torch.full((8,), 0.3, dtype=torch.double))
    trained, _ = train(problem, config, 0)
    assert trained.upper_loss < 2.4 and trained.metrics["test_accuracy"] > 0.2
    # The shares of the classes fall from the first to the last by the ratio.
    assert problem.shares.sum().item() == pytest.approx(1)
    assert (problem.shares[0] / problem.shares[-1]).item() == pytest.approx(20, rel=0.1)
    slopes = [*trained.lower_gradient["weight_decay"].values(), trained.lower_gradient["confidence_penalty"]]
    assert all(abs(slope) > 0 for slope in slopes)
    # Decays of all layers together are that of all weights.
    model = problem.model()
    weights = sum(weight.square().sum().item() for weight in model.parameters())
    one = torch.ones(())
    decays = sum(problem.decay(model, layer, one).item() for layer in ("fc1", "fc2", "fc3", "norm"))
    assert decays == pytest.approx(weights / 2, rel=1e-5)
