"""On which known exposures an unknown one projects: how much of each, and how much of neither.

The log fold change that a sample shows against its own unit's control is written as a sum of the
references' log fold changes with weights >= 0 (Lawson & Hanson 1974), the references' units never
being the sample's own (judging rule 10). Reference profiles are noisy, and noise in what one
projects on pulls every weight towards zero; products of two *different* units' profiles carry no
such noise, so the references' own products are taken between units only. What noise remains, the
sample's own and the references', enters as a ridge (Hoerl & Kennard 1970): where effects drown,
weights shrink instead of running away.

What a projection does not say: that a compound acts through a receptor. It says whose transcripts
its own resemble. Where exposure and run are one, it compares runs with runs.

G genes, T cell types (one, where they are not told), U reference units, E exposures but control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.optimize import nnls

from endoprint.config import Refusal
from endoprint.curated import matrix
from endoprint.profiles import (
    FEWEST_CELLS,
    References,
    between_units,
    centred,
    kinds_of,
    logged,
    met_by,
    products_of,
    references,
)

Array = np.ndarray[Any, np.dtype[Any]]

DRAWS = 200  # bootstrap samples of cells and reference units behind an interval
INTERVAL = (0.025, 0.975)
SPLITS = 8  # into halves, averaged: one alone is noisy
NO_NULL = "no null"
USUAL_WEIGHT = 0.5  # spread of weights expected beforehand; matters where noise is large (a guess)
# eigenvalues below so many times their scatter are noise; 2 is the law's edge, 6 was steadier on
# simulated cells (seeds 20 and 41 to 44; 4 let weights run high, 8 shrank true ones)
EDGE = 6.0
STEADY = 1e-6  # of the largest eigenvalue: what is smaller counts as this


# -- what is projected --------------------------------------------------------------------------
def projected(
    labelled: AnnData,
    cells: AnnData,
    *,
    control: str,
    is_control: Array,
    by: str = "sample",
    n_draws: int = DRAWS,
    seed: int = 0,
) -> Projection:
    """Project the samples of a file on the exposures of labelled cells: `references`, `project`.

    Cell types are told apart where both tell them by the same names.
    """
    types = [
        set(each.obs["cell_type"].astype(str)) if "cell_type" in each.obs else set()
        for each in (labelled, cells)
    ]
    if not types[1] or not types[1] <= types[0]:
        obs = labelled.obs.drop(columns="cell_type", errors="ignore")
        labelled = AnnData(X=labelled.X, obs=obs, var=labelled.var[[]])
    known = references(labelled, control=control)
    return project(known, cells, is_control=is_control, by=by, n_draws=n_draws, seed=seed)


@dataclass(frozen=True)
class Projection:
    """What the samples of one scoring resemble. Index of every table: samples.

    `weights`, `low`, `high`: one column per group of references; 1 is the references' own
    strength, and weights need not sum to one. `low` and `high`: a 95 % bootstrap over the
    sample's and its control's cells and over reference units; it says nothing of other cultures.
    `null`: the largest weight that any control sample had against the other control samples of
    its unit, per group; None: no unit had two. `samples`: unit, n_cells, n_control_cells,
    residual_share (of the sample's squared change, what no reference explains; its own noise
    taken out; NaN where noise is all), is_null, sentence. `left_out`: sample -> why.
    """

    weights: pd.DataFrame
    low: pd.DataFrame
    high: pd.DataFrame
    null: pd.Series | None
    samples: pd.DataFrame
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold, one entry per sample."""
        rows: dict[Any, dict[Any, Any]] = self.samples.to_dict(orient="index")
        tables = {"weight": self.weights, "low": self.low, "high": self.high}
        bounds: dict[str, dict[Any, dict[Any, Any]]] = {
            key: table.to_dict(orient="index") for key, table in tables.items()
        }
        samples = {
            str(name): {
                **row,
                "residual_share": None
                if np.isnan(row["residual_share"])
                else row["residual_share"],
                "weights": {
                    group: {key: float(table[name][group]) for key, table in bounds.items()}
                    for group in map(str, self.weights.columns)
                },
            }
            for name, row in rows.items()
        }
        null = NO_NULL if self.null is None else {str(k): float(v) for k, v in self.null.items()}
        return {"samples": samples, "null": null, "left_out": dict(self.left_out)}


