"""How good an answer is: probabilities and truth in, numbers out; paired comparisons over units.

Every average over exposures is taken over the exposures *present in the truth*: an exposure that
no judged cell met has neither recall nor F1, and a zero for it would be an invention. An exposure
present in the truth that the model has no column for counts with F1 zero.

Shapes: n cells, E exposures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from endoprint.config import Refusal
from endoprint.paired import Comparison, compare_units

Array = np.ndarray[Any, np.dtype[Any]]

N_BINS = 10  # of equal mass, for calibration
N_DRAWS = 200  # simulated, perfectly calibrated outcomes behind the noise floor
FLOOR_QUANTILE = 0.95  # a calibrated model exceeds its noise floor one time in twenty


# -- one judged table ---------------------------------------------------------------------------
def summary(
    probabilities: pd.DataFrame, truth: pd.Series, unit: pd.Series, *, seed: int = 0
) -> dict[str, float]:
    """Say in one dictionary how well cells were told apart, under the same names for every model.

    probabilities (n, E) indexed by cell id, columns exposures; `truth` and `unit` are joined by
    cell id. A figure that cannot be had (AUROC of one exposure alone) is NaN.
    """
    truth, unit = _joined(probabilities, truth), _joined(probabilities, unit)
    calls = call(probabilities)
    f1, recall = f1_by_exposure(truth, calls), recall_by_exposure(truth, calls)
    error, floor = calibration_error(probabilities, truth, unit, seed=seed)
    units = by_unit(probabilities, truth, unit)
    return {
        "macro_f1": float(f1.mean()),
        "balanced_accuracy": float(recall.mean()),
        "auroc_macro": auroc_macro(probabilities, truth),
        "pr_auc_macro": pr_auc_macro(probabilities, truth),
        "top2_balanced_accuracy": top2_balanced_accuracy(probabilities, truth),
        "log_loss": balanced_log_loss(probabilities, truth, unit),
        "ece": error,
        "ece_noise_floor": floor,
        "worst_unit_macro_f1": float(units["macro_f1"].min()),
        **{f"f1_{exposure}": float(value) for exposure, value in f1.items()},
    }


def call(probabilities: pd.DataFrame) -> pd.Series:
    """Return the most probable exposure of every cell; ties go to the first column."""
    columns = np.asarray(probabilities.columns, dtype=object)
    best = columns[probabilities.to_numpy().argmax(axis=1)]
    return pd.Series(best, index=probabilities.index, dtype=object)


def f1_by_exposure(truth: pd.Series, calls: pd.Series) -> pd.Series:
    """Return F1 of every exposure present in the truth."""
    true, called = truth.to_numpy(dtype=object), calls.to_numpy(dtype=object)
    scores = {}
    for exposure in sorted(set(true)):
        is_true, is_called = true == exposure, called == exposure
        n_hits = int((is_true & is_called).sum())
        scores[exposure] = 2 * n_hits / int(is_true.sum() + is_called.sum())
    return pd.Series(scores, dtype=float)


def recall_by_exposure(truth: pd.Series, calls: pd.Series) -> pd.Series:
    """Return the share of each present exposure's cells that were called right."""
    hit = truth.to_numpy(dtype=object) == calls.to_numpy(dtype=object)
    return pd.Series(hit, dtype=float).groupby(truth.to_numpy(dtype=object)).mean()


def auroc_macro(probabilities: pd.DataFrame, truth: pd.Series) -> float:
    """Return the mean one-versus-rest AUROC over exposures present; NaN without a rest."""
    return _one_versus_rest(roc_auc_score, probabilities, truth)


def pr_auc_macro(probabilities: pd.DataFrame, truth: pd.Series) -> float:
    """Return the mean one-versus-rest average precision over the exposures present."""
    return _one_versus_rest(average_precision_score, probabilities, truth)


def top2_balanced_accuracy(probabilities: pd.DataFrame, truth: pd.Series) -> float:
    """Return how often the truth is among the two most probable, exposures weighted equally."""
    columns = np.asarray(probabilities.columns, dtype=object)
    order = np.argsort(-probabilities.to_numpy(), axis=1, kind="stable")[:, :2]
    true = truth.to_numpy(dtype=object)
    hit = (columns[order] == true[:, None]).any(axis=1)
    return float(pd.Series(hit, dtype=float).groupby(true).mean().mean())


def balanced_log_loss(probabilities: pd.DataFrame, truth: pd.Series, unit: pd.Series) -> float:
    """Return minus the log probability of the truth in nats; units and exposures weigh equally."""
    of_truth = _at_truth(probabilities, truth)
    lost = -np.log(np.clip(of_truth, np.finfo(np.float64).tiny, None))
    return float(np.average(lost, weights=balanced_weight(truth, unit)))


