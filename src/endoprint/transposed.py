"""Cells that a file stores gene by gene, laid out cell by cell on disk in flat memory.

A column-stored matrix and a 10x matrix.mtx can not be read from the middle. Their entries are
dealt into buckets of consecutive cells, then every bucket is sorted in memory.
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from endoprint.config import Refusal

Array = np.ndarray[Any, np.dtype[Any]]
Entries = tuple[Array, Array, Array]  # cell, gene, value

BUCKET_ENTRIES = 1 << 22  # sorted in memory at once: about 64 MB
READ_ENTRIES = 1 << 21
ENTRY = np.dtype([("cell", "<u4"), ("gene", "<u4"), ("value", "<f8")])


def lay_out(
    entries: Iterator[Entries], path: Path, *, n_cells: int, n_genes: int, n_entries: int
) -> None:
    """Write entries of any order as HDF5: `indptr` (int64), `indices`, `data`; whole or not.

    Within a cell, entries keep the order in which they came.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.buckets")
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    cells_per_bucket = max(1, int(n_cells * BUCKET_ENTRIES / max(n_entries, 1)))
    try:
        for cell, gene, value in entries:
            _deal(cell, gene, value, cells_per_bucket, scratch)
        with h5py.File(beside, "w") as file:
            file["shape"] = np.array([n_cells, n_genes])
            indices = file.create_dataset(
                "indices", (0,), "<u4", maxshape=(None,), chunks=(65536,)
            )
            data = file.create_dataset("data", (0,), "<f8", maxshape=(None,), chunks=(65536,))
            indptr = np.zeros(n_cells + 1, dtype=np.int64)
            for start in range(0, n_cells, cells_per_bucket):
                found = _bucket(scratch / str(start // cells_per_bucket))
                found = found[np.argsort(found["cell"], kind="stable")]
                stop = min(start + cells_per_bucket, n_cells)
                indptr[start + 1 : stop + 1] = np.bincount(
                    found["cell"] - start, minlength=stop - start
                )
                _append(indices, found["gene"])
                _append(data, found["value"])
            file["indptr"] = np.cumsum(indptr)
        os.replace(beside, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        beside.unlink(missing_ok=True)


def by_gene(group: Any) -> Iterator[Entries]:
    """Yield the entries of a column-stored matrix (CSC of cells x genes), HDF5's or zarr's."""
    indptr = np.asarray(group["indptr"][:], dtype=np.int64)
    n_entries = int(indptr[-1])
    for start in range(0, n_entries, READ_ENTRIES):
        stop = min(start + READ_ENTRIES, n_entries)
        gene = np.searchsorted(indptr, np.arange(start, stop), side="right") - 1
        yield group["indices"][start:stop], gene, group["data"][start:stop]


def of_mtx(path: Path, *, n_cells: int, n_genes: int) -> Iterator[Entries]:
    """Yield the entries of a MatrixMarket file of genes x cells (CellRanger 3), gzipped or not."""
    rule = "matrix.mtx lists gene, cell and count, as its header says"
    parts = pd.read_csv(
        path, sep=" ", comment="%", header=None, skiprows=_head_lines(path) + 1,
        names=["gene", "cell", "value"], dtype=np.float64, chunksize=READ_ENTRIES,
    )  # fmt: skip
    for part in parts:
        gene, cell = part["gene"].to_numpy(), part["cell"].to_numpy()
        is_off = ~((gene >= 1) & (gene <= n_genes) & (cell >= 1) & (cell <= n_cells))
        if is_off.any():
            first = part[is_off].iloc[0].to_list()
            raise Refusal(rule, f"an entry {first} of {n_genes} x {n_cells}", "copy it again")
        yield cell.astype(np.int64) - 1, gene.astype(np.int64) - 1, part["value"].to_numpy()


def mtx_shape(path: Path) -> tuple[int, int, int]:
    """Return genes, cells and entries as the header of a MatrixMarket file says."""
    rule = "matrix.mtx is a MatrixMarket coordinate matrix of genes x cells"
    n = _head_lines(path)
    try:
        head = pd.read_csv(path, sep=" ", header=None, skiprows=n, nrows=1, dtype=np.int64)
        n_genes, n_cells, n_entries = (int(value) for value in head.iloc[0])
    except (ValueError, OSError, EOFError, IndexError) as error:
        raise Refusal(rule, str(error).split("\n")[0][:160], "copy it again") from None
    return n_genes, n_cells, n_entries


def _head_lines(path: Path) -> int:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as text:
        for number, line in enumerate(text):
            if number == 0 and not line.startswith("%%MatrixMarket matrix coordinate"):
                break
            if not line.startswith("%"):
                return number
    raise Refusal(
        "matrix.mtx is a MatrixMarket coordinate matrix of genes x cells",
        f"{path.name}, which is another text",
        "give CellRanger's filtered_feature_bc_matrix",
    )


def _deal(cell: Array, gene: Array, value: Array, cells_per_bucket: int, scratch: Path) -> None:
    """Append entries to the files of the buckets that their cells belong to."""
    if np.issubdtype(value.dtype, np.complexfloating) or value.dtype.kind not in "biuf":
        raise Refusal("X must hold raw counts", f"values of type {value.dtype}", "export it again")
    dealt = np.empty(len(cell), dtype=ENTRY)
    dealt["cell"], dealt["gene"], dealt["value"] = cell, gene, value
    bucket = dealt["cell"] // cells_per_bucket
    order = np.argsort(bucket, kind="stable")
    dealt, bucket = dealt[order], bucket[order]
    edges = np.flatnonzero(np.diff(bucket)) + 1
    for part in np.split(np.arange(len(dealt)), edges):
        if len(part):
            with (scratch / str(bucket[part[0]])).open("ab") as file:
                dealt[part[0] : part[-1] + 1].tofile(file)


def _bucket(path: Path) -> Array:
    return np.fromfile(path, dtype=ENTRY) if path.exists() else np.empty(0, dtype=ENTRY)


def _append(dataset: Any, values: Array) -> None:
    n = dataset.shape[0]
    dataset.resize((n + len(values),))
    dataset[n:] = values
