"""cifar_cnn.py, searched by raybilevel: the weight decay and the label smoothing have gradients."""

from functools import partial

from cifar_cnn import build_model, evaluate, fit, load_data, main, training_loss
from search_algorithms import command_line

from raybilevel import BilevelSearch
from raybilevel.loop import from_loop

trainable = from_loop(
    fit,
    model=lambda config: build_model(config, load_data(config.get("data"))["train"][0]),
    data=load_data,
    lower_loss=training_loss,
    weight_decay="weight_decay",
    upper_loss=lambda model, batch: training_loss(model, {"label_smoothing": 0.0}, batch),
    evaluate=lambda model, config: evaluate(model, load_data(config.get("data"))),
)
main = partial(main, lambda seed: BilevelSearch(trainable, seed=seed), trainable=trainable)

if __name__ == "__main__":
    command_line(main)
