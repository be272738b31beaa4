"""Balanced logistic regression under an elastic net: most genes are left with no say at all.

Solved by accelerated proximal gradient steps with restarts (FISTA: Beck & Teboulle 2009, SIAM J.
Imaging Sci. 2:183; O'Donoghue & Candes 2015, arXiv 1204.3982). n cells, G inputs, E exposures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import softmax

from endoprint.linear import Fitted

Array = np.ndarray[Any, np.dtype[Any]]

TOLERANCE = 1e-4  # of the gradient, beyond what the penalty holds; as in `linear`
MAX_ITERATIONS = 500
POWER_STEPS = 20  # to bound the curvature from
MARGIN = 1.1  # on that bound, which so few steps meet from below


def fit_elastic(
    values: Array | sparse.csr_matrix, truth: Array, penalties: Sequence[float], l1_share: float
) -> Iterator[Fitted]:
    """Fit under each penalty in turn, each starting from the last: give strong ones first.

    values (n, G), best centred; truth (n,) column numbers 0..E-1, all present. A penalty is per
    cell, as in `linear.fit_balanced`: `l1_share` of it on absolute values, the rest on squares.
    """
    n_exposures = int(truth.max()) + 1
    weight = 1.0 / (n_exposures * np.bincount(truth)[truth])
    wanted = np.eye(n_exposures)[truth]
    step = 1.0 / (MARGIN * _curvature(values, weight))
    slope = np.zeros((n_exposures, values.shape[1]))
    intercept = np.zeros(n_exposures)
    for penalty in penalties:
        ahead, ahead_intercept, pace = slope, intercept, 1.0
        has_converged = False
        for _ in range(MAX_ITERATIONS):
            scores = values @ ahead.T.astype(values.dtype) + ahead_intercept
            off = (softmax(scores, axis=1) - wanted) * weight[:, None]
            pull = np.asarray(values.T @ off.astype(values.dtype)).T
            stepped = ahead - step * pull
            # what absolute values take, then what squares take
            stepped = np.sign(stepped) * np.maximum(np.abs(stepped) - step * penalty * l1_share, 0)
            stepped /= 1.0 + step * penalty * (1.0 - l1_share)
            stepped_intercept = ahead_intercept - step * off.sum(axis=0)
            still = max(np.abs(ahead - stepped).max(), np.abs(off.sum(axis=0)).max() * step)
            move = stepped - slope
            is_uphill = ((ahead - stepped) * move).sum() > 0
            faster = 1.0 if is_uphill else (1.0 + np.sqrt(1.0 + 4.0 * pace**2)) / 2.0
            carry = 0.0 if is_uphill else (pace - 1.0) / faster
            ahead = stepped + carry * move
            ahead_intercept = stepped_intercept + carry * (stepped_intercept - intercept)
            slope, intercept, pace = stepped, stepped_intercept, faster
            if still <= TOLERANCE * step:
                has_converged = True
                break
        yield Fitted(penalty, slope.copy(), intercept.copy(), has_converged)


def _curvature(values: Array | sparse.csr_matrix, weight: Array) -> float:
    """Return the largest curvature of the loss: half that of the weighted squares (Bohning 1992).

    The intercept counts as one more input that is always 1.
    """
    axis = np.full(values.shape[1] + 1, 1.0 / np.sqrt(values.shape[1] + 1))
    power = 0.0
    for _ in range(POWER_STEPS):
        along = weight * (values @ axis[:-1].astype(values.dtype) + axis[-1])
        turned = np.append(values.T @ along.astype(values.dtype), along.sum())
        power = float(np.linalg.norm(turned))
        axis = turned / power
    return 0.5 * power
