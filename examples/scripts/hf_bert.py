"""Hugging Face's Trainer with a tiny BERT, made from its config, that says whether a sentence is friendly."""

import random
import tempfile

import numpy as np
import torch
from ray import tune
from search_algorithms import command_line, search_algorithm
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

SPACE = {
    "learning_rate": tune.loguniform(1e-3, 3e-2),
    "weight_decay": tune.loguniform(1e-4, 1e0),
    "warmup_steps": tune.randint(0, 60),
    "num_train_epochs": tune.randint(4, 13),
    "per_device_train_batch_size": tune.choice([16, 32, 64]),
    "label_smoothing_factor": tune.uniform(0.0, 0.3),
    "lr_scheduler_type": tune.choice(["linear", "cosine", "constant_with_warmup"]),
    "num_hidden_layers": tune.randint(1, 4),
    "hidden_dropout_prob": tune.uniform(0.0, 0.4),
    "attention_probs_dropout_prob": tune.uniform(0.0, 0.4),
}
MODEL_SETTINGS = {"num_hidden_layers", "hidden_dropout_prob", "attention_probs_dropout_prob"}

FRIENDLY = "good lovely kind clever bright warm fine sweet honest gentle".split()  # noqa: SIM905
UNFRIENDLY = "bad awful rude stupid dull cold poor bitter false harsh".split()  # noqa: SIM905
OTHER = "the a this that film book meal day was is it and so quite really they said we think about".split()  # noqa: SIM905
VOCABULARY = ["[PAD]", "[CLS]", "not", *FRIENDLY, *UNFRIENDLY, *OTHER]
LENGTH = 12  # words


def sentence(rng):
    """Words among which one to three judge, each of them turned round by a "not" before it; the sum decides."""
    words, judgement = rng.choices(OTHER, k=rng.randint(3, 5)), 0
    for _ in range(rng.choice([1, 1, 3])):
        sign, negated = rng.choice([-1, 1]), rng.random() < 0.3
        at = rng.randrange(len(words))
        if at and words[at - 1] == "not":
            at -= 1
        words[at:at] = ["not"] * negated + [rng.choice(FRIENDLY if sign > 0 else UNFRIENDLY)]
        judgement += -sign if negated else sign
    return ["[CLS]", *words], int(judgement > 0)


def dataset(rows, noise, rng):
    """Rows as Trainer takes them; a share of the labels is wrong."""
    examples = []
    for _ in range(rows):
        words, label = sentence(rng)
        padding = LENGTH - len(words)
        examples.append(
            {
                "input_ids": [VOCABULARY.index(word) for word in words] + [0] * padding,
                "attention_mask": [1] * len(words) + [0] * padding,
                "labels": 1 - label if rng.random() < noise else label,
            }
        )
    return examples


def load_data():
    rng = random.Random(0)
    return {"train": dataset(800, 0.1, rng), "val": dataset(500, 0.0, rng), "test": dataset(1000, 0.0, rng)}


def build_model(config):
    set_seed(config.get("seed", 0))
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.1,
    }
    settings = {name: config[name] for name in MODEL_SETTINGS}
    return BertForSequenceClassification(BertConfig(vocab_size=len(VOCABULARY), num_labels=2, **sizes, **settings))


def compute_metrics(predictions):
    """The loss of the labels as they are: Trainer's own eval_loss is smoothed."""
    logits = torch.tensor(predictions.predictions)
    labels = torch.tensor(predictions.label_ids)
    accuracy = np.mean(predictions.predictions.argmax(1) == predictions.label_ids)
    return {"loss": cross_entropy(logits, labels).item(), "accuracy": float(accuracy)}


class Report(TrainerCallback):
    def __init__(self):
        self.metrics = {}

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics |= {
            name.removeprefix("eval_"): metrics[name] for name in metrics if name.endswith(("loss", "accuracy"))
        }
        if "test_loss" in self.metrics:
            tune.report(self.metrics)
            self.metrics = {}


def build_trainer(config):
    data = load_data()
    trainer = Trainer(
        build_model(config),
        TrainingArguments(
            tempfile.gettempdir(),
            eval_strategy="epoch",
            per_device_eval_batch_size=500,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            **{name: value for name, value in config.items() if name not in MODEL_SETTINGS},
        ),
        train_dataset=data["train"],
        eval_dataset={"val": data["val"], "test": data["test"]},
        compute_metrics=compute_metrics,
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainable(config):
    build_trainer(config).train()


def main(searcher="random", num_samples=20, seed=0, trainable=trainable):
    return tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=search_algorithm(searcher, seed),
            num_samples=num_samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(verbose=1),
    ).fit()


if __name__ == "__main__":
    command_line(main)
