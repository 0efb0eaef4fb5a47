"""The search algorithms that the scripts are run with, by name, and their command line."""

import argparse
import inspect

import optuna
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

SEARCHERS = {
    "random": lambda seed: BasicVariantGenerator(random_state=seed),
    "optuna-tpe": lambda seed: OptunaSearch(sampler=optuna.samplers.TPESampler(seed=seed)),
    "optuna-gp": lambda seed: OptunaSearch(sampler=optuna.samplers.GPSampler(seed=seed)),
}


def search_algorithm(name, seed=0):
    if name not in SEARCHERS:
        raise ValueError(f"unknown searcher {name!r}; choose one of {', '.join(SEARCHERS)}")
    return SEARCHERS[name](seed)


def command_line(main):
    """Run a script's `main` with the arguments of the command line, and print its best trial."""
    parser = argparse.ArgumentParser(description=inspect.getmodule(main).__doc__.split("\n")[0])
    if "searcher" in inspect.signature(main).parameters:
        parser.add_argument("--searcher", choices=SEARCHERS, default="random")
    parser.add_argument("--num-samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    if "data" in inspect.signature(main).parameters:
        parser.add_argument("--data", help="a folder of data files; without it a small data set of scikit-learn's")
    best = main(**vars(parser.parse_args())).get_best_result("val_loss", "min")
    print("best hyperparameters:", best.config)
    print(", ".join(f"{name} {best.metrics[name]:.4f}" for name in best.metrics if name.startswith(("val_", "test_"))))