def project(
    known: References,
    cells: AnnData,
    *,
    is_control: Array,
    by: str = "sample",
    n_draws: int = DRAWS,
    seed: int = 0,
) -> Projection:
    """Project every sample on the references, against the control cells of its own unit.

    cells: curated counts with `obs[by]`, `unit` and, where known, `cell_type`; genes that the
    references lack are ignored. `is_control` (n,): which cells met the vehicle only. Control
    samples of a unit that has several are projected too: their weights are the null.
    """
    for column in (by, "unit"):
        if column not in cells.obs:
            raise Refusal(
                f"a projection tells samples by obs[{column!r}]",
                "no such column",
                "name the key in params.yaml",
            )
    lacking = sorted(set(known.genes) - set(map(str, cells.var_names)))
    if len(lacking) == len(known.genes):
        raise Refusal(
            "a projection needs genes of the references", "none measured", "map the gene ids"
        )
    # by id, so that the file's order reaches no draw
    order = np.argsort(cells.obs_names.to_numpy(dtype=str), kind="stable")
    cells = cells[order]
    is_control = np.asarray(is_control, dtype=bool)[order]
    told = _Known(known, lacking)
    kind = kinds_of(cells, known.cell_types)
    counts = matrix(cells, known.genes)
    sample, unit = (cells.obs[name].astype(str).to_numpy() for name in (by, "unit"))
    rows: dict[str, dict[str, Any]] = {}
    found: dict[str, tuple[Array, Array, Array]] = {}
    left_out: dict[str, str] = {}
    for name in sorted(set(sample)):
        inside = sample == name
        own = str(unit[inside][0])
        is_null = bool(is_control[inside].all())
        if not is_null:
            inside &= ~is_control
        beside = (unit == own) & is_control & ~inside
        if is_null and not beside.any():
            continue  # the only control of its unit is what others are held against
        if min(inside.sum(), beside.sum()) < FEWEST_CELLS:
            left_out[name] = (
                f"{inside.sum()} cells, and {beside.sum()} control cells of unit {own}: a profile "
                f"needs {FEWEST_CELLS} of each"
            )
            continue
        rng = np.random.default_rng([seed, crc32(name.encode())])
        weights, residual, bounds = told.fit(counts, kind, inside, beside, own, n_draws, rng)
        found[name] = (weights, bounds[0], bounds[1])
        rows[name] = {
            "unit": own,
            "n_cells": int(inside.sum()),
            "n_control_cells": int(beside.sum()),
            "residual_share": residual,
            "is_null": is_null,
        }
    empty = np.empty((0, len(known.names)))
    tables = [
        pd.DataFrame(
            np.array([each[k] for each in found.values()]) if found else empty,
            index=list(found),
            columns=known.names,
        )
        for k in range(3)
    ]
    nulls = [name for name, row in rows.items() if row["is_null"]]
    null = tables[0].loc[nulls].max() if nulls else None
    for number, row in enumerate(rows.values()):
        row["sentence"] = _sentence(
            list(rows)[number], row, tables[0].iloc[number], tables[1].iloc[number], null
        )
    columns = ["unit", "n_cells", "n_control_cells", "residual_share", "is_null", "sentence"]
    samples = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    for table in (*tables, samples):
        table.index.name = by
    return Projection(tables[0], tables[1], tables[2], null, samples, left_out)


