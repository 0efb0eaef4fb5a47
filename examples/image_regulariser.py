"""Filters of an image regulariser, learned so that digits which lack most of their pixels are filled in well.

python image_regulariser.py DATA      DATA/mnist holds MNIST (train-images-idx3-ubyte.gz and so on)
"""

import sys
from pathlib import Path

import torch
from ray import tune

from raybilevel import BilevelSearch, hypergradient_trainable
from raybilevel.hypergradient import CHECKPOINT_FILE, load_checkpoint
from raybilevel.methods import HypergradientDescent
from raybilevel.problems.imaging import FieldsOfExperts, psnr

if __name__ == "__main__":
    problem = FieldsOfExperts(data=sys.argv[1], task="inpainting", images=4, noise=0.1)
    method = HypergradientDescent(
        steps=60, rate=0.05, lower="tolerance", lower_tolerance=1e-3, solver_settings={"tolerance": 1e-3}
    )
    best = (
        tune.Tuner(
            tune.with_resources(hypergradient_trainable(problem, method), {"cpu": 1}),
            param_space={"start": tune.quniform(0, 65535, 1)},
            tune_config=tune.TuneConfig(
                search_alg=BilevelSearch(problem, method=method), metric="upper_loss", mode="min", num_samples=2
            ),
            run_config=tune.RunConfig(verbose=0),
        )
        .fit()
        .get_best_result()
    )
    measured = problem.splits["test"]
    learned = problem.upper_variables().to(problem.dtype)
    learned.load_state_dict(load_checkpoint(Path(best.checkpoint.path) / CHECKPOINT_FILE)["upper"])
    torch.manual_seed(0)
    random = problem.upper_variables().to(problem.dtype)
    for name, experts in (("random filters", random), ("learned filters", learned)):
        found = problem.reconstruct(measured, {"upper": experts}).detach()
        print(f"PSNR of other digits, {name}: {psnr(found, measured.clean):.2f} dB")
