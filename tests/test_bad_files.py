"""Every malformed file is refused in one line (rule, got, remedy), and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from conftest import planted_cells
from endoprint.cells import CellsConfig, curate, load, read, write
from endoprint.config import Refusal
from lab import chunks

KEYS = {"exposure_key": "exposure", "unit_keys": ["unit"], "batch_key": "batch"}


def good() -> ad.AnnData:
    """Cells as a user has them; every test breaks one thing."""
    cells = planted_cells(n_units=2, n_cells=4, n_genes=30)
    cells.obs = cells.obs[["exposure", "unit", "line", "batch"]].copy()
    return cells


def curate_file(path: Path, **values: object) -> ad.AnnData:
    """What `endoprint curate` does: read, curate, write."""
    config = CellsConfig.of({**KEYS, **values}, "cells")
    cells, _ = curate(read(path, config), config)
    write(cells, path.parent / "out" / "cells.h5ad")
    return cells


def broken_counts(value: float) -> Callable[[ad.AnnData], None]:
    def breaks(cells: ad.AnnData) -> None:
        counts = cells.X.astype(np.float32)
        counts.data[3] = value
        cells.X = counts

    return breaks


def log_normalise(cells: ad.AnnData) -> None:
    cells.X = sparse.csr_matrix(np.log1p(cells.X.toarray() / 7))


def empty_all(cells: ad.AnnData) -> None:
    cells.X = sparse.csr_matrix(cells.shape, dtype=np.float32)


def name_genes(make: Callable[[int], str]) -> Callable[[ad.AnnData], None]:
    def breaks(cells: ad.AnnData) -> None:
        cells.var_names = [make(i) for i in range(cells.n_vars)]

    return breaks


def set_obs(**columns: Callable[[ad.AnnData], object]) -> Callable[[ad.AnnData], None]:
    def breaks(cells: ad.AnnData) -> None:
        for name, make in columns.items():
            cells.obs[name] = make(cells)

    return breaks


def without_first(column: str) -> Callable[[ad.AnnData], object]:
    return lambda cells: [None, *cells.obs[column][1:]]


def missing_id(cells: ad.AnnData) -> None:
    cells.var["gene_ids"] = [None, *cells.var_names[1:]]


def two_ids_alike(cells: ad.AnnData) -> None:
    cells.obs_names = ["twin", "twin", *cells.obs_names[2:]]


def totals(cells: ad.AnnData) -> np.ndarray:
    return np.asarray(cells.X.sum(axis=1)).ravel()


def nothing(cells: ad.AnnData) -> None:
    """The file is good; the config asks for what it has not."""


# what is broken, how, the config, a word of the rule, a word of what was got
BROKEN = {
    "log-normalised X": (log_normalise, {}, "raw counts", "fractions"),
    "negative": (broken_counts(-2), {}, "raw counts", "negative"),
    "NaN": (broken_counts(np.nan), {}, "raw counts", "nan"),
    "infinite": (broken_counts(np.inf), {}, "raw counts", "inf"),
    "too large": (broken_counts(2**25), {}, "raw counts", "33554432"),
    "all cells empty": (empty_all, {}, "at least one cell", "no counts"),
    "no exposure column": (nothing, {"exposure_key": "drug"}, "exposure_key", "'drug'"),
    "no unit column": (nothing, {"unit_keys": ["donor"]}, "unit_keys", "'donor'"),
    "no batch column": (nothing, {"batch_key": "lane"}, "batch_key", "'lane'"),
    "no sample column": (nothing, {"sample_key": "tube"}, "sample_key", "'tube'"),
    "no fold column": (nothing, {"technical_fold": "plate"}, "technical_fold", "'plate'"),
    "no split column": (nothing, {"split_key": "part"}, "split_key", "'part'"),
    "no gene id column": (nothing, {"gene_id_key": "ids"}, "gene_id_key", "'ids'"),
    "no library size column": (nothing, {"library_size_key": "n"}, "library_size_key", "'n'"),
    "one exposure": (set_obs(exposure=lambda c: "DMSO"), {}, "two exposures", "only DMSO"),
    "one unit": (set_obs(unit=lambda c: "u0"), {}, "two units", "only 'u0'"),
    "control absent": (nothing, {"control": "BPA"}, "control is among", "'BPA'"),
    "unknown label": (
        set_obs(exposure=lambda c: c.obs["exposure"].replace("RET_AGONIST", "RAT_AGONIST")),
        {},
        "label of the atlas",
        "RAT_AGONIST",
    ),
    "NaN exposure": (
        set_obs(exposure=without_first("exposure")),
        {},
        "has an exposure",
        "1 cells without",
    ),
    "NaN unit": (set_obs(unit=without_first("unit")), {}, "belongs to a unit", "1 cells"),
    "NaN batch": (set_obs(batch=without_first("batch")), {}, "has a batch", "1 cells"),
    "mouse ids": (name_genes(lambda i: f"ENSMUSG{i:011d}"), {}, "human", "ENSMUSG"),
    "transcript ids": (name_genes(lambda i: f"ENST{i:011d}"), {}, "gene ids", "ENST"),
    "mouse symbols": (name_genes(lambda i: f"Gm{i}"), {"allow_symbols": True}, "human", "mouse"),
    "symbols not asked for": (name_genes(lambda i: f"GENE{i}"), {}, "Ensembl", "GENE0"),
    "missing gene id": (missing_id, {"gene_id_key": "gene_ids"}, "has an id", "1 of 30"),
    "mixed gene ids": (
        name_genes(lambda i: f"ENSG{i:011d}" if i else "EGFP"),
        {},
        "all Ensembl or all symbols",
        "'EGFP'",
    ),
    "no genes, only tags": (
        lambda c: c.var.insert(0, "feature_types", "Antibody Capture"),
        {},
        "Gene Expression",
        "Antibody Capture",
    ),
    "duplicate cell ids": (two_ids_alike, {}, "cell ids are unique", "'twin'"),
    "library size too small": (
        set_obs(total=lambda c: totals(c) - 1),
        {"library_size_key": "total"},
        "no less than its counts",
        "24 cells",
    ),
    "library size in words": (
        set_obs(total=lambda c: "many"),
        {"library_size_key": "total"},
        "library size",
        "many",
    ),
    "library size missing": (
        set_obs(total=lambda c: np.append(totals(c)[1:], np.nan)),
        {"library_size_key": "total"},
        "library size",
        "1 cells without",
    ),
    "no such layer": (nothing, {"layer": "counts"}, "layer", "there are: X"),
    "no raw": (nothing, {"layer": "raw"}, "layer", "no raw"),
    "pattern that misses": (nothing, {"unit_pattern": "donor(.)"}, "unit_pattern", "'u0'"),
    "pattern without group": (nothing, {"unit_pattern": "u."}, "unit_pattern", "group"),
    "pattern that is none": (nothing, {"unit_pattern": "(u"}, "unit_pattern", "(u"),
    "no mitochondrial genes": (
        nothing,
        {"max_mitochondrial_share": 0.1},
        "mitochondrial genes",
        "none",
    ),
    "every gene rare": (nothing, {"min_cells_per_gene": 99}, "99 cells", "none"),
    "threshold no cell passes": (nothing, {"min_counts": 1e6}, "one cell passes", "24 fewer"),
    "symbol map absent": (nothing, {"symbol_map": "absent.json"}, "symbol_map", "absent.json"),
    "misspelt key": (nothing, {"exposure_kye": "exposure"}, "exposure_kye", "exposure"),
}


def refused(run: Callable[[], object], folder: Path) -> Refusal:
    before = sorted(folder.rglob("*"))
    with pytest.raises(Refusal) as caught:
        run()
    refusal = caught.value
    assert "\n" not in str(refusal)
    assert all((refusal.rule, refusal.got, refusal.remedy))
    assert str(refusal).count("; ") >= 2
    assert sorted(folder.rglob("*")) == before  # nothing was written
    return refusal


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    breaks, values, rule, got = BROKEN[name]
    cells = good()
    breaks(cells)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    refusal = refused(lambda: curate_file(tmp_path / "cells.h5ad", **values), tmp_path)
    assert rule in refusal.rule
    assert got in refusal.got


@pytest.mark.parametrize(("n_cells", "n_genes"), [(0, 30), (24, 0)])
def test_an_empty_file_is_refused(n_cells: int, n_genes: int, tmp_path: Path) -> None:
    good()[:n_cells, :n_genes].copy().write_h5ad(tmp_path / "cells.h5ad")
    refusal = refused(lambda: curate_file(tmp_path / "cells.h5ad"), tmp_path)
    assert refusal.got == f"{n_cells} x {n_genes}"


def truncated(path: Path) -> None:
    good().write_h5ad(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupted(path: Path) -> None:
    """The head is whole, the counts are not."""
    cells = good()
    cells.write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        where = file["X/data"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[where.byte_offset : where.byte_offset + where.size] = b"\xff" * where.size
    path.write_bytes(bytes(data))


def other_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["weights"] = np.zeros(3)


def cellranger_2(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["GRCh38/barcodes"] = np.array([b"AAAC-1"])


def half_10x(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["matrix/barcodes"] = np.array([b"AAAC-1"])
        file["matrix/features/id"] = np.array([b"ENSG00000000001"])


def no_var(path: Path) -> None:
    good().write_h5ad(path)
    with h5py.File(path, "a") as file:
        del file["var"]


def no_x(path: Path) -> None:
    good().write_h5ad(path)
    with h5py.File(path, "a") as file:
        del file["X"]


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "can not be read"),
    "corrupted": (corrupted, "can not be read"),
    "text renamed": (lambda path: path.write_text("cell,gene\n1,2\n"), "can not be read"),
    "zero bytes": (lambda path: path.touch(), "can not be read"),
    "other HDF5": (other_hdf5, "weights"),
    "CellRanger 2": (cellranger_2, "GRCh38"),
    "10x without counts": (half_10x, "can not be read"),
    "a folder": (lambda path: path.mkdir(), "folder"),
    "absent": (lambda path: None, "no file"),
    "no var": (no_var, "none in"),
    "no X": (no_x, "no X"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_file_of_cells_is_refused(name: str, tmp_path: Path) -> None:
    make, got = FILES[name]
    path = tmp_path / "cells.h5ad"
    make(path)
    assert got in refused(lambda: curate_file(path), tmp_path).got
    assert refused(lambda: list(chunks(path, CellsConfig(), 10)), tmp_path)
    assert refused(lambda: load(path), tmp_path)


def test_an_obs_table_that_does_not_match_is_refused(tmp_path: Path) -> None:
    cells = good()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    table = cells.obs.copy()
    table.index = [f"{cell}-491" for cell in table.index]
    table.to_csv(tmp_path / "obs.csv")
    path = tmp_path / "cells.h5ad"
    refusal = refused(lambda: curate_file(path, obs_table="obs.csv"), tmp_path)
    assert "24 of 24 are not" in refusal.got
    pd.concat([cells.obs, cells.obs[:1]]).to_csv(tmp_path / "obs.csv")
    assert "twice" in refused(lambda: curate_file(path, obs_table="obs.csv"), tmp_path).got
    assert "none.csv" in refused(lambda: curate_file(path, obs_table="none.csv"), tmp_path).got


@pytest.mark.parametrize(
    ("text", "got"),
    [("[1, 2]", "list"), ("{", "Expecting"), ('{"A": "ENSMUSG00000000001"}', "ENSMUSG")],
)
def test_a_symbol_map_that_is_none_is_refused(text: str, got: str, tmp_path: Path) -> None:
    good().write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "map.json").write_text(text)
    refusal = refused(
        lambda: curate_file(tmp_path / "cells.h5ad", symbol_map=str(tmp_path / "map.json")),
        tmp_path,
    )
    assert got in refusal.got


def test_a_symbol_map_that_fits_few_genes_is_refused(tmp_path: Path) -> None:
    cells = good()
    cells.var_names = [f"GENE{i}" for i in range(cells.n_vars)]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "map.json").write_text(json.dumps({"GENE0": "ENSG00000000001"}))
    refusal = refused(
        lambda: curate_file(tmp_path / "cells.h5ad", symbol_map=str(tmp_path / "map.json")),
        tmp_path,
    )
    assert "3.3% of 30" in refusal.got


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0.5, "fractions among the counts"),
        (-1, "negative counts"),
        (np.nan, "counts that are no numbers"),
        (np.inf, "counts that are no numbers"),
        (2**25, "a count too large to be one"),
    ],
)
def test_one_impossible_count_sets_its_cell_aside_while_scoring(
    value: float, reason: str, tmp_path: Path
) -> None:
    cells = good()
    broken_counts(value)(cells)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    config = CellsConfig.of(KEYS, "cells")
    seen = pd.concat([block.obs for block in chunks(tmp_path / "cells.h5ad", config, 7)])
    assert list(seen.index) == list(cells.obs_names)
    assert list(seen["flag"]) == [reason] + [""] * (cells.n_obs - 1)


def test_curated_cells_that_were_tampered_with_are_refused(tmp_path: Path) -> None:
    good().write_h5ad(tmp_path / "cells.h5ad")
    curate_file(tmp_path / "cells.h5ad")
    path = tmp_path / "out" / "cells.h5ad"
    with h5py.File(path, "a") as file:
        file["X/data"][0] = 0.5
    assert "whole counts" in refused(lambda: load(path), tmp_path).rule


GOOD: dict[str, Callable[[ad.AnnData], None]] = {
    "CSR": nothing,
    "CSC": lambda cells: setattr(cells, "X", sparse.csc_matrix(cells.X)),
    "dense": lambda cells: setattr(cells, "X", cells.X.toarray()),
    "int64": lambda cells: setattr(cells, "X", cells.X.astype(np.int64)),
    "uint8": lambda cells: setattr(cells, "X", cells.X.astype(np.uint8)),
    "float64": lambda cells: setattr(cells, "X", cells.X.astype(np.float64)),
    "versions": lambda cells: setattr(cells, "var_names", [f"{g}.7" for g in cells.var_names]),
    "unused categories": set_obs(
        exposure=lambda c: pd.Categorical(
            c.obs["exposure"], categories=["BPA", *sorted(set(c.obs["exposure"]))]
        )
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_only_unusual_works(name: str, tmp_path: Path) -> None:
    cells = good()
    GOOD[name](cells)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    curated = curate_file(tmp_path / "cells.h5ad")
    wanted = good()
    assert curated.obs_names.equals(wanted.obs_names)
    assert curated.var_names.equals(wanted.var_names)
    assert (curated.X != wanted.X).nnz == 0
    assert sorted(set(curated.obs["exposure"])) == ["DMSO", "LIVER-X_AGONIST", "RET_AGONIST"]
    path = tmp_path / "cells.h5ad"
    streamed = list(chunks(path, CellsConfig.of(KEYS, "cells"), 7))
    assert (sparse.vstack([block.X for block in streamed]) != wanted.X).nnz == 0
