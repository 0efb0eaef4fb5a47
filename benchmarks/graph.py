"""Learned graphs of Cora and Citeseer against the graph that is left and a nearest-neighbour graph.

    python -m benchmarks.graph --data DIR --out DIR

For each graph, share of missing edges and seed (of the edges removed and the halves of the validation nodes), test
accuracies of one network, trained on the training nodes, with

    given       the edges that are left;
    neighbours  a nearest-neighbour graph, of 10 or 20 by accuracy on all validation nodes;
    start       the expected graph at the start of the descent: given edges and neighbours, nothing learned;
    learned     the expected graph of a descent of configs/graph_structure.yaml;

and with the validation nodes of F, whose labels a descent uses, among the training nodes,

    start+      the expected graph at the start of the descent;
    learned+    the learned one.

DIR gets graph.json, figures, and runs/, a file for each measurement; those that are there are not made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from benchmarks.families import (
    arguments_parser,
    descend,
    descent_method,
    intervals,
    kept,
    shown,
    table,
    wide_console,
    write_json,
)
from raybilevel._config.experiment import ExperimentConfig, read_config, resolved
from raybilevel.problems import make_problem
from raybilevel.problems.graph import GraphStructure, nearest
from raybilevel.report._charts import Chart, Series
from raybilevel.report._static import write_figures
from raybilevel.report._statistics import Interval, bootstrap

NEIGHBOURS = (10, 20)
COLUMNS = ("given", "neighbours", "start", "learned", "start+", "learned+")
BASELINES = ("given", "neighbours")


def problem_of(config: ExperimentConfig, data: str, graph: str, missing: float, seed: int) -> GraphStructure:
    options = {**config.options, "graph": graph, "missing": missing, "data_seed": seed}
    problem = make_problem(config.problem, options, data)
    assert isinstance(problem, GraphStructure)
    return problem


def neighbour_accuracy(problem: GraphStructure, seed: int) -> dict[str, float]:
    """Of the nearest-neighbour graph with the k that does best on all validation nodes."""
    features = problem.citations.features
    found = {k: problem.accuracies(nearest(features, k), seed=seed) for k in NEIGHBOURS}
    best = max(found, key=lambda k: found[k]["validation"])
    return {"neighbours": found[best]["test"], "k": float(best)}


def accuracies(problem: GraphStructure, config: ExperimentConfig, seed: int) -> dict[str, float]:
    """All but that of nearest neighbours, which does not depend on the edges that are missing; F and homophily too."""
    start = problem.start_probabilities()
    found = descend(problem, descent_method(config), seed)
    return {
        "given": found["given_accuracy"],
        "start": problem.accuracies(problem.candidates, start, seed=seed)["test"],
        "start+": problem.accuracies(problem.candidates, start, "labelled", seed)["test"],
        "learned": found["test_accuracy"],
        "learned+": found["refit_accuracy"],
        "upper_loss": found["upper_loss"],
        "homophily": found["homophily"],
    }


def chart(graph: str, rows: Mapping[float, Mapping[str, Interval]]) -> Chart:
    missing = sorted(rows)
    series = tuple(
        Series(
            name, "line", [100 * share for share in missing], [rows[share][name].mean for share in missing],
            low=[rows[share][name].ends[0] for share in missing], high=[rows[share][name].ends[1] for share in missing],
            colour=number, strong=name == "learned",
        )
        for number, name in enumerate(COLUMNS)
    )  # fmt: skip
    said = "; ".join(f"{name} " + ", ".join(f"{rows[s][name].mean:.3f}" for s in missing) for name in COLUMNS)
    return Chart(
        f"graph_{graph}",
        f"{graph.capitalize()}: test accuracy of a graph convolutional network",
        "Means over seeds with 95 % intervals, by the share of edges that is missing; higher is better.",
        f"At {', '.join(f'{share:.0%}' for share in missing)} missing: {said}",
        "edges missing (%)",
        "test accuracy",
        series,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = arguments_parser("graph", __doc__.splitlines()[0], "configs/graph_structure.yaml", 3)
    parser.add_argument("--graphs", nargs="+", default=["cora", "citeseer"], help="by default both")
    parser.add_argument("--missing", nargs="+", type=float, default=[0.25, 0.5, 0.75, 1.0], help="shares of edges")
    given = parser.parse_args(arguments)
    config, console = read_config(given.config, given.set), wide_console()
    settings, result, lines, charts = resolved(config), [], [], []
    for graph in given.graphs:
        by_share: dict[float, dict[str, Interval]] = {}
        for missing in given.missing:
            rows: list[dict[str, float]] = []
            for seed in range(given.seeds):
                problem = problem_of(config, given.data, graph, missing, seed)
                # Nearest neighbours do not depend on the missing edges, so they are measured once a seed.
                runs, near = given.out / "runs", problem_of(config, given.data, graph, 1.0, seed)
                measure_near = partial(neighbour_accuracy, near, seed)
                measure = partial(accuracies, problem, config, seed)
                one = {
                    **kept(runs / f"{graph}-neighbours-{seed}.json", settings, measure_near),
                    **kept(runs / f"{graph}-{missing:g}-{seed}.json", settings, measure),
                }
                rows.append(one)
                said = ", ".join(f"{name} {one[name]:.3f}" for name in COLUMNS)
                console.print(f"{graph}, {missing:.0%} missing, seed {seed}: {said}", style="dim", highlight=False)
            by_share[missing] = intervals(rows)
            # Seed by seed: the better of the two may be another one each time.
            gains = bootstrap([row["learned"] - max(row[name] for name in BASELINES) for row in rows])
            result.append({"graph": graph, "missing": missing, "means": by_share[missing], "gain": gains, "rows": rows})
            means = [f"{by_share[missing][name].mean:.3f}" for name in COLUMNS]
            lines.append((f"{graph}, {missing:.0%} missing", *means, shown(gains)))
        charts.append(chart(graph, by_share))
    console.print(table(("edges", *COLUMNS, "learned less the better of the first two"), lines), highlight=False)
    write_json(given.out / "graph.json", {"seeds": given.seeds, "settings": settings, "results": result})
    write_figures(charts, given.out / "figures")
    console.print(f"written to {given.out / 'graph.json'}", highlight=False)


if __name__ == "__main__":
    main()
