"""Cells of a file on disk, any range of them at a time, in memory that does not grow with it.

h5ad and zarr (row-stored, column-stored or dense), 10x .h5, and a 10x folder of matrix.mtx.
Only the columns of `obs` that are asked for are read, and only of the cells asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.io import read_elem
from filelock import FileLock
from scipy import sparse

from endoprint import sources, transposed
from endoprint.config import Refusal

Array = np.ndarray[Any, np.dtype[Any]]

MTX = ("matrix.mtx.gz", "matrix.mtx")
IDS_AT_ONCE = 1 << 16


class Stored:
    """An open file of cells: how many, which genes, and any range of rows."""

    def __init__(
        self, *, name: str, n_cells: int, var: pd.DataFrame, ids: Any, columns: Any, rows: Any
    ) -> None:
        self.name, self.n_cells, self.var = name, n_cells, var
        self._ids, self._columns, self._rows = ids, columns, rows

    def ids(self, start: int, stop: int) -> Array:
        """Return the ids of a range of cells, text."""
        with sources.readable(Path(self.name)):
            return np.asarray([str(each) for each in self._ids(start, stop)], dtype=object)

    def all_ids(self) -> Iterator[Array]:
        """Yield all cell ids in order, some at a time."""
        for start in range(0, self.n_cells, IDS_AT_ONCE):
            yield self.ids(start, min(start + IDS_AT_ONCE, self.n_cells))

    def obs(self, start: int, stop: int) -> pd.DataFrame:
        """Return what is known about a range of cells: the columns asked for that there are."""
        index = pd.Index(self.ids(start, stop))
        with sources.readable(Path(self.name)):
            columns = {
                name: np.asarray(values) for name, values in self._columns(start, stop).items()
            }
            return pd.DataFrame(columns, index)

    def part(self, start: int, stop: int) -> AnnData:
        """Return a range of cells; `X` is the matrix asked for, as stored (CSR or dense)."""
        with sources.readable(Path(self.name)):
            obs, rows = self.obs(start, stop), self._rows(start, stop)
            if rows.shape != (len(obs), len(self.var)):
                raise Refusal(
                    "counts have a row per cell and a column per gene",
                    f"{rows.shape[0]} x {rows.shape[1]} for {len(obs)} x {len(self.var)}",
                    "check that the file was copied whole",
                )
            return AnnData(X=rows, obs=obs, var=self.var)


@contextmanager
def opened(
    path: Path, *, layer: str | None, columns: Sequence[str] = (), obs_table: str = "",
    scratch: Path,
) -> Iterator[Stored]:  # fmt: skip
    """Open a file of cells; `layer` as in `cells.layer`, `columns` of `obs` as far as it has them.

    What is not stored by rows is laid out anew in the folder `scratch`, once. `obs_table` is a
    CSV beside the file whose columns are joined by cell id, if there is one.
    """
    with ExitStack() as stack:
        if is_mtx(path):
            found = _of_mtx(path, layer, scratch, stack)
        elif sources.is_zarr(path):
            with sources.readable(path):
                group = zarr.open_group(str(path), mode="r")
            found = _of_anndata(group, path, layer, columns, scratch, stack)
        else:
            file = stack.enter_context(sources.open_hdf5(path))
            with sources.readable(path):  # not what the caller does: its errors are its own
                found = _of_hdf5(file, path, layer, columns, scratch, stack)
        beside = path.parent / obs_table
        yield _joined(found, beside, columns) if obs_table and beside.is_file() else found


def is_mtx(path: Path) -> bool:
    """Say whether a folder is CellRanger's: matrix, barcodes and features as text."""
    return path.is_dir() and any((path / name).is_file() for name in MTX)


# -- kinds --------------------------------------------------------------------------------------
def _of_hdf5(
    file: h5py.File, path: Path, layer: str | None, columns: Sequence[str], scratch: Path,
    stack: ExitStack,
) -> Stored:  # fmt: skip
    if sources.is_10x(file):
        return _of_10x(file, path, layer)
    if isinstance(file.get("obs"), h5py.Dataset):  # written by anndata before 0.7
        whole = sources.read_source(path, layer=layer, runs={}, obs_table="")
        return _of_memory(whole, path, layer)
    return _of_anndata(file, path, layer, columns, scratch, stack)


