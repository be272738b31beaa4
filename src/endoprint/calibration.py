"""How sure a model may say it is: one temperature, and the confidence below which it is silent.

Both are fitted on validation units. Shapes: n cells, E exposures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression, minimize_scalar
from scipy.special import log_softmax

Array = np.ndarray[Any, np.dtype[Any]]

RIGHT_AS_OFTEN_AS_WRONG = 0.5


def fit_temperature(evidence: Array, truth: Array, weight: Array) -> float:
    """Return the temperature that makes the true exposures most likely (Guo 2017, 1706.04599).

    evidence (n, E), truth (n,) column numbers, weight (n,). Searched on [0.005, 50]. Half an
    observation is taken to have gone wrong (Platt 1999 smooths likewise): where every one is right
    the likelihood alone would ask for certainty.
    """
    n, n_exposures = evidence.shape
    wrong = 0.5 / (n + 1)

    def loss(log_temperature: float) -> float:
        log_p = log_softmax(evidence / np.exp(log_temperature), axis=1)
        at_truth = log_p[np.arange(n), truth]
        elsewhere = (log_p.sum(axis=1) - at_truth) / (n_exposures - 1)
        return float(np.average(-(1 - wrong) * at_truth - wrong * elsewhere, weights=weight))

    found = minimize_scalar(loss, bounds=(np.log(0.005), np.log(50.0)), method="bounded")
    return float(np.exp(found.x))


def abstention_threshold(confidence: Array, is_right: Array, weight: Array) -> float:
    """Return the confidence below which a call is more often wrong than right.

    confidence (n,), is_right (n,), weight (n,): validation cells, whose units should weigh
    equally. How often calls of one confidence are right is fitted to rise with it (isotonic
    regression, Barlow 1972). 0: calls of any confidence are right often enough; infinite: of none.
    """
    if not len(confidence):
        return 0.0
    level, which = np.unique(confidence, return_inverse=True)
    total = np.bincount(which, weights=weight)
    share = np.bincount(which, weights=weight * is_right) / total
    often = isotonic_regression(share, weights=total).x >= RIGHT_AS_OFTEN_AS_WRONG
    if often.all():
        return 0.0
    return float(level[often].min()) if often.any() else float("inf")
