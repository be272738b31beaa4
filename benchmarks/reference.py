"""The published way to fine-tune Geneformer, as the reference that costs are compared with.

Upstream's cell classifier (ctheodoris/Geneformer, Theodoris 2023, Nature 618:616):
`BertForSequenceClassification` under transformers' Trainer, fp32, the whole cell, minibatches of
12 padded to their longest, no layer frozen, dropout .02, linear schedule, evaluated every epoch,
the best epoch loaded at the end. So that it is no straw man on some hundred cells it warms up for
a tenth of its steps (published: 500 steps, more than a small set has), may take one of three
learning rates, and has this project's limit of epochs and early stopping. Its cells open with
`<cls>`, as V2's do, so that what its head reads is meant to be read.

Shapes: n cells, E exposures.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.metrics import f1_score
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from endoprint.encoder import backbone
from endoprint.encoder.loop import Lesson
from endoprint.model import fit_temperature
from endoprint.tokens import Tokens
from endoprint.vocabulary import Vocabulary

Array = np.ndarray[Any, np.dtype[Any]]

MINIBATCH = 12
DROPOUT = 0.02  # V1's, hidden states and attention alike
WEIGHT_DECAY = 0.001
# upstream's default, the published example's (8.04e-4), and the geometric mean of the two
LEARNING_RATES = (5e-5, 2e-4, 8.04e-4)
# This project's limits when the comparison was made: so many passes, more where a set is small
# (its own steps are of 32 cells), and stopping after four without a lower validation loss
EPOCHS, MIN_STEPS, STEP_CELLS, PATIENCE = 5, 200, 32, 4


@dataclass(frozen=True)
class Shape:
    """The size of a backbone, the same on both sides of a comparison."""

    layers: int
    hidden: int
    heads: int
    ffn: int

    @property
    def name(self) -> str:
        """Say it as layers x width."""
        return f"{self.layers} x {self.hidden}"


@dataclass(frozen=True)
class Epoch:
    """What one pass came to: processor seconds are counted from the start of the fit."""

    valid_loss: float  # at its best temperature, exposures weighing equally, as this project's
    valid_macro_f1: float
    cpu_seconds: float


@dataclass(frozen=True)
class Outcome:
    """A finished fit of the reference."""

    trainer: Trainer
    epochs: list[Epoch]
    n_steps: int
    cpu_seconds: float  # training, validation and loading the best epoch

    @property
    def best(self) -> Epoch:
        """Return the epoch whose weights were kept."""
        return min(self.epochs, key=lambda epoch: epoch.valid_loss)

    def answers(self, tokens: Tokens) -> Array:
        """Return the logits of cells, (n, E), in their order."""
        told: Array = self.trainer.predict(_Cells(tokens)).predictions
        return told


def epochs_for(n_cells: int) -> int:
    """Return the passes that a set of this size gets, on both sides."""
    return max(EPOCHS, -(-MIN_STEPS // -(-n_cells // STEP_CELLS)))


def fit(
    train: Lesson,
    valid: Lesson,
    vocabulary: Vocabulary,
    shape: Shape,
    *,
    n_exposures: int,
    lr: float,
    seed: int,
    most_steps: int = -1,
    accumulate: int = 1,
) -> Outcome:
    """Fine-tune from a random start by the published recipe, on one thread of the processor.

    `most_steps` stops after so many steps, for timing; `accumulate` splits a minibatch of 12 into
    so many parts where it would not fit into memory.
    """
    set_seed(seed)
    model = BertForSequenceClassification(_config(shape, vocabulary, n_exposures))
    watch = _Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=_arguments(
                folder,
                lr=lr,
                seed=seed,
                epochs=epochs_for(len(train.truth)),
                most_steps=most_steps,
                accumulate=accumulate,
            ),
            train_dataset=_Cells(train.tokens, train.truth),
            eval_dataset=_Cells(valid.tokens, valid.truth),
            data_collator=Collator(vocabulary.pad_id),
            compute_metrics=lambda told: validated(told.predictions, told.label_ids),
            callbacks=[watch, *([] if most_steps > 0 else [EarlyStoppingCallback(PATIENCE)])],
        )
        trainer.remove_callback(PrinterCallback)
        watch.started = started = time.process_time()
        trainer.train()
        spent = time.process_time() - started
    return Outcome(trainer, watch.epochs, int(trainer.state.global_step), spent)


def _config(shape: Shape, vocabulary: Vocabulary, n_exposures: int) -> BertConfig:
    config = backbone.shape_of(
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        ffn=shape.ffn,
        vocabulary_size=len(vocabulary),
        max_length=vocabulary.max_length,
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = DROPOUT
    config.num_labels = n_exposures
    return config


def _arguments(
    folder: str, *, lr: float, seed: int, epochs: int, most_steps: int, accumulate: int
) -> TrainingArguments:
    is_timed_only = most_steps > 0
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=MINIBATCH // accumulate,
        gradient_accumulation_steps=accumulate,
        per_device_eval_batch_size=MINIBATCH,
        num_train_epochs=epochs,
        max_steps=most_steps,
        learning_rate=lr,
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # a share of all steps
        weight_decay=WEIGHT_DECAY,
        eval_strategy="no" if is_timed_only else "epoch",
        save_strategy="no" if is_timed_only else "epoch",
        load_best_model_at_end=not is_timed_only,
        metric_for_best_model="valid_loss",
        greater_is_better=False,
        save_total_limit=1,
        save_only_model=True,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
    )


def validated(logits: Array, truth: Array) -> dict[str, float]:
    """Judge validation cells as this project's own loop does, so that both stop by one rule."""
    present, n_cells = np.unique(truth, return_counts=True)
    weight = 1.0 / n_cells[np.searchsorted(present, truth)]
    cooled = logits / fit_temperature(logits, truth, weight)
    at_truth = log_softmax(cooled, axis=1)[np.arange(len(truth)), truth]
    return {
        "valid_loss": float(-np.average(at_truth, weights=weight)),
        "valid_macro_f1": macro_f1(truth, logits, labels=present),
    }


def macro_f1(truth: Array, logits: Array, labels: Array | None = None) -> float:
    """Return the mean F1 over exposures of the likeliest calls."""
    calls = logits.argmax(axis=1)
    return float(f1_score(truth, calls, labels=labels, average="macro", zero_division=0))


class Collator:
    """Pad some cells to the longest among them."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, cells: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ids and mask, (B, T), and labels where they are known."""
        longest = max(len(cell["input_ids"]) for cell in cells)
        ids = torch.full((len(cells), longest), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, cell in enumerate(cells):
            length = len(cell["input_ids"])
            ids[row, :length] = torch.from_numpy(cell["input_ids"])
            mask[row, :length] = 1
        padded = {"input_ids": ids, "attention_mask": mask}
        if "labels" in cells[0]:
            padded["labels"] = torch.tensor([cell["labels"] for cell in cells])
        return padded


class _Cells(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, tokens: Tokens, truth: Array | None = None) -> None:
        self.tokens, self.truth = tokens, truth

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, cell: int) -> dict[str, Any]:
        said: dict[str, Any] = {"input_ids": self.tokens[cell].astype(np.int64)}
        return said if self.truth is None else said | {"labels": int(self.truth[cell])}


class _Watch(TrainerCallback):
    def __init__(self) -> None:
        self.epochs: list[Epoch] = []
        self.started = 0.0

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        """Note what an epoch came to (the keyword arguments are the Trainer's contract)."""
        spent = time.process_time() - self.started
        self.epochs.append(
            Epoch(metrics["eval_valid_loss"], metrics["eval_valid_macro_f1"], spent)
        )