def _of_anndata(
    group: Any, path: Path, layer: str | None, columns: Sequence[str], scratch: Path,
    stack: ExitStack,
) -> Stored:  # fmt: skip
    with sources.readable(path):
        sources.refuse_missing(group, layer, path)
        obs = group["obs"]
        index = obs[str(obs.attrs["_index"])]
        known = [name for name in columns if name in obs and name != obs.attrs["_index"]]
        var = pd.DataFrame(read_elem(group["raw/var" if layer == "raw" else "var"]))
        rows = _rows_of(group[sources.place(layer)], path, len(var), scratch, stack)
        n_cells = _length(index)
        n_rows = _n_rows(group[sources.place(layer)])
        if n_rows != n_cells:
            raise Refusal(
                "counts have a row per cell and a column per gene",
                f"{n_rows} rows for {n_cells} cells in {path.name}",
                "check that the file was copied whole",
            )
    return Stored(
        name=path.name,
        n_cells=n_cells,
        var=var,
        ids=lambda start, stop: _values(index, start, stop),
        columns=lambda start, stop: {name: _values(obs[name], start, stop) for name in known},
        rows=rows,
    )


def _of_10x(file: h5py.File, path: Path, layer: str | None) -> Stored:
    if layer is not None:
        raise sources.no_layer(layer, ["X"])
    with sources.readable(path):
        group = file["matrix"]
        n_genes, n_cells = (int(n) for n in group["shape"][:])
        features = group["features"]
        var = sources.tenx_genes(
            features["id"].asstr()[:], features["name"].asstr()[:],
            features["feature_type"].asstr()[:],
        )  # fmt: skip
        group["data"], group["indices"], group["indptr"]
        barcodes = group["barcodes"]
        if len(barcodes) != n_cells or len(var) != n_genes:
            raise Refusal(
                "a 10x file has a barcode per cell and a feature per gene",
                f"{len(barcodes)} x {len(var)} for {n_cells} x {n_genes} in {path.name}",
                "check that it was copied whole",
            )
    return Stored(
        name=path.name,
        n_cells=n_cells,
        var=var,
        ids=lambda start, stop: barcodes.asstr()[start:stop],
        columns=lambda start, stop: {},
        rows=lambda start, stop: _csr(group, start, stop, n_genes),
    )


def _of_mtx(path: Path, layer: str | None, scratch: Path, stack: ExitStack) -> Stored:
    if layer is not None:
        raise sources.no_layer(layer, ["X"])
    matrix = next(path / name for name in MTX if (path / name).is_file())
    with sources.readable(path):
        features = _lines(path, "features.tsv")
        barcodes = _lines(path, "barcodes.tsv")[0].to_numpy(dtype=object)
        n_genes, n_cells, n_entries = transposed.mtx_shape(matrix)
        if (n_cells, n_genes) != (len(barcodes), len(features)):
            raise Refusal(
                "a 10x folder has a barcode per cell and a feature per gene",
                f"{len(barcodes)} x {len(features)} for {n_cells} x {n_genes} in {path.name}",
                "check that it was copied whole",
            )
        kind = features[2] if 2 in features else pd.Series("Gene Expression", features.index)
        var = sources.tenx_genes(*(part.to_numpy() for part in (features[0], features[1], kind)))

        def entries() -> Iterator[transposed.Entries]:
            return transposed.of_mtx(matrix, n_cells=n_cells, n_genes=n_genes)

        rows = _laid_out(entries, scratch, path, (n_cells, n_genes), n_entries, stack)
    return Stored(
        name=path.name,
        n_cells=n_cells,
        var=var,
        ids=lambda start, stop: barcodes[start:stop],
        columns=lambda start, stop: {},
        rows=rows,
    )


def _of_memory(cells: AnnData, path: Path, layer: str | None) -> Stored:
    values, var = sources.chosen(cells, layer)
    whole = values if isinstance(values, np.ndarray) else sparse.csr_matrix(values)
    return Stored(
        name=path.name,
        n_cells=cells.n_obs,
        var=var,
        ids=lambda start, stop: cells.obs_names[start:stop],
        columns=lambda start, stop: dict(cells.obs.iloc[start:stop].items()),
        rows=lambda start, stop: whole[start:stop],
    )


def _joined(found: Stored, table: Path, columns: Sequence[str]) -> Stored:
    """Add the columns of a table of cells; the table itself stays in memory."""
    ids = np.concatenate([*found.all_ids(), np.empty(0, dtype=object)])
    joined, _ = sources.join_table(pd.DataFrame(index=pd.Index(ids)), table)
    told = joined[[name for name in columns if name in joined]]
    own = found._columns
    found._columns = lambda start, stop: {
        **own(start, stop), **{name: told[name].to_numpy()[start:stop] for name in told}
    }  # fmt: skip
    return found


