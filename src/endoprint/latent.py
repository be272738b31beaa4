"""A small common space for cells: expression of variable genes, principal components.

Genes, scales, centre and components are fitted on training cells only; the model that owns a
`Latent` keeps it as arrays. What spreads cells most there is seldom their exposure, so models that
go by distance turn it by `telling_axes`. n cells, G genes, D width, E exposures, A axes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.linalg import eigh
from sklearn.covariance import ledoit_wolf_shrinkage

from endoprint.curated import log_normalised
from endoprint.expression import Expression

Array = np.ndarray[Any, np.dtype[Any]]

N_MEAN_BINS = 20  # genes are called variable among genes of similar mean (Satija 2015)
ROUNDNESS = 0.1  # least share of the spread within taken as equal on all axes (a guess)
CELLS_PER_AXIS = 5  # fewer, and axes tell the training cells apart only (a guess)
BLOCK = 4096  # cells projected at once; bounds memory


@dataclass(frozen=True)
class Latent:
    """Principal components of the log expression (`expression`) of the most variable genes."""

    expression: Expression
    components: Array  # (D, G), orthonormal rows
    residual: float  # root mean square distance of a training cell from the plane

    @property
    def genes(self) -> list[str]:
        """The genes it reads, in order."""
        return self.expression.genes

    @property
    def centre(self) -> Array:
        """Mean expression of the training cells, (G,)."""
        return self.expression.mean

    @classmethod
    def fit(cls, cells: AnnData, *, n_genes: int = 2000, width: int = 30) -> Self:
        """Choose variable genes and find the axes along which training cells differ most.

        Exact and without chance: the smaller of the two covariance matrices is diagonalised.
        Fewer cells or genes than asked for give fewer axes.
        """
        chosen = variable_genes(log_normalised(cells, list(cells.var_names)), n_genes)
        expression = Expression.fit(cells[:, chosen], "log")
        values = expression.of(cells).toarray().astype(np.float64)
        # to the last digit, else copies of one cell differ from their mean by rounding
        expression = replace(expression, mean=values.mean(axis=0))
        values -= expression.mean
        width = max(1, min(width, len(values) - 1, len(chosen)))
        components = _leading_axes(values, width)
        off = values - (values @ components.T) @ components
        residual = float(np.sqrt((off**2).sum(axis=1).mean()))
        return cls(expression, components, residual)

    def transform(self, cells: AnnData) -> Array:
        """Return each cell's place on the axes, (n, D); an absent gene counts as average."""
        return self._project(cells)[0]

    def with_residual(self, cells: AnnData) -> Array:
        """Return place and, as a last column, the distance from the plane of the axes, (n, D + 1).

        A cell of a kind never seen may project onto the middle of the plane; its distance from
        the plane gives it away.
        """
        place, off = self._project(cells)
        return np.column_stack([place, off])

    def _project(self, cells: AnnData) -> tuple[Array, Array]:
        is_present = cells.var_names.get_indexer(self.genes) >= 0
        place = np.empty((cells.n_obs, len(self.components)))
        off = np.empty(cells.n_obs)
        every = self.expression.of(cells)
        for start in range(0, cells.n_obs, BLOCK):
            block = every[start : start + BLOCK].toarray().astype(np.float64) - self.centre
            block[:, ~is_present] = 0.0
            here = block @ self.components.T
            place[start : start + BLOCK] = here
            squared = (block**2).sum(axis=1) - (here**2).sum(axis=1)
            off[start : start + BLOCK] = np.sqrt(np.maximum(squared, 0.0))
        return place, off

    def image(self, place: Array) -> Array:
        """Return the log1p counts per 10,000 that a place stands for, (n, D) -> (n, G).

        Floored at zero; what the axes do not see is as in the average cell.
        """
        return self.expression.log1p_per_10k(place @ self.components + self.centre)

    def arrays(self) -> dict[str, Array]:
        """Return what `of` needs beside the gene list."""
        return {
            "latent.centre": self.centre,
            "latent.scale": self.expression.scale,
            "latent.size": np.array([self.expression.size]),
            "latent.components": self.components,
            "latent.residual": np.array([self.residual]),
        }

    @classmethod
    def of(cls, genes: list[str], arrays: dict[str, Array]) -> Self:
        """Take back what `arrays` gave."""
        read = Expression(
            genes,
            "log",
            float(arrays["latent.size"][0]),
            arrays["latent.scale"],
            arrays["latent.centre"],
        )
        return cls(read, arrays["latent.components"], float(arrays["latent.residual"][0]))


