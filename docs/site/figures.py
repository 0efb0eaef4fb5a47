"""Draw docs/images/run.svg from a run's summary: python docs/site/figures.py RUN_FOLDER [OUTPUT.svg]."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

BLUE, GREY = "#0072b2", "#8c8c8c"  # safe for colour-blind readers


def draw(summary: dict, output: Path) -> None:
    history = [entry for entry in summary["history"] if entry["upper_loss"] is not None]
    cost = [entry["cost"] for entry in history]
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "raybilevel", "font.size": 10}
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.plot(cost, [e["upper_loss"] for e in history], "o", color=GREY, markersize=5, label="F of each training")
    best = min(history, key=lambda entry: entry["upper_loss"])
    label = f"best so far, at last {best['upper_loss']:.4f}"
    axes.step(cost, [e["best_upper_loss"] for e in history], where="post", color=BLUE, linewidth=2, label=label)
    dimension = len(json.dumps(best["hyperparameters"]).split(",")) if best["hyperparameters"] else 0
    axes.set_yscale("log")
    axes.set_xlabel("cost, in trainings (upper-level steps charged)")
    axes.set_ylabel("validation loss F")
    axes.set_title(f"{summary['problem']}, {dimension} hyperparameters, method {summary['method']}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[1] / "images/run.svg"
    draw(json.loads((folder / "summary.json").read_text(encoding="utf-8")), target)
