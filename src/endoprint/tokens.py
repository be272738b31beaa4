"""A cell as a sentence: its genes, ranked by how far each is above its usual expression.

Rank-value encoding (Theodoris 2023, Nature 618:616): counts over the gene's median, highest
first, cut at the vocabulary's length. The library size divides every gene of a cell alike, so it
never changes a rank and is not asked for. Ties go by token id; upstream's order among ties is
that of an unstable sort and differs between machines.

Every cell is kept. One without any gene of the vocabulary has only its special tokens (V2,
fitted: `<cls> <eos>`) or none at all (V1), and `coverage` says so.

Shapes: n cells, G columns of a matrix.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from anndata import AnnData
from scipy import sparse

from endoprint import stored
from endoprint.config import Config, Refusal
from endoprint.curated import refuse_double_cells
from endoprint.ranks import Columns, Ranked, as_csr
from endoprint.vocabulary import Vocabulary, fetch

__all__ = ["TokenFile", "Tokens", "TokensConfig", "Vocabulary", "fetch", "of", "tokenize_file"]

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int, int], None]  # (cells done, cells in all)

log = logging.getLogger(__name__)

MINIBATCH = 1024  # cells read, ranked and written at a time: some 20 MB at 2,800 genes a cell
DENSE_BYTES = 1 << 26  # of a matrix with its zeros, at a time
COVERAGE = ["share", "n_genes", "n_tiny_medians", "is_empty"]
SCHEMA = pa.schema(
    [("cell_id", pa.string()), ("tokens", pa.list_(pa.int32())), ("n_tokens", pa.int32())]
)


class TokensConfig(Config):
    """Which vocabulary a workspace's cells are told in."""

    # training: fitted inside every fit, on its own training cells; pool: fitted once, on the pool
    # of unlabelled cells; v1, v2: Geneformer's own; else a folder or JSON
    vocabulary: str = "training"
    dictionaries: str | None = None  # folder of the official ones; null: $ENDOPRINT_DICTIONARIES
    max_length: int = 2048  # tokens per cell, specials included; for a vocabulary fitted on a pool


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of many cells, one cell after the other.

    Cell i has `values[offsets[i] : offsets[i + 1]]`. `coverage` (index cell ids): `share` of the
    cell's counts that the vocabulary knows (0 for a cell without counts), `n_genes` of it before
    the cut, `n_tiny_medians` of those (genes so rarely seen that one stray count ranks first),
    `is_empty` where there is no gene to rank.
    """

    values: Array  # int32, every token
    offsets: Array  # int64, (n + 1,)
    cell_ids: pd.Index
    coverage: pd.DataFrame
    vocabulary_sha256: str

    def __len__(self) -> int:
        return len(self.cell_ids)

    def __getitem__(self, cell: int) -> Array:
        """Return the tokens of one cell by its place."""
        return self.values[self.offsets[cell] : self.offsets[cell + 1]]

    @property
    def lengths(self) -> Array:
        """Tokens per cell, specials included, (n,), int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TokenFile:
    """What became of a file of cells: how many, how long, how well the vocabulary knew them."""

    path: str
    vocabulary: str
    vocabulary_sha256: str
    n_cells: int
    n_empty: int  # cells without a gene of the vocabulary
    n_cut: int  # cells with more genes than the vocabulary's length has room for
    n_cells_with_tiny_medians: int
    n_identifiers: int
    n_known: int
    n_case_folded: int  # identifiers known only in upper case: mouse-style symbols
    n_summed: int  # columns added to another of the same gene
    share: float  # of all counts, in the vocabulary
    lowest_share: float  # of a cell
    mean_n_tokens: float


