"""How good logits are on cells that were held out of training, whatever the temperature.

Shapes: n cells, E exposures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import f1_score

from endoprint.calibration import fit_temperature

Array = np.ndarray[Any, np.dtype[Any]]


def held_out(logits: Array, truth: Array) -> dict[str, float]:
    """Return the loss at its best temperature and the macro-F1, exposures weighing equally.

    logits (n, E), truth (n,) column numbers; the exposures that are there count, and no cells
    have no figures.
    """
    if not len(truth):
        return {}
    present, n_cells = np.unique(truth, return_counts=True)
    weight = 1.0 / n_cells[np.searchsorted(present, truth)]
    cooled = logits / fit_temperature(logits, truth, weight)
    at_truth = log_softmax(cooled, axis=1)[np.arange(len(logits)), truth]
    loss = -np.average(at_truth, weights=weight)
    f1 = f1_score(truth, logits.argmax(axis=1), labels=present, average="macro", zero_division=0)
    return {"valid_loss": float(loss), "valid_macro_f1": float(f1)}
