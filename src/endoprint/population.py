"""What a whole sample looks exposed to: the honest level, for cells of one dish share its fate.

A sample's evidence is the *mean* log evidence of its cells with a temperature of its own
(judging rule 6); the sum would treat cells as independent and be wildly over-confident.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.special import softmax

from endoprint.config import Refusal
from endoprint.labels import CONTROL, DIRECTIONS, DISRUPTORS, find_control
from endoprint.model import ExposureModel

Array = np.ndarray[Any, np.dtype[Any]]

FEW_CELLS = 20  # fewer say little about a sample, however sure each is (a guess)
UNDECIDED = 0.5  # below, the second call is named too
MOSTLY = 0.5  # share of a sample's cells that must be novel for the sentence to say so

NAMES = {
    "ANDROGEN": "androgen",
    "ARYL_HYD": "aryl hydrocarbon",
    "ESTROGEN": "estrogen",
    "GLUCOCORT": "glucocorticoid",
    "LIVER-X": "liver X",
    "RET": "retinoic acid",
    "THYROID": "thyroid",
}


def sample_calls(
    model: ExposureModel,
    cells: AnnData,
    *,
    by: str = "sample",
    probabilities: pd.DataFrame | None = None,
    novelty: Array | None = None,
    control: str | None = None,
) -> pd.DataFrame:
    """Say what every sample looks exposed to, and how sure that is; one row per sample.

    Index: the values of `obs[by]`, sorted. Columns: unit, n_cells, call, confidence, second_call,
    second_confidence, agreement (share of cells whose own call is the sample's), novel_share
    (cells farther from the training cells than the model's threshold; NaN where the model keeps
    none), is_calibration_unit_validated, sentence, p_<exposure>. `probabilities` (n, E) and
    `novelty` (n,) of the same cells spare computing them again; with both, a model that does not
    weigh populations itself needs no counts. `control`: the label that is no exposure, unless the
    cells or its spelling tell.
    """
    if by not in cells.obs:
        raise Refusal(f"samples are told apart by obs[{by!r}]", "no such column", "name one")
    if probabilities is None:
        probabilities = model.predict_proba(cells)
    own_call = probabilities.idxmax(axis=1).astype(str).to_numpy() if cells.n_obs else np.empty(0)
    distance = model.novelty(cells) if novelty is None else novelty
    sample = cells.obs[by].astype(str).to_numpy()
    unit = cells.obs["unit"].astype(str).to_numpy() if "unit" in cells.obs else sample
    told = control or cells.uns.get("endoprint", {}).get("control")
    control = told or find_control(model.exposures)
    is_control = np.zeros(cells.n_obs, dtype=bool)
    if "exposure" in cells.obs:
        is_control = (cells.obs["exposure"].astype(str) == control).to_numpy()
    is_pooled = type(model).population_evidence is ExposureModel.population_evidence
    rows = {}
    for name in sorted(set(sample)):
        inside = sample == name
        # its own unit's vehicle; a sample that is itself the vehicle has no other to be held to
        beside = (unit == unit[inside][0]) & is_control & ~inside
        if is_pooled:
            weighed = _pooled(model, probabilities[inside])
        else:
            own = cells[beside] if beside.any() else None
            weighed = model.population_proba(cells[inside], control=own)
        first, second = (str(exposure) for exposure in weighed.nlargest(2).index)
        row: dict[str, Any] = {
            "unit": str(unit[inside][0]),
            "n_cells": int(inside.sum()),
            "call": first,
            "confidence": float(weighed[first]),
            "second_call": second,
            "second_confidence": float(weighed[second]),
            "agreement": float((own_call[inside] == first).mean()),
            "novel_share": _novel_share(distance[inside], model.novelty_threshold),
            "is_calibration_unit_validated": bool(
                model.provenance.get("is_calibration_unit_validated", False)
            ),
        }
        row["sentence"] = sentence(name, row, control=control)
        rows[name] = row | {f"p_{exposure}": float(p) for exposure, p in weighed.items()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = by
    return table


def _pooled(model: ExposureModel, probabilities: pd.DataFrame) -> pd.Series:
    """Return the model's own `population_proba` (E,) from its cells' probabilities (n, E).

    Evidence is their logarithm times the temperature, up to a constant per cell, which the
    soft-max forgets: the cells need not be weighed a second time.
    """
    said = probabilities.to_numpy()
    # stored scores are coarser than fresh ones: what they round to zero was no smaller than this
    floor = float(np.finfo(said.dtype).tiny)
    mean = (
        np.log(np.maximum(said.astype(np.float64), floor)).mean(axis=0)
        * model.temperature
        / model.population_temperature
    )
    return pd.Series(softmax(mean), index=model.exposures)


def sentence(sample: str, row: Mapping[str, Any], *, control: str | None = None) -> str:
    """Say one sample's call in plain words, with the doubt that the design leaves.

    `row`: as in the table of `sample_calls`; `control`: the label that is no exposure.
    """
    head = f"Sample {sample} ({row['n_cells']} {'cell' if row['n_cells'] == 1 else 'cells'})"
    if row["confidence"] < UNDECIDED:
        said = (
            f"is undecided between {row['call']} ({_share(row['confidence'])}) "
            f"and {row['second_call']} ({_share(row['second_confidence'])})"
        )
    else:
        words = described(row["call"])
        said = f"looks exposed to {row['call']}{f' ({words})' if words else ''}"
        if row["call"] in (control, CONTROL):
            said = f"looks like the control ({row['call']})"
        said += f": confidence {_share(row['confidence'])}"
    doubts = []
    if row["novel_share"] > MOSTLY:
        doubts.append(f"{row['novel_share']:.0%} of its cells are unlike any training cell")
    if row["n_cells"] < FEW_CELLS:
        doubts.append("too few cells to lean on")
    if not row["is_calibration_unit_validated"]:
        doubts.append("calibration not unit-validated")
    return "; ".join([f"{head} {said}", *doubts])


def described(exposure: str) -> str:
    """Return what a canonical label means in words; empty for a label of the user's own."""
    if exposure in DISRUPTORS:
        return "endocrine disruptor"
    for stem, pathway in NAMES.items():
        for direction in DIRECTIONS:
            if exposure == f"{stem}_{direction}":
                return f"{pathway} pathway, {direction.lower()}"
    return ""


def _novel_share(distance: Array, threshold: float) -> float:
    if np.isnan(distance).any() or not np.isfinite(threshold):
        return float("nan")
    return float((distance > threshold).mean())


def _share(value: float) -> str:
    """Write a probability as a reader takes it: .93, never a false 1.00."""
    if value > 0.99:
        return "> .99"
    return f"{value:.2f}".removeprefix("0")
