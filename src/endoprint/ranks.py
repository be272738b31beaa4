"""From counts to ranked tokens, fast and exact: highest count over median first.

Each gene of a cell becomes one 64-bit integer: the leading bits of its key above, its token
below. Sorting integers is what processors do best (numpy uses their vector units), and ties fall
by token id on their own. What the leading bits can not tell apart is compared again in full.
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


class Ranker:
    """Ranks the genes of cells whose matrix has given tokens as columns.

    `tokens` int32 (G,): the token of each column, -1 for none; no token twice.
    """

    def __init__(self, tokens: Array, vocabulary: Vocabulary) -> None:
        n_specials = len(vocabulary.specials)
        is_known = tokens >= 0
        # Columns without a token are divided by infinity: their key is 0, below every gene's.
        self._median = np.full(len(tokens), np.inf)
        self._median[is_known] = vocabulary.medians[tokens[is_known] - n_specials]
        self._token = np.where(is_known, tokens, 0).astype(np.int64)
        self.is_known = is_known.astype(np.float32)
        self.is_tiny = (self._median < TINY_MEDIAN).astype(np.float32)
        self._head = [] if vocabulary.cls_id is None else [vocabulary.cls_id]
        self._tail = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
        self.room = vocabulary.max_length - len(self._head) - len(self._tail)
        self._token_bits = (len(vocabulary) - 1).bit_length()
        # the smallest key there can be: one count of the gene with the largest median
        self._lowest = int(np.float64(1.0 / vocabulary.medians.max()).view(np.int64))
        self._median_of_token = np.concatenate([np.zeros(n_specials), vocabulary.medians])
        self._key_of_token = np.zeros(len(vocabulary))
        self._make_room(0)

    def rank(self, data: Array, indices: Array, indptr: Array) -> tuple[Array, Array] | None:
        """Return (tokens of all cells int32, tokens per cell int64) of CSR arrays.

        None where the data are no raw counts. Stored zeros are not expressed. A column stands at
        most once in a cell.
        """
        n_cells, n_head, n_tail = len(indptr) - 1, len(self._head), len(self._tail)
        entries = np.minimum(np.diff(indptr), self.room)
        out = np.empty(int(entries.sum()) + n_cells * (n_head + n_tail), dtype=np.int32)
        lengths = np.empty(n_cells, dtype=np.int64)
        filled, cell = 0, 0
        while cell < n_cells:
            start = int(indptr[cell])
            stop_cell = int(np.searchsorted(indptr, start + STRETCH, side="right")) - 1
            stop_cell = min(max(stop_cell, cell + 1), n_cells)
            stop = int(indptr[stop_cell])
            bounds = (indptr[cell : stop_cell + 1] - start).tolist()
            if not self._pack(data[start:stop], indices[start:stop]):
                return None
            for ranked in self._sort(bounds):
                end = filled + n_head + len(ranked) + n_tail
                out[filled : filled + n_head] = self._head
                out[filled + n_head : end - n_tail] = ranked
                out[end - n_tail : end] = self._tail
                lengths[cell] = end - filled
                filled, cell = end, cell + 1
        return out[:filled], lengths

    def _make_room(self, n: int) -> None:
        self._keys_buffer = np.empty(n)
        self._packed_buffer = np.empty(n, dtype=np.int64)
        self._tokens_buffer = np.empty(n, dtype=np.int64)

    def _pack(self, data: Array, indices: Array) -> bool:
        """Fill `_packed`: ascending order is descending key, then ascending token."""
        n = len(data)
        if n > len(self._keys_buffer):
            self._make_room(max(n, STRETCH))
        keys, packed = self._keys_buffer[:n], self._packed_buffer[:n]
        tokens = self._tokens_buffer[:n]
        if n and not _are_counts(data, keys.view(data.dtype)[:n]):
            return False
        # float64: in float32, neighbours that are not ties swap in 0.2-1 % of real cells, and in
        # 16 % of deep ones (measured), for count/median of two genes may differ in the 8th digit.
        np.take(self._median, indices, out=keys, mode="clip")
        np.divide(data, keys, out=keys)
        # The bits of positive floats are ordered as the floats are.
        bits = keys.view(np.int64)
        highest = max(int(bits.max()), self._lowest) if n else self._lowest
        self._shift = max(0, (highest - self._lowest).bit_length() - (62 - self._token_bits))
        beyond = ((highest - self._lowest) >> self._shift) + 1  # where key 0 goes
        np.subtract(highest, bits, out=packed)
        np.right_shift(packed, self._shift, out=packed)
        np.minimum(packed, beyond, out=packed)
        np.left_shift(packed, self._token_bits, out=packed)
        np.take(self._token, indices, out=tokens, mode="clip")
        np.bitwise_or(packed, tokens, out=packed)
        self._end = beyond << self._token_bits
        self._keys, self._tokens, self._packed = keys, tokens, packed
        return True

    def _sort(self, bounds: list[int]) -> list[Array]:
        """Return the ranked tokens of each cell of the stretch, cut to the room there is."""
        packed = self._packed
        n_genes = []
        for start, stop in zip(bounds[:-1], bounds[1:]):
            cell = packed[start:stop]
            cell.sort()
            n_genes.append(int(cell.searchsorted(self._end)))
        if self._shift:
            self._settle(np.array(bounds), n_genes)
        packed &= (1 << self._token_bits) - 1
        return [
            packed[start : start + min(n, self.room)] for start, n in zip(bounds[:-1], n_genes)
        ]

    def _settle(self, bounds: Array, n_genes: list[int]) -> None:
        """Rank again, by full keys, every cell where equal leading bits hid unequal keys."""
        packed = self._packed
        mask = (1 << self._token_bits) - 1
        alike = packed[1:] ^ packed[:-1] <= mask
        places = np.flatnonzero(alike) + 1  # each with its predecessor
        upper, lower = packed[places - 1], packed[places]
        # Where medians are equal the keys are: unequal counts would differ in the leading bits.
        same_median = self._median_of_token[upper & mask] == self._median_of_token[lower & mask]
        doubtful = ~same_median & (lower < self._end)
        places = places[doubtful]
        if not len(places):
            return
        cells = np.searchsorted(bounds, places, side="right") - 1
        for cell in np.unique(cells):
            start, stop = bounds[cell], bounds[cell + 1]
            tokens, keys = self._tokens[start:stop], self._keys[start:stop]
            self._key_of_token[tokens] = keys
            here = places[(cells == cell) & (places > start)]
            upper, lower = packed[here - 1] & mask, packed[here] & mask
            if (self._key_of_token[upper] != self._key_of_token[lower]).any():
                order = np.lexsort((tokens, -keys))[: n_genes[cell]]
                packed[start : start + n_genes[cell]] = tokens[order]


def _are_counts(data: Array, room: Array) -> bool:
    """Whether all are finite whole numbers from zero; `room` is of the same type and length."""
    if not (data.min() >= 0 and data.max() < np.inf):  # also false for NaN
        return False
    if np.issubdtype(data.dtype, np.integer):
        return True
    np.rint(data, out=room)
    return bool((room == data).all())


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

    def rank(self, counts: sparse.csr_matrix) -> tuple[Array, Array]:
        """Return (tokens of all cells, tokens per cell)."""
        merged = counts if self.collapse is None else sparse.csr_matrix(counts @ self.collapse)
        ranked = self.ranker.rank(merged.data, merged.indices, merged.indptr)
        if ranked is None:
            # refused there, in the words curation has for it
            raw_counts(counts, where="the matrix", remedy="name the layer of raw counts")
            raise Refusal("the matrix must hold raw counts", "other values", "give raw counts")
        return ranked

    def coverage(self, counts: sparse.csr_matrix) -> dict[str, Array]:
        """Return the columns of `Tokens.coverage`, and `n_counts` summed over all columns."""
        # in the counts' own type: scipy would copy a matrix to multiply it with another
        kind = counts.dtype if counts.dtype.kind == "f" else np.dtype(np.float64)
        n_counts = (counts @ np.ones(counts.shape[1], dtype=kind)).astype(np.float64)
        n_inside = counts @ (self.tokens >= 0).astype(kind)
        with np.errstate(invalid="ignore"):  # infinite counts: refused where they are ranked
            share = np.divide(n_inside, n_counts, out=np.zeros(len(n_counts)), where=n_counts > 0)
        merged = counts if self.collapse is None else sparse.csr_matrix(counts @ self.collapse)
        is_seen = sparse.csr_matrix(
            ((merged.data > 0).astype(np.float32), merged.indices, merged.indptr), merged.shape
        )
        n_genes = (is_seen @ self.ranker.is_known).astype(np.int64)
        n_tiny = np.zeros_like(n_genes)
        if self.ranker.is_tiny.any():
            n_tiny = (is_seen @ self.ranker.is_tiny).astype(np.int64)
        return {
            "share": share,
            "n_genes": n_genes,
            "n_tiny_medians": n_tiny,
            "is_empty": n_genes == 0,
            "n_counts": n_counts,
        }


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