def telling_axes(places: Array, labels: Array, *, n_further: int = 0) -> Array:
    """Return the axes that tell exposures apart, (D, A), scaled to unit spread within exposures.

    places (n, D), leading components first; labels (n,) column numbers 0..E-1, all present; the
    global metric of Hastie & Tibshirani 1996 (IEEE PAMI 18:607). Exposures weigh equally. The
    spread within is held round as far as few cells measure it badly (Ledoit & Wolf 2004), and
    components that fewer than `CELLS_PER_AXIS` cells each speak for are left out. A is E - 1 (D at
    most) and `n_further` of the components themselves: what else cells differ in.
    """
    width = min(places.shape[1], max(int(labels.max()), len(places) // CELLS_PER_AXIS))
    every, places = places.shape[1], places[:, :width]
    groups = [places[labels == e] for e in range(int(labels.max()) + 1)]
    means = np.stack([group.mean(axis=0) for group in groups])
    centred = zip(groups, means, strict=True)
    within = np.mean([(g - m).T @ (g - m) / len(g) for g, m in centred], axis=0)
    total = np.trace(np.cov(means.T, bias=True).reshape(width, width) + within) / width
    floor = max(np.trace(within) / width, 1e-6 * total, 1e-6)
    measured = float(ledoit_wolf_shrinkage(places - means[labels], assume_centered=True))
    roundness = max(ROUNDNESS, measured if np.isfinite(measured) else 1.0)
    within = (1 - roundness) * within + roundness * floor * np.eye(width)
    between = np.cov(means.T, bias=True).reshape(width, width)
    first = max(0, width - (len(groups) - 1))
    _, axes = eigh(between, within, subset_by_index=(first, width - 1))
    n_further = min(n_further, width)
    further = np.eye(width)[:, :n_further] / np.sqrt(np.diag(within))[:n_further]
    unused = np.zeros((every - width, axes.shape[1] + n_further))
    return np.ascontiguousarray(np.vstack([np.hstack([axes[:, ::-1], further]), unused]))


def way_back(places: Array, axes: Array) -> Array:
    """Return the map (A, D) from places on the axes to the likeliest places in the latent."""
    centred = places - places.mean(axis=0)
    back: Array = np.linalg.lstsq(centred @ axes, centred, rcond=None)[0]
    return back


def variable_genes(values: sparse.csr_matrix, n_genes: int) -> Array:
    """Return positions of the genes that vary most among genes of similar mean, ascending.

    values (n, G), log-normalised. Dispersion is compared within bins of mean (Satija 2015).
    """
    mean, variance = moments(values)
    is_seen = variance > 0
    if int(is_seen.sum()) <= n_genes:
        return np.flatnonzero(is_seen)
    dispersion = np.log(variance[is_seen] / mean[is_seen])
    rank = pd.Series(mean[is_seen]).rank(method="first")
    bins = pd.qcut(rank, min(N_MEAN_BINS, len(rank)), labels=False).to_numpy()
    grouped = pd.Series(dispersion).groupby(bins)
    score = (dispersion - grouped.transform("mean")) / grouped.transform("std").replace(0, 1)
    best = np.argsort(-score.fillna(0.0).to_numpy(), kind="stable")[:n_genes]
    return np.sort(np.flatnonzero(is_seen)[best])


def moments(values: sparse.csr_matrix, weight: Array | None = None) -> tuple[Array, Array]:
    """Return mean and variance of every gene, (G,) each; `weight` (n,) per cell sums to one."""
    weight = np.full(values.shape[0], 1.0 / values.shape[0]) if weight is None else weight
    wide = values.astype(np.float64)
    mean = np.asarray(wide.T @ weight).ravel()
    square = np.asarray(wide.power(2).T @ weight).ravel()
    return mean, np.maximum(square - mean**2, 0.0)


def _leading_axes(values: Array, width: int) -> Array:
    """Return the first principal axes of centred values, (D, G); signs fixed, so runs agree."""
    n, n_genes = values.shape
    if n_genes <= n:
        _, vectors = eigh(values.T @ values, subset_by_index=(n_genes - width, n_genes - 1))
        axes = vectors.T[::-1]
    else:
        power, vectors = eigh(values @ values.T, subset_by_index=(n - width, n - 1))
        axes = (vectors.T[::-1] @ values) / np.sqrt(np.maximum(power[::-1], 1e-300))[:, None]
    largest = np.abs(axes).argmax(axis=1)
    signs = np.sign(axes[np.arange(len(axes)), largest])
    return np.ascontiguousarray(axes * np.where(signs == 0, 1, signs)[:, None])
