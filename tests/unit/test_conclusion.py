"""What to make of a run, in plain words."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from raybilevel._lower.paired import Gain, Gains
from raybilevel._records.conclusion import conclude, hyperparameters, so_far, with_error
from raybilevel._records.record import Observation, Record, Settings
from raybilevel._records.shared_value import Compared, best_shared
from raybilevel._records.summary import as_text, summary_of
from raybilevel.methods import make_method
from raybilevel.search_state import Proposal, SearchState, Training
from raybilevel.space import Parameter, Space


def summary(**changes: Any) -> dict[str, Any]:
    start = {"training": 1, "hyperparameters": {"decay": {"a": 1.0}}, "upper_loss": 0.5, "test_loss": 0.6}
    best = {**start, "training": 4, "hyperparameters": {"decay": {"a": 0.25}}, "upper_loss": 0.4, "test_loss": 0.55,
            "test_loss_refit": 0.5}  # fmt: skip
    return {
        "metric": "upper_loss",
        "start": start,
        "best": {**best, **changes.pop("best", {})},
        "new_data": None,
        "verdict": "converged",
        **changes,
    }


def test_what_was_found_helped_and_is_sure() -> None:
    assert conclude(summary()).lines == (
        "Found: F (validation loss) 0.4 at training 4, decay/a=0.25.",
        "Helped: yes. Test loss 0.55, which was 0.6 at training 1, the start. Test loss 0.5 after a refit on all data.",
        "How sure: the search had nothing better to propose.",
    )


@pytest.mark.parametrize(
    ("by_model", "words"), [(None, "0.4 at"), (0.403, "0.4 at"), (0.43, "0.4 (by the model 0.43) at")]
)
def test_f_by_the_model_is_given_where_it_differs(by_model: float | None, words: str) -> None:
    assert f"F (validation loss) {words} training 4" in conclude(summary(best={"expected_upper_loss": by_model})).found


@pytest.mark.parametrize(
    ("best", "words"),
    [
        ({"test_loss": 0.7}, "not on new data. Test loss 0.7, which was 0.6"),
        ({"test_loss": None, "test_loss_refit": None}, "by F alone, as there is no test loss. F was 0.5 at training 1"),
        ({"training": 1, "test_loss_refit": None}, "no. Nothing was better than training 1, the start"),
    ],
)
def test_a_gain_in_f_alone_is_not_sold_as_one(best: dict[str, Any], words: str) -> None:
    assert conclude(summary(best=best)).helped.startswith(words)


@pytest.mark.parametrize(
    ("spread", "nearer", "loss", "words"),
    [
        (0.5, True, 0.5, "Test loss 0.5 after a refit on all data. For the refit hyperparameters of a kind are half as "
         "far apart: by trainings on halves of the 90 validation examples the loss is then lower by 0.341 ± 0.021"),
        (0.0, True, None, "For the refit hyperparameters of a kind are equal: by trainings on"),
        (1.0, False, 0.5, "Test loss 0.5 after a refit on all data"),
    ],
)  # fmt: skip
def test_a_refit_says_why_it_is_not_with_the_result(
    spread: float, nearer: bool, loss: float | None, words: str
) -> None:
    chosen = {"spread": spread, "gain": None if not nearer else gain(0.3413, "upper_loss"), "trainings": 6}
    told = conclude(summary(refit=chosen, best={"test_loss_refit": loss})).helped
    assert words in told
    assert ("For the refit" in told) == nearer


def gain(mean: float, of: str = "test_loss") -> dict[str, Any]:
    return {"of": of, "mean": mean, "standard_error": 0.0214, "examples": 90}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (gain(0.3413), "yes. Test loss 0.55, .* lower by 0.341 ± 0.021 over 90 test examples, beyond two standard"),
        (gain(0.04), "perhaps. Test loss 0.55, .* lower by 0.040 ± 0.021 over 90 test examples, within two standard"),
        (gain(-0.04), "perhaps. .* higher by 0.040 ± 0.021 over 90 test"),
        (gain(0.01, "upper_loss"), r"yes. .*\. F lower by 0.010 ± 0.021 over 90 validation examples, within two"),
    ],
)
def test_a_gain_says_whether_it_may_be_chance(found: dict[str, Any], words: str) -> None:
    assert re.match(words, conclude(summary(gain=found)).helped)


def shared(**changes: Any) -> dict[str, Any]:
    found = {"training": 3, "hyperparameters": {"decay": {"a": 0.5}}, "upper_loss": 0.45, "test_loss": 0.58, "tried": 3}
    return {**found, **changes}


@pytest.mark.parametrize(
    ("entry", "over", "words"),
    [
        (
            shared(),
            gain(0.1),
            "Test loss lower by 0.100 ± 0.021 than with one shared value (training 3, the best of 3 tried), beyond two "
            "standard errors",
        ),
        (
            shared(tried=1),
            gain(-0.01, "upper_loss"),
            "F higher by 0.010 ± 0.021 than with one shared value (training 3, the only one tried), within two "
            "standard errors",
        ),
        (shared(), None, "Test loss 0.58 with one shared value (training 3, the best of 3 tried)"),
        (shared(test_loss=None), None, "F 0.45 with one shared value (training 3, the best of 3 tried)"),
        (shared(training=1), gain(0.1), "The start has one shared value, the best of 3 tried"),
        (shared(training=4), None, "The result has one shared value, the best of 3 tried"),
    ],
)
def test_the_result_is_compared_with_one_shared_value(entry: Any, over: Any, words: str) -> None:
    whole = summary(gain=gain(0.3413), shared=entry, gain_over_shared=over)
    assert words in conclude(whole).helped.split(". ")


def test_without_groups_nothing_is_said_of_shared_values() -> None:
    assert "shared" not in conclude(summary(shared=None, gain_over_shared=None)).helped


def test_the_best_shared_value_is_of_trainings_whose_groups_have_one_value_each() -> None:
    space = Space((
        *(Parameter(("decay", name), 1e-3, 1.0, log=True) for name in "ab"),
        Parameter(("last",), 0.0, 1.0),
    ))  # fmt: skip
    units = ((0.5, 0.5, 0.1), (0.2, 0.3, 0.1), (0.25, 0.25, 0.9), (0.75, 0.75, 0.5))
    uppers = (3.0, 1.0, 2.0, 2.5)
    state = SearchState(tuple(
        Training(i, Proposal(unit, "start"), "done", i, 1.0, upper, (0.0,) * 3, 10.0)
        for i, (unit, upper) in enumerate(zip(units, uppers, strict=True))
    ))  # fmt: skip
    found = best_shared(state, space)
    assert found is not None and (found.training.index, found.tried) == (2, 3)
    assert best_shared(state, Space(space.parameters[1:])) is None
    compared = Compared.of(state, space)
    first, lowest, best_of_shared, _ = state.trainings
    assert compared.beside(lowest) == [first, best_of_shared]
    assert compared.beside(first) == [best_of_shared]
    over = Gain("upper_loss", 0.1, 0.02, 90)
    assert compared.gains({2: over}) == Gains(None, over) and compared.gains({0: over}) == Gains(over, None)
    written = summary_of(
        state, space, make_method("default"), {}, {}, {}, None, 1.0, Gains(None, Gain("upper_loss", 0.1, 0.02, 90))
    )
    assert written["shared"]["training"] == 3 and written["shared"]["tried"] == 3
    assert written["gain_over_shared"]["mean"] == 0.1
    words = "F lower by 0.100 ± 0.020 than with one shared value (training 3, the best of 3 tried)"
    assert words in written["in_words"][1]


def test_a_gain_without_an_error_has_four_places() -> None:
    assert with_error({"mean": 0.5, "standard_error": 0.0}) == "0.5000 ± 0.0000"
    assert with_error({"mean": 81.0, "standard_error": 23.4}) == "81 ± 23"


def test_whether_the_constraints_are_kept_is_said() -> None:
    kept = summary(constraints={"ms": "<= 5", "size": "<= 2"}, metrics={"ms": 4.5}, best={"feasible": True})
    assert conclude(kept).found.endswith("decay/a=0.25. Feasible: ms <= 5 (4.5), size <= 2")
    broken = summary(constraints={"ms": "<= 5"}, metrics={"ms": 6.0}, best={"feasible": False}, verdict="not feasible")
    broken["start"] = {**broken["start"], "feasible": False}
    assert conclude(broken).found.endswith(". Not feasible: ms <= 5 (6)")
    assert "training 1, the start, which is not feasible" in conclude(broken).helped
    assert conclude(broken).sure == "no training kept every constraint. This one is nearest to that"


def test_a_run_under_way_says_what_it_has_so_far() -> None:
    def training(number: int, accuracy: float, test: float) -> Observation:
        values = {"decay": {"a": float(number)}}
        return Observation(number=number, status="done", unit=(0.5,), hyperparameters=values, upper_loss=-accuracy,
                           metrics={"test_loss": test})  # fmt: skip

    record = Record(
        kind="run", status="running", problem_name="p", method_name="default", metric="-accuracy",
        settings=Settings(problem="p", options={}, method="default", seed=0, budget=5), epochs_per_training=1, space=(),
        observations=(training(2, 0.9, 0.3), training(1, 0.8, 0.4)),
    )  # fmt: skip
    assert so_far(record).lines == (
        "Found: accuracy 0.9 at training 2, decay/a=2.",
        "Helped: yes. Test loss 0.3, which was 0.4 at training 1, the start.",
        "How sure: not yet. The run has not ended, or was stopped.",
    )
    assert so_far(record.model_copy(update={"observations": ()})).found == "nothing"


def test_what_the_search_expects_of_new_data_is_said() -> None:
    expected = {"in_words": "F 0.4, expected on new data about 0.45"}
    assert conclude(summary(new_data=expected, verdict="budget exhausted")).sure == (
        "the search ended with its trainings, and more may find better. F 0.4, expected on new data about 0.45"
    )


def test_a_run_without_a_result() -> None:
    assert conclude(summary(best={}) | {"best": None, "start": None, "verdict": "no result"}).lines == (
        "Found: nothing.", "Helped: no.", "How sure: no training ran to its end.",
    )  # fmt: skip


def test_a_run_of_stopped_trainings_has_a_result_without_a_start() -> None:
    space = Space((Parameter(("decay",), 0.0, 1.0),))
    trainings = (Training(0, Proposal((0.25,), "start"), "stopped", 0, upper_loss=0.5),)
    found = json.loads(
        as_text(summary_of(SearchState(trainings), space, make_method("default"), {}, {}, {}, None, 1.0))
    )
    assert found["best"]["lower_loss"] is None
    assert found["in_words"] == [
        "Found: F (validation loss) 0.5 at training 1, decay=0.25.",
        "Helped: not known. There is no start to compare with.",
        "How sure: no training ran to its end.",
    ]


def test_choices_and_whole_numbers_are_written_as_they_are() -> None:
    assert hyperparameters({"depth": 3, "kind": "relu", "rate": 0.123456}) == "depth=3, kind=relu, rate=0.1235"


def test_of_a_list_the_entries_that_moved_are_written() -> None:
    start = {"decay": [1.0] * 20, "rate": 0.1}
    best = {"decay": [1.0] * 17 + [0.5, 0.25, 0.123456], "rate": 0.1}
    assert hyperparameters(best, start, 3) == "decay/17=0.5, decay/18=0.25, decay/19=0.1235 and 18 more"


def test_a_group_that_all_names_are_of_is_named_once() -> None:
    assert hyperparameters({"decay": {"a": 1.0, "b": 0.5}}) == "decay: a=1, b=0.5"
    assert hyperparameters({"decay": {"a": 1.0, "b": 0.5}, "rate": 0.1}) == "decay/a=1, decay/b=0.5, rate=0.1"


def test_a_front_is_named_before_its_constraints() -> None:
    members = [{"training": n, "other_objectives": {"ms": float(n)}} for n in (4, 7)]
    found = summary(pareto_front=members, other_objectives={"ms": "max"}, constraints={"size": "<= 2"}, metrics={})
    assert conclude(found).found == (
        "a Pareto front of 2 trainings, from F (validation loss) 0.4 at training 4, decay/a=0.25 to ms 7 at training 7"
        ". Feasible: size <= 2"
    )
