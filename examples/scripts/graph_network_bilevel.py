"""graph_network.py, searched by raybilevel: the weight decays and the label smoothing have gradients."""

from functools import partial

from graph_network import build_model, evaluate, fit, load_data, main, parameter_groups, training_loss
from search_algorithms import command_line

from raybilevel import BilevelSearch
from raybilevel.loop import from_loop


def loss(model, config, nodes):
    return training_loss(model, config, {**load_data(config.get("data")), "train": nodes})


trainable = from_loop(
    fit,
    model=lambda config: build_model(config, load_data(config.get("data"))),
    data=load_data,
    lower_loss=loss,
    weight_decay=parameter_groups,
    upper_loss=lambda model, config, nodes: loss(model, {**config, "label_smoothing": 0.0}, nodes),
    evaluate=lambda model, config: evaluate(model, load_data(config.get("data"))),
)
main = partial(main, lambda seed: BilevelSearch(trainable, seed=seed), trainable=trainable)

if __name__ == "__main__":
    command_line(main)
