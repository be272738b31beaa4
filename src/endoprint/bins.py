"""A cell as genes with levels: each gene's expression as one of 50 bins over the cell's own.

Value binning of scGPT (Cui 2024, Nature Methods 21:1470): counts per 10,000, log1p, then quantiles
of the cell's non-zero values; so levels are rank-like, and comparable between cells of any depth.
Counts tie heavily, and where edges coincide upstream draws a bin between them from the global
generator: its answers wobble. Here nothing does: a tie takes the middle bin, or is drawn from the
cell's own content, so that neither neighbours nor order matter.

Every cell begins with `<cls>` (level 0) and is kept even if it has no gene of the vocabulary.

Shapes: n cells, N tokens of all cells one after the other, K bin edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from endoprint.config import Refusal
from endoprint.curated import TARGET_SUM, sums
from endoprint.genes import remap

Array = np.ndarray[Any, np.dtype[Any]]
Ties = Literal["middle", "drawn"]

PAD, CLS = 0, 1  # special tokens; gene g is token FIRST_GENE + g
FIRST_GENE = 2
FOR_TIES, FOR_ROOM = 1, 2  # kinds of draw, so that one says nothing of the other


@dataclass(frozen=True, eq=False)
class Binned:
    """The genes of many cells with their levels, one cell after the other.

    Cell i has `values[offsets[i] : offsets[i + 1]]`: `<cls>`, then its genes from the highest
    expression down. `share` (n,): of a cell's counts, in the genes known.
    """

    values: Array  # int32 (N,), token of each gene
    levels: Array  # float32 (N,), bins 1..K; 0 at `<cls>`
    offsets: Array  # int64 (n + 1,)
    cell_ids: pd.Index
    share: Array

    def __len__(self) -> int:
        return len(self.cell_ids)

    @property
    def lengths(self) -> Array:
        """Tokens per cell, `<cls>` included, (n,), int64."""
        return np.diff(self.offsets)


def of(
    cells: AnnData,
    gene_of_column: Array,
    *,
    n_genes: int,
    n_bins: int = 51,
    max_length: int = 0,
    ties: Ties = "middle",
    seed: int = 0,
) -> Binned:
    """Return the levels of cells, in their order.

    `gene_of_column` (columns,): which of `n_genes` genes a column is, or -1; columns of one gene
    are summed. `n_bins` counts the zero, as upstream. `max_length`: most tokens of a cell, `<cls>`
    included (0: no limit); of a longer cell a random subset stays, always the same one, with the
    levels it had in the whole cell. The library size is `obs["n_counts"]`.
    """
    if max_length == 1 or max_length < 0:
        raise Refusal("max_length has room for genes", str(max_length), "set it to 1200, or 0")
    everything = sparse.csr_matrix(cells.X)
    counts = remap(everything, gene_of_column, n_genes)
    counts.eliminate_zeros()
    total = cells.obs["n_counts"].to_numpy(dtype=np.float64)
    scale = np.divide(TARGET_SUM, total, out=np.zeros_like(total), where=total > 0)
    in_file = sums(everything)
    values, levels = [], []
    for i in range(cells.n_obs):
        here = slice(counts.indptr[i], counts.indptr[i + 1])
        gene, count = counts.indices[here].astype(np.int64), counts.data[here]
        # through float32, as the matrix upstream bins: equal counts stay equal
        expression = np.log1p(count * scale[i]).astype(np.float32)
        own = _Draws(gene, count, seed)
        draw = own.of(FOR_TIES) if ties == "drawn" else np.full(len(gene), 0.5)
        level = bins(expression, n_bins=n_bins, draw=draw)
        order = np.lexsort((gene, -expression))
        if max_length and len(gene) > max_length - 1:
            chosen = np.argsort(own.of(FOR_ROOM), kind="stable")[: max_length - 1]
            order = order[np.isin(order, chosen)]
        values.append(np.concatenate([[CLS], gene[order] + FIRST_GENE]))
        levels.append(np.concatenate([[0], level[order]]))
    lengths = [len(value) for value in values]
    return Binned(
        values=np.concatenate(values or [np.empty(0)]).astype(np.int32),
        levels=np.concatenate(levels or [np.empty(0)]).astype(np.float32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        cell_ids=pd.Index(cells.obs_names),
        share=np.divide(sums(counts), in_file, out=np.zeros(cells.n_obs), where=in_file > 0),
    )


def bins(values: Array, *, n_bins: int = 51, draw: Array | float = 0.5) -> Array:
    """Return the bin of every non-zero value of one cell, 1 .. n_bins - 1, int64.

    Edges are quantiles of `values` at n_bins - 1 even steps. A value between two edges has one
    bin; where several edges equal it, `draw` in [0, 1) takes one of their bins, evenly.
    """
    if not len(values):
        return np.empty(0, dtype=np.int64)
    lowest, highest = bounds(values, edges(values, n_bins))
    drawn: Array = np.ceil(highest - np.asarray(draw) * (highest - lowest + 1)).astype(np.int64)
    return np.maximum(drawn, lowest)


def bounds(values: Array, edge_K: Array) -> tuple[Array, Array]:
    """Return the lowest and the highest bin each value may fall into."""
    highest = np.searchsorted(edge_K, values, side="right")
    return np.minimum(np.searchsorted(edge_K, values, side="left") + 1, highest), highest


def edges(values: Array, n_bins: int) -> Array:
    """Return the quantiles that part a cell's non-zero values into bins, float64 (n_bins - 1,).

    Linear between order statistics, as numpy's default (Hyndman & Fan 1996, type 7).
    """
    ordered = np.sort(values).astype(np.float64)
    place = np.linspace(0.0, 1.0, n_bins - 1) * (len(ordered) - 1)
    below = np.minimum(place.astype(np.int64), max(len(ordered) - 2, 0))
    above = np.minimum(below + 1, len(ordered) - 1)
    part, step = place - below, ordered[above] - ordered[below]
    # from the nearer end, so that an edge on a value equals it and edges never fall
    between: Array = np.where(
        part < 0.5, ordered[below] + step * part, ordered[above] - step * (1.0 - part)
    )
    return between


class _Draws:
    """Even draws in [0, 1) from what a cell holds: the same wherever and whenever it is read."""

    def __init__(self, gene: Array, count: Array, seed: int) -> None:
        self._gene, self._count, self._seed = gene.astype(np.uint64), count, seed

    def of(self, kind: int) -> Array:
        """Return one draw per gene, float64."""
        gene = _mix(self._gene)
        held = _mix(gene ^ _mix(self._count.astype(np.uint64)))
        # a sum, which no order of genes changes
        cell = held.sum(dtype=np.uint64) + np.array([self._seed, kind], dtype=np.uint64)
        mixed = _mix(gene ^ _mix(_mix(cell[:1]) ^ cell[1:]))
        drawn: Array = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return drawn


def _mix(value: Array) -> Array:
    """Scatter 64-bit numbers evenly (SplitMix64; Steele 2014, doi:10.1145/2660193.2660195)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scattered: Array = value ^ (value >> np.uint64(31))
    return scattered
