"""digits_mlp.py, searched by raybilevel: the weight decays have gradients."""

from functools import partial

from digits_mlp import build_model, evaluate, fit, load_data, main, parameter_groups, training_loss
from search_algorithms import command_line

from raybilevel import BilevelSearch
from raybilevel.loop import from_loop

trainable = from_loop(
    fit,
    model=build_model,
    data=load_data,
    lower_loss=training_loss,
    weight_decay=parameter_groups,
    upper_loss=training_loss,
    evaluate=lambda model, config: evaluate(model, load_data()),
)
main = partial(main, lambda seed: BilevelSearch(trainable, seed=seed), trainable=trainable)

if __name__ == "__main__":
    command_line(main)
