"""What files cells come in: h5ad, 10x .h5, zarr, and several 10x runs with a table of cells.

Only the parts that are needed are read: one matrix, `obs` and `var`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData, read_h5ad, read_zarr
from anndata.io import read_elem, sparse_dataset
from scipy import sparse

from endoprint.config import Refusal

KINDS = "an h5ad file, a 10x .h5 file (CellRanger 3 or later) or a zarr folder"
NOT_IN_TABLE = "not in the obs table"
REMOVED = "endoprint_removed_at_reading"  # key of uns that curation moves into its report


def read_source(
    path: Path, *, layer: str | None, runs: Mapping[str, str], obs_table: str
) -> AnnData:
    """Read cells as they are, with only the matrix that `layer` names.

    `runs` maps a run to its 10x file below the folder `path`; `-<run>` is added to its cell ids.
    `obs_table` is a CSV, beside or below `path`, whose first column is the cell id: its columns
    are joined, and cells it does not list are left out and counted.
    """
    cells = _read_runs(path, runs) if runs else _read_one(path, layer)
    if not obs_table:
        return cells
    obs, is_listed = join_table(cells.obs, _beside(path, obs_table))
    joined = cells[is_listed].copy()
    joined.obs = obs[is_listed]
    if not is_listed.all():
        joined.uns[REMOVED] = {NOT_IN_TABLE: int((~is_listed).sum())}
    return joined


def read_obs(path: Path) -> pd.DataFrame:
    """Read only what is known about each cell."""
    if is_zarr(path):
        with readable(path):
            return pd.DataFrame(read_zarr(path).obs)
    with hdf5(path) as file:
        if is_10x(file):
            return pd.DataFrame(_read_10x(file, path).obs)
        return _frame(file, "obs", path)


def blocks(path: Path, *, layer: str | None, n_cells: int, obs_table: str) -> Iterator[AnnData]:
    """Read cells block by block, `X` being the matrix `layer` names: memory stays flat.

    Row-wise (CSR) and dense matrices of an h5ad stream; anything else is read whole first.
    """
    if is_zarr(path) or not _streams(path, layer):
        whole = _read_one(path, layer)
        values, var = chosen(whole, layer)
        obs = whole.obs if not obs_table else join_table(whole.obs, _beside(path, obs_table))[0]
        rows = values if isinstance(values, np.ndarray) else sparse.csr_matrix(values)
        yield from _sliced(rows, obs, var, n_cells)
        return
    with hdf5(path) as file:
        obs = _frame(file, "obs", path)
        if obs_table:
            obs = join_table(obs, _beside(path, obs_table))[0]
        var = _frame(file, "raw/var" if layer == "raw" else "var", path)
        stored = file[place(layer)]
        yield from _sliced(
            sparse_dataset(stored) if isinstance(stored, h5py.Group) else stored, obs, var, n_cells
        )


def layers(path: Path) -> list[str | None]:
    """Return where a file holds matrices: None is X, then layers, then "raw"."""
    if is_zarr(path):
        with readable(path):
            cells = read_zarr(path)
        found: list[str | None] = [None] if cells.X is not None else []
        return found + list(cells.layers) + (["raw"] if cells.raw is not None else [])
    with hdf5(path) as file:
        if is_10x(file):
            return [None]
        named: list[str | None] = list(file["layers"]) if "layers" in file else []
        return [None] * ("X" in file) + named + ["raw"] * ("raw/X" in file)


def chosen(cells: AnnData, layer: str | None) -> tuple[Any, pd.DataFrame]:
    """Return the matrix that `layer` names and the table of its genes."""
    found: Any = None
    if layer is None:
        found = cells.X
    elif layer == "raw":
        if cells.raw is not None:
            return cells.raw.X, cells.raw.var
    elif layer in cells.layers:
        found = cells.layers[layer]
    if found is None:
        available = ["X"] if cells.X is not None else []
        available += list(cells.layers) + (["raw"] if cells.raw is not None else [])
        raise no_layer(layer, available)
    return found, cells.var


def join_table(obs: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, np.ndarray[Any, Any]]:
    """Return `obs` with the table's columns joined by cell id, and which cells it lists."""
    rule = "obs_table is a CSV whose first column is the cell id (with its run suffix)"
    try:
        table = pd.read_csv(path, index_col=0, dtype=str)
    except (OSError, ValueError) as error:
        raise Refusal(rule, str(error), "check the path and the separator") from None
    table.index = table.index.astype(str)
    if not table.index.is_unique:
        double = table.index[table.index.duplicated()][0]
        raise Refusal(rule, f"{double!r} twice", "keep one line per cell")
    strangers = table.index.difference(obs.index.astype(str))
    if len(strangers):
        raise Refusal(
            "every cell of the obs table is in the matrices",
            f"{len(strangers)} of {len(table)} are not, such as {strangers[0]!r} "
            f"(cells here: {', '.join(map(str, obs.index[:2]))})",
            "check runs and the suffix of the cell ids",
        )
    kept = obs.drop(columns=[name for name in obs.columns if name in table.columns])
    return kept.join(table), obs.index.isin(table.index)


