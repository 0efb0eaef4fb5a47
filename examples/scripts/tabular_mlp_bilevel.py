"""tabular_mlp.py, searched by raybilevel: Huber's delta and the weight decay have gradients."""

from functools import partial

from search_algorithms import command_line
from tabular_mlp import build_model, evaluate, fit, load_data, main
from torch.nn.functional import huber_loss, l1_loss

from raybilevel import BilevelSearch
from raybilevel.loop import from_loop

trainable = from_loop(
    fit,
    model=build_model,
    data=load_data,
    lower_loss=lambda model, config, batch: huber_loss(model(batch[0]), batch[1], delta=config["huber_delta"]),
    weight_decay="weight_decay",
    upper_loss=lambda model, batch: l1_loss(model(batch[0]), batch[1]),
    evaluate=lambda model, config: {"test_loss": evaluate(model, *load_data()["test"])},
)
main = partial(main, lambda seed: BilevelSearch(trainable, seed=seed), trainable=trainable)

if __name__ == "__main__":
    command_line(main)
