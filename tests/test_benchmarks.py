"""The comparison with the published recipe: its reference is what it says, its sums add up."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from children import ROOT
from conftest import planted_cells

pytest.importorskip("accelerate", reason="the bench extra is not installed")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The scripts as modules, which they are to each other when run."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import published

    yield published
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def small(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two passes over some sixty cells, by a backbone of one layer."""
    monkeypatch.setattr(bench.reference, "MIN_STEPS", 1)
    monkeypatch.setattr(bench.reference, "EPOCHS", 2)
    monkeypatch.setitem(bench.SHAPES, "1 x 8", bench.Shape(1, 8, 1, 8))
    short = {"epochs": 2, "min_steps": 1}
    for side, values in bench.OURS.items():
        monkeypatch.setitem(bench.OURS, side, values | short)
    return bench


def a_fold(bench: Any, n_cells: int = 10) -> Any:
    cells = planted_cells(n_units=3, n_cells=n_cells)
    parts = (cells[cells.obs["unit"] == unit].copy() for unit in ("u0", "u1", "u2"))
    return bench.tasks.Fold("planted", "u2", *parts)


def options(rows: Path, **changed: Any) -> argparse.Namespace:
    usual = {"task": "", "fold": None, "side": "", "shapes": ["1 x 8"], "seeds": 2}
    return argparse.Namespace(rows=rows, **usual | changed)


