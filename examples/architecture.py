"""An architecture: which operation each edge of a convolutional cell has, learned on scikit-learn's digits.

The trial is a descent along hypergradients in the mixing weights; its result is the accuracy of the architecture that
they become, trained anew. Its checkpoint holds the mixing weights.
"""

from pathlib import Path

from ray import tune

from raybilevel import BilevelSearch, hypergradient_trainable
from raybilevel.hypergradient import CHECKPOINT_FILE, load_checkpoint
from raybilevel.methods import HypergradientDescent
from raybilevel.problems.architecture import Architecture, edges, genotype

if __name__ == "__main__":
    problem = Architecture()
    method = HypergradientDescent(
        steps=15, rate=0.1, estimator="unrolled", estimator_settings={"steps": 1, "rate": 0.05}
    )
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
    mixing = problem.upper_variables().to(problem.dtype)
    mixing.load_state_dict(load_checkpoint(Path(best.checkpoint.path) / CHECKPOINT_FILE)["upper"])
    weights = mixing().max(1).values.tolist()
    for (i, j), operation, weight in zip(edges(problem.nodes), genotype(mixing), weights, strict=True):
        print(f"node {i} -> node {j}: {operation} ({weight:.2f})")
    print(f"validation loss of the mixture {best.metrics['upper_loss']:.4f}")
    print(f"test accuracy of the architecture, trained anew: {best.metrics['test_accuracy']:.3f}")
