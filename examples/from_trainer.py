"""Hugging Face's Trainer with a tiny BERT made from its config. Needs raybilevel[transformers].

The label smoothing has gradients. The other hyperparameters are searched by values.
"""

import random
import tempfile

from ray import tune
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments

from raybilevel import BilevelSearch
from raybilevel.transformers import from_trainer

SPACE = {
    "learning_rate": tune.loguniform(1e-3, 3e-2),
    "label_smoothing_factor": tune.uniform(0.0, 0.3),
    "hidden_dropout_prob": tune.uniform(0.0, 0.3),
}
WORDS = 20
LENGTH = 8


def sentences(count, seed):
    """Word 0 begins a sentence. Of the others, the first half of the vocabulary is friendly; the majority decides."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        words = [rng.randrange(1, WORDS) for _ in range(LENGTH - 1)]
        label = int(sum(word < WORDS // 2 for word in words) > LENGTH // 2 - 1)
        rows.append({"input_ids": [0, *words], "labels": label})
    return rows


def trainer(learning_rate, label_smoothing_factor, hidden_dropout_prob):
    model = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        hidden_dropout_prob=hidden_dropout_prob,
    )
    arguments = TrainingArguments(
        tempfile.gettempdir(),
        learning_rate=learning_rate,
        label_smoothing_factor=label_smoothing_factor,
        num_train_epochs=20,
        per_device_train_batch_size=50,
        per_device_eval_batch_size=200,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    found = Trainer(
        BertForSequenceClassification(model), arguments, train_dataset=sentences(400, 0), eval_dataset=sentences(200, 1)
    )
    found.remove_callback(PrinterCallback)
    return found


if __name__ == "__main__":
    problem = from_trainer(trainer)
    settings = tune.TuneConfig(
        search_alg=BilevelSearch(problem), metric="eval_loss", mode="min", num_samples=8, reuse_actors=True
    )
    results = tune.Tuner(problem, param_space=SPACE, tune_config=settings, run_config=tune.RunConfig(verbose=0)).fit()
    best = results.get_best_result()
    print("best hyperparameters:", best.config)
    print(f"validation loss {best.metrics['eval_loss']:.4f}")
