"""A model that needs several GPUs: every training is data-parallel on two workers (here on two CPUs).

On GPUs: ScalingConfig(num_workers=..., use_gpu=True), and the problem's device = "cuda".
"""

import ray
import torch
from ray import tune
from ray.train import ScalingConfig
from torch import nn
from torch.nn.functional import mse_loss

from raybilevel import BilevelProblem, BilevelSearch, data_parallel_trainable
from raybilevel.problem import minibatches


class Curve(BilevelProblem):
    """A noisy sine; how strongly are the two layers to be regularised?"""

    epochs = 20

    def __init__(self):
        x = torch.linspace(-3, 3, 120)[:, None]
        y = torch.sin(2 * x) + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        self.data = {"lower": (x[::2], y[::2]), "upper": (x[1::2], y[1::2])}

    def model(self):
        return nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))

    def lower_loss(self, model, hyperparameters, batch):
        x, y = batch
        decay = hyperparameters["weight_decay"]
        return (
            mse_loss(model(x), y)
            + decay["first"] * model[0].weight.square().sum()
            + decay["second"] * model[2].weight.square().sum()
        )

    def upper_loss(self, model, batch):
        x, y = batch
        return mse_loss(model(x), y)

    def batches(self, level, generator):
        return minibatches(self.data[level], 16, generator)

    def optimizer(self, model):
        return torch.optim.Adam(model.parameters(), lr=0.02)


def main(samples=12):
    problem = Curve()
    decays = {layer: tune.loguniform(1e-6, 1e-1) for layer in ("first", "second")}
    return tune.Tuner(
        data_parallel_trainable(problem, ScalingConfig(num_workers=2)),
        param_space={"weight_decay": decays},
        tune_config=tune.TuneConfig(
            # Two trainings of two workers at a time are what four CPUs hold.
            search_alg=BilevelSearch(problem, max_concurrent=max(1, int(ray.cluster_resources()["CPU"]) // 2)),
            metric="upper_loss",
            mode="min",
            num_samples=samples,
        ),
    ).fit()


if __name__ == "__main__":
    ray.init()
    best = main().get_best_result()
    print(f"best weight decay {best.config['weight_decay']}, validation loss {best.metrics['upper_loss']:.3f}")
