"""The data contract: what curated cells are, on disk and in memory, and how models read them.

Curated cells are AnnData: `X` raw counts (CSR float32, whole numbers, no stored zeros, sorted),
`var_names` unique gene ids, `obs_names` unique cell ids, `obs` plain text columns with `n_counts`
(the true library size) and `n_genes`. Shapes: n cells, K genes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, write_elem
from scipy import sparse

from endoprint.config import Refusal
from endoprint.genes import HUMAN, remap

Array = np.ndarray[Any, np.dtype[Any]]

TARGET_SUM = 1e4  # counts per cell after scaling; the field's habit (scanpy, Geneformer)
LEAST_GENE_SHARE = 0.05  # of a model's genes; cells with fewer ask another question (a guess)
EXACT_IN_FLOAT32 = 2**24  # whole numbers above are no longer all representable
LOOKED_AT = 1 << 16  # values checked at once: what fits a core's cache
IMPOSSIBLE = (  # why a cell's values can be no counts
    "counts that are no numbers", "negative counts", "fractions among the counts",
    "a count too large to be one",
)  # fmt: skip
REQUIRED = ("unit", "n_counts", "n_genes")


def raw_counts(values: Any, *, where: str, remedy: str, copy: bool = True) -> sparse.csr_matrix:
    """Return a copy of a matrix as raw counts (n, K), or refuse what counts can not be.

    Takes dense, CSR or CSC of any number type; `where` and `remedy` word the refusal. Without
    `copy` the result may share its arrays with `values`, which are then not to be changed.
    """
    rule = f"{where} must hold raw counts: whole numbers from zero"
    if getattr(values, "ndim", 2) != 2:
        raise Refusal(rule, f"an array of {values.ndim} dimensions", remedy)
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == bool):
        raise Refusal(rule, f"values of type {values.dtype}", remedy)
    is_array = isinstance(values, np.ndarray)
    stored = sparse.csr_matrix(np.asarray(values) if is_array else values)
    if not stored.has_canonical_format:
        stored = stored.copy()
        stored.sum_duplicates()
    data = stored.data
    if np.issubdtype(data.dtype, np.complexfloating):
        raise Refusal(rule, f"values of type {data.dtype}", remedy)
    low, high, is_whole = _looked_at(data)
    if not (np.isfinite(low) and np.isfinite(high)):  # one NaN is the least and the greatest
        bad = data[~np.isfinite(data)]
        raise Refusal(rule, f"{len(bad)} values such as {bad[0]}", remedy)
    if low < 0:
        raise Refusal(rule, f"{int((data < 0).sum())} negative values such as {low}", remedy)
    if not is_whole:
        broken = data != np.rint(data)
        raise Refusal(
            rule,
            f"{broken.mean():.0%} fractions such as {float(data[broken][0]):.4g} "
            "(normalised or log-transformed?)",
            remedy,
        )
    if high >= EXACT_IN_FLOAT32:
        raise Refusal(rule, f"a count of {high:.0f}", "counts must be below 16,777,216")
    counts = stored.astype(np.float32, copy=copy or low == 0)
    if low == 0:
        counts.eliminate_zeros()
    counts.has_canonical_format = True  # as `stored` is: sorted, no entry twice
    return counts


def _looked_at(data: Array) -> tuple[Any, Any, bool]:
    """Return the least and the greatest value, NaN if there is one, and whether all are whole.

    Some at a time: the memory that whole passes would take costs more than the passes.
    """
    parts = [data[start : start + LOOKED_AT] for start in range(0, len(data), LOOKED_AT)]
    is_float = not (np.issubdtype(data.dtype, np.integer) or data.dtype == bool)
    is_whole = not is_float or all(np.array_equal(part, np.rint(part)) for part in parts)
    if not parts:
        return 0, 0, True
    low, high = np.array([(part.min(), part.max()) for part in parts]).T
    return low.min(), high.max(), is_whole


def possible_counts(values: Any, *, where: str, remedy: str) -> tuple[sparse.csr_matrix, Array]:
    """Return raw counts (n, K) and, per cell, why its values can be none ("" where they can).

    A cell that holds one impossible value is emptied, not mended. A matrix that holds no numbers
    at all is refused, as by `raw_counts`. The counts may share their arrays with `values`.
    """
    reason: Array = np.full(values.shape[0], "", dtype=object)
    try:
        return raw_counts(values, where=where, remedy=remedy, copy=False), reason
    except Refusal:
        if values.ndim != 2 or not (values.dtype == bool or values.dtype.kind in "iuf"):
            raise
    stored = sparse.csr_matrix(np.asarray(values) if isinstance(values, np.ndarray) else values)
    stored = stored.copy()
    stored.sum_duplicates()
    cell = np.repeat(np.arange(stored.shape[0]), np.diff(stored.indptr))
    data = stored.data
    wrong = (~np.isfinite(data), data < 0, data != np.rint(data), data >= EXACT_IN_FLOAT32)
    for why, is_wrong in zip(IMPOSSIBLE, wrong):
        held = np.isin(np.arange(len(reason)), cell[is_wrong])
        reason[held & (reason == "")] = why
    stored.data[np.isin(cell, np.flatnonzero(reason != ""))] = 0
    return raw_counts(stored, where=where, remedy=remedy), reason


def fingerprint(cells: AnnData) -> str:
    """Return a sha256 over cell ids, gene ids and counts: the identity of what was measured."""
    digest = hashlib.sha256()
    for names in (cells.obs_names, cells.var_names):
        digest.update("\n".join(map(str, names)).encode() + b"\0")
    counts = _csr(cells)
    digest.update(np.asarray(counts.indptr, dtype="<i8").tobytes())
    for start in range(0, counts.nnz, 1 << 22):  # bounds memory
        part = slice(start, start + (1 << 22))
        digest.update(np.asarray(counts.indices[part], dtype="<i8").tobytes())
        digest.update(np.asarray(counts.data[part], dtype="<f4").tobytes())
    return digest.hexdigest()


def matrix(cells: AnnData, genes: Sequence[str]) -> sparse.csr_matrix:
    """Return raw counts (n, len(genes)) in the order of `genes`, joined by gene id.

    Genes the cells do not have are zero columns; genes not asked for are left out.
    """
    place = pd.Index(genes)
    if not place.is_unique:
        raise Refusal(
            "the genes asked for are unique", str(place[place.duplicated()][0]), "drop doubles"
        )
    counts = _csr(cells)
    if len(place) == cells.n_vars and place.equals(pd.Index(cells.var_names)):
        return counts.copy()
    return remap(counts, place.get_indexer(pd.Index(cells.var_names)), len(place))


def log_normalised(cells: AnnData, genes: Sequence[str]) -> sparse.csr_matrix:
    """Return log1p(10,000 x count / library size), (n, len(genes)), float32.

    The library size is `n_counts`, not the sum over `genes`: a panel's share is information.
    """
    counts = matrix(cells, genes)
    total = cells.obs["n_counts"].to_numpy(dtype=np.float64)
    scale = np.divide(TARGET_SUM, total, out=np.zeros_like(total), where=total > 0)
    per_value = np.repeat(scale, np.diff(counts.indptr))
    counts.data = np.log1p(counts.data * per_value).astype(np.float32)
    return counts


def from_frame(frame: pd.DataFrame) -> AnnData:
    """Make unlabelled cells from a table of raw counts: index cell ids, columns genes.

    A column `n_counts`, if there is one, is the true library size; else the sum over all genes.
    """
    ids = pd.Index(frame.index.astype(str))
    refuse_double_cells(ids)
    genes = frame.drop(columns="n_counts") if "n_counts" in frame else frame
    if not genes.shape[1]:
        raise Refusal("a table of counts has gene columns", "none", "one column per gene")
    names = [
        match.group(1) if (match := HUMAN.match(str(name))) else str(name)
        for name in genes.columns
    ]
    kept = pd.Index(names).unique()
    counts = raw_counts(genes.to_numpy(), where="the table", remedy="give raw counts")
    counts = remap(counts, kept.get_indexer(pd.Index(names)), len(kept))
    total = sums(counts)
    if "n_counts" in frame:
        total = library_size(frame["n_counts"], at_least=total, key="n_counts")
    obs = pd.DataFrame(
        {"unit": "", "sample": "all cells", "n_counts": total, "n_genes": np.diff(counts.indptr)},
        index=ids,
    )
    return AnnData(X=counts, obs=obs, var=pd.DataFrame(index=kept))


def as_cells(given: pd.DataFrame | AnnData, genes: Sequence[str]) -> AnnData:
    """Return what a caller hands over as cells, refusing what shares hardly a gene with `genes`.

    Unknown genes count as not measured, so that a table by symbols would be answered from silence.
    """
    if isinstance(given, pd.DataFrame):
        cells = from_frame(given)
    elif isinstance(given, AnnData):
        cells = given
        check(cells, where="the cells")
    else:
        raise Refusal(
            "cells are a table of counts, or curated",
            type(given).__name__,
            "give a DataFrame: index cell ids, columns Ensembl ids",
        )
    known = float((cells.var_names.get_indexer(list(genes)) >= 0).mean())
    if known < LEAST_GENE_SHARE:
        raise Refusal(
            f"cells have at least {LEAST_GENE_SHARE:.0%} of the model's genes",
            f"{known:.1%} of {len(genes)} (columns start {', '.join(cells.var_names[:3])})",
            "name the columns by Ensembl ids, not symbols",
        )
    return cells


def sums(counts: sparse.csr_matrix) -> Array:
    """Return counts per cell, (n,), float64."""
    total: Array = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    return total


def library_size(values: pd.Series, *, at_least: Array, key: str) -> Array:
    """Return the true number of counts per cell, (n,), or refuse what it can not be."""
    rule = f"library size {key!r} is the number of all counts of a cell"
    try:
        total = values.astype(str).astype(float).to_numpy()
    except ValueError as error:
        raise Refusal(rule, str(error), "name a numeric column, or null for the sum") from None
    if not np.isfinite(total).all():
        n_bad = int((~np.isfinite(total)).sum())
        raise Refusal(rule, f"{n_bad} cells without", "fill them in, or null for the sum")
    whole = np.rint(total)
    # totals recovered from normalised values miss whole numbers by rounding (1e-14 seen)
    total = np.where(np.abs(total - whole) < 1e-6 * np.maximum(whole, 1), whole, total)
    short = total < at_least * (1 - 1e-6)
    if short.any():
        first = int(np.flatnonzero(short)[0])
        raise Refusal(
            rule + ", so no less than its counts in this file",
            f"{total[first]:g} against {at_least[first]:g} in cell {values.index[first]!r} "
            f"({int(short.sum())} cells)",
            "name another column, or null for the sum",
        )
    return total


def md5(path: str | Path) -> str:
    """Return the md5 of a file's bytes, the digest DVC knows it by."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def write(cells: AnnData, path: str | Path) -> None:
    """Write curated cells as h5ad: whole or not at all, equal cells as equal bytes."""
    path = Path(path)
    check(cells, where="cells to write")
    obs = cells.obs.copy()
    for name in obs.columns:
        if obs[name].dtype == object or isinstance(obs[name].dtype, pd.StringDtype):
            # sorted categories: the bytes must not depend on the order of appearance
            obs[name] = pd.Categorical(obs[name].astype(str))
    out = AnnData(X=_csr(cells), obs=obs, var=cells.var.copy(), uns=_in_order(cells.uns))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with h5py.File(beside, "w") as file:
            # not compressed: lzf's bytes depend on what its table held before, gzip's on the
            # library's build, and every fit reads this file (a fourth of the time lzf takes)
            write_elem(file, "/", out)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | Path) -> AnnData:
    """Read curated cells and check that they keep the contract."""
    path = Path(path)
    remedy = "make them with `endoprint curate`"
    if not path.is_file():
        raise Refusal("curated cells are an h5ad file", f"none at {path}", remedy)
    try:
        with h5py.File(path) as file:
            cells = read_elem(file["/"])
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise Refusal("curated cells are an h5ad file", str(error)[:200], remedy) from None
    if not isinstance(cells, AnnData):
        raise Refusal("curated cells are an h5ad file", f"{path.name} holds none", remedy)
    for frame in (cells.obs, cells.var):
        for name in frame.columns:
            if isinstance(frame[name].dtype, pd.CategoricalDtype):
                frame[name] = frame[name].astype(str).astype(object)
    check(cells, where=path.name)
    return cells


