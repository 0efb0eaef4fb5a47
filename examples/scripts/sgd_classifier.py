"""scikit-learn's SGDClassifier, trained by partial_fit: is a digit an 8? Both answers count the same."""

import numpy as np
from ray import tune
from sample_data import digits
from search_algorithms import command_line, search_algorithm
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.utils.class_weight import compute_sample_weight

SPACE = {
    "alpha": tune.loguniform(1e-6, 1e-1),
    "penalty": tune.choice(["l2", "l1", "elasticnet"]),
    "l1_ratio": tune.uniform(0.0, 1.0),
    "positive_weight": tune.loguniform(0.5, 50.0),
    "learning_rate": tune.choice(["constant", "invscaling", "optimal"]),
    "eta0": tune.loguniform(1e-4, 1e-1),
    "power_t": tune.uniform(0.1, 0.9),
    "average": tune.choice([False, True]),
    "epochs": tune.randint(5, 61),
}


def load_data():
    return {
        name: (x.flatten(1).numpy().astype(np.float64), (y == 8).long().numpy())
        for name, (x, y) in digits(train=500, val=600).items()
    }


def build_model(config):
    return SGDClassifier(
        loss="log_loss",
        alpha=config["alpha"],
        penalty=config["penalty"],
        l1_ratio=config["l1_ratio"],
        class_weight={0: 1.0, 1: config["positive_weight"]},
        learning_rate=config["learning_rate"],
        eta0=config["eta0"],
        power_t=config["power_t"],
        average=config["average"],
        random_state=config.get("seed", 0),
    )


def evaluate(model, data):
    """Log loss and accuracy, each the mean of those of the two classes."""
    metrics = {}
    for name in ("val", "test"):
        x, y = data[name]
        weights = compute_sample_weight("balanced", y)
        metrics[f"{name}_loss"] = log_loss(y, model.predict_proba(x), sample_weight=weights)
        metrics[f"{name}_accuracy"] = balanced_accuracy_score(y, model.predict(x))
    return metrics


def fit(config):
    data = load_data()
    model = build_model(config)
    rng = np.random.default_rng(config.get("seed", 0))
    x, y = data["train"]
    for epoch in range(1, config["epochs"] + 1):
        rows = rng.permutation(len(x))
        model.partial_fit(x[rows], y[rows], classes=[0, 1])
        if epoch % 5 == 0 or epoch == config["epochs"]:
            tune.report(evaluate(model, data))
    return model


def trainable(config):
    fit(config)


def main(searcher="random", num_samples=20, seed=0, trainable=trainable):
    return tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=search_algorithm(searcher, seed),
            num_samples=num_samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(verbose=1),
    ).fit()


if __name__ == "__main__":
    command_line(main)
