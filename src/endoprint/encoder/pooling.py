"""How a cell's tokens become one vector: the weight of every token, said in one place.

A cell's vector is the weighted sum of its tokens' hidden states, so a pooling *is* its weights.
They depend on the cell's own length only, never on how it was cut into rows or padded.

Two conventions are upstream's (Theodoris 2023; `emb_mode` in Geneformer): `mean` is its "cell",
the average over genes with `<cls>` and `<eos>` left out; `cls` is the first position, which is
`<cls>` where the vocabulary has one and merely the top-ranked gene where it has none.
`rank` is ours: the higher a gene ranks, the more it counts. Where genes come with levels (scGPT's
bins), which are ranks with ties, the level counts instead.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Pooling = Literal["rank", "mean", "cls"]
Array = np.ndarray[Any, np.dtype[Any]]


def token_weights(pooling: Pooling, rank: Array, length: Array, *, has_specials: bool) -> Array:
    """Return how much each token counts in its cell's vector, float32, same shape as `rank`.

    `rank` is the token's place in its own cell, from 0, and `length` that cell's number of tokens,
    special ones included. The weights of a cell add up to one; a cell without genes has none.
    """
    if pooling == "cls":
        first: Array = (rank == 0).astype(np.float32)
        return first
    gene = rank - 1 if has_specials else rank
    n_genes = np.maximum(length - 2 if has_specials else length, 1)
    is_gene = (gene >= 0) & (gene < (length - 2 if has_specials else length))
    if pooling == "mean":
        mean: Array = np.where(is_gene, 1.0 / n_genes, 0.0).astype(np.float32)
        return mean
    # 1 - gene / n, divided by its own sum over the cell, (n + 1) / 2
    by_rank = 2.0 * (1.0 - gene / n_genes) / (n_genes + 1)
    weights: Array = np.where(is_gene, by_rank, 0.0).astype(np.float32)
    return weights


def level_weights(
    pooling: Pooling, level_N: Array, rank_N: Array, cell_N: Array, n_cells: int
) -> Array:
    """Return the same for genes with levels above zero and special tokens with none, (N,).

    `cell_N`: which of `n_cells` cells a token is of.
    """
    if pooling == "cls":
        first: Array = (rank_N == 0).astype(np.float32)
        return first
    counted = np.maximum(level_N, 0.0) if pooling == "rank" else (level_N > 0).astype(np.float64)
    total = np.bincount(cell_N, counted, minlength=n_cells)
    weights: Array = (counted / np.maximum(total, 1.0)[cell_N]).astype(np.float32)
    return weights
