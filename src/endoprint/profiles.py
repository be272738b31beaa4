"""What every known exposure does to expression, unit by unit: profiles to hold others against.

A profile is the log fold change of a group of cells, counts summed, against the control cells of
its own unit, so that what is the unit's own cancels.

G genes, T cell types (one, where they are not told), U units, E exposures but control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from endoprint.config import Refusal
from endoprint.curated import matrix

Array = np.ndarray[Any, np.dtype[Any]]

ALIKE = 0.7  # correlation above which two exposures are reported as one group (judging rule 10)
DISPERSION = 0.3  # of single cells' counts, NB: how little a well expressed gene's depth helps
PSEUDO = 0.5  # counts per gene lent to every sample, shared out as control expresses them
FEWEST_CELLS = 10  # of a sample or of its control: fewer make no profile (a guess)


@dataclass(frozen=True)
class References:
    """What every known exposure does to expression, unit by unit, against the unit's control.

    `change` (U, E, T * G): natural-log fold changes, centred; NaN where a unit lacks an exposure.
    `precision` (T * G,): how much each gene counts. `level` (T, G): control's share of counts.
    `groups`: exposures told as one, because their profiles correlate above .7.
    """

    control: str
    genes: list[str]
    cell_types: list[str]  # [""]: not told apart
    units: list[str]
    exposures: list[str]
    groups: list[list[str]]
    change: Array
    precision: Array
    level: Array

    @property
    def names(self) -> list[str]:
        """What each group is called."""
        return [" + ".join(group) for group in self.groups]


def references(cells: AnnData, *, control: str) -> References:
    """Return the profiles of all exposures of labelled cells that met a unit beside its control.

    cells: curated, with `exposure`, `unit` and, where known, `cell_type`.
    """
    exposure = cells.obs["exposure"].astype(str).to_numpy()
    unit = cells.obs["unit"].astype(str).to_numpy()
    exposures = sorted(set(exposure) - {control})
    if control not in set(exposure) or not exposures:
        raise Refusal(
            "a projection compares exposures with their control",
            f"exposures {', '.join(sorted(set(exposure))) or 'none'}",
            f"give labelled cells, some of them {control}",
        )
    types = set(cells.obs["cell_type"].astype(str)) if "cell_type" in cells.obs else set()
    cell_types = sorted(types) if len(types) > 1 else [""]
    kind = kinds_of(cells, cell_types)
    counts = matrix(cells, list(cells.var_names))
    level = _shares_of(counts, exposure == control, kind, cell_types)
    n_control = int((exposure == control).sum())
    mean = _summed(counts, exposure == control, kind, cell_types) / n_control
    # variance of a log mean of n cells: (1 / mean + dispersion) / n; `mean` holds the type's share
    precision = (mean / (1.0 + DISPERSION * mean)).ravel()
    units, rows = [], []
    for name in sorted(set(unit) - {""}):
        of_control = (unit == name) & (exposure == control)
        of_each = [(unit == name) & (exposure == one) for one in exposures]
        if of_control.sum() < FEWEST_CELLS or max(each.sum() for each in of_each) < FEWEST_CELLS:
            continue
        base = profile(counts, of_control, kind, cell_types, level)
        empty = np.full(base.shape, np.nan)
        rows.append(
            [
                centred(profile(counts, each, kind, cell_types, level) - base, precision)
                if each.sum() >= FEWEST_CELLS
                else empty
                for each in of_each
            ]
        )
        units.append(name)
    if not units:
        raise Refusal(
            f"a profile needs {FEWEST_CELLS} cells of an exposure and of its unit's control",
            "no unit with both",
            "give more cells, or units that met their control",
        )
    change = np.array(rows)
    is_met = np.isfinite(change).any(axis=(0, 2))
    change = change[:, is_met]
    exposures = [exposures[i] for i in np.flatnonzero(is_met)]
    gram, _ = between_units(products_of(change, precision), np.ones(len(units)), met_by(change))
    return References(
        control=control,
        genes=[str(gene) for gene in cells.var_names],
        cell_types=cell_types,
        units=units,
        exposures=exposures,
        groups=alike_in(gram, exposures),
        change=change,
        precision=precision,
        level=level,
    )


# -- profiles -----------------------------------------------------------------------------------
def kinds_of(cells: AnnData, cell_types: list[str]) -> Array:
    """Return each cell's type by number, (n,); zeros where types are not told apart."""
    if cell_types == [""]:
        return np.zeros(cells.n_obs, dtype=int)
    told = cells.obs["cell_type"].astype(str) if "cell_type" in cells.obs else pd.Series([""])
    strange = sorted(set(told) - set(cell_types))
    if strange:
        raise Refusal(
            "references that tell cell types apart are for cells of those types",
            strange[0] or "cells without cell_type",
            "make the references from cells without `cell_type`",
        )
    kinds: Array = pd.Index(cell_types).get_indexer(pd.Index(told))
    return kinds


