"""The door: what curated cells are, whatever they came in."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from conftest import planted_cells
from endoprint import labels
from endoprint.annotations import text
from endoprint.cells import (
    CellsConfig,
    curate,
    fingerprint,
    from_frame,
    load,
    log_normalised,
    matrix,
    md5,
    read,
    read_obs,
    write,
)
from endoprint.config import Refusal
from endoprint.genes import MITOCHONDRIAL
from lab import chunks

CONFIG = CellsConfig(exposure_key="exposure", unit_keys=["unit"], batch_key="batch")


def raw_cells(**values: int) -> ad.AnnData:
    cells = planted_cells(n_units=2, n_cells=5, n_genes=40, **values)
    cells.obs = cells.obs[["exposure", "unit", "line", "batch"]].copy()
    return cells


def frozen(cells: ad.AnnData) -> tuple[object, ...]:
    return (
        cells.X.toarray().tobytes(),
        cells.X.nnz,
        cells.obs.to_csv(),
        cells.var.to_csv(),
        json.dumps({key: str(value) for key, value in cells.uns.items()}),
    )


# -- curation -----------------------------------------------------------------------------------
def test_the_callers_cells_are_never_modified() -> None:
    cells = raw_cells()
    cells.X.data[0] = 0  # a stored zero, which curation drops from its own copy
    before = frozen(cells)
    curated, _ = curate(cells, CONFIG)
    curated.X.data[:] = 7
    curated.obs["unit"] = "changed"
    assert frozen(cells) == before


def test_curated_cells_keep_the_contract() -> None:
    cells, report = curate(raw_cells(), CONFIG)
    assert isinstance(cells.X, sparse.csr_matrix)
    assert cells.X.dtype == np.float32
    assert cells.X.has_sorted_indices
    assert cells.X.data.min() >= 1
    assert cells.obs["n_counts"].dtype == np.float64
    assert np.array_equal(cells.obs["n_counts"], np.asarray(cells.X.sum(axis=1)).ravel())
    assert np.array_equal(cells.obs["n_genes"], (cells.X.toarray() > 0).sum(axis=1))
    assert all(type(value) is str for value in cells.obs["exposure"])
    assert cells.obs["sample"].iloc[0] == "|".join(
        cells.obs.iloc[0][["unit", "exposure", "batch"]]
    )
    said = cells.uns["endoprint"]
    assert said["control"] == "DMSO"
    assert said["fingerprint"] == fingerprint(cells)
    assert report.exposures == {"DMSO": 10, "LIVER-X_AGONIST": 10, "RET_AGONIST": 10}
    json.dumps(report.to_json())


def test_columns_of_one_gene_are_summed() -> None:
    cells = raw_cells()
    names = list(cells.var_names)
    doubled = ad.AnnData(
        X=sparse.hstack([cells.X, cells.X[:, :3]], format="csr"),
        obs=cells.obs,
        var=pd.DataFrame(
            index=[*names, *(f"{name}.2" for name in names[:2]), f"{names[2]}_PAR_Y"]
        ),
    )
    curated, report = curate(doubled, CONFIG)
    wanted = cells.X.toarray()
    wanted[:, :3] *= 2
    assert np.array_equal(matrix(curated, names).toarray(), wanted)
    assert report.removed_genes == {"summed into another column of the same gene": 3}


def test_removals_are_counted_by_reason() -> None:
    cells = raw_cells()
    counts = cells.X.toarray()
    counts[0] = 0
    counts[1], counts[1, 0] = 0, 500  # one gene only
    counts[2] = (counts[2] > 0) * 1
    cells.X = sparse.csr_matrix(counts)
    cells.obs["exposure"] = [
        "MTR_393_3GEX" if i == 3 else e for i, e in enumerate(cells.obs.exposure)
    ]
    config = CONFIG.model_copy(
        update={"min_counts": 41, "min_genes": 2, "drop_labels": ["MTR_393_3GEX"]}
    )
    curated, report = curate(cells, config)
    assert report.removed_cells == {
        "no counts": 1,
        "fewer than 2 genes": 1,
        "fewer than 41 counts": 1,
        "placeholder exposure": 1,
    }
    assert curated.n_obs == cells.n_obs - 4 == report.n_cells
    assert curated.uns["endoprint"]["n_removed_by_reason"] == report.removed_cells


def test_mitochondrial_cells_go_by_share_of_the_library() -> None:
    cells = raw_cells()
    cells.var_names = [sorted(MITOCHONDRIAL)[0], *cells.var_names[1:]]
    counts = cells.X.toarray()
    counts[:, 0] = 0
    counts[4, 0] = counts[4].sum() * 3
    cells.X = sparse.csr_matrix(counts)
    curated, report = curate(cells, CONFIG.model_copy(update={"max_mitochondrial_share": 0.5}))
    assert report.removed_cells == {"more than 50% mitochondrial": 1}
    assert cells.obs_names[4] not in curated.obs_names


def test_rare_genes_go_where_asked() -> None:
    cells = raw_cells()
    counts = cells.X.toarray()
    counts[:, 5], counts[0, 5] = 0, 1
    cells.X = sparse.csr_matrix(counts)
    curated, report = curate(cells, CONFIG.model_copy(update={"min_cells_per_gene": 2}))
    assert cells.var_names[5] not in curated.var_names
    assert report.removed_genes["in fewer than 2 cells"] == 40 - curated.n_vars
    # the library was what it was
    assert np.array_equal(curated.obs["n_counts"], counts.sum(axis=1))


def test_the_true_library_size_counts_genes_that_are_not_here() -> None:
    cells = raw_cells()
    cells.obs["total"] = np.asarray(cells.X.sum(axis=1)).ravel() * 4 - 1e-12
    curated, report = curate(cells, CONFIG.model_copy(update={"library_size_key": "total"}))
    assert np.array_equal(curated.obs["n_counts"], np.asarray(cells.X.sum(axis=1)).ravel() * 4)
    assert report.library_size == "total"


def test_counts_come_from_the_layer_that_is_named() -> None:
    cells = raw_cells()
    wanted = cells.X.toarray()
    cells.layers["counts"] = cells.X.copy()
    cells.raw = cells.copy()
    cells.X = sparse.csr_matrix(np.log1p(wanted))
    for layer in ("counts", "raw"):
        curated, _ = curate(cells, CONFIG.model_copy(update={"layer": layer}))
        assert np.array_equal(curated.X.toarray(), wanted)
    with pytest.raises(Refusal, match="counts, raw"):
        curate(cells, CONFIG)


def test_symbols_are_mapped_by_case_and_coverage_is_said(tmp_path: Path) -> None:
    cells = raw_cells()
    ids = list(cells.var_names)
    cells.var_names = ["EYA4", "Eya4", "NOSUCH", *(f"GENE{i}" for i in range(3, 40))]
    known = {"EYA4": f"{ids[0]}.3"} | {f"GENE{i}": ids[i] for i in range(3, 40)}
    (tmp_path / "map.json").write_text(json.dumps(known))
    config = CONFIG.model_copy(update={"symbol_map": str(tmp_path / "map.json")})
    curated, report = curate(cells, config)
    assert list(curated.var_names) == [ids[0], *ids[3:]]
    assert list(curated.var["symbol"][:2]) == ["EYA4", "GENE3"]
    assert report.removed_genes == {"mouse-style symbol": 1, "symbol not in symbol_map": 1}
    assert report.gene_coverage == 38 / 40
    assert report.count_coverage == pytest.approx(
        np.delete(cells.X.toarray(), [1, 2], axis=1).sum() / cells.X.sum()
    )
    # counts of unmapped genes still belong to the library
    assert curated.obs["n_counts"].sum() == cells.X.sum()
    kept, report = curate(cells, CONFIG.model_copy(update={"allow_symbols": True}))
    assert "Eya4" not in kept.var_names
    assert (report.gene_ids, kept.n_vars) == ("symbols", 39)


def test_antibodies_and_tags_are_not_genes() -> None:
    cells = raw_cells()
    cells.var["feature_types"] = ["Multiplexing Capture"] + ["Gene Expression"] * 39
    cells.var_names = ["CMO301", *cells.var_names[1:]]
    curated, report = curate(cells, CONFIG)
    assert curated.n_vars == 39
    assert report.removed_genes == {"not a gene-expression feature": 1}
    assert np.array_equal(curated.obs["n_counts"], np.asarray(curated.X.sum(axis=1)).ravel())


# -- labels, units ------------------------------------------------------------------------------
SPELLINGS = {
    "RETAGONIST": "RET_AGONIST",
    "ARYLHYDAGONIST": "ARYL_HYD_AGONIST",
    "LIVERXAGONIST": "LIVER-X_AGONIST",
    "3PBA": "3-PBA",
    "AhHyd_Ag": "ARYL_HYD_AGONIST",
    "AhHyd_Inh": "ARYL_HYD_ANTAGONIST",
    "Andr_Inh": "ANDROGEN_ANTAGONIST",
    "Estr_Ag": "ESTROGEN_AGONIST",
    "GC_Ag": "GLUCOCORT_AGONIST",
    "LivX_Inh": "LIVER-X_ANTAGONIST",
    "Ret_Inh": "RET_ANTAGONIST",
    "Thyr_Ag": "THYROID_AGONIST",
    "MBzP": "MBzP",
    "DMSO": "DMSO",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_atlas_has_one_label(spelling: str) -> None:
    assert labels.canonical(spelling) == SPELLINGS[spelling]


def test_the_table_of_labels_is_whole_and_unambiguous() -> None:
    assert len(labels.CANONICAL) == 23
    assert all(labels.canonical(label) == label for label in labels.CANONICAL)
    assert len(labels.ALIASES) == 23 + 14  # no two spellings collide


@pytest.mark.parametrize("label", ["CTL", "ctrl", "stim", "MTR_393_3GEX", "RET", "AGONIST", ""])
def test_what_no_one_declared_is_unknown(label: str) -> None:
    assert labels.canonical(label) is None


def test_a_file_may_declare_labels_of_its_own() -> None:
    cells = raw_cells()
    cells.obs["exposure"] = cells.obs["exposure"].map(
        {"DMSO": "ctrl", "RET_AGONIST": "stim", "LIVER-X_AGONIST": "LXR"}
    )
    aliases = {"stim": "INTERFERON", "LXR": "LIVER-X_AGONIST"}
    config = CONFIG.model_copy(update={"aliases": aliases, "control": "ctrl"})
    curated, _ = curate(cells, config)
    assert sorted(set(curated.obs["exposure"])) == ["INTERFERON", "LIVER-X_AGONIST", "ctrl"]
    config = CONFIG.model_copy(update={"aliases": {**aliases, "ctrl": "DMSO"}, "control": "ctrl"})
    assert curate(cells, config)[0].uns["endoprint"]["control"] == "DMSO"


@pytest.mark.parametrize(
    "values", [[1.0, 1.5, np.nan, 2.0], [" a", "a", None, "nan"], [3, 1], [True, False]]
)
def test_a_value_is_spelled_alike_whatever_stands_beside_it(values: list[object]) -> None:
    together = list(text(pd.Series(values)))
    assert together == [text(pd.Series([each])).iloc[0] for each in values]


def test_a_missing_replicate_makes_a_pooled_unit() -> None:
    cells = raw_cells()
    cells.obs["replicate"] = np.where(cells.obs["exposure"] == "RET_AGONIST", np.nan, 3.0)
    config = CONFIG.model_copy(update={"unit_keys": ["line", "replicate"], "line_key": "line"})
    curated, _ = curate(cells, config)
    pooled = curated.obs[curated.obs["is_pooled"]]
    assert set(pooled["exposure"]) == {"RET_AGONIST"}
    assert set(curated.obs["unit"]) == {"L0|3", "L1|3", "L0|?", "L1|?"}


def test_a_unit_may_be_part_of_a_name() -> None:
    cells = raw_cells()
    short = cells.obs["exposure"].str[:4]
    cells.obs["tube"] = short + "10" + cells.obs["unit"].str[1:]
    config = CONFIG.model_copy(update={"unit_keys": ["tube"], "unit_pattern": r"(\d+)$"})
    assert set(curate(cells, config)[0].obs["unit"]) == {"100", "101"}


def test_no_units_is_a_design_too() -> None:
    config = CONFIG.model_copy(update={"unit_keys": [], "technical_fold": "line"})
    curated, _ = curate(raw_cells(), config)
    assert set(curated.obs["unit"]) == {""}
    assert set(curated.obs["technical_fold"]) == {"L0", "L1"}


def test_unlabelled_cells_need_no_keys() -> None:
    cells = raw_cells()
    cells.obs = pd.DataFrame(index=cells.obs_names)
    curated, report = curate(cells, CONFIG, labelled=False)
    assert "exposure" not in curated.obs
    assert set(curated.obs["sample"]) == {"all cells"}
    assert (report.n_cells, report.exposures) == (cells.n_obs, {})


# -- files --------------------------------------------------------------------------------------
def write_10x(cells: ad.AnnData, path: Path) -> None:
    """CellRanger 3's layout, written by hand: the oracle is the layout's description."""
    by_gene = sparse.csc_matrix(cells.X.T)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(cells.obs_names, dtype="S")
        group["data"] = by_gene.data.astype(np.int32)
        group["indices"] = by_gene.indices.astype(np.int64)
        group["indptr"] = by_gene.indptr.astype(np.int64)
        group["shape"] = np.array(by_gene.shape, dtype=np.int32)
        group["features/id"] = np.array(cells.var_names, dtype="S")
        group["features/name"] = np.array([f"G{i}" for i in range(cells.n_vars)], dtype="S")
        group["features/feature_type"] = np.array(["Gene Expression"] * cells.n_vars, dtype="S")
        group["features/genome"] = np.array(["GRCh38"] * cells.n_vars, dtype="S")


def test_every_kind_of_file_gives_the_same_cells(tmp_path: Path) -> None:
    cells = raw_cells()
    wanted, _ = curate(cells, CONFIG)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    cells.write_zarr(tmp_path / "cells.zarr")
    write_10x(cells, tmp_path / "cells.h5")
    cells.obs.to_csv(tmp_path / "obs.csv")
    for name, table in (("cells.h5ad", ""), ("cells.zarr", ""), ("cells.h5", "obs.csv")):
        config = CONFIG.model_copy(update={"obs_table": table})
        curated, _ = curate(read(tmp_path / name, config), config)
        assert fingerprint(curated) == fingerprint(wanted), name
        assert curated.obs["exposure"].equals(wanted.obs["exposure"]), name
        streamed = list(chunks(tmp_path / name, config, 7))
        assert [len(block) for block in streamed] == [7, 7, 7, 7, 2], name
        assert (sparse.vstack([block.X for block in streamed]) != wanted.X).nnz == 0, name
    assert read_obs(tmp_path / "cells.h5ad")["exposure"].tolist() == list(cells.obs["exposure"])
    assert len(read_obs(tmp_path / "cells.h5")) == len(read_obs(tmp_path / "cells.zarr"))


def test_runs_join_their_cell_ids_and_a_table_of_cells(tmp_path: Path) -> None:
    first, second = raw_cells(seed=1), raw_cells(seed=2)
    second.obs_names = first.obs_names  # barcodes repeat across runs
    write_10x(first, tmp_path / "491.h5")
    write_10x(second, tmp_path / "505.h5")
    table = []
    for run, cells in (("491", first), ("505", second)):
        part = cells.obs[["exposure", "unit"]].copy()
        part.index = [f"{cell}-{run}" for cell in part.index]
        table.append(part)
    pd.concat(table)[::-1][4:].to_csv(tmp_path / "obs.csv")  # another order, four cells unlisted
    config = CONFIG.model_copy(
        update={
            "runs": {"491": "491.h5", "505": "505.h5"},
            "obs_table": "obs.csv",
            "batch_key": "run",
        }
    )
    curated, report = curate(read(tmp_path, config), config)
    assert report.removed_cells == {"not in the obs table": 4}
    assert report.n_cells_read == 60
    assert set(curated.obs["batch"]) == {"491", "505"}
    cell = f"{first.obs_names[7]}-491"
    assert curated.obs.loc[cell, "exposure"] == first.obs["exposure"].iloc[7]
    assert np.array_equal(curated[cell].X.toarray(), first.X[7].toarray())


def test_scoring_loses_no_cell(tmp_path: Path) -> None:
    cells = raw_cells()
    counts = cells.X.toarray()
    counts[[0, 9]] = 0
    cells.X = sparse.csr_matrix(counts)
    cells.layers["counts"] = cells.X
    cells.raw = cells.copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for layer in (None, "counts", "raw"):
        config = CONFIG.model_copy(update={"layer": layer})
        blocks = list(chunks(tmp_path / "cells.h5ad", config, 8))
        seen = pd.concat([block.obs for block in blocks])
        assert list(seen.index) == list(cells.obs_names)
        assert list(np.flatnonzero(seen["flag"] == "no counts")) == [0, 9]
        assert set(seen["flag"].iloc[1:9]) == {""}


def test_equal_cells_are_equal_bytes(tmp_path: Path) -> None:
    cells, _ = curate(raw_cells(), CONFIG)
    write(cells, tmp_path / "a.h5ad")
    write(curate(raw_cells(), CONFIG)[0], tmp_path / "b.h5ad")
    back = load(tmp_path / "a.h5ad")
    write(back, tmp_path / "c.h5ad")
    assert md5(tmp_path / "a.h5ad") == md5(tmp_path / "b.h5ad") == md5(tmp_path / "c.h5ad")
    assert fingerprint(back) == cells.uns["endoprint"]["fingerprint"]
    pd.testing.assert_frame_equal(back.obs, cells.obs, check_dtype=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad", "c.h5ad"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    cells, _ = curate(raw_cells(), CONFIG)
    write(cells, tmp_path / "a.h5ad")
    before = md5(tmp_path / "a.h5ad")
    cells.uns["endoprint"]["odd"] = object()  # h5ad can not hold it
    with pytest.raises(Exception, match="odd"):
        write(cells, tmp_path / "a.h5ad")
    assert md5(tmp_path / "a.h5ad") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


# -- how models read them -----------------------------------------------------------------------
def test_the_matrix_is_joined_by_gene_id() -> None:
    cells, _ = curate(raw_cells(), CONFIG)
    genes = ["ENSG99999999999", *cells.var_names[[7, 2, 30]]]
    wanted = np.hstack([np.zeros((cells.n_obs, 1)), cells.X.toarray()[:, [7, 2, 30]]])
    assert np.array_equal(matrix(cells, genes).toarray(), wanted)
    shuffled = cells[:, np.random.default_rng(0).permutation(cells.n_vars)].copy()
    assert np.array_equal(matrix(shuffled, genes).toarray(), wanted)
    same = matrix(cells, list(cells.var_names))
    same.data[:] = 0
    assert cells.X.data.min() > 0  # a copy
    with pytest.raises(Refusal, match="unique"):
        matrix(cells, [genes[1], genes[1]])


def test_normalisation_uses_the_true_library_size() -> None:
    cells, _ = curate(raw_cells(), CONFIG)
    cells.obs["n_counts"] *= 3
    genes = list(cells.var_names[:9])
    wanted = np.log1p(1e4 * cells.X.toarray()[:, :9] / cells.obs["n_counts"].to_numpy()[:, None])
    found = log_normalised(cells, genes)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.toarray(), wanted, rtol=1e-6)


def test_a_table_of_counts_becomes_cells() -> None:
    cells, _ = curate(raw_cells(), CONFIG)
    frame = pd.DataFrame(
        cells.X.toarray().astype(int),
        index=cells.obs_names,
        columns=[f"{gene}.1" for gene in cells.var_names],
    )
    made = from_frame(frame)
    assert (made.X != cells.X).nnz == 0
    assert list(made.var_names) == list(cells.var_names)
    assert np.array_equal(made.obs["n_counts"], cells.obs["n_counts"])
    frame["n_counts"] = 10_000
    assert set(from_frame(frame).obs["n_counts"]) == {10_000.0}
    frame.iloc[0] = 0
    frame["n_counts"] = 0 * frame["n_counts"] + frame.drop(columns="n_counts").sum(axis=1)
    assert not log_normalised(from_frame(frame), list(cells.var_names))[0].nnz
    with pytest.raises(Refusal, match="raw counts"):
        from_frame(frame.drop(columns="n_counts") / 3)
    with pytest.raises(Refusal, match="type object"):
        from_frame(frame.astype(str).drop(columns="n_counts"))


def test_a_fingerprint_sees_one_count() -> None:
    cells, _ = curate(raw_cells(), CONFIG)
    other = cells.copy()
    other.X.data[-1] += 1
    assert fingerprint(other) != fingerprint(cells)
    renamed = cells.copy()
    renamed.obs_names = [f"{cell}x" for cell in cells.obs_names]
    assert fingerprint(renamed) != fingerprint(cells)


def test_paths_of_a_workspace_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDOPRINT_TEST_DATA", "/data")
    config = CellsConfig(source="${ENDOPRINT_TEST_DATA}/a.h5ad", pool="pool.h5ad")
    found = config.located(tmp_path)
    assert found.source == "/data/a.h5ad"
    assert found.pool == str(tmp_path / "pool.h5ad")
    assert found.symbol_map is None
    with pytest.raises(Refusal, match="environment variables that are set"):
        CellsConfig(source="${ENDOPRINT_UNSET}/a.h5ad").located(tmp_path)


# -- real cells ---------------------------------------------------------------------------------
def test_real_symbols_map_as_the_reference_says(shared: Path) -> None:
    config = CellsConfig(
        aliases={"CTL": "DMSO"},
        unit_keys=[],
        technical_fold="plate",
        library_size_key="implied_total_counts",
        symbol_map=str(shared / "data/geneformer/gene_name_id_dict_gc30M.json"),
    )
    raw = read(shared / "data/real/a549_dex_sciCAR_scAI.h5ad", config)
    curated, report = curate(raw, config)
    golden = ad.read_h5ad(shared / "golden/geneformer_tokens/a549.v1.input.h5ad")
    assert set(curated.var_names) == set(golden.var_names)
    assert (matrix(curated, list(golden.var_names)) != golden[curated.obs_names].X).nnz == 0
    assert np.array_equal(curated.obs["n_counts"], golden.obs.loc[curated.obs_names, "n_counts"])
    assert report.exposures == {"DMSO": 583, "GLUCOCORT_AGONIST": 2058}
    plain = config.model_copy(update={"symbol_map": None, "allow_symbols": True})
    _, report = curate(raw, plain)
    assert report.removed_genes == {"mouse-style symbol": 32}
    assert report.count_coverage == pytest.approx(0.989, abs=1e-3)  # 1.1 % of counts are mouse
