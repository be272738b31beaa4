"""A small common space for cells: log-normalised counts, variable genes, principal components.

Genes, centre and components are fitted on training cells only; the model that owns a `Latent`
keeps it as arrays. n cells, G genes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.linalg import eigh

from endoprint.curated import log_normalised

Array = np.ndarray[Any, np.dtype[Any]]

N_MEAN_BINS = 20  # genes are called variable among genes of similar mean (Satija 2015)
BLOCK = 4096  # cells projected at once; bounds memory


@dataclass(frozen=True)
class Latent:
    """Principal components of log1p counts per 10,000 over the most variable genes."""

    genes: list[str]
    centre: Array  # (G,)
    components: Array  # (D, G), orthonormal rows
    residual: float  # root mean square distance of a training cell from the plane

    @classmethod
    def fit(cls, cells: AnnData, *, n_genes: int = 2000, width: int = 30) -> Self:
        """Choose variable genes and find the axes along which training cells differ most.

        Exact and without chance: the smaller of the two covariance matrices is diagonalised.
        Fewer cells or genes than asked for give fewer axes.
        """
        every = log_normalised(cells, list(cells.var_names))
        chosen = variable_genes(every, n_genes)
        values = every[:, chosen].toarray().astype(np.float64)
        centre = values.mean(axis=0)
        values -= centre
        width = max(1, min(width, len(values) - 1, len(chosen)))
        components = _leading_axes(values, width)
        off = values - (values @ components.T) @ components
        return cls(
            genes=[str(gene) for gene in cells.var_names[chosen]],
            centre=centre,
            components=components,
            residual=float(np.sqrt((off**2).sum(axis=1).mean())),
        )

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
        is_present = np.isin(self.genes, cells.var_names)
        place = np.empty((cells.n_obs, len(self.components)))
        off = np.empty(cells.n_obs)
        every = log_normalised(cells, self.genes)
        for start in range(0, cells.n_obs, BLOCK):
            block = every[start : start + BLOCK].toarray().astype(np.float64) - self.centre
            block[:, ~is_present] = 0.0
            here = block @ self.components.T
            place[start : start + BLOCK] = here
            squared = (block**2).sum(axis=1) - (here**2).sum(axis=1)
            off[start : start + BLOCK] = np.sqrt(np.maximum(squared, 0.0))
        return place, off

    def arrays(self) -> dict[str, Array]:
        """Return what `of` needs beside the gene list."""
        return {
            "latent.centre": self.centre,
            "latent.components": self.components,
            "latent.residual": np.array([self.residual]),
        }

    @classmethod
    def of(cls, genes: list[str], arrays: dict[str, Array]) -> Self:
        """Take back what `arrays` gave."""
        return cls(
            genes=genes,
            centre=arrays["latent.centre"],
            components=arrays["latent.components"],
            residual=float(arrays["latent.residual"][0]),
        )


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