def of(cells: AnnData, vocabulary: Vocabulary, cache: Path | None = None) -> Tokens:
    """Return the tokens of cells, in their order: the only way in for every model.

    `cells`: raw counts; identifiers in `var["ensembl_id"]`, `var["gene_ids"]` or `var_names`,
    whichever comes first. `cache`: a parquet that `tokenize_file` wrote, used only if it tells of
    these cells (fingerprint in `uns`), these genes and this vocabulary, and only if all of it
    fits; else the tokens are computed.
    """
    columns = Columns.of(cells.var, vocabulary)
    counts = as_csr(cells.X)
    coverage = columns.coverage(counts)
    frame = pd.DataFrame(coverage, index=cells.obs_names)[COVERAGE]
    found = _cached(cells, columns, coverage["n_genes"], Path(cache)) if cache else None
    if found is None:
        parts = [columns.rank(block) for block in _blocks(counts)]
        found = (
            np.concatenate([part.tokens for part in parts] or [np.empty(0, np.int32)]),
            np.concatenate([part.lengths for part in parts] or [np.empty(0, np.int64)]),
        )
    values, lengths = found
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Tokens(values, offsets, cells.obs_names, frame, vocabulary.sha256)


def tokenize_file(
    path: str | Path,
    out: str | Path,
    vocabulary: Vocabulary,
    *,
    layer: str | None = None,
    minibatch: int = MINIBATCH,
    watch: Progress | None = None,
) -> TokenFile:
    """Tokenise a file of cells into parquet, in input order, whole or not at all.

    Columns `cell_id` string, `tokens` list<int32>, `n_tokens` int32 (specials included). The
    schema's metadata names what they were made from, so that `of` can tell. Any file that
    `stored` reads; memory does not grow with the number of cells. What is stored gene by gene is
    laid out cell by cell beside `out` first, which takes up to 28 bytes per count on disk while it
    lasts. `layer`: where raw counts are (null for X, "raw", or a layer).
    """
    path, out = Path(path), Path(out)
    with ExitStack() as stack:
        try:
            scratch = Path(stack.enter_context(_scratch(out)))
        except OSError as error:
            raise _unwritten(error) from None
        found = stack.enter_context(stored.opened(path, layer=layer, scratch=scratch))
        if not found.n_cells:
            raise Refusal("there are cells to tokenise", f"none in {path.name}", "check the file")
        _refuse_double_cells(found)
        columns = Columns.of(found.var, vocabulary)
        tally = _Tally(columns)
        # Reading, hashing and writing leave Python's lock, so they go on beside the ranking.
        hasher = stack.enter_context(ThreadPoolExecutor(1))
        origin = hasher.submit(_origin, path)
        following = stack.enter_context(_read_ahead(_parts(found, minibatch)))
        parquet, later = stack.enter_context(_parquet(out))

        def keep(cell_ids: pd.Index, counts: sparse.csr_matrix, ranked: Ranked) -> None:
            parquet.write_table(_table(cell_ids, ranked))
            tally.add(columns.coverage(counts, ranked), ranked.lengths)

        n_done = 0
        while (block := following()) is not None:
            counts = as_csr(block.X)
            later(keep, block.obs_names, counts, columns.rank(counts))
            n_done += block.n_obs
            if watch is not None:
                watch(n_done, found.n_cells)
        later()
        parquet.add_key_value_metadata({**columns.about, **origin.result()})
    return tally.report(out)