def check(cells: AnnData, *, where: str) -> None:
    """Refuse cells that do not keep the contract."""
    rule, remedy = f"{where}: curated cells", "curate the original file again"
    missing = [name for name in REQUIRED if name not in cells.obs]
    if missing:
        raise Refusal(f"{rule} have obs columns {', '.join(REQUIRED)}", f"no {missing[0]}", remedy)
    refuse_double_cells(pd.Index(cells.obs_names))
    if not cells.var_names.is_unique:
        raise Refusal(f"{rule} have unique gene ids", "duplicates", remedy)
    counts = cells.X
    if not isinstance(counts, sparse.csr_matrix) or counts.dtype != np.float32:
        kind = f"{type(counts).__name__} of {getattr(counts, 'dtype', 'nothing')}"
        raise Refusal(f"{rule} hold CSR float32 counts", kind, remedy)
    data = counts.data
    if len(data) and (
        not np.isfinite(data).all() or data.min() <= 0 or (data != np.rint(data)).any()
    ):
        raise Refusal(f"{rule} hold whole counts, no stored zeros", "other values", remedy)
    total = cells.obs["n_counts"].to_numpy(dtype=float)
    if (total < sums(counts) * (1 - 1e-6)).any():
        raise Refusal(f"{rule} have n_counts no less than their counts", "less", remedy)


def _csr(cells: AnnData) -> sparse.csr_matrix:
    counts = cells.X
    return counts if isinstance(counts, sparse.csr_matrix) else sparse.csr_matrix(counts)


def _in_order(values: Mapping[str, Any]) -> dict[str, Any]:
    """HDF5 lays groups out as they come: the order of keys would change the bytes."""
    return {
        key: _in_order(value) if isinstance(value, Mapping) else value
        for key, value in sorted(values.items())
    }


def refuse_double_cells(ids: pd.Index) -> None:
    """Refuse a list of cell ids that names a cell twice."""
    if not ids.is_unique:
        double = ids[ids.duplicated()]
        raise Refusal(
            "cell ids are unique",
            f"{len(double)} repeated, such as {double[0]!r}",
            "add the run to the cell id (barcodes repeat across runs)",
        )