class _Known:
    """The references as this file can use them: its genes, its cell types."""

    def __init__(self, known: References, lacking: list[str]) -> None:
        self.known = known
        self.n_types = len(known.cell_types)
        is_here = ~np.isin(known.genes, lacking)
        self.precision = known.precision * np.tile(is_here, self.n_types)
        self.change = centred(known.change, self.precision)
        self.n_features = max(int((self.precision > 0).sum()), 1)
        self.column = {name: i for i, name in enumerate(known.exposures)}

    def fit(
        self,
        counts: sparse.csr_matrix,
        kind: Array,
        inside: Array,
        beside: Array,
        unit: str,
        n_draws: int,
        rng: np.random.Generator,
    ) -> tuple[Array, float, Array]:
        """Return weights per group, the residual's share and bounds (2, groups) of one sample."""
        kept = np.array([name != unit for name in self.known.units])
        if not kept.any():
            raise Refusal("references are of other units than the sample", f"only {unit}", "")
        change = self.change[kept]
        products, met = products_of(change, self.precision), met_by(change)
        own = [(counts[np.flatnonzero(part)], kind[part]) for part in (inside, beside)]
        once = np.ones(len(change))
        gram = _definite(*between_units(products, once, met), self.n_features)
        seen = self._seen(own, [np.ones((1, len(each[1]))) for each in own])[0]
        total, halves = self._in_halves(own, rng)
        ridge = self._noise(products, gram, met, seen, total) / USUAL_WEIGHT**2
        weights = _solved(gram, _towards(change, seen, self.precision, once, met), ridge)
        drawn = np.empty((n_draws, len(weights)))
        resampled = [rng.multinomial(len(k), np.full(len(k), 1 / len(k)), n_draws) for _, k in own]
        seen_again = self._seen(own, resampled)
        for draw in range(n_draws):
            turn = rng.multinomial(len(change), np.full(len(change), 1 / len(change))).astype(
                float
            )
            if (turn > 0).sum() < 2:
                turn = once
            drawn[draw] = _solved(
                _definite(*between_units(products, turn, met), self.n_features),
                _towards(change, seen_again[draw], self.precision, turn, met),
                ridge,
            )
        bounds = np.quantile(self._grouped(drawn), INTERVAL, axis=0)
        towards = _towards(change, halves, self.precision, once, met)
        explained = float(2 * weights @ towards - weights @ gram @ weights)
        residual = float(np.clip(1.0 - explained / total, 0.0, 1.0)) if total > 0 else float("nan")
        return self._grouped(weights[None])[0], residual, bounds

    def _grouped(self, weights: Array) -> Array:
        """Add up the weights of exposures that are told as one, (draws, E) -> (draws, groups)."""
        columns = [[self.column[one] for one in group] for group in self.known.groups]
        return np.stack([weights[:, each].sum(axis=1) for each in columns], axis=1)

    def _seen(self, own: list[tuple[sparse.csr_matrix, Array]], times: list[Array]) -> Array:
        """Return the sample's change under repeated drawings of its cells, (draws, T * G)."""
        sides = []
        for (counts, kind), n in zip(own, times):
            by_type = [
                np.asarray((n * (kind == t)) @ counts, dtype=np.float64)
                for t in range(self.n_types)
            ]
            sides.append(logged(np.stack(by_type, axis=1), self.known.level))
        return centred(sides[0] - sides[1], self.precision)

    def _in_halves(
        self, own: list[tuple[sparse.csr_matrix, Array]], rng: np.random.Generator
    ) -> tuple[float, Array]:
        """Return the sample's squared change without its noise, and its mean change, (T * G,).

        The product of two halves of the cells holds no noise of theirs.
        """
        totals, means = [], []
        for _ in range(SPLITS):
            halves = [(rng.permutation(len(k)) % 2)[None, :].astype(float) for _, k in own]
            first = self._seen(own, halves)[0]
            second = self._seen(own, [1.0 - half for half in halves])[0]
            totals.append(float((first * self.precision) @ second))
            means.append(0.5 * (first + second))
        return float(np.mean(totals)), np.mean(means, axis=0)

    def _noise(self, products: Array, gram: Array, met: Array, seen: Array, total: float) -> Array:
        """Return the noise in one gene's weighed change, the sample's and references', (E,)."""
        of_sample = max(float((seen * self.precision) @ seen) - total, 0.0)
        n_units = np.maximum(met.sum(axis=0), 1.0)
        alone = np.einsum("ueue->e", products) / n_units
        of_references = np.maximum(alone - np.diag(gram), 0.0) / n_units
        noise: Array = (of_sample + of_references) / self.n_features
        return noise


# -- least squares ------------------------------------------------------------------------------
def _definite(gram: Array, noise: float, n_features: int) -> Array:
    """Raise what noise may have made of the eigenvalues to where noise ends, (E, E)."""
    values, vectors = np.linalg.eigh(gram)
    # noise of squared length `noise` scatters them by about this much (Marchenko & Pastur 1967)
    scatter = noise * np.sqrt(len(gram) / n_features)
    floor = max(EDGE * scatter, STEADY * float(values[-1]), 1e-300)
    raised: Array = (vectors * np.maximum(values, floor)) @ vectors.T
    return raised


def _towards(change: Array, seen: Array, precision: Array, times: Array, met: Array) -> Array:
    """Return the products of the references' mean profiles with a sample's change, (E,)."""
    each = np.nan_to_num(change) @ (precision * seen)
    n = np.maximum(times @ met, 1e-300)
    mean: Array = (times @ each) / n
    return mean


def _solved(gram: Array, towards: Array, ridge: Array) -> Array:
    """Return w >= 0 that minimises w' (gram + ridge) w - 2 w' towards, (E,)."""
    root = np.linalg.cholesky(gram + np.diag(ridge))
    found: Array = nnls(root.T, np.linalg.solve(root, towards))[0]
    return found


# -- words --------------------------------------------------------------------------------------
def _sentence(
    sample: str, row: dict[str, Any], weights: pd.Series, low: pd.Series, null: pd.Series | None
) -> str:
    """Say what a sample resembles in one line, with what keeps it from being proof."""
    floor = null if null is not None else pd.Series(0.0, index=weights.index)
    told = weights[(low > 0) & (weights > floor)].sort_values(ascending=False)
    if row["is_null"]:
        n_told = int((low > 0).sum())
        return f"Sample {sample} is control against control: {n_told} weights above zero"
    named = ", ".join(f"{weight:.2f} of {group}" for group, weight in told.items())
    head = f"Sample {sample} resembles {named}" if named else f"Sample {sample} resembles nothing"
    rest = row["residual_share"]
    doubts = ["its change is within noise" if np.isnan(rest) else f"{rest:.0%} resembles neither"]
    doubts.append("more than control against control" if null is not None else NO_NULL)
    return "; ".join([head, *doubts]) if named else f"{head} known; {doubts[0]}"
