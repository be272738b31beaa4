"""From counts to ranked tokens, fast and exact: highest count over median first.

Counts are small whole numbers, so cells hold few different pairs of gene and count. All pairs up
to some count of each gene are put in order once, by keys in float64 and then by token, and the
place of a pair in that order is one int32. To rank a cell is to look up its places and to sort
them, which is what processors do best (numpy uses their vector units).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from endoprint.config import Refusal
from endoprint.curated import raw_counts
from endoprint.vocabulary import TINY_MEDIAN, Vocabulary

Array = np.ndarray[Any, np.dtype[Any]]

STRETCH = 1 << 15  # entries at a time: their working arrays stay in a core's cache
LEAST_PLACES = 16  # counts of every gene that have a place from the start
LARGEST_PLACED = 1 << 13  # a larger count never gets one
MOST_PLACES = 1 << 21  # in all, 100 MB while put in order; cells from droplets need half a million
SLOW_SHARE = 0.01  # of cells ranked without places before more are given


@dataclass(frozen=True)
class Ranked:
    """Tokens of many cells, one cell after the other."""

    tokens: Array  # int32
    lengths: Array  # int64 (n,), specials included
    n_genes: Array  # int64 (n,), before the cut
    n_tiny: Array  # int64 (n,), of those with a tiny median


class Ranker:
    """Ranks the genes of cells whose matrix has given tokens as columns.

    `tokens` int32 (G,): the token of each column, -1 for none; no token twice.

    A pair's slot in the table of places is `bases[column] + count`. Slots of count 0, and the last
    of all, hold the place behind every gene; unknown columns have the last, whatever they count.
    """

    def __init__(self, tokens: Array, vocabulary: Vocabulary) -> None:
        n_specials = len(vocabulary.specials)
        is_known = tokens >= 0
        self._tokens = tokens
        self._median = np.full(len(tokens), np.inf)
        self._median[is_known] = vocabulary.medians[tokens[is_known] - n_specials]
        self.is_known = is_known.astype(np.float32)
        self.is_tiny = (self._median < TINY_MEDIAN).astype(np.float32)
        self._is_tiny = np.zeros(len(vocabulary), dtype=bool)  # by token
        self._is_tiny[n_specials:] = vocabulary.medians < TINY_MEDIAN
        self._head = [] if vocabulary.cls_id is None else [vocabulary.cls_id]
        self._tail = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
        self.room = vocabulary.max_length - len(self._head) - len(self._tail)
        self._genes = np.flatnonzero(is_known)  # columns, in the order of their tokens
        self._genes = self._genes[np.argsort(tokens[self._genes])]
        self._put_in_order(np.full(len(self._genes), LEAST_PLACES))

    def _put_in_order(self, most: Array) -> None:
        """Give every gene's counts from 1 to `most` their places."""
        ends = np.cumsum(most + 1)
        starts = ends - most - 1
        gene = np.repeat(np.arange(len(most)), most)
        count = np.arange(1, len(gene) + 1) - np.repeat(np.cumsum(most) - most, most)
        # float64: in float32, neighbours that are not ties swap in 0.2-1 % of real cells, and in
        # 16 % of deep ones (measured), for count/median of two genes may differ in the 8th digit.
        key = -(count / self._median[self._genes][gene])
        order = np.argsort(key)
        sorted_key = key[order]
        is_tie = np.concatenate([[False], sorted_key[1:] == sorted_key[:-1], [False]])
        ties = np.flatnonzero(is_tie[1:] | is_tie[:-1])
        # few: by token, as a stable sort of all would have them at four times the cost
        order[ties] = order[ties][np.lexsort((gene[order[ties]], sorted_key[ties]))]
        self._behind = np.int32(len(order))  # of the places' own type: else searches convert them
        self._places = np.full(int(ends[-1]) + 1, self._behind, dtype=np.int32)
        self._places[(starts[gene] + count)[order]] = np.arange(len(order), dtype=np.int32)
        self._token_at = np.append(self._tokens[self._genes][gene][order], np.int32(0))
        tiny = np.flatnonzero(self._is_tiny[self._token_at[:-1]])
        self._end_of_tiny = int(tiny[-1]) + 1 if len(tiny) else 0
        # float32 adds slots to counts exactly: both are below 2^24
        self._bases = np.full(len(self._tokens), ends[-1], dtype=np.float32)
        self._bases[self._genes] = starts
        self._most = np.full(len(self._tokens), np.inf, dtype=np.float32)
        self._most[self._genes] = most

    def rank(self, data: Array, indices: Array, indptr: Array) -> Ranked | None:
        """Rank the cells of CSR arrays; None where the data are no raw counts.

        Stored zeros are not expressed. A column stands at most once in a cell.
        """
        if not _are_counts(data):
            return None
        slow = self._without_places(data, indices, indptr)
        n_cells, n_head, n_tail = len(indptr) - 1, len(self._head), len(self._tail)
        entries = np.minimum(np.diff(indptr), self.room)
        out = np.empty(int(entries.sum()) + n_cells * (n_head + n_tail), dtype=np.int32)
        lengths, n_genes, n_tiny = (np.zeros(n_cells, np.int64) for _ in range(3))
        filled, cell = 0, 0
        while cell < n_cells:
            start = int(indptr[cell])
            stop_cell = int(np.searchsorted(indptr, start + STRETCH, side="right")) - 1
            stop_cell = min(max(stop_cell, cell + 1), n_cells)
            bounds = (indptr[cell : stop_cell + 1] - start).tolist()
            part = slice(start, int(indptr[stop_cell]))
            places = self._look_up(data[part], indices[part])
            for first, last in zip(bounds[:-1], bounds[1:]):
                places[first:last].sort()
            ranked = self._token_at.take(places)
            if self._end_of_tiny:
                early = np.flatnonzero(places < self._end_of_tiny)
                tiny = early[self._is_tiny[ranked[early]]]
                n_tiny[cell:stop_cell] = np.diff(tiny.searchsorted(bounds))
            for first, last in zip(bounds[:-1], bounds[1:]):
                tokens = ranked[first:last]
                n = int(places[first:last].searchsorted(self._behind))
                if cell in slow:
                    here = slice(start + first, start + last)
                    tokens = self._by_definition(data[here], indices[here])
                    n, n_tiny[cell] = len(tokens), self._is_tiny[tokens].sum()
                end = filled + n_head + min(n, self.room) + n_tail
                out[filled : filled + n_head] = self._head
                out[filled + n_head : end - n_tail] = tokens[: min(n, self.room)]
                out[end - n_tail : end] = self._tail
                n_genes[cell], lengths[cell] = n, end - filled
                filled, cell = end, cell + 1
        return Ranked(out[:filled], lengths, n_genes, n_tiny)

    def _look_up(self, data: Array, indices: Array) -> Array:
        """Return the place of each entry, int32."""
        slots = self._bases.take(indices, mode="clip")
        # what counts too much for a place is ranked by definition, whatever it finds here
        with np.errstate(over="ignore", invalid="ignore"):
            slots += data
            places: Array = self._places.take(slots.astype(np.intp), mode="clip")
        return places

    def _without_places(self, data: Array, indices: Array, indptr: Array) -> set[int]:
        """Return the cells with a count that has no place, having given more places if it pays."""
        cells = np.empty(0, dtype=np.int64)
        # few counts are large, and only those need a closer look
        large = np.flatnonzero(data > LEAST_PLACES)
        for _ in range(2):
            entries = large[data[large] > self._most[indices[large]]]
            cells = np.unique(np.searchsorted(indptr, entries, side="right") - 1)
            if len(cells) <= SLOW_SHARE * len(indptr):
                break
            if not self._give_places(indices[entries], data[entries]):
                break
        return set(cells.tolist())

    def _give_places(self, columns: Array, counts: Array) -> bool:
        """Give places to counts seen and up to twice as large; False if there are too many."""
        is_placed = counts <= LARGEST_PLACED
        most = self._most.astype(np.float64)
        np.maximum.at(most, columns[is_placed], 2.0 * counts[is_placed])
        if not is_placed.any() or most[self._genes].sum() > MOST_PLACES:
            return False
        self._put_in_order(most[self._genes].astype(np.int64))
        return True

    def _by_definition(self, data: Array, indices: Array) -> Array:
        """Return the ranked tokens of one cell, whatever it counts."""
        is_gene = (data > 0) & (self._tokens[indices] >= 0)
        tokens = self._tokens[indices[is_gene]]
        keys = data[is_gene] / self._median[indices[is_gene]]
        ranked: Array = tokens[np.lexsort((tokens, -keys))]
        return ranked