def _parts(found: stored.Stored, minibatch: int) -> Iterator[AnnData]:
    """Give the cells of a file, so many at a time; fewer where zeros are stored too."""
    if isinstance(found.part(0, 1).X, np.ndarray):
        minibatch = min(minibatch, max(DENSE_BYTES // (8 * max(len(found.var), 1)), 1))
    for start in range(0, found.n_cells, minibatch):
        yield found.part(start, min(start + minibatch, found.n_cells))


def _refuse_double_cells(found: stored.Stored) -> None:
    """Refuse a cell id that stands twice, at eight bytes per cell."""
    hashes = [pd.util.hash_array(ids, categorize=False) for ids in found.all_ids()]
    in_order = np.sort(np.concatenate(hashes))
    double = in_order[1:][in_order[1:] == in_order[:-1]]
    if len(double):  # equal ids, or two that happen to share a hash
        alike = [ids[np.isin(hashed, double)] for ids, hashed in zip(found.all_ids(), hashes)]
        refuse_double_cells(pd.Index(np.concatenate(alike)))


def _blocks(counts: sparse.csr_matrix) -> Iterator[sparse.csr_matrix]:
    for start in range(0, counts.shape[0], MINIBATCH):
        yield counts[start : start + MINIBATCH]


# -- parquet ------------------------------------------------------------------------------------
@contextmanager
def _read_ahead(blocks: Iterator[AnnData]) -> Iterator[Callable[[], AnnData | None]]:
    """Give a function that returns the next block, or None, while the one after is being read."""
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(next, blocks, None)]

        def following() -> AnnData | None:
            block: AnnData | None = ahead.pop().result()
            ahead.append(reader.submit(next, blocks, None))
            return block

        yield following


@contextmanager
def _scratch(out: Path) -> Iterator[str]:
    """Give a folder beside a file, for as long as it is needed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", suffix=".rows", dir=out.parent) as folder:
        yield folder


@contextmanager
def _parquet(out: Path) -> Iterator[tuple[pq.ParquetWriter, Callable[..., None]]]:
    """Give a writer of a file that appears whole or not at all, and a hand to work it.

    The hand does one call at a time, in order, while the next is prepared; without one it waits.
    """
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    waiting: list[Future[None]] = []
    try:
        with (
            pq.ParquetWriter(
                beside,
                SCHEMA,
                # measured on tokens: the bytes of zstd without splitting, at half its cost; zstd
                # after splitting saves a tenth more bytes for a quarter more time
                compression="lz4",
                use_dictionary=False,
                column_encoding={"tokens.list.element": "BYTE_STREAM_SPLIT"},
                write_page_checksum=True,
                write_statistics=False,
                store_schema=False,  # else metadata added at the end are not in the schema's
            ) as parquet,
            ThreadPoolExecutor(1) as hand,
        ):

            def later(call: Callable[..., None] | None = None, *arguments: Any) -> None:
                if waiting:
                    waiting.pop().result()
                if call is not None:
                    waiting.append(hand.submit(call, *arguments))

            yield parquet, later
        os.replace(beside, out)
    except OSError as error:
        raise _unwritten(error) from None
    finally:
        beside.unlink(missing_ok=True)


def _unwritten(error: OSError) -> Refusal:
    return Refusal(
        "tokens are written whole or not at all", str(error), "make room, or name another file"
    )


def _table(cell_ids: pd.Index, ranked: Ranked) -> pa.Table:
    offsets = np.concatenate([[0], np.cumsum(ranked.lengths)]).astype(np.int32)
    tokens = pa.ListArray.from_arrays(offsets, ranked.tokens)
    n_tokens = pa.array(ranked.lengths.astype(np.int32))
    return pa.Table.from_arrays([pa.array(cell_ids, pa.string()), tokens, n_tokens], schema=SCHEMA)


def _origin(path: Path) -> dict[str, str]:
    """Say which cells a file holds: curation's fingerprint, else the sha256 of the file."""
    if not path.is_file():
        return {}
    with h5py.File(path) as file:
        stored = file.get("uns/endoprint/fingerprint")
        if isinstance(stored, h5py.Dataset):
            return {"cells_fingerprint": str(stored.asstr()[()])}
    with path.open("rb") as source:  # half the cost of md5 where the processor helps
        return {"source_sha256": hashlib.file_digest(source, "sha256").hexdigest()}


def _cached(
    cells: AnnData, columns: Columns, n_genes: Array, cache: Path
) -> tuple[Array, Array] | None:
    """Return (tokens, tokens per cell) from a parquet, or None if it does not fit in any way."""
    fingerprint = str(cells.uns.get("endoprint", {}).get("fingerprint", ""))
    if not (cache.is_file() and fingerprint and cells.obs_names.is_unique):
        return None
    wanted = {**columns.about, "cells_fingerprint": fingerprint}
    vocabulary = columns.vocabulary
    room = columns.ranker.room
    due = np.minimum(n_genes, room) + vocabulary.max_length - room
    try:
        # checksums of every page: a flipped bit is an error, not another gene
        with pq.ParquetFile(cache, page_checksum_verification=True) as parquet:
            told = {
                k.decode(): v.decode() for k, v in (parquet.schema_arrow.metadata or {}).items()
            }
            if any(told.get(name) != value for name, value in wanted.items()):
                log.info("tokens in %s are of other cells, genes or vocabulary: made anew", cache)
                return None
            found = _joined(parquet, pd.Index(cells.obs_names), due)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        log.warning("tokens in %s are damaged (%s): made anew", cache, error)
        return None
    if found is None or (len(found) and not 0 <= found.min() <= found.max() < len(vocabulary)):
        log.warning("tokens in %s do not fit these cells: made anew", cache)
        return None
    return found, due


def _joined(parquet: pq.ParquetFile, cell_ids: pd.Index, due: Array) -> Array | None:
    """Return the tokens of `cell_ids`, `due` per cell, or None if any is missing or else long."""
    offsets = np.concatenate([[0], np.cumsum(due, dtype=np.int64)])
    values = np.empty(offsets[-1], dtype=np.int32)
    is_missing = np.ones(len(cell_ids), dtype=bool)
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, use_threads=False).combine_chunks()
        if not table.num_rows:
            continue
        places = cell_ids.get_indexer(pd.Index(table["cell_id"].to_pandas()))
        lists = table["tokens"].chunk(0)
        ends, tokens = lists.offsets.to_numpy(), lists.values.to_numpy()
        for row in np.flatnonzero(places >= 0):
            place = places[row]
            if ends[row + 1] - ends[row] != due[place] or not is_missing[place]:
                return None
            values[offsets[place] : offsets[place + 1]] = tokens[ends[row] : ends[row + 1]]
            is_missing[place] = False
    return None if is_missing.any() else values


