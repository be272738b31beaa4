"""Malformed input to scoring is one line that leaves nothing, or a reason beside its cell."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from conftest import planted_cells
from endoprint import artefact
from endoprint.cells import CellsConfig
from endoprint.config import Refusal
from endoprint.models.logistic import Logistic, LogisticConfig
from endoprint.registry import Version
from endoprint.scoring import NO_GENES, SCORES, Layout, ScoreSummary, late
from files import write_10x, write_mtx
from scoring_story import score

KEYS = {"sample_key": "sample", "unit_keys": ["unit"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Logistic, Version]:
    cells = planted_cells(n_units=4)
    unit = cells.obs["unit"].to_numpy()
    fitted = Logistic(LogisticConfig(penalty=0.1, latent_width=4))
    fitted.fit(cells[unit != "u3"].copy(), cells[unit == "u3"].copy())
    folder = tmp_path_factory.mktemp("model")
    fitted.save(folder)
    return fitted, Version("toy", "1", "run", artefact.digest(folder), "logistic", {})


def raw_cells() -> AnnData:
    cells = planted_cells(n_units=2, n_cells=6, seed=5)
    return AnnData(X=cells.X, obs=cells.obs[["unit", "sample"]], var=cells.var[[]])


Make = Callable[[Path], object]


def changed(change: Callable[[AnnData], object]) -> Make:
    def make(path: Path) -> None:
        cells = raw_cells()
        change(cells)
        cells.write_h5ad(path)

    return make


def inside(change: Callable[[h5py.File], object]) -> Make:
    """A file whose cells are good and whose HDF5 was then meddled with."""

    def make(path: Path) -> None:
        raw_cells().write_h5ad(path)
        with h5py.File(path, "r+") as file:
            change(file)

    return make


def put(file: h5py.File, name: str, values: object) -> None:
    attributes = dict(file[name].attrs) if name in file else {}
    if name in file:
        del file[name]
    file[name] = values
    file[name].attrs.update(attributes)


def renamed(make: Callable[[int], str]) -> Make:
    def change(cells: AnnData) -> None:
        cells.var_names = [make(i) for i in range(cells.n_vars)]

    return changed(change)


def values(change: Callable[[np.ndarray], np.ndarray]) -> Make:
    def make(cells: AnnData) -> None:
        cells.X = sparse.csr_matrix(change(cells.X.toarray().astype(np.float32)))

    return changed(make)


def tenx(change: Callable[[h5py.File], object]) -> Make:
    def make(path: Path) -> None:
        write_10x(raw_cells(), path)
        with h5py.File(path, "r+") as file:
            change(file)

    return make


def mtx(change: Callable[[Path], object]) -> Make:
    def make(path: Path) -> None:
        write_mtx(raw_cells(), path)
        change(path)

    return make


def text_of(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = gzip.decompress((folder / name).read_bytes()).decode()
        (folder / name).write_bytes(gzip.compress(change(text).encode()))

    return edit


def twice(path: Path) -> None:
    for name in ("one", "two"):
        (path / name).mkdir(parents=True)
        raw_cells().write_h5ad(path / name / "cells.h5ad")


def cut(share: float) -> Make:
    def make(path: Path) -> None:
        raw_cells().write_h5ad(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return make


def zarr_without(name: str) -> Make:
    """A store of which the values of one array have not been copied yet."""

    def make(path: Path) -> None:
        raw_cells().write_zarr(path)
        for each in (path / name).rglob("*"):
            if each.is_file() and not each.name.startswith((".z", "zarr.json")):
                each.unlink()

    return make


def strangers(path: Path) -> None:
    renamed(lambda i: f"ENSG{i + 900:011d}")(path)


# what is wrong, how, a word of what is said, reading rules
REFUSED: dict[str, tuple[Make, str, dict[str, object]]] = {
    "absent": (lambda path: None, "none at", {}),
    "an empty folder": (lambda path: path.mkdir(), "none in", {}),
    "a folder of notes": (lambda p: (p.mkdir(), (p / "a.txt").touch()), "none in", {}),
    "an empty zarr": (
        lambda p: (p.mkdir(), (p / ".zgroup").write_text('{"zarr_format": 2}')),
        "none in",
        {},
    ),
    "zero bytes": (lambda path: path.touch(), "can not be read", {}),
    "text": (lambda path: path.write_text("cell,gene\n"), "can not be read", {}),
    "a tenth of a file": (cut(0.1), "can not be read", {}),
    "half a file": (cut(0.5), "can not be read", {}),
    "nearly a file": (cut(0.95), "can not be read", {}),
    "no cells": (changed(lambda c: c._inplace_subset_obs([])), "0 x", {}),
    "no genes": (changed(lambda c: c._inplace_subset_var([])), "x 0", {}),
    "no obs": (inside(lambda f: f.__delitem__("obs")), "", {}),
    "no var": (inside(lambda f: f.__delitem__("var")), "none in", {}),
    "no X": (inside(lambda f: f.__delitem__("X")), "no X", {}),
    "no index": (inside(lambda f: f["obs"].__delitem__("_index")), "can not be read", {}),
    "no data": (inside(lambda f: f["X"].__delitem__("data")), "can not be read", {}),
    "X of words": (inside(lambda f: put(f, "X/data", np.array([b"x"] * 9))), "", {}),
    "X of three dimensions": (inside(lambda f: put(f, "X", np.ones((36, 3, 2)))), "dimen", {}),
    "complex": (changed(lambda c: setattr(c, "X", c.X.astype(complex))), "complex", {}),
    "pointers that fall": (
        inside(lambda f: f["X/indptr"].__setitem__(4, 0)),
        "check that the file was copied whole",
        {},
    ),
    "genes beyond the last": (
        inside(lambda f: f["X/indices"].__setitem__(0, 500)),
        "values and genes that are there",
        {},
    ),
    "fewer values than pointed at": (
        inside(lambda f: put(f, "X/data", f["X/data"][:9])),
        "values and genes that are there",
        {},
    ),
    "a column less": (inside(lambda f: put(f, "obs/_index", f["obs/_index"][:9])), "36 rows", {}),
    "log-normalised": (values(lambda x: np.log1p(x)), "raw counts", {}),
    "scaled": (values(lambda x: x - x.mean(axis=0)), "raw counts", {}),
    "all NaN": (values(lambda x: x * np.nan), "raw counts", {}),
    "two cells of one name": (
        changed(lambda c: setattr(c, "obs_names", [f"c{i // 2}" for i in range(36)])),
        "cell ids are unique",
        {},
    ),
    "symbols": (renamed(lambda i: f"GENE{i}"), "Ensembl", {}),
    "mouse": (renamed(lambda i: f"ENSMUSG{i:011d}"), "human", {}),
    "transcripts": (renamed(lambda i: f"ENST{i:011d}"), "gene ids", {}),
    "mixed ids": (renamed(lambda i: f"ENSG{i:011d}" if i else "EGFP"), "EGFP", {}),
    "other genes": (strangers, "of the model's genes", {}),
    "no layer": (changed(lambda c: None), "no counts", {"layer": "counts"}),
    "no raw": (changed(lambda c: None), "no raw", {"layer": "raw"}),
    "no gene id column": (changed(lambda c: None), "'ids'", {"gene_id_key": "ids"}),
    "no library size": (changed(lambda c: None), "'n'", {"library_size_key": "n"}),
    "a library size too small": (
        changed(lambda c: c.obs.insert(0, "n", 1.0)),
        "no less than its counts",
        {"library_size_key": "n"},
    ),
    "no mitochondrial gene": (changed(lambda c: None), "mito", {"max_mitochondrial_share": 0.1}),
    "a barcode less": (
        tenx(lambda f: put(f, "matrix/barcodes", f["matrix/barcodes"][:9])),
        "a barcode per cell",
        {},
    ),
    "10x without features": (tenx(lambda f: f["matrix"].__delitem__("features")), "matrix", {}),
    "10x without data": (tenx(lambda f: f["matrix"].__delitem__("data")), "can not be read", {}),
    "CellRanger 2": (
        tenx(lambda f: (f.__delitem__("matrix"), put(f, "GRCh38/barcodes", [1]))),
        "GRCh38",
        {},
    ),
    "mtx without features": (
        mtx(lambda p: (p / "features.tsv.gz").unlink()),
        "no features.tsv",
        {},
    ),
    "mtx of another text": (
        mtx(text_of("matrix.mtx.gz", lambda t: "gene,cell\n" + t)),
        "another text",
        {},
    ),
    "mtx without its shape": (
        mtx(text_of("matrix.mtx.gz", lambda t: "\n".join(t.split("\n")[:2]) + "\n")),
        "MatrixMarket",
        {},
    ),
    "mtx of another shape": (
        mtx(text_of("matrix.mtx.gz", lambda t: t.replace("120 36", "120 35"))),
        "a barcode per cell",
        {},
    ),
    "mtx beyond its genes": (
        mtx(text_of("matrix.mtx.gz", lambda t: t + "121 1 4\n")),
        "an entry",
        {},
    ),
    "mtx of words": (mtx(text_of("matrix.mtx.gz", lambda t: t + "a b c\n")), "read", {}),
    "mtx cut short": (
        mtx(lambda p: (p / "matrix.mtx.gz").write_bytes((p / "matrix.mtx.gz").read_bytes()[:99])),
        "",
        {},
    ),
    "a zarr without its counts": (zarr_without("X/data"), "0 of 1 parts of data", {}),
    "a zarr without its genes' numbers": (zarr_without("X/indices"), "parts of indices", {}),
    "a zarr without its row pointers": (zarr_without("X/indptr"), "that end elsewhere", {}),
    "a pipe": (os.mkfifo, "neither at", {}),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "none at", {}),
    "files of one name": (twice, "in several folders", {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_scored_is_one_line_and_leaves_nothing(
    name: str, model: tuple[Logistic, Version], tmp_path: Path
) -> None:
    make, words, rules = REFUSED[name]
    path = tmp_path / "cells.h5ad"
    make(path)
    where = f"{path}/*/cells.h5ad" if name == "files of one name" else path
    with pytest.raises(Refusal) as caught:
        score(*model, where, tmp_path / "out", cells=CellsConfig.of({**KEYS, **rules}, "cells"))
    said = str(caught.value)
    assert "\n" not in said
    assert words in said
    assert all((caught.value.rule, caught.value.got, caught.value.remedy))
    assert not (tmp_path / "out").exists()


# -- cells set aside ----------------------------------------------------------------------------
def one_value(value: float) -> Make:
    def change(counts: np.ndarray) -> np.ndarray:
        counts[4, 0] = value
        return counts

    return values(change)


def emptied(counts: np.ndarray) -> np.ndarray:
    counts[4] = 0
    return counts


def alien(cells: AnnData) -> None:
    counts = np.hstack([cells.X.toarray(), np.full((cells.n_obs, 1), 5)])
    counts[4, :-1] = 0
    var = pd.DataFrame(index=[*cells.var_names, "ENSG00000999999"])
    cells.__init__(X=sparse.csr_matrix(counts), obs=cells.obs, var=var)


SET_ASIDE: dict[str, tuple[Make, str, dict[str, object]]] = {
    "NaN": (one_value(np.nan), "counts that are no numbers", {}),
    "infinite": (one_value(np.inf), "counts that are no numbers", {}),
    "negative": (one_value(-1), "negative counts", {}),
    "a fraction": (one_value(0.5), "fractions among the counts", {}),
    "too large": (one_value(2.0**25), "a count too large to be one", {}),
    "empty": (values(emptied), "no counts", {}),
    "nothing the model knows": (changed(alien), NO_GENES, {}),
    "too few genes": (values(lambda x: emptied(x) + np.eye(36, 120, k=-4)),
                      "fewer than 3 genes", {"min_genes": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", SET_ASIDE)
def test_a_bad_cell_is_set_aside_with_a_reason_and_the_others_are_scored(
    name: str, model: tuple[Logistic, Version], tmp_path: Path
) -> None:
    make, reason, rules = SET_ASIDE[name]
    path = tmp_path / "cells.h5ad"
    make(path)
    config = CellsConfig.of({**KEYS, **rules}, "cells")
    summary: ScoreSummary = score(
        *model, path, tmp_path / "out", cells=config, layout=Layout(shard_cells=10)
    )
    rows = pd.read_parquet(tmp_path / "out" / SCORES)
    assert list(rows["cell_id"]) == list(raw_cells().obs_names)
    assert rows["quarantine"].to_list() == ["", "", "", "", reason, *[""] * 31]
    assert rows["abstain"][4]
    assert pd.isna(rows["call"][4])
    assert summary.quarantined == {reason: 1}
    others = rows.drop(index=4)
    assert others["call"].notna().all()
    assert np.isfinite(others.filter(regex="^p_").to_numpy()).all()


def test_enough_was_tried() -> None:
    assert len(REFUSED) + len(SET_ASIDE) >= 40


# -- where scores go, and what is taken for scores ------------------------------------------------
def test_scores_are_never_written_into_the_cells(
    model: tuple[Logistic, Version], tmp_path: Path
) -> None:
    store = tmp_path / "cells.zarr"
    raw_cells().write_zarr(store)
    before = sorted(store.rglob("*"))
    for out in (store, store / "out"):
        with pytest.raises(Refusal, match="beside the cells"):
            score(*model, store, out, cells=CellsConfig.of(KEYS, "cells"))
    assert sorted(store.rglob("*")) == before


def test_a_place_that_can_not_be_written_is_refused_before_anything_is_scored(
    model: tuple[Logistic, Version], tmp_path: Path
) -> None:
    raw_cells().write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(Refusal, match="can be written"):
        score(*model, tmp_path / "cells.h5ad", Path("/proc/out"),
              cells=CellsConfig.of(KEYS, "cells"))  # fmt: skip


def test_a_table_that_is_no_scores_is_not_held_against_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("cell_id,exposure\na,DMSO\n")
    pd.DataFrame({"cell_id": ["a"], "call": "DMSO"}).to_parquet(tmp_path / "own.parquet")
    with pytest.raises(Refusal, match="without file, sample") as caught:
        late.evaluate(tmp_path / "own.parquet", tmp_path / "labels.csv", cells=CellsConfig())
    assert "\n" not in str(caught.value)