# -- one file -----------------------------------------------------------------------------------
def _read_one(path: Path, layer: str | None) -> AnnData:
    if is_zarr(path):
        with readable(path):
            refuse_missing(zarr.open_group(str(path), mode="r"), layer, path)
            cells: AnnData = read_zarr(path)
        return cells
    with hdf5(path) as file:
        if is_10x(file):
            return _read_10x(file, path)
        if isinstance(file.get("obs"), h5py.Dataset):  # written by anndata before 0.7
            old: AnnData = read_h5ad(path)
            return old
        obs, var = _frame(file, "obs", path), _frame(file, "var", path)
        refuse_missing(file, layer, path)
        values = read_elem(file[place(layer)])
        if layer is None:
            return AnnData(X=values, obs=obs, var=var)
        if layer == "raw":
            raw = {"X": values, "var": _frame(file, "raw/var", path)}
            return AnnData(obs=obs, var=var, raw=raw)
        return AnnData(obs=obs, var=var, layers={layer: values})


def _read_runs(folder: Path, runs: Mapping[str, str]) -> AnnData:
    parts: list[AnnData] = []
    for run, name in runs.items():
        with hdf5(folder / name) as file:
            if not is_10x(file):
                raise Refusal(
                    "runs names 10x .h5 files",
                    f"{name} has groups {', '.join(file) or 'none'}",
                    "give filtered_feature_bc_matrix.h5 of each run",
                )
            part = _read_10x(file, folder / name)
        part.obs_names = [f"{cell}-{run}" for cell in part.obs_names]
        part.obs["run"] = run
        if parts and not part.var_names.equals(parts[0].var_names):
            raise Refusal(
                "all runs were counted on one list of genes",
                f"{part.n_vars} genes in {name} against {parts[0].n_vars}, or another order",
                "count them again on one reference",
            )
        parts.append(part)
    return AnnData(
        X=sparse.vstack([part.X for part in parts], format="csr"),
        obs=pd.concat([part.obs for part in parts]),
        var=parts[0].var,
    )


def _read_10x(file: h5py.File, path: Path) -> AnnData:
    """CellRanger 3: CSC of genes x cells, which is CSR of cells x genes."""
    with readable(path):
        group = file["matrix"]
        n_genes, n_cells = (int(n) for n in group["shape"][:])
        counts = sparse.csr_matrix(
            (group["data"][:], group["indices"][:], group["indptr"][:]), shape=(n_cells, n_genes)
        )
        features = group["features"]
        var = tenx_genes(
            features["id"].asstr()[:],
            features["name"].asstr()[:],
            features["feature_type"].asstr()[:],
        )
        obs = pd.DataFrame(index=group["barcodes"].asstr()[:])
    return AnnData(X=counts, obs=obs, var=var)


def tenx_genes(ids: Any, symbols: Any, kinds: Any) -> pd.DataFrame:
    """Return the table of genes of a 10x file: index Ensembl ids."""
    var = pd.DataFrame({"gene_ids": ids, "symbol": symbols, "feature_types": kinds})
    var.index = pd.Index(var["gene_ids"].to_numpy(), name=None)
    return var


def is_10x(file: h5py.File) -> bool:
    """Say whether a file is CellRanger's; refuse one that is no file of cells at all."""
    if "obs" in file or "X" in file:
        return False
    if "matrix" in file and "features" in file["matrix"]:
        return True
    raise Refusal(
        f"cells come as {KINDS}",
        f"HDF5 with {', '.join(list(file)[:5]) or 'nothing'} at its top in "
        f"{Path(file.filename).name}",
        "give an h5ad, or a 10x file with the group matrix/features (CellRanger 2 has another)",
    )


# -- pieces of an h5ad --------------------------------------------------------------------------
def place(layer: str | None) -> str:
    """Return where a file keeps the matrix that `layer` names."""
    return {None: "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")