# -- the report ---------------------------------------------------------------------------------
class _Tally:
    """Adds up what `TokenFile` reports, block by block."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.n_cells = self.n_empty = self.n_cut = self.n_tiny = self.n_tokens = 0
        self.n_counts = self.n_inside = 0.0
        self.lowest_share = 1.0

    def add(self, coverage: dict[str, Array], lengths: Array) -> None:
        self.n_cells += len(lengths)
        self.n_tokens += int(lengths.sum())
        self.n_empty += int(coverage["is_empty"].sum())
        self.n_tiny += int((coverage["n_tiny_medians"] > 0).sum())
        self.n_counts += float(coverage["n_counts"].sum())
        self.n_inside += float((coverage["share"] * coverage["n_counts"]).sum())
        self.lowest_share = min(self.lowest_share, float(coverage["share"].min()))
        self.n_cut += int((coverage["n_genes"] > self.columns.ranker.room).sum())

    def report(self, path: Path) -> TokenFile:
        columns = self.columns
        return TokenFile(
            path=str(path),
            vocabulary=columns.vocabulary.name,
            vocabulary_sha256=columns.vocabulary.sha256,
            n_cells=self.n_cells,
            n_empty=self.n_empty,
            n_cut=self.n_cut,
            n_cells_with_tiny_medians=self.n_tiny,
            n_identifiers=len(columns.tokens),
            n_known=int((columns.tokens >= 0).sum()),
            n_case_folded=columns.n_case_folded,
            n_summed=columns.n_summed,
            share=self.n_inside / self.n_counts if self.n_counts else 0.0,
            lowest_share=self.lowest_share,
            mean_n_tokens=self.n_tokens / self.n_cells,
        )
