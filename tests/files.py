"""Files of cells as other programs write them."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import numpy as np
from anndata import AnnData
from scipy import sparse


def write_10x(cells: AnnData, path: Path) -> None:
    """CellRanger 3's filtered_feature_bc_matrix.h5: CSC of genes x cells."""
    counts = sparse.csr_matrix(cells.X)
    n = cells.n_vars
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = cells.obs_names.to_numpy().astype("S")
        group["data"] = counts.data.astype(np.int32)
        group["indices"], group["indptr"] = counts.indices.astype(np.int64), counts.indptr
        group["shape"] = np.array([n, cells.n_obs])
        features = group.create_group("features")
        features["id"] = cells.var_names.to_numpy().astype("S")
        features["name"] = cells.var_names.to_numpy().astype("S")
        features["feature_type"] = np.array(["Gene Expression"] * n).astype("S")


def write_mtx(cells: AnnData, folder: Path, *, is_zipped: bool = True) -> None:
    """CellRanger 3's folder of matrix, barcodes and features as text."""
    folder.mkdir(parents=True)
    counts = sparse.csr_matrix(cells.X).tocoo()
    lines = ["%%MatrixMarket matrix coordinate integer general", '%metadata_json: {"a": 1}']
    lines += [f"{cells.n_vars} {cells.n_obs} {counts.nnz}"]
    lines += [f"{g + 1} {c + 1} {int(n)}" for c, g, n in zip(counts.row, counts.col, counts.data)]
    tables = {
        "matrix.mtx": lines,
        "barcodes.tsv": list(cells.obs_names),
        "features.tsv": [f"{gene}\t{gene}\tGene Expression" for gene in cells.var_names],
    }
    for name, rows in tables.items():
        text = "\n".join(rows) + "\n"
        if is_zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
