"""The search algorithms that the scripts are run with, by name, and their command line."""

import argparse
import inspect
import sys

from ray.tune.search import BasicVariantGenerator


def optuna_search(sampler, seed):
    # Here, so that the other searchers need no Optuna.
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(sampler=getattr(optuna.samplers, sampler)(seed=seed))


SEARCHERS = {
    "random": lambda seed: BasicVariantGenerator(random_state=seed),
    "optuna-tpe": lambda seed: optuna_search("TPESampler", seed),
    "optuna-gp": lambda seed: optuna_search("GPSampler", seed),
}


def search_algorithm(searcher, seed=0):
    """One of those above by its name, or another function of the seed."""
    if callable(searcher):
        return searcher(seed)
    if searcher not in SEARCHERS:
        raise ValueError(f"unknown searcher {searcher!r}; choose one of {', '.join(SEARCHERS)}")
    return SEARCHERS[searcher](seed)


def command_line(main):
    """Run a script's `main` with the arguments of the command line, and print its best trial."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.split("\n")[0])
    if "searcher" in inspect.signature(main).parameters:
        parser.add_argument("--searcher", choices=SEARCHERS, default="random")
    parser.add_argument("--num-samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    if "data" in inspect.signature(main).parameters:
        parser.add_argument("--data", help="a folder of data files; without it a small data set of scikit-learn's")
    best = main(**vars(parser.parse_args())).get_best_result("val_loss", "min")
    print("best hyperparameters:", best.config)
    print(", ".join(f"{name} {best.metrics[name]:.4f}" for name in best.metrics if name.startswith(("val_", "test_"))))
