"""mnist_step_lr.py, searched by raybilevel: the weight decays have gradients."""

from functools import partial

from mnist_step_lr import build_model, fit, load_data, main, parameter_groups, test, training_loss
from search_algorithms import command_line

from raybilevel import BilevelSearch
from raybilevel.loop import from_loop

trainable = from_loop(
    fit,
    model=lambda config: build_model(config, load_data(config.get("data"))["train"][0]),
    data=load_data,
    lower_loss=training_loss,
    weight_decay=parameter_groups,
    upper_loss=training_loss,
    evaluate=lambda model, config: test(model, load_data(config.get("data"))),
)
main = partial(main, lambda seed: BilevelSearch(trainable, seed=seed), trainable=trainable)

if __name__ == "__main__":
    command_line(main)
