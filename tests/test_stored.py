"""Any range of cells of any kind of file is what reading the whole file says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import zarr as zarr_store
from anndata import AnnData
from scipy import sparse

from conftest import planted_cells
from endoprint import stored, transposed
from endoprint.config import Refusal
from files import write_10x, write_mtx


def raw_cells() -> AnnData:
    cells = planted_cells(n_units=2, n_cells=11, n_genes=50, seed=3)
    obs = cells.obs[["unit", "sample", "n_counts"]].copy()
    obs["kind"] = pd.Categorical(["a", "b", None] * 22)
    obs["is_odd"] = np.arange(66) % 2 == 1
    obs["plate"] = pd.array([1, None, 3] * 22, dtype="Int64")
    return AnnData(X=cells.X, obs=obs, var=cells.var)


def as_kind(change: Callable[[AnnData], object]) -> Callable[[AnnData, Path], Path]:
    def write(cells: AnnData, folder: Path) -> Path:
        cells = cells.copy()
        cells.X = change(cells)
        cells.write_h5ad(folder / "cells.h5ad", compression="gzip")
        return folder / "cells.h5ad"

    return write


def zarr(change: Callable[[AnnData], object]) -> Callable[[AnnData, Path], Path]:
    def write(cells: AnnData, folder: Path) -> Path:
        cells = cells.copy()
        cells.X = change(cells)
        cells.write_zarr(folder / "cells.zarr")
        return folder / "cells.zarr"

    return write


def int64(cells: AnnData, folder: Path) -> Path:
    cells.write_h5ad(folder / "cells.h5ad")
    with h5py.File(folder / "cells.h5ad", "r+") as file:
        for name in ("indptr", "indices"):
            values = file[f"X/{name}"][:].astype(np.int64)
            del file[f"X/{name}"]
            file[f"X/{name}"] = values
    return folder / "cells.h5ad"


def tenx(cells: AnnData, folder: Path) -> Path:
    write_10x(cells, folder / "cells.h5")
    return folder / "cells.h5"


def mtx(is_zipped: bool) -> Callable[[AnnData, Path], Path]:
    def write(cells: AnnData, folder: Path) -> Path:
        write_mtx(cells, folder / "run", is_zipped=is_zipped)
        return folder / "run"

    return write


KINDS = {
    "CSR": as_kind(lambda cells: cells.X),
    "CSC": as_kind(lambda cells: sparse.csc_matrix(cells.X)),
    "dense": as_kind(lambda cells: cells.X.toarray()),
    "int64 pointers": int64,
    "zarr, CSR": zarr(lambda cells: cells.X),
    "zarr, CSC": zarr(lambda cells: sparse.csc_matrix(cells.X)),
    "zarr, dense": zarr(lambda cells: cells.X.toarray()),
    "10x .h5": tenx,
    "10x folder": mtx(True),
    "10x folder, not zipped": mtx(False),
}
COLUMNS = ["unit", "kind", "is_odd", "plate", "n_counts", "absent"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_of_cells_is_that_part_of_the_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transposed, "BUCKET_ENTRIES", 100)  # many buckets
    monkeypatch.setattr(transposed, "READ_ENTRIES", 64)
    cells = raw_cells()
    path = KINDS[kind](cells, tmp_path)
    scratch = tmp_path / "scratch"
    with stored.opened(path, layer=None, columns=COLUMNS, scratch=scratch) as found:
        assert found.n_cells == 66
        assert list(found.var.index) == list(cells.var_names)
        assert list(np.concatenate(list(found.all_ids()))) == list(cells.obs_names)
        for start, stop in ((0, 66), (13, 14), (60, 66), (5, 40)):
            part = found.part(start, stop)
            assert (sparse.csr_matrix(part.X) != cells.X[start:stop]).nnz == 0
            assert list(part.obs_names) == list(cells.obs_names[start:stop])
            if "10x" not in kind:
                wanted = cells.obs.iloc[start:stop]
                assert set(part.obs) == set(COLUMNS) - {"absent"}
                for name in part.obs:
                    both = (wanted[name].astype(object), part.obs[name].astype(object))
                    values = [each.where(each.notna(), None).to_list() for each in both]
                    assert values[0] == values[1], name


def test_layers_and_raw_are_read_where_asked(tmp_path: Path) -> None:
    cells = raw_cells()
    cells.layers["counts"] = cells.X * 2
    cells.raw = AnnData(cells.X * 3, obs=cells.obs, var=cells.var)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    cells.write_zarr(tmp_path / "cells.zarr")
    for name in ("cells.h5ad", "cells.zarr"):
        for layer, times in ((None, 1), ("counts", 2), ("raw", 3)):
            with stored.opened(tmp_path / name, layer=layer, scratch=tmp_path) as found:
                assert (cells.X[3:30] * times != found.part(3, 30).X).nnz == 0


def test_a_table_beside_the_file_is_joined_by_cell_id(tmp_path: Path) -> None:
    cells = raw_cells()
    write_10x(cells, tmp_path / "cells.h5")
    cells.obs[["unit"]].iloc[::-1].to_csv(tmp_path / "obs.csv")
    with stored.opened(
        tmp_path / "cells.h5", layer=None, columns=["unit"], obs_table="obs.csv", scratch=tmp_path
    ) as found:
        assert list(found.obs(7, 20)["unit"]) == list(cells.obs["unit"].iloc[7:20])


def test_entries_of_any_order_are_laid_out_by_cell(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wanted = sparse.random(300, 40, 0.2, format="csr", random_state=0)
    entries = wanted.tocoo()
    order = rng.permutation(wanted.nnz)

    def dealt():
        for part in np.array_split(order, 7):
            yield entries.row[part], entries.col[part], entries.data[part]

    path = tmp_path / "rows.h5"
    transposed.lay_out(dealt(), path, n_cells=300, n_genes=40, n_entries=wanted.nnz)
    with h5py.File(path) as file:
        assert file["indptr"].dtype == np.int64
        found = sparse.csr_matrix(
            (file["data"][:], file["indices"][:], file["indptr"][:]), shape=(300, 40)
        )
    assert (found != wanted).nnz == 0
    assert [each.name for each in tmp_path.iterdir()] == ["rows.h5"]


def test_laying_out_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken():
        yield np.zeros(3, int), np.arange(3), np.ones(3)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        transposed.lay_out(broken(), tmp_path / "rows.h5", n_cells=2, n_genes=3, n_entries=6)
    assert list(tmp_path.iterdir()) == []


# -- damaged files ------------------------------------------------------------------------------
def code(value: int) -> Callable[[Path], None]:
    """Let a cell have a category that is not there."""

    def hurt(path: Path) -> None:
        if path.is_dir():
            zarr_store.open_group(str(path), mode="r+")["obs/kind/codes"][3] = value
            return
        with h5py.File(path, "r+") as file:
            file["obs/kind/codes"][3] = value

    return hurt


def half_an_index(path: Path) -> None:
    part = next(each for each in (path / "obs/_index").rglob("*") if each.name in ("0", "c"))
    part = part / "0" if part.is_dir() else part
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])


def newer(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["var"].attrs["encoding-version"] = "99.0"


DAMAGED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a code too large, h5ad": ("CSR", code(99)),
    "a code too large, zarr": ("zarr, CSR", code(99)),
    "a code too small": ("CSR", code(-2)),
    "half an index, zarr": ("zarr, CSR", half_an_index),
    "a layout of later years": ("CSR", newer),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    kind, hurt = DAMAGED[name]
    path = KINDS[kind](raw_cells(), tmp_path)
    hurt(path)

    def read() -> None:
        with stored.opened(path, layer=None, columns=COLUMNS, scratch=tmp_path) as found:
            found.ids(0, 9)
            found.obs(0, 9)

    with pytest.raises(Refusal) as caught:
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["CSR", "zarr, CSR"])
def test_what_fails_beside_reading_is_not_said_of_the_file(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](raw_cells(), tmp_path)
    with (
        pytest.raises(OSError, match="disk full"),
        stored.opened(path, layer=None, scratch=tmp_path),
    ):
        raise OSError("disk full")
