"""lightning_digits.py, searched by raybilevel: the weight decay and the label smoothing have gradients."""

from functools import partial

from lightning_digits import Digits, build_model, build_trainer, main
from search_algorithms import command_line

from raybilevel import BilevelSearch
from raybilevel.lightning import from_lightning

trainable = from_lightning(build_model, Digits, build_trainer)
main = partial(main, lambda seed: BilevelSearch(trainable, seed=seed), trainable=trainable)

if __name__ == "__main__":
    command_line(main)
