"""Whether new cells look like those a model was fitted for: what they were like, and how far off.

The reference is a few quantiles of each quantity, kept with the model. How far is too far is what
the reference's own units show: the farthest of them from all together. Only where no two units can
be held apart is it a rule of thumb.
n cells, Q quantiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

Array = np.ndarray[Any, np.dtype[Any]]

QUANTITIES = {  # column of scores -> what it tells in words
    "n_counts": "counts per cell",
    "n_genes": "genes detected per cell",
    "known_share": "share of counts in the model's genes",
    "confidence": "confidence of the calls",
    "novelty": "distance to the training cells",
}
GRID = np.linspace(0.0, 1.0, 101)  # a distance between distributions is known to one in a hundred
BINS = 10  # of the stability index, by the reference's deciles (Siddiqi 2006)
LEAST_SHARE = 1e-4  # of cells in a bin: the index is infinite at none
RULE_OF_THUMB = 0.25  # stability index above which a distribution counts as moved (Siddiqi 2006)
FEWEST_CELLS = 20  # of a unit; fewer say little about how units differ (a guess)


def reference(cells: pd.DataFrame, unit: Array) -> dict[str, Any]:
    """Return what new cells will be held against, in plain values.

    `cells`: one row per cell, columns of QUANTITIES; `unit` (n,). A quantity nobody knows is left
    out. Per quantity: `quantiles` (Q,), and `usual_ks`, `usual_psi`: the farthest unit's; None of
    fewer than two units, for one alone lies at no distance from itself.
    """
    told: dict[str, Any] = {}
    for name in QUANTITIES:
        if name not in cells:
            continue
        known = np.isfinite(cells[name].to_numpy(dtype=np.float64))
        values, of = cells[name].to_numpy(dtype=np.float64)[known], unit[known]
        if not len(values):
            continue
        quantiles = np.quantile(values, GRID)
        apart = [
            (ks(quantiles, values[of == each]), psi(quantiles, values[of == each]))
            for each in sorted(set(of))
            if (of == each).sum() >= FEWEST_CELLS
        ]
        is_told = len(apart) > 1
        told[name] = {
            "quantiles": [float(value) for value in quantiles],
            "usual_ks": max(each[0] for each in apart) if is_told else None,
            "usual_psi": max(each[1] for each in apart) if is_told else None,
        }
    return told


def ks(quantiles: Array, values: Array) -> float:
    """Return the largest gap between two distributions' cumulative shares (Kolmogorov-Smirnov).

    `quantiles` (Q,) of the reference at GRID, `values` (n,) of the new cells. Known to 1 / Q.
    """
    values = np.sort(values)
    points, first = np.unique(quantiles, return_index=True)
    last = len(quantiles) - 1 - np.unique(quantiles[::-1], return_index=True)[1]
    # a value that many reference cells share is a step: both of its sides are compared
    below = np.abs(np.searchsorted(values, points, side="left") / len(values) - GRID[first])
    upto = np.abs(np.searchsorted(values, points, side="right") / len(values) - GRID[last])
    # the reference's least value is no step from 0 if few cells have it, its greatest none to 1
    below[0] = np.searchsorted(values, points[0], side="left") / len(values)
    upto[-1] = 1 - np.searchsorted(values, points[-1], side="right") / len(values)
    return float(max(below.max(), upto.max()))


def psi(quantiles: Array, values: Array) -> float:
    """Return the population stability index: shares by the reference's deciles (Siddiqi 2006).

    The sum over bins of (new - old) x log(new / old); 0 where nothing moved.
    """
    edges = np.unique(np.quantile(quantiles, np.linspace(0, 1, BINS + 1))[1:-1])
    # what the quantiles themselves put into each bin: ties make bins unequal
    old = np.bincount(np.searchsorted(edges, quantiles), minlength=len(edges) + 1) / len(quantiles)
    new = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1) / len(values)
    old, new = np.maximum(old, LEAST_SHARE), np.maximum(new, LEAST_SHARE)
    return float(((new - old) * np.log(new / old)).sum())


def compare(known: Mapping[str, Any], scores: pd.DataFrame) -> pd.DataFrame:
    """Hold new cells against a model's reference; one row per quantity.

    `known`: as `reference` returned; `scores`: columns of QUANTITIES, NaN where unknown. Columns
    ks, usual_ks, psi, usual_psi, median, usual_median, has_drifted (farther than any of the
    reference's units in both measures; by the rule of thumb where those were too few to tell).
    """
    rows = {}
    for name, told in known.items():
        values = scores[name].to_numpy(dtype=np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        quantiles = np.asarray(told["quantiles"])
        row = {
            "ks": ks(quantiles, values),
            "usual_ks": told["usual_ks"],
            "psi": psi(quantiles, values),
            "usual_psi": told["usual_psi"],
            "median": float(np.median(values)),
            "usual_median": float(np.median(quantiles)),
        }
        row["has_drifted"] = bool(
            row["psi"] > RULE_OF_THUMB
            if told["usual_ks"] is None
            else row["ks"] > told["usual_ks"] and row["psi"] > told["usual_psi"]
        )
        rows[name] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "quantity"
    return table


def sentences(table: pd.DataFrame) -> list[str]:
    """Say in plain words which quantities lie farther off than any unit of the reference did."""
    said = []
    for name, row in table[table["has_drifted"].astype(bool)].iterrows() if len(table) else []:
        told = (
            f"median {row['median']:.3g} against {row['usual_median']:.3g} (KS {row['ks']:.2f}, "
            f"PSI {row['psi']:.2f}"
        )
        said.append(
            f"Drift in {QUANTITIES[str(name)]}: {told}; above {RULE_OF_THUMB} by a rule of thumb, "
            "for the reference has too few units to show how far they usually differ)"
            if pd.isna(row["usual_ks"])
            else f"Drift in {QUANTITIES[str(name)]}, farther off than any unit of the reference: "
            f"{told}; usual up to {row['usual_ks']:.2f} and {row['usual_psi']:.2f})"
        )
    return said