def _streams(path: Path, layer: str | None) -> bool:
    with hdf5(path) as file:
        if is_10x(file) or not isinstance(file.get("obs"), h5py.Group):
            return False
        refuse_missing(file, layer, path)
        stored = file[place(layer)]
        return isinstance(stored, h5py.Dataset) or "csr" in str(stored.attrs["encoding-type"])


def refuse_missing(file: h5py.Group, layer: str | None, path: Path) -> None:
    """Refuse a file, HDF5 or zarr, without its tables or the matrix that `layer` names."""
    for name in ("obs", "raw/var" if layer == "raw" and "raw" in file else "var"):
        if name not in file:
            raise Refusal(
                f"an h5ad has {name}", f"none in {path.name}", "write it with anndata again"
            )
    if place(layer) not in file:
        layers = list(file["layers"]) if "layers" in file else []
        raise no_layer(
            layer, [n for n in ("X",) if n in file] + layers + (["raw"] if "raw/X" in file else [])
        )
    _refuse_half_copied(file[place(layer)], path)


def _refuse_half_copied(stored: Any, path: Path) -> None:
    """Refuse a zarr store that lacks parts of its sparse counts: they would be read as zeros."""
    if not isinstance(stored, zarr.Group) or "indptr" not in stored:
        return  # of a dense matrix, parts without any count are left out by right
    n_values = int(stored["data"].size)
    for name in ("data", "indices"):
        n_there, n_parts = stored[name].nchunks_initialized, stored[name].nchunks
        if n_values and n_there < n_parts:
            got = f"{n_there} of {n_parts} parts of {name} in {path.name}"
            break
    else:
        if int(stored["indptr"][-1]) == n_values:
            return
        got = f"row pointers in {path.name} that end elsewhere"
    raise Refusal("a zarr store holds all of its counts", got, "check that it was copied whole")


def no_layer(layer: str | None, available: list[str]) -> Refusal:
    """Return the refusal of a layer that is not there."""
    return Refusal(
        "layer names where raw counts are: null for X, raw, or a layer",
        f"no {layer or 'X'}; there are: {', '.join(available) or 'none'}",
        "set layer to one of them",
    )


def _frame(file: h5py.File, name: str, path: Path) -> pd.DataFrame:
    if name not in file:
        raise Refusal(f"an h5ad has {name}", f"none in {path.name}", "write it with anndata again")
    if isinstance(file[name], h5py.Dataset):
        return pd.DataFrame(getattr(read_h5ad(path), name))  # before anndata 0.7
    frame: pd.DataFrame = read_elem(file[name])
    return frame


def _sliced(rows: Any, obs: pd.DataFrame, var: pd.DataFrame, n_cells: int) -> Iterator[AnnData]:
    for start in range(0, len(obs), n_cells):
        part = slice(start, start + n_cells)
        yield AnnData(X=rows[part], obs=obs.iloc[part].copy(), var=var.copy())


# -- opening ------------------------------------------------------------------------------------
def _beside(path: Path, name: str) -> Path:
    return (path if path.is_dir() and not is_zarr(path) else path.parent) / name


def is_zarr(path: Path) -> bool:
    """Say whether a folder is a zarr store."""
    return path.is_dir() and any(
        (path / mark).exists() for mark in ("zarr.json", ".zgroup", ".zattrs")
    )


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what HDF5, zarr and anndata say of a broken file into one line.

    Put only reading inside: damaged bytes raise every kind of error, so every kind is the file's.
    """
    try:
        yield
    except Refusal:
        raise
    except Exception as error:  # noqa: BLE001  # listed kinds left some out, twice
        said = str(error).strip().split("\n")[0][:160] or type(error).__name__
        raise Refusal(
            f"cells come as {KINDS}",
            f"{path.name}, which can not be read ({said})",
            "check that it was copied whole",
        ) from None


@contextmanager
def hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file that is read at once, and refuse in one line what is none or broken."""
    with readable(path), open_hdf5(path) as file:
        yield file


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file, or refuse in one line what is none; whoever reads it says `readable`."""
    if not path.exists():
        raise Refusal(f"cells come as {KINDS}", f"no file at {path}", "check the path")
    if path.is_dir():
        raise Refusal(
            f"cells come as {KINDS}", f"the folder {path.name}", "name the file, or set runs"
        )
    with readable(path):
        return h5py.File(path, "r")
