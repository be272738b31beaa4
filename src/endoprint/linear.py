"""Balanced multinomial logistic regression: the one linear solver that models and controls share.

Exposures weigh equally whatever their number of cells, so the answer is free of the prior.
n cells, G inputs, E exposures.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

Array = np.ndarray[Any, np.dtype[Any]]

TOLERANCE = 1e-4  # of the solver's gradient; looser moved no call, tighter only cost time
MAX_ITERATIONS = 500


class Fitted(NamedTuple):
    """One fit: evidence is `values @ coefficients.T + intercept`."""

    penalty: float
    coefficients: Array  # (E, G) float64
    intercept: Array  # (E,) float64
    has_converged: bool


def fit_balanced(
    values: Array | sparse.csr_matrix, truth: Array, penalties: Sequence[float]
) -> Iterator[Fitted]:
    """Fit under each L2 penalty in turn, each starting from the last: give strong ones first.

    values (n, G), truth (n,) column numbers 0..E-1, all present. A penalty is per cell, so it
    means the same for few cells and many.
    """
    solver = LogisticRegression(
        class_weight="balanced", warm_start=True, tol=TOLERANCE, max_iter=MAX_ITERATIONS
    )
    for penalty in penalties:
        solver.set_params(C=1.0 / (penalty * len(truth)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # returned instead
            solver.fit(values, truth)
        slope = np.array(solver.coef_, dtype=np.float64)
        intercept = np.array(solver.intercept_, dtype=np.float64)
        if len(slope) == 1:  # two exposures share one row: the log odds of the second
            slope = np.vstack([-slope / 2, slope / 2])
            intercept = np.concatenate([-intercept / 2, intercept / 2])
        has_converged = bool((solver.n_iter_ < MAX_ITERATIONS).all())
        yield Fitted(penalty, slope, intercept, has_converged)
