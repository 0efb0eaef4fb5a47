"""sgd_classifier.py, searched by raybilevel: alpha and the class weight have gradients."""

from functools import partial

from search_algorithms import command_line
from sgd_classifier import build_model, evaluate, fit, load_data, main
from sklearn.utils.class_weight import compute_sample_weight

from raybilevel import BilevelSearch
from raybilevel.sklearn import from_estimator

data = load_data()
x, y = data["val"]
validation = (x, y, compute_sample_weight("balanced", y))
trainable = from_estimator(build_model, data["train"], validation, fit=fit, evaluate=lambda m: evaluate(m, data))
main = partial(main, lambda seed: BilevelSearch(trainable, seed=seed), trainable=trainable)

if __name__ == "__main__":
    command_line(main)
