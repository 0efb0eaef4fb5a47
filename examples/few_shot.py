"""An initialisation from which a network learns new digits from one example each, learned on tasks of other digits.

python few_shot.py DATA      DATA/mnist holds MNIST (train-images-idx3-ubyte.gz and so on)
"""

import sys
from pathlib import Path

import torch
from ray import tune

from raybilevel import BilevelSearch, hypergradient_trainable
from raybilevel.hypergradient import CHECKPOINT_FILE, load_checkpoint
from raybilevel.methods import HypergradientDescent
from raybilevel.problems.few_shot import FewShot

if __name__ == "__main__":
    problem = FewShot(data=sys.argv[1])
    method = HypergradientDescent(
        steps=30, rate=0.01, lower="tolerance", lower_tolerance=1e-3, solver_settings={"tolerance": 3e-2, "limit": 20}
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
    network = problem.upper_variables().to(problem.dtype)
    network.load_state_dict(load_checkpoint(Path(best.checkpoint.path) / CHECKPOINT_FILE)["upper"])
    print(f"{sum(weight.numel() for weight in network.parameters()):,} weights to begin a task with")
    print(f"validation loss {best.metrics['upper_loss']:.4f}")
    print(f"test accuracy on new digits: {best.metrics['test_accuracy']:.3f}")
    torch.manual_seed(0)
    random = problem.accuracies(problem.upper_variables(), "test", problem.nearness).mean()
    print(f"from random weights:         {random:.3f}")
