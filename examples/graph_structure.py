"""Edges of a citation graph that lacks most of them: their probabilities, learned for a graph convolutional network.

python graph_structure.py DATA      DATA/planetoid holds Cora (ind.cora.x and so on)
"""

import sys
from pathlib import Path

import torch
from ray import tune

from raybilevel import BilevelSearch, hypergradient_trainable
from raybilevel.hypergradient import CHECKPOINT_FILE, load_checkpoint
from raybilevel.methods import HypergradientDescent
from raybilevel.problems.graph import GraphStructure

if __name__ == "__main__":
    problem = GraphStructure(data=sys.argv[1], graph="cora", missing=0.75)
    method = HypergradientDescent(steps=10, rate=0.1, solver_settings={"tolerance": 3e-2, "limit": 20})
    best = (
        tune.Tuner(
            tune.with_resources(hypergradient_trainable(problem, method), {"cpu": 1}),
            param_space={"start": tune.quniform(0, 65535, 1)},
            tune_config=tune.TuneConfig(
                search_alg=BilevelSearch(problem, method=method), metric="upper_loss", mode="min", num_samples=1
            ),
            run_config=tune.RunConfig(verbose=0),
        )
        .fit()
        .get_best_result()
    )
    edges = problem.upper_variables().to(problem.dtype)
    edges.load_state_dict(load_checkpoint(Path(best.checkpoint.path) / CHECKPOINT_FILE)["upper"])
    with torch.no_grad():
        found = edges()
    gained = found - problem.start_probabilities()
    print("the edges whose probability rose most, and whether their papers have one topic:")
    for number in gained.topk(5).indices.tolist():
        i, j = problem.candidates[number].tolist()
        labels = problem.citations.labels
        same = "one topic" if labels[i] == labels[j] else "two topics"
        print(f"  {i} - {j}: {problem.start_probabilities()[number]:.2f} -> {found[number]:.2f}, {same}")
    print(f"validation loss {best.metrics['upper_loss']:.4f}")
    for name, key in (("edges left", "given"), ("nearest neighbours", "neighbour"), ("learned", "test")):
        print(f"test accuracy, {name}: {best.metrics[key + '_accuracy']:.3f}")
