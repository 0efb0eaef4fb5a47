"""hf_bert.py, searched by raybilevel: the label smoothing has gradients."""

from functools import partial

from hf_bert import build_trainer, main
from search_algorithms import command_line

from raybilevel import BilevelSearch
from raybilevel.transformers import from_trainer

trainable = from_trainer(build_trainer, metric="val_loss")
main = partial(main, lambda seed: BilevelSearch(trainable, seed=seed), trainable=trainable)

if __name__ == "__main__":
    command_line(main)
