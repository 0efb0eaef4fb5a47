"""Effects of a treatment by a regression on units that a learned network weights, against the estimators in use.

    python -m benchmarks.treatment --out DIR

Each seed draws units anew, learns weights by the descent of configs/treatment_effects.yaml, and measures the error of
the mean effect and of the units' effects, whose true values are known. The table has means over seeds with 95 %
bootstrap intervals, and the paired difference to inverse propensities. DIR gets treatment.json and a
figure; DIR/runs has every draw, and those there are not run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.families import (
    arguments_parser,
    descend,
    descent_method,
    dots,
    intervals,
    kept,
    shown,
    table,
    wide_console,
    write_json,
)
from raybilevel._config.experiment import read_config, resolved
from raybilevel.problems import make_problem
from raybilevel.report._charts import Chart
from raybilevel.report._static import write_figures
from raybilevel.report._statistics import Interval, paired_test

OURS = "learned weights"
ESTIMATORS = {
    "difference": "difference of means",
    "ipw": "inverse propensities",
    "ipw_trimmed": "inverse propensities, trimmed",
    "regression": "regression",
    "ipw_regression": "regression, inverse propensities",
    "doubly_robust": "doubly robust",
    "": OURS,
}
BASE = "inverse propensities"


def by_name(found: Mapping[str, float], measure: str) -> dict[str, float]:
    """A measure, "ate_error" or "pehe", of each estimator."""
    return {name: found[f"{key}_{measure}" if key else measure] for key, name in ESTIMATORS.items()}


def chart(errors: Mapping[str, Interval]) -> Chart:
    title = "Error of the mean effect (true effect 10), by estimator"
    caption = "Means over draws of the data with 95 % intervals; lower is better."
    return dots("treatment_effects", title, caption, errors, "absolute error", "mean over seeds", digits=2)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    about = __doc__.splitlines()[0]
    given = arguments_parser("treatment", about, "configs/treatment_effects.yaml", 50).parse_args(arguments)
    config = read_config(given.config, given.set)
    method, console = descent_method(config), wide_console()
    found: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        problem = make_problem(config.problem, {**config.options, "data_seed": seed})
        file = given.out / "runs" / f"{seed}.json"
        found.append(kept(file, resolved(config), partial(descend, problem, method)))
        console.print(f"seed {seed}: error of the mean effect {found[-1]['ate_error']:.2f}", style="dim")
    rows = {measure: [by_name(one, measure) for one in found] for measure in ("ate_error", "pehe")}
    ate, pehe = intervals(rows["ate_error"]), intervals(rows["pehe"])
    # Paired, since each draw of the data is as hard for all estimators.
    tests = {
        name: paired_test([row[name] for row in rows["ate_error"]], [row[BASE] for row in rows["ate_error"]])
        for name in ate
    }
    lines = [
        (name, shown(ate[name], 2), shown(pehe[name], 2), shown(tests[name].difference, 2), f"{tests[name].p or 1:.2g}")
        for name in ate
    ]
    columns = ("estimator", "error of the mean effect", "PEHE", f"less {BASE}", "p")
    console.print(table(columns, lines), highlight=False)
    result = {"seeds": given.seeds, "ate_error": ate, "pehe": pehe, "paired": tests, "rows": rows}
    write_json(given.out / "treatment.json", result)
    write_figures([chart(ate)], given.out / "figures")
    console.print(f"written to {given.out / 'treatment.json'}", highlight=False)


if __name__ == "__main__":
    main()