def balanced_weight(truth: pd.Series, unit: pd.Series) -> Array:
    """Return weights, summing to one, (n,), by which every unit x exposure counts the same."""
    keys = pd.DataFrame({"truth": truth.to_numpy(), "unit": unit.to_numpy()})
    n_in_group = keys.groupby(["truth", "unit"])["truth"].transform("size").to_numpy()
    weight = 1.0 / n_in_group
    balanced: Array = weight / weight.sum()
    return balanced


def by_unit(probabilities: pd.DataFrame, truth: pd.Series, unit: pd.Series) -> pd.DataFrame:
    """Return one row per unit: n_cells, n_exposures, macro_f1, balanced_accuracy, auroc_macro."""
    truth, unit = _joined(probabilities, truth), _joined(probabilities, unit)
    calls = call(probabilities)
    rows = {}
    for name in sorted(set(unit)):
        inside = (unit == name).to_numpy()
        rows[name] = {
            "n_cells": int(inside.sum()),
            "n_exposures": int(truth[inside].nunique()),
            "macro_f1": float(f1_by_exposure(truth[inside], calls[inside]).mean()),
            "balanced_accuracy": float(recall_by_exposure(truth[inside], calls[inside]).mean()),
            "auroc_macro": auroc_macro(probabilities[inside], truth[inside]),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "unit"
    return table


def confusion(probabilities: pd.DataFrame, truth: pd.Series) -> pd.DataFrame:
    """Return counts of cells, rows the true exposure, columns the called one."""
    truth, calls = _joined(probabilities, truth), call(probabilities)
    exposures = sorted(set(truth) | {str(column) for column in probabilities.columns})
    counts = pd.crosstab(truth.to_numpy(dtype=object), calls.to_numpy(dtype=object))
    table = counts.reindex(index=exposures, columns=exposures, fill_value=0)
    table.index.name, table.columns.name = "truth", "call"
    return table


def roc_curves(
    probabilities: pd.DataFrame, truth: pd.Series, *, n_points: int = 200
) -> pd.DataFrame:
    """Return one-versus-rest ROC points, a long table: exposure, false and true positive rate."""
    truth = _joined(probabilities, truth)
    curves = []
    for exposure in probabilities.columns:
        is_true = (truth == exposure).to_numpy()
        if not 0 < is_true.sum() < len(is_true):
            continue
        false_rate, true_rate, _ = roc_curve(is_true, probabilities[exposure].to_numpy())
        kept = np.unique(np.linspace(0, len(false_rate) - 1, n_points).round().astype(int))
        curves.append(
            pd.DataFrame(
                {
                    "exposure": exposure,
                    "false_positive_rate": false_rate[kept],
                    "true_positive_rate": true_rate[kept],
                }
            )
        )
    columns = ["exposure", "false_positive_rate", "true_positive_rate"]
    return pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(columns=columns)


# -- calibration --------------------------------------------------------------------------------
def calibration_error(
    probabilities: pd.DataFrame, truth: pd.Series, unit: pd.Series, *, seed: int = 0
) -> tuple[float, float]:
    """Return the expected calibration error of the calls, and its noise floor.

    Ten bins of equal mass over the confidence of the call; every unit x exposure weighs the same,
    because evidence is prior-free. The floor is the 95th percentile of the error that perfectly
    calibrated outcomes would show with these confidences and weights; it draws cells as
    independent, so within strongly correlated units the true floor is higher.
    """
    truth, unit = _joined(probabilities, truth), _joined(probabilities, unit)
    confidence = probabilities.to_numpy(dtype=np.float64).max(axis=1)
    is_right = (call(probabilities) == truth).to_numpy(dtype=np.float64)
    weight = balanced_weight(truth, unit)
    bins = _equal_mass_bins(confidence, weight)
    rng = np.random.default_rng(seed)
    floor = [
        _binned_gap(bins, confidence, rng.random(len(confidence)) < confidence, weight)
        for _ in range(N_DRAWS)
    ]
    return (
        _binned_gap(bins, confidence, is_right, weight),
        float(np.quantile(floor, FLOOR_QUANTILE)),
    )


def reliability(probabilities: pd.DataFrame, truth: pd.Series, unit: pd.Series) -> pd.DataFrame:
    """Return confidence against accuracy per bin, for the calls and for every exposure's column.

    Long table: exposure ("call" is the called one), bin, confidence, accuracy, mass, n_cells.
    """
    truth, unit = _joined(probabilities, truth), _joined(probabilities, unit)
    weight = balanced_weight(truth, unit)
    is_right = (call(probabilities) == truth).to_numpy(dtype=np.float64)
    judged = [("call", probabilities.to_numpy(dtype=np.float64).max(axis=1), is_right)]
    for exposure in probabilities.columns:
        said = probabilities[exposure].to_numpy(dtype=np.float64)
        judged.append((exposure, said, (truth == exposure).to_numpy(dtype=np.float64)))
    tables = []
    for exposure, said, happened in judged:
        bins = _equal_mass_bins(said, weight)
        frame = pd.DataFrame({"bin": bins, "w": weight, "said": said * weight})
        frame["happened"] = happened * weight
        sums = frame.groupby("bin").sum()
        tables.append(
            pd.DataFrame(
                {
                    "exposure": exposure,
                    "bin": sums.index,
                    "confidence": sums["said"] / sums["w"],
                    "accuracy": sums["happened"] / sums["w"],
                    "mass": sums["w"],
                    "n_cells": frame.groupby("bin").size(),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _equal_mass_bins(value: Array, weight: Array) -> Array:
    """Return bin numbers of equal mass; equal values share a bin, so row order cannot matter."""
    _, group = np.unique(value, return_inverse=True)
    mass = np.bincount(group, weights=weight)
    middle = (np.cumsum(mass) - mass / 2) / mass.sum()
    bins: Array = np.minimum((middle * N_BINS).astype(int), N_BINS - 1)[group]
    return bins


def _binned_gap(bins: Array, confidence: Array, is_right: Array, weight: Array) -> float:
    gap = np.bincount(bins, weights=weight * (is_right - confidence), minlength=N_BINS)
    return float(np.abs(gap).sum() / weight.sum())


def _one_versus_rest(
    score: Callable[[Array, Array], float], probabilities: pd.DataFrame, truth: pd.Series
) -> float:
    true = truth.to_numpy(dtype=object)
    scores = [
        float(score(true == exposure, probabilities[exposure].to_numpy()))
        for exposure in sorted(set(true))
        if exposure in probabilities.columns and not (true == exposure).all()
    ]
    return float(np.mean(scores)) if scores else float("nan")


def _at_truth(probabilities: pd.DataFrame, truth: pd.Series) -> Array:
    column = pd.Index(probabilities.columns).get_indexer(pd.Index(truth))
    values = probabilities.to_numpy(dtype=np.float64)
    picked: Array = np.where(column >= 0, values[np.arange(len(values)), column], 0.0)
    return picked


def _joined(probabilities: pd.DataFrame, values: pd.Series) -> pd.Series:
    """Return values in the order of the probabilities' cells, joined by cell id."""
    if not len(probabilities):
        raise Refusal("figures need judged cells", "none", "check the split's held-out part")
    if not values.index.is_unique or not probabilities.index.is_unique:
        raise Refusal("cell ids are unique", "repeated ids", "add the batch to the cell ids")
    absent = probabilities.index.difference(values.index)
    if len(absent):
        raise Refusal(
            "every judged cell has a truth and a unit",
            f"{len(absent)} cells without, the first {absent[0]}",
            "pass both for the same cells",
        )
    return values.loc[probabilities.index].astype(str).astype(object)


# -- two judged tables ------------------------------------------------------------------------
def compare(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    metric: str = "macro_f1",
    by: float = 0.0,
    confidence: float = 0.95,
    unit: str = "unit",
    seed: int = 0,
) -> Comparison:
    """Say whether the first model is better than the second on the same cells, unit by unit.

    Both frames are indexed by cell id with columns `unit`, `truth` and `p_<exposure>` (as
    `judge.Judgement.predictions`). `unit` names the column of independent units: `line`, where
    the claim is about new lines.
    """
    if not first.index.sort_values().equals(second.index.sort_values()):
        raise Refusal(
            "two models are compared on the same cells",
            f"{len(first)} and {len(second)} cells, "
            f"{len(first.index.intersection(second.index))} of them shared",
            "judge both on one split",
        )
    scores = []
    for predictions in (first, second):
        table = by_unit(probabilities_of(predictions), predictions["truth"], predictions[unit])
        scores.append(table[metric])
    return compare_units(
        scores[0], scores[1], metric=metric, by=by, confidence=confidence, seed=seed
    )


def probabilities_of(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the `p_<exposure>` columns of a table of predictions, named by exposure."""
    mine = [str(column) for column in predictions.columns if str(column).startswith("p_")]
    return predictions[mine].rename(columns=lambda column: column.removeprefix("p_"))
