"""torchvision_recipe.py, searched by raybilevel: all that stands in the loss has gradients."""

from functools import partial

from search_algorithms import command_line
from torch.nn.functional import cross_entropy
from torchvision_recipe import build_model, evaluate, fit, load_data, main, parameter_groups, training_loss

from raybilevel import BilevelSearch
from raybilevel.loop import from_loop

trainable = from_loop(
    fit,
    model=lambda config: build_model(config, load_data(config.get("data"))["train"][0]),
    data=load_data,
    lower_loss=lambda model, config, batch: training_loss(model, config, batch, batch[1]),
    weight_decay=parameter_groups,
    upper_loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
    evaluate=lambda model, config: evaluate(model, load_data(config.get("data"))),
)
main = partial(main, lambda seed: BilevelSearch(trainable, seed=seed), trainable=trainable)

if __name__ == "__main__":
    command_line(main)
