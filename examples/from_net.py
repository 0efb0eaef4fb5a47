"""A classifier of skorch: weight decay and label smoothing with gradients, the learning rate by values.

Needs raybilevel[skorch].
"""

import numpy as np
from ray import tune
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from skorch import NeuralNetClassifier
from skorch.dataset import ValidSplit
from torch import nn
from torch.nn.functional import cross_entropy

from raybilevel import BilevelSearch
from raybilevel.skorch import from_net

SPACE = {
    "lr": tune.loguniform(1e-2, 1e0),
    "weight_decay": tune.loguniform(1e-5, 1e0),
    "label_smoothing": tune.uniform(0.0, 0.3),
}


def data():
    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(1).permutation(len(y))[:200]
    return scale(x)[order].astype(np.float32), y[order]


def net(lr, weight_decay, label_smoothing):
    return NeuralNetClassifier(
        nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2)),
        criterion=nn.CrossEntropyLoss,
        criterion__label_smoothing=label_smoothing,
        optimizer__weight_decay=weight_decay,
        lr=lr,
        max_epochs=40,
        train_split=ValidSplit(0.5, stratified=True, random_state=0),
        verbose=0,
    )


if __name__ == "__main__":
    problem = from_net(net, data, upper_loss=cross_entropy)
    settings = tune.TuneConfig(
        search_alg=BilevelSearch(problem), metric="valid_loss", mode="min", num_samples=12, reuse_actors=True
    )
    results = tune.Tuner(problem, param_space=SPACE, tune_config=settings, run_config=tune.RunConfig(verbose=0)).fit()
    best = results.get_best_result()
    print("best hyperparameters:", best.config)
    print(f"validation loss {best.metrics['valid_loss']:.4f}")
