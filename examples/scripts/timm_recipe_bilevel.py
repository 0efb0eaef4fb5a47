"""timm_recipe.py, searched by raybilevel: the label smoothing has gradients."""

from functools import partial

from search_algorithms import command_line
from timm_recipe import build_model, fit, load_data, main, training_loss, validate

from raybilevel import BilevelSearch
from raybilevel.loop import from_loop

trainable = from_loop(
    fit,
    model=lambda config: build_model(config, load_data(config.get("data"))["train"][0]),
    data=load_data,
    lower_loss=training_loss,
    upper_loss=lambda model, batch: training_loss(model, {"smoothing": 0.0}, batch),
    evaluate=lambda model, config: validate(model, load_data(config.get("data"))),
)
main = partial(main, lambda seed: BilevelSearch(trainable, seed=seed), trainable=trainable)

if __name__ == "__main__":
    command_line(main)
