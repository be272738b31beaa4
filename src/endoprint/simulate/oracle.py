"""How well could anyone do? The posterior from the simulator's own law.

Known: each exposure's mean, the cell's type and library size. Unknown, and integrated per gene by
Gauss-Hermite quadrature: the effects of line, replicate and run, which together are log-normal
(judging rule 7). The bound holds for a cell of an unseen line, culture and run. A model scored on
lines or runs it was trained on may pass it; where run and exposure are confounded it will, by
recognising the run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.special import softmax

from endoprint.config import Refusal
from endoprint.simulate.counts import Watch, silent
from endoprint.simulate.law import CELL_TYPES, Law

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK_ENTRIES = 2**17  # cells x genes at a time: the nodes' float64 arrays stay in the cache


def oracle(
    law: Law,
    cells: AnnData,
    *,
    library: pd.Series | None = None,
    n_nodes: int = 7,
    watch: Watch = silent,
) -> pd.DataFrame:
    """Return the probability of every exposure for every cell, all equally likely before.

    cells: raw counts in `X`; `obs["cell_type"]`; genes by `var["gene_ids"]`, else `var_names`;
    genes the law does not know are ignored. library: expected counts per cell (index cell id), as
    in `Atlas.hidden["library"]`; absent: `obs["n_counts"]`, else the cell's own total.
    Result (n, E): index cell ids, columns sorted exposures.
    """
    counts, gene = _known_genes(law, cells)
    log_library = np.log(_library(cells, counts, library))
    cell_type = pd.Index(CELL_TYPES).get_indexer(cells.obs["cell_type"].astype(str))
    if (cell_type < 0).any():
        raise Refusal(
            f"the oracle knows the cell types {', '.join(CELL_TYPES)}",
            str(cells.obs["cell_type"].iloc[int(np.argmin(cell_type))]),
            "give cells of this simulator",
        )
    log_evidence = np.empty((cells.n_obs, len(law.exposures)))
    step = max(1, BLOCK_ENTRIES // len(gene))
    done = 0
    for t in range(len(CELL_TYPES)):
        of_type = np.flatnonzero(cell_type == t)
        for start in range(0, len(of_type), step):
            block = of_type[start : start + step]
            x = counts[block].toarray().astype(np.float64)
            for e in range(len(law.exposures)):
                log_mean = log_library[block, None] + law.log_share[e, t, gene]
                log_evidence[block, e] = integrated(
                    x, log_mean, dispersion=law.dispersion, sd=law.nuisance_sd, n_nodes=n_nodes
                ).sum(axis=1)
            done += len(block)
            watch(done, cells.n_obs)
    return pd.DataFrame(
        softmax(log_evidence, axis=1), index=cells.obs_names, columns=list(law.exposures)
    )


def integrated(x: Array, log_mean: Array, *, dispersion: float, sd: float, n_nodes: int) -> Array:
    """Log NB likelihood of counts, the mean multiplied by a log-normal of mean one integrated out.

    x and log_mean of one shape; what depends on x alone is left out (it cancels between
    exposures).
    """
    node, weight = np.polynomial.hermite_e.hermegauss(n_nodes)
    size = 1.0 / dispersion
    mean = np.exp(log_mean)
    terms = np.empty((n_nodes, *x.shape))
    for k, (z, w) in enumerate(zip(node, weight / weight.sum())):
        shift = sd * z - 0.5 * sd**2
        term = np.log(size + mean * np.exp(shift))
        term *= -(x + size)
        term += x * shift
        terms[k] = term + np.log(w)
    top = terms.max(axis=0)
    terms -= top
    np.exp(terms, out=terms)
    return np.asarray(top + np.log(terms.sum(axis=0)) + x * log_mean + size * np.log(size))


def _known_genes(law: Law, cells: AnnData) -> tuple[sparse.csr_matrix, Array]:
    """Return the counts of the genes the law knows, and the place of each in the law."""
    ids = cells.var.get("gene_ids", cells.var_names)
    place = pd.Index(law.gene_ids).get_indexer(pd.Index(ids).astype(str))
    known = np.flatnonzero(place >= 0)
    if not len(known):
        raise Refusal(
            "the oracle knows the genes of its own simulator",
            f"{cells.n_vars} genes, none of them known",
            "give cells drawn with the same config and seed",
        )
    return sparse.csr_matrix(cells.X)[:, known], place[known]


def _library(cells: AnnData, counts: sparse.csr_matrix, library: pd.Series | None) -> Array:
    if library is not None:
        missing = cells.obs_names.difference(library.index)
        if len(missing):
            raise Refusal(
                "every cell has a library size",
                f"none for {len(missing)} cells",
                "pass library of the atlas these cells are from",
            )
        return np.asarray(library.loc[cells.obs_names], dtype=float)
    if "n_counts" in cells.obs:
        return np.asarray(cells.obs["n_counts"], dtype=float)
    return np.asarray(counts.sum(axis=1), dtype=float).ravel()
