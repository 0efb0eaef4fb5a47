"""char_gpt.py, searched by raybilevel: the label smoothing has gradients."""

from functools import partial

import torch
from char_gpt import CONTEXT, build_model, evaluate, fit, load_data, main, training_loss, windows
from search_algorithms import command_line

from raybilevel import BilevelSearch
from raybilevel.loop import from_loop

codes, vocabulary = load_data()
parts = {name: windows(codes[name], torch.arange(0, len(codes[name]) - CONTEXT, CONTEXT // 4)) for name in codes}

trainable = from_loop(
    fit,
    model=lambda config: build_model(config, vocabulary),
    data=parts,
    lower_loss=training_loss,
    upper_loss=lambda model, batch: training_loss(model, {"label_smoothing": 0.0}, batch),
    evaluate=lambda model, config: {"test_loss": evaluate(model, codes["test"])},
    passes=lambda config: 16 * config["steps"] / len(parts["train"][0]),
)
main = partial(main, lambda seed: BilevelSearch(trainable, seed=seed), trainable=trainable)

if __name__ == "__main__":
    command_line(main)