# -- matrices -----------------------------------------------------------------------------------
def _rows_of(stored: Any, path: Path, n_genes: int, scratch: Path, stack: ExitStack) -> Any:
    """Return a function that reads a range of rows."""
    if hasattr(stored, "shape") and not hasattr(stored, "keys"):
        if len(stored.shape) != 2:
            raise Refusal(
                "counts have a row per cell and a column per gene",
                f"an array of {len(stored.shape)} dimensions in {path.name}",
                "export them again",
            )
        return lambda start, stop: np.asarray(stored[start:stop])
    kind = str(stored.attrs.get("encoding-type") or stored.attrs.get("h5sparse_format", ""))
    if "csc" in kind:
        shape = tuple(int(n) for n in stored.attrs["shape"])
        n_entries = int(stored["indptr"][-1])
        return _laid_out(
            lambda: transposed.by_gene(stored), scratch, path, shape, n_entries, stack
        )
    return lambda start, stop: _csr(stored, start, stop, n_genes)


def _n_rows(stored: Any) -> int:
    """Return how many cells a matrix has rows for, by what it says of itself."""
    if hasattr(stored, "shape") and not hasattr(stored, "keys"):
        return int(stored.shape[0])
    shape = stored.attrs["shape"] if "shape" in stored.attrs else stored.attrs["h5sparse_shape"]
    return int(shape[0])


def _laid_out(
    entries: Any, scratch: Path, path: Path, shape: tuple[int, ...], n_entries: int,
    stack: ExitStack,
) -> Any:  # fmt: skip
    """Return a function that reads rows of what is laid out anew, by whoever needs it first."""
    laid = scratch / f"{path.name}.rows.h5"
    opened: list[h5py.File] = []

    def read(start: int, stop: int) -> sparse.csr_matrix:
        if not opened:
            scratch.mkdir(parents=True, exist_ok=True)
            with FileLock(laid.with_suffix(".lock")):
                if not laid.is_file():
                    transposed.lay_out(
                        entries(), laid, n_cells=shape[0], n_genes=shape[1], n_entries=n_entries
                    )
            opened.append(stack.enter_context(h5py.File(laid, "r")))
        return _csr(opened[0], start, stop, shape[1])

    return read


def _csr(group: Any, start: int, stop: int, n_genes: int) -> sparse.csr_matrix:
    """Read rows start to stop; only their part of the row pointers, which may be int64."""
    indptr = np.asarray(group["indptr"][start : stop + 1]).astype(np.int64)
    first, last = int(indptr[0]), int(indptr[-1])
    data, indices = np.asarray(group["data"][first:last]), np.asarray(group["indices"][first:last])
    is_whole = len(data) == len(indices) == last - first and (np.diff(indptr) >= 0).all()
    if not is_whole or (len(indices) and not 0 <= indices.min() <= indices.max() < n_genes):
        raise Refusal(
            "a sparse matrix points at values and genes that are there",
            f"rows {start} to {stop} that do not",
            "check that the file was copied whole",
        )
    return sparse.csr_matrix(
        (data, indices.astype(np.int32, copy=False), (indptr - first).astype(np.int32)),
        shape=(len(indptr) - 1, n_genes),
    )


# -- columns of obs -----------------------------------------------------------------------------
def _length(element: Any) -> int:
    if hasattr(element, "keys"):  # categories, or values with a mask
        element = element["codes"] if "codes" in element else element["values"]
    return int(element.shape[0])


def _values(element: Any, start: int, stop: int) -> Array:
    """Return a range of one column, whichever way anndata stored it."""
    if hasattr(element, "keys"):
        if "codes" in element:
            categories = np.asarray(read_elem(element["categories"]), dtype=object)
            return _named(categories, np.asarray(element["codes"][start:stop]))
        values = _values(element["values"], start, stop).astype(object)
        values[np.asarray(element["mask"][start:stop])] = None
        return values
    if isinstance(element, h5py.Dataset) and h5py.check_string_dtype(element.dtype):
        return np.asarray(element.asstr()[start:stop], dtype=object)
    if "categories" in element.attrs:  # anndata 0.7: codes here, their names elsewhere
        categories = element.file[element.attrs["categories"]]
        named = _values(categories, 0, len(categories))
        return _named(named, np.asarray(element[start:stop]))
    values = np.asarray(element[start:stop])
    return values.astype(object) if values.dtype.kind in "TUSO" else values


def _named(categories: Array, codes: Array) -> Array:
    if len(codes) and not -1 <= codes.min() <= codes.max() < len(categories):
        raise Refusal(
            "codes of a column name its categories",
            f"{codes.min()} to {codes.max()} for {len(categories)}",
            "check that the file was copied whole",
        )
    names: Array = np.asarray([*categories, None], dtype=object)[codes]  # -1, missing, is the last
    return names


def _lines(folder: Path, name: str) -> pd.DataFrame:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False)
    raise Refusal(
        "a 10x folder holds matrix.mtx, features.tsv and barcodes.tsv (CellRanger 3)",
        f"no {name} in {folder.name}",
        "give filtered_feature_bc_matrix",
    )
