"""Balanced multinomial logistic regression: the one linear solver that models and controls share.

Exposures weigh equally whatever their number of cells, so the answer is free of the prior.
n cells, G inputs, E exposures, K groups of cells.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

Array = np.ndarray[Any, np.dtype[Any]]

TOLERANCE = 1e-4  # of the solver's gradient; looser moved no call, tighter only cost time
MAX_ITERATIONS = 500


class Fitted(NamedTuple):
    """One fit: evidence is `values @ coefficients.T + intercept`."""

    penalty: float
    coefficients: Array  # (E, G) float64; of groups (K, E, G)
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


def fit_grouped(
    values: sparse.csr_matrix, mean: Array, group: Array, truth: Array, penalties: Sequence[float]
) -> Iterator[Fitted]:
    """Fit weights for every group of cells that the same L2 penalty holds to common ones.

    What `fit_balanced` finds on inputs that are centred in their group (`mean` (K, G), `group`
    (n,)) and stand twice, once for all and once for their group alone (Evgeniou & Pontil 2004,
    KDD, p. 109); neither the centred nor the repeated inputs are ever laid out. Coefficients are
    common and own ones added up.
    """
    n_groups, n_inputs = mean.shape
    n_exposures = int(truth.max()) + 1
    weight = 1.0 / (n_exposures * np.bincount(truth)[truth])
    rows = [np.flatnonzero(group == k) for k in range(n_groups)]
    parts = [values[at] for at in rows]
    turned = [sparse.csr_matrix(part.T) for part in parts]
    wanted = np.eye(n_exposures)[truth]

    def cost(flat: Array, penalty: float) -> tuple[float, Array]:
        blocks = flat[:-n_exposures].reshape(1 + n_groups, n_exposures, n_inputs)
        slope, pull_of_intercept = np.zeros_like(blocks), np.zeros(n_exposures)
        lost = 0.5 * penalty * float(flat[:-n_exposures] @ flat[:-n_exposures])
        for k, at in enumerate(rows):
            wide = blocks[0] + blocks[1 + k]
            offset = flat[-n_exposures:] - wide @ mean[k]
            said = log_softmax(parts[k] @ wide.T.astype(values.dtype) + offset, axis=1)
            lost -= float(weight[at] @ (said * wanted[at]).sum(axis=1))
            off = (np.exp(said) - wanted[at]) * weight[at, None]
            total = off.sum(axis=0)
            slope[1 + k] = (turned[k] @ off.astype(values.dtype)).T - np.outer(total, mean[k])
            pull_of_intercept += total
        slope[0] = slope[1:].sum(axis=0)
        return lost, np.append((slope + penalty * blocks).ravel(), pull_of_intercept)

    start = np.zeros((1 + n_groups) * n_exposures * n_inputs + n_exposures)
    one_row = 2 if n_exposures == 2 else 1  # `fit_balanced` gives two exposures one row of weights
    for penalty in penalties:
        done = minimize(
            cost, start, (one_row * penalty,), method="L-BFGS-B", jac=True,
            options={"maxiter": MAX_ITERATIONS, "gtol": TOLERANCE, "ftol": 0.0},
        )  # fmt: skip
        start = done.x
        blocks = start[:-n_exposures].reshape(1 + n_groups, n_exposures, n_inputs)
        yield Fitted(
            penalty, blocks[:1] + blocks[1:], start[-n_exposures:], done.nit < MAX_ITERATIONS
        )