# -- the reference ------------------------------------------------------------------------------
def test_the_reference_is_the_published_recipe(small: Any) -> None:
    fold = a_fold(small)
    vocabulary = small.Vocabulary.fit(fold.train)
    exposures, train, valid = small.lessons(fold, vocabulary)
    done = small.reference.fit(
        train,
        valid,
        vocabulary,
        small.SHAPES["1 x 8"],
        n_exposures=len(exposures),
        lr=2e-4,
        seed=0,
    )
    told, model = done.trainer.args, done.trainer.model
    assert type(model).__name__ == "BertForSequenceClassification"
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any((told.bf16, told.fp16, told.gradient_checkpointing))
    assert told.per_device_train_batch_size * told.gradient_accumulation_steps == 12
    assert model.config.attention_probs_dropout_prob == model.config.hidden_dropout_prob == 0.02
    assert type(done.trainer.optimizer.optimizer).__name__ == "AdamW"
    steps = 2 * -(-fold.train.n_obs // 12)
    assert (done.n_steps, told.get_warmup_steps(steps)) == (steps, -(-steps // 10))
    assert (told.lr_scheduler_type.value, told.weight_decay) == ("linear", 0.001)


def test_the_reference_reads_whole_cells_padded_to_the_longest(bench: Any) -> None:
    cells = [{"input_ids": np.arange(2, 2 + n), "labels": n} for n in (3, 7, 5)]
    padded = bench.reference.Collator(0)(cells)
    assert padded["input_ids"].shape == (3, 7)
    assert padded["attention_mask"].sum(1).tolist() == [3, 7, 5]
    for cell, ids in zip(cells, padded["input_ids"].tolist()):
        assert ids == [*cell["input_ids"], *[0] * (7 - len(cell["input_ids"]))]
    assert padded["labels"].tolist() == [3, 7, 5]


def test_the_reference_is_judged_by_the_same_rule_as_ours(bench: Any) -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [30, 10, 5])
    logits = rng.normal(size=(45, 3)) + 2 * np.eye(3)[truth]
    found = bench.reference.validated(logits, truth)
    weight = (1 / np.bincount(truth))[truth]
    cooled = logits / bench.reference.fit_temperature(logits, truth, weight)
    p = np.exp(cooled) / np.exp(cooled).sum(1, keepdims=True)
    assert found["valid_loss"] == pytest.approx(log_loss(truth, p, sample_weight=weight))


def test_the_reference_learns_what_was_planted(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small.reference, "EPOCHS", 25)
    monkeypatch.setitem(small.SHAPES, "1 x 16", small.Shape(1, 16, 1, 16))
    job = small.Job(small.PUBLISHED, "1 x 16", 0, 0.005)
    row = small.measure(job, a_fold(small, n_cells=20))
    assert row["valid_loss"] < 0.8 * np.log(3), "three exposures, guessed blindly, lose log 3"


# -- the accounting -----------------------------------------------------------------------------
def test_costs_add_up_and_finished_fits_are_not_repeated(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = a_fold(small)
    monkeypatch.setattr(small, "folds_of", lambda options: iter([fold]))
    asked = options(tmp_path / "rows.jsonl")
    small.run(asked)
    rows = small.read(asked.rows)
    sides = [row["side"] for row in rows]
    n_rates = len(small.reference.LEARNING_RATES)
    assert sides.count(small.PUBLISHED) == n_rates + 1, "the rate is chosen on one seed"
    assert all(sides.count(side) == 2 for side in (small.LOGISTIC, *small.OURS))
    for row in rows:
        assert row["n_train"] == fold.train.n_obs
        assert 0 <= row["macro_f1"] <= 1
        assert row["cpu_seconds"] > 0
        if row["side"] != small.LOGISTIC:
            assert row["cell_steps"] == row["epochs"] * fold.train.n_obs == 2 * fold.train.n_obs
            spent = [epoch["cpu_seconds"] for epoch in row["history"]]
            assert spent == sorted(spent)
            assert small.seconds_till_as_good(row) <= row["cpu_seconds"]

    monkeypatch.setattr(small, "measure", lambda job, fold: pytest.fail("measured again"))
    with asked.rows.open("a") as file:
        file.write('{"task": "planted", "fo')  # killed while writing
    small.run(asked)
    assert small.read(asked.rows) == rows
    said = small.table(rows)
    assert said.count("\n") == 1 + len([small.PUBLISHED, *small.OURS, small.LOGISTIC])


def a_row(side: str, seed: int, f1: float, cpu: float, steps: int, **more: Any) -> dict[str, Any]:
    where = {"task": "t", "fold": "f", "shape": "1 x 8", "recipe": {}, "lr": 0.0}
    found = {"macro_f1": f1, "cpu_seconds": cpu, "cell_steps": steps, "valid_loss": 1.0}
    return {"side": side, "seed": seed, **where, **found, **more}


def test_the_ratio_is_the_product_of_its_causes(bench: Any) -> None:
    bar = [a_row(bench.PUBLISHED, seed, 0.95, 80.0, 4000) for seed in range(2)]
    ours = [a_row("ours", seed, f1, 4.0, 2000) for seed, f1 in enumerate((0.93, 0.96))]
    assert bench.compared(ours, bar)[2:4] == ["20.0", "10.0 x 2.00"]


def test_who_knows_when_to_stop_pays_until_validation_is_as_good(bench: Any) -> None:
    scores, spent = (0.5, 0.985, 0.97, 0.99), (10.0, 20.0, 30.0, 40.0)
    history = [{"valid_macro_f1": f1, "cpu_seconds": s} for f1, s in zip(scores, spent)]
    assert bench.seconds_till_as_good({"history": history}) == 20.0


def test_a_units_name_never_breaks_the_table(bench: Any) -> None:
    said = bench.table([a_row("ours", 0, 0.9, 4.0, 2000) | {"fold": "CTL04E|2"}])
    assert len({line.count("|") for line in said.splitlines()}) == 1


@pytest.mark.parametrize(("f1", "verdict"), [(0.941, "yes"), (0.939, "no"), (0.99, "yes")])
def test_equal_means_at_most_a_hundredth_below(bench: Any, f1: float, verdict: str) -> None:
    bar = [a_row(bench.PUBLISHED, 0, 0.95, 80.0, 4000)]
    assert bench.compared([a_row("ours", 0, f1, 4.0, 2000)], bar)[-1].startswith(verdict)


def test_the_rate_is_chosen_on_validation_cells_of_one_seed(bench: Any) -> None:
    rates = bench.reference.LEARNING_RATES
    tried = [
        a_row(bench.PUBLISHED, 0, f1, 80.0, 1, lr=lr, valid_loss=loss)
        for lr, f1, loss in zip(rates, (0.1, 0.2, 0.9), (0.5, 0.3, 0.4))
    ]
    luckier = a_row(bench.PUBLISHED, 1, 0.9, 80.0, 1, lr=rates[2], valid_loss=0.01)
    elsewhere = a_row(bench.PUBLISHED, 0, 0.9, 80.0, 1, lr=rates[2], valid_loss=0.0) | {
        "fold": "a later one"
    }
    assert bench.best_rate([*tried, luckier, elsewhere], "t", "1 x 8") == rates[1]
    assert bench.best_rate(tried[:2], "t", "1 x 8") is None, "not before every rate was tried"


def test_a_changed_recipe_is_measured_again(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fold, job = a_fold(small), small.Job("ours", "1 x 8", 0)
    before = json.dumps(small.key_of(job, fold))
    monkeypatch.setitem(small.OURS, "ours", small.OURS["ours"] | {"patience": 3})
    assert json.dumps(small.key_of(job, fold)) != before


# -- the shape that is only timed ---------------------------------------------------------------
def test_timed_cells_are_full_and_every_one_is_counted(bench: Any) -> None:
    import steps

    known = steps.vocabulary(60, 32)
    shape = bench.Shape(1, 8, 1, 8)
    dear = steps.published(2, shape, known)
    cheap = steps.ours(40, shape, known, steps.GeneformerConfig(epochs=1, min_steps=1))
    assert (dear["n_cells"], dear["n_steps"]) == (24, 2)
    assert (cheap["n_cells"], cheap["n_steps"]) == (40, 2)
    assert set(steps.lesson(3, known).tokens.lengths) == {32}