def _summed(counts: sparse.csr_matrix, inside: Array, kind: Array, cell_types: list[str]) -> Array:
    """Return summed counts per cell type, (T, G)."""
    n_types = len(cell_types)
    picks = np.stack([inside & (kind == t) for t in range(n_types)]).astype(np.float64)
    return np.asarray(picks @ counts, dtype=np.float64)


def _shares_of(
    counts: sparse.csr_matrix, inside: Array, kind: Array, cell_types: list[str]
) -> Array:
    """Return the expected share of every gene, (T, G); what a type lacks is as in all cells."""
    summed = _summed(counts, inside, kind, cell_types)
    every = summed.sum(axis=0) + 1e-9
    mixed = summed + PSEUDO * len(every) * every / every.sum()
    shares: Array = mixed / mixed.sum(axis=1, keepdims=True)
    return shares


def profile(
    counts: sparse.csr_matrix,
    inside: Array,
    kind: Array,
    cell_types: list[str],
    level: Array,
) -> Array:
    """Return log shares of a group of cells, (T * G,)."""
    row: Array = logged(_summed(counts, inside, kind, cell_types)[None], level)[0]
    return row


def logged(summed: Array, level: Array) -> Array:
    """Return log shares (draws, T * G) of summed counts (draws, T, G), a little lent to each."""
    lent = summed + PSEUDO * level.shape[1] * level
    shares = np.log(lent / lent.sum(axis=2, keepdims=True))
    rows: Array = shares.reshape(len(summed), -1)
    return rows


def centred(change: Array, precision: Array) -> Array:
    """Take out what all genes share: a few genes that rise make all others' shares fall."""
    mean = (change @ precision) / precision.sum()
    shifted: Array = change - mean[..., None]
    return shifted


# -- products of profiles ------------------------------------------------------------------------
def met_by(change: Array) -> Array:
    """Say which unit has which exposure, (U, E)."""
    met: Array = np.isfinite(change[:, :, 0]).astype(float)
    return met


def products_of(change: Array, precision: Array) -> Array:
    """Return the weighed products of every two profiles, (U, E, U, E)."""
    n_units, n_exposures, n_features = change.shape
    flat = np.nan_to_num(change).reshape(-1, n_features)
    products: Array = (flat * precision) @ flat.T
    return products.reshape(n_units, n_exposures, n_units, n_exposures)


def between_units(products: Array, times: Array, met: Array) -> tuple[Array, float]:
    """Return the exposures' products (E, E), from pairs of different units, and their noise.

    `times` (U,): how often each unit counts. Where no two units met both of a pair of exposures,
    their products within units stand in, noise included. The noise is that of a mean profile's
    square.
    """
    pairs = np.outer(times, times) * (1.0 - np.eye(len(times)))
    number = np.einsum("uv,ue,vf->ef", pairs, met, met)
    apart = np.einsum("uv,uevf->ef", pairs, products) / np.maximum(number, 1.0)
    n_alone = np.maximum(np.einsum("u,ue,uf->ef", times, met, met), 1.0)
    alone = np.einsum("u,ueuf->ef", times, products) / n_alone
    mean = np.where(number > 0, apart, alone)
    noise = np.maximum(np.diag(alone - mean), 0.0).mean() / max(float(times.sum()), 1.0)
    return 0.5 * (mean + mean.T), float(noise)


def alike_in(gram: Array, exposures: list[str]) -> list[list[str]]:
    """Return exposures in groups, each reached from each by correlations above .7."""
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    is_seen = np.diag(gram) > 0  # an exposure that noise hides is like none
    is_alike = (gram / np.outer(scale, scale) > ALIKE) & np.outer(is_seen, is_seen)
    group = list(range(len(exposures)))
    for i, j in zip(*np.nonzero(np.triu(is_alike, 1))):
        old, new = group[j], group[i]
        group = [new if each == old else each for each in group]
    return [[e for e, g in zip(exposures, group) if g == n] for n in sorted(set(group))]
