"""Would an exposure that nobody named be noticed? Each in turn is kept from a model, then shown.

A fresh model is fitted without one exposure; held-out cells of that exposure should lie further
from what it was shown than held-out cells of the others do (judging rule 11).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.metrics import roc_auc_score

from endoprint.config import Refusal
from endoprint.judge import Build

if TYPE_CHECKING:
    from endoprint.design import Split

COLUMNS = ["novelty_auroc", "separability_auroc", "found_rate", "false_novel_rate", "n_cells"]


def left_out(
    build: Build,
    cells: AnnData,
    split: Split,
    *,
    control: str,
    folds: Sequence[int] = (0,),
    told: Callable[[int, int], None] = lambda done, total: None,
) -> pd.DataFrame:
    """Return one row per exposure but control, each left out of every fit in turn.

    `novelty_auroc`: its held-out cells against those of all others, by novelty.
    `separability_auroc`: the same cells against control's, by a model that knows it: what cannot
    be told from control when known cannot be noticed when unknown. `found_rate` and
    `false_novel_rate`: share of its, and of the others', cells beyond the model's own threshold.
    Over the held-out units of `folds`.
    """
    exposures = sorted(set(cells.obs["exposure"].astype(str)) - {control})
    if len(exposures) < 2:
        raise Refusal(
            "leaving one exposure out leaves two to learn, control among them",
            ", ".join(exposures) or "none",
            "novelty is asked of three exposures or more",
        )
    found: dict[str, list[dict[str, Any]]] = {exposure: [] for exposure in exposures}
    total = len(folds) * (len(exposures) + 1)
    done = 0
    for fold in folds:
        parts = split.parts(cells.obs, fold)
        held_out = cells[parts.held_out].copy()
        truth = held_out.obs["exposure"].astype(str).to_numpy()
        told(done, total)
        knowing = build().fit(cells[parts.train].copy(), cells[parts.valid].copy())
        said = knowing.predict_proba(held_out)
        done += 1
        for exposure in exposures:
            told(done, total)
            done += 1
            is_it = truth == exposure
            if not is_it.any() or exposure not in said:
                continue
            train, valid = (
                cells[rows[(cells.obs["exposure"].iloc[rows].astype(str) != exposure).to_numpy()]]
                for rows in (parts.train, parts.valid)
            )
            blind = build().fit(train.copy(), valid.copy())
            distance = blind.novelty(held_out)
            beside = is_it | (truth == control)
            odds = np.log(said[exposure] + 1e-12) - np.log(said[control] + 1e-12)
            is_novel = distance > blind.novelty_threshold
            found[exposure].append(
                {
                    "novelty_auroc": _auroc(is_it, distance),
                    "separability_auroc": _auroc(is_it[beside], odds.to_numpy()[beside]),
                    "found_rate": float(is_novel[is_it].mean()),
                    "false_novel_rate": float(is_novel[~is_it].mean()),
                    "n_cells": int(is_it.sum()),
                }
            )
    told(total, total)
    rows = {}
    for exposure, each in found.items():
        if each:
            table = pd.DataFrame(each)
            rows[exposure] = {**table.mean().to_dict(), "n_cells": int(table["n_cells"].sum())}
    made = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)
    made.index.name = "exposure"
    return made


def _auroc(is_it: np.ndarray[Any, Any], value: np.ndarray[Any, Any]) -> float:
    if not 0 < is_it.sum() < len(is_it) or np.isnan(value).any():
        return float("nan")
    return float(roc_auc_score(is_it, value))
