"""Does a loaded model answer at all? Asked before anything relies on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from endoprint.config import Refusal
from endoprint.model import ExposureModel, Predictor, load

SMOKE_CELLS = 16
UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def opened(folder: Path, label: str) -> ExposureModel:
    """Load a checked model and let it answer for a few made-up cells; refuse one that cannot."""
    try:
        model = load(folder)
        said, is_sound = _answer(model)
    except Refusal:
        raise
    except UNFIT as error:
        said, is_sound = f"{type(error).__name__}: {error}"[:200], False
    if not is_sound:
        raise Refusal(
            "a saved model loads and answers with probabilities",
            f"{label}: {said}",
            "train it again, or name another version",
        )
    return model


def _answer(model: ExposureModel) -> tuple[str, bool]:
    counts = np.random.default_rng(0).poisson(2.0, (SMOKE_CELLS, len(model.genes)))
    cells = pd.DataFrame(counts, columns=model.genes, dtype=np.float32)
    cells.index = pd.Index([f"cell{i}" for i in range(SMOKE_CELLS)])
    rows = Predictor(model).predict(cells).to_numpy().sum(axis=1)
    return f"rows that sum to {rows.min():g} to {rows.max():g}", bool(np.allclose(rows, 1.0))
