"""Where a model is right and where it is not: by exposure, pathway, direction, cell type and unit.

A pathway's cells are those of its agonist and its antagonist; called either, they count as right.
Directions are asked the same way across pathways. n cells.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from endoprint import metrics
from endoprint.labels import DIRECTIONS

COLUMNS = ["by", "group", "n_cells", "n_units", "f1", "recall", "auroc", "pr_auc", "worst_unit"]


def breakdown(predictions: pd.DataFrame, *, unit: str = "unit") -> pd.DataFrame:
    """Return one row per group, a long table with the columns `COLUMNS`.

    predictions: as `judge.Judgement.predictions`. `f1`, `recall`, `auroc` and `pr_auc` are the
    group's own against all else; for cell types and units, whose cells hold every exposure, macro
    averages over exposures. `worst_unit`: the lowest F1 of the group in any one unit.
    """
    probabilities = metrics.probabilities_of(predictions)
    truth, units = predictions["truth"].astype(str), predictions[unit].astype(str)
    tables = []
    for by, name in (("exposure", str), ("pathway", pathway), ("direction", direction)):
        tables.append(_by_label(by, name, probabilities, truth, units))
    for by in ("cell_type", unit):
        if by in predictions and predictions[by].notna().any():
            tables.append(_by_part(by, predictions[by].astype(str), probabilities, truth, units))
    return pd.concat([table for table in tables if len(table)], ignore_index=True)


def pathway(exposure: str) -> str:
    """Return the pathway of an exposure; of a label that names none, itself."""
    stem, _, way = exposure.rpartition("_")
    return stem if stem and way in DIRECTIONS else exposure


def direction(exposure: str) -> str:
    """Return AGONIST or ANTAGONIST; of a label that names neither, itself."""
    way = exposure.rpartition("_")[2]
    return way if way in DIRECTIONS else exposure


def _by_label(
    by: str,
    name: Callable[[str], str],
    probabilities: pd.DataFrame,
    truth: pd.Series,
    units: pd.Series,
) -> pd.DataFrame:
    """Judge answers after exposures were lumped together by name."""
    names = [name(str(column)) for column in probabilities.columns]
    if by != "exposure" and names == [str(column) for column in probabilities.columns]:
        return pd.DataFrame(columns=COLUMNS)  # no label names one: the exposures said it already
    lumped = probabilities.T.groupby(np.array(names)).sum().T
    true = truth.map(name)
    calls = metrics.call(lumped)
    rows = []
    for group in sorted(set(true)):
        inside = (true == group).to_numpy()
        known, is_alone = group in lumped.columns, bool(inside.all())
        binary = true.where(inside, "else"), calls.where((calls == group).to_numpy(), "else")
        by_unit = [
            float(metrics.f1_by_exposure(binary[0][of], binary[1][of])[group])
            for of in ((units == each).to_numpy() for each in sorted(set(units[inside])))
        ]
        one = pd.DataFrame({group: lumped[group]}) if known and not is_alone else None
        rows.append(
            {
                "by": by,
                "group": group,
                "n_cells": int(inside.sum()),
                "n_units": int(units[inside].nunique()),
                "f1": float(metrics.f1_by_exposure(*binary)[group]),
                "recall": float((calls[inside] == group).mean()),
                "auroc": np.nan if one is None else metrics.auroc_macro(one, binary[0]),
                "pr_auc": np.nan if one is None else metrics.pr_auc_macro(one, binary[0]),
                "worst_unit": min(by_unit),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def _by_part(
    by: str, part: pd.Series, probabilities: pd.DataFrame, truth: pd.Series, units: pd.Series
) -> pd.DataFrame:
    """Judge the cells of one type, or of one unit, by themselves."""
    rows = []
    for group in sorted(set(part) - {""}):
        inside = (part == group).to_numpy()
        said, true, calls = (
            probabilities[inside],
            truth[inside],
            metrics.call(probabilities)[inside],
        )
        worst = metrics.by_unit(said, true, units[inside])["macro_f1"].min()
        rows.append(
            {
                "by": by,
                "group": group,
                "n_cells": int(inside.sum()),
                "n_units": int(units[inside].nunique()),
                "f1": float(metrics.f1_by_exposure(true, calls).mean()),
                "recall": float(metrics.recall_by_exposure(true, calls).mean()),
                "auroc": metrics.auroc_macro(said, true),
                "pr_auc": metrics.pr_auc_macro(said, true),
                "worst_unit": float(worst),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)
