"""Does a loaded model answer at all? Asked before anything relies on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from endoprint.config import Refusal
from endoprint.curated import as_cells
from endoprint.model import ExposureModel, Predictor, load
from endoprint.passing import is_passing

SMOKE_CELLS = 4
SMOKE_GENES = 500  # with counts, per cell: what an encoder takes grows with them


def opened(folder: Path, label: str) -> ExposureModel:
    """Load a checked model and let it answer for a few made-up cells; refuse one that cannot."""
    try:
        model = load(folder)
        said, is_sound = _answer(model)
    except Refusal:
        raise
    except Exception as error:
        if is_passing(error):  # a disk that is away is no fault of the model
            raise
        said, is_sound = f"{type(error).__name__}: {error}"[:200], False
    if not is_sound:
        raise Refusal(
            "a saved model loads and answers with probabilities",
            f"{label}: {said}",
            "train it again, or name another version",
        )
    return model


def _answer(model: ExposureModel) -> tuple[str, bool]:
    """Return what the model says of made-up cells, in words, and whether scoring can use it."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (SMOKE_CELLS, len(model.genes))) + 1
    counts[rng.random(counts.shape) * len(model.genes) > SMOKE_GENES] = 0
    cells = pd.DataFrame(counts, columns=model.genes, dtype=np.float32)
    cells.index = pd.Index([f"cell{i}" for i in range(SMOKE_CELLS)])
    rows = Predictor(model).predict(cells).to_numpy().sum(axis=1)
    if not np.allclose(rows, 1.0):
        return f"rows that sum to {rows.min():g} to {rows.max():g}", False
    distance = model.novelty(as_cells(cells, model.genes))
    is_told = np.isfinite(model.novelty_threshold)  # else it never learned what is novel
    if is_told and not np.isfinite(distance).all():
        return "novelty that is no number", False
    model.provenance["is_calibration_unit_validated"]  # every report of scores says so
    thresholds = (model.novelty_threshold, model.abstention_threshold)
    is_set = all(each > 0 for each in (model.temperature, model.population_temperature))
    return "temperatures or thresholds below nought", is_set and all(x >= 0 for x in thresholds)