def _are_counts(data: Array) -> bool:
    """Whether all are finite whole numbers from zero."""
    for start in range(0, len(data), STRETCH):
        part = data[start : start + STRETCH]
        if not (part.min() >= 0 and part.max() < np.inf):  # also false for NaN
            return False
        if part.dtype.kind == "f" and not (np.rint(part) == part).all():
            return False
    return True


# -- one matrix ---------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Columns:
    """What the vocabulary makes of a matrix's columns."""

    vocabulary: Vocabulary
    tokens: Array  # int32 (G,), -1 where unknown
    genes_sha256: str
    n_case_folded: int
    n_summed: int
    collapse: sparse.csr_matrix | None  # (G, distinct genes): adds columns of one gene
    ranker: Ranker

    @classmethod
    def of(cls, var: pd.DataFrame, vocabulary: Vocabulary) -> Columns:
        # upstream's name for the column, then the one 10x files are read under
        stated = var.get("ensembl_id", var.get("gene_ids", var.index))
        identifiers = [str(name) for name in stated]
        found = vocabulary.identify(identifiers)
        if not found.n_known:
            raise Refusal(
                f"genes are named as vocabulary {vocabulary.name} names them",
                f"none of {len(identifiers)} known, such as {', '.join(identifiers[:3])}",
                "give human Ensembl ids, or symbols where the vocabulary knows them",
            )
        known = np.flatnonzero(found.tokens >= 0)
        collapse, tokens = None, found.tokens
        if found.n_summed:
            tokens, target = np.unique(found.tokens[known], return_inverse=True)
            ones = np.ones(len(known))
            collapse = sparse.csr_matrix(
                (ones, (known, target)), shape=(len(identifiers), len(tokens))
            )
        return cls(
            vocabulary,
            found.tokens,
            _sha256_of_set(identifiers),
            found.n_case_folded,
            found.n_summed,
            collapse,
            Ranker(tokens, vocabulary),
        )

    @property
    def about(self) -> dict[str, str]:
        """What decides the tokens of given counts."""
        return {
            "vocabulary": self.vocabulary.name,
            "vocabulary_sha256": self.vocabulary.sha256,
            "genes_sha256": self.genes_sha256,
        }

    def rank(self, counts: sparse.csr_matrix) -> Ranked:
        """Rank the genes of every cell."""
        merged = counts if self.collapse is None else sparse.csr_matrix(counts @ self.collapse)
        ranked = self.ranker.rank(merged.data, merged.indices, merged.indptr)
        if ranked is None:
            # refused there, in the words curation has for it
            raw_counts(counts, where="the matrix", remedy="name the layer of raw counts")
            raise Refusal("the matrix must hold raw counts", "other values", "give raw counts")
        return ranked

    def coverage(
        self, counts: sparse.csr_matrix, ranked: Ranked | None = None
    ) -> dict[str, Array]:
        """Return the columns of `Tokens.coverage`, and `n_counts` summed over all columns.

        `ranked`: of the same counts, if there is one; it spares a look at them.
        """
        is_filled = np.diff(counts.indptr) > 0
        n_counts = np.zeros(counts.shape[0])
        if is_filled.any():
            n_counts[is_filled] = np.add.reduceat(counts.data, counts.indptr[:-1][is_filled])
        # in the counts' own type: scipy would copy a matrix to multiply it with another
        kind = counts.dtype if counts.dtype.kind == "f" else np.dtype(np.float64)
        n_inside = counts @ (self.tokens >= 0).astype(kind)
        with np.errstate(invalid="ignore"):  # infinite counts: refused where they are ranked
            share = np.divide(n_inside, n_counts, out=np.zeros(len(n_counts)), where=n_counts > 0)
        n_genes, n_tiny = (
            (ranked.n_genes, ranked.n_tiny) if ranked is not None else self._seen(counts)
        )
        return {
            "share": share,
            "n_genes": n_genes,
            "n_tiny_medians": n_tiny,
            "is_empty": n_genes == 0,
            "n_counts": n_counts,
        }

    def _seen(self, counts: sparse.csr_matrix) -> tuple[Array, Array]:
        """Return genes of the vocabulary per cell, and those of them with a tiny median."""
        merged = counts if self.collapse is None else sparse.csr_matrix(counts @ self.collapse)
        is_seen = sparse.csr_matrix(
            ((merged.data > 0).astype(np.float32), merged.indices, merged.indptr), merged.shape
        )
        n_genes: Array = (is_seen @ self.ranker.is_known).astype(np.int64)
        n_tiny: Array = (is_seen @ self.ranker.is_tiny).astype(np.int64)
        return n_genes, n_tiny


def as_csr(values: Any) -> sparse.csr_matrix:
    """Return counts as CSR with each gene once per cell; the caller's matrix stays as it is."""
    if values.dtype.kind not in "iuf" or values.dtype.itemsize > 8:
        return raw_counts(values, where="the matrix", remedy="give raw counts")
    counts = sparse.csr_matrix(values)
    if not counts.has_canonical_format:
        counts = counts.copy()
        counts.sum_duplicates()
    return counts


def _sha256_of_set(identifiers: list[str]) -> str:
    # sorted: the order of genes does not matter to a token
    return hashlib.sha256("\n".join(sorted(identifiers)).encode()).hexdigest()
