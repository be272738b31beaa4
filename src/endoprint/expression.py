"""What a gene's counts are taken as: comparable between cells, and between genes.

Counts are brought to the training cells' median library, not to 10,000: where a library holds
1,500 counts, the logarithm of counts per 10,000 is nearly all-or-nothing. Every gene is divided by
the spread that sampling alone would give it (negative binomial, as in analytic Pearson residuals:
Lause 2021, Genome Biology 22:258), never by the spread it shows, which is where exposures are.
Zero stays zero, so that counts stay sparse. n cells, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from anndata import AnnData
from scipy import sparse

from endoprint.curated import log_normalised

Array = np.ndarray[Any, np.dtype[Any]]
Kind = Literal["log", "linear"]

PER_CELL = 10_000.0  # counts that `log_normalised` brings a cell to
DISPERSION = 0.3  # of counts between like cells, NB; a guess that held on three data sets
FAINTEST = 0.01  # added to a gene's variance: one stray count must not shout


@dataclass(frozen=True)
class Expression:
    """How genes are read: `log`, log1p at the median library; `linear`, without the logarithm.

    `size`: the library that cells are brought to, counts. `scale` (G,): what each gene is
    multiplied by. `mean` (G,): over the training cells; an absent gene counts as this.
    """

    genes: list[str]
    kind: Kind
    size: float
    scale: Array
    mean: Array

    @classmethod
    def fit(cls, cells: AnnData, kind: Kind) -> Self:
        """Learn library, spread and mean from training cells; genes silent in all are left out."""
        every = log_normalised(cells, list(cells.var_names))
        total = np.asarray(every.sum(axis=0)).ravel()
        is_seen = total > 0
        genes = [str(gene) for gene in cells.var_names[is_seen]]
        size = float(np.median(cells.obs["n_counts"].to_numpy(dtype=np.float64)))
        counts = _at(every[:, is_seen], size)
        mean = np.asarray(counts.mean(axis=0), dtype=np.float64).ravel()
        scale = 1.0 / np.sqrt(mean + DISPERSION * mean**2 + FAINTEST)
        if kind == "log":
            scale *= 1.0 + mean  # the slope of the logarithm there (delta method)
        bare = cls(genes, kind, size, scale, np.zeros(len(genes)))
        read = bare._read(counts)
        return cls(genes, kind, size, scale, np.asarray(read.mean(axis=0)).ravel())

    def of(self, cells: AnnData) -> sparse.csr_matrix:
        """Return every cell's expression, (n, G) float32; an absent gene is zero."""
        return self._read(_at(log_normalised(cells, self.genes), self.size))

    def log1p_per_10k(self, values: Array) -> Array:
        """Return log1p counts per 10,000 of expression as this reads it, (n, G); zero at least."""
        counts = np.maximum(values, 0.0) / self.scale
        if self.kind == "log":
            counts = np.expm1(counts)
        back: Array = np.log1p(counts * (PER_CELL / self.size))
        return back

    def _read(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        if self.kind == "log":
            counts.data = np.log1p(counts.data)
        return sparse.csr_matrix(counts.multiply(self.scale.astype(np.float32)), dtype=np.float32)


def _at(values: sparse.csr_matrix, size: float) -> sparse.csr_matrix:
    """Return counts at a library of `size` from log1p counts per 10,000; a new matrix."""
    counts = sparse.csr_matrix(values, copy=True)
    counts.data = np.expm1(counts.data.astype(np.float64)) * (size / PER_CELL)
    return counts
