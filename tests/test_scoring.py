"""Every cell of a file is scored once, in its order, whatever happens meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from anndata import AnnData
from scipy import sparse

from conftest import planted_cells
from endoprint import artefact, scoring
from endoprint.cells import CellsConfig
from endoprint.config import Refusal
from endoprint.curated import md5
from endoprint.model import ExposureModel
from endoprint.models.logistic import Logistic, LogisticConfig
from endoprint.registry import Version
from endoprint.scoring import Job, Layout, ScoreSummary
from files import write_10x, write_mtx
from scoring_story import score

KEYS = CellsConfig(sample_key="sample", unit_keys=["unit"])


@pytest.fixture(scope="module")
def model() -> Logistic:
    cells = planted_cells(n_units=4)
    unit = cells.obs["unit"].to_numpy()
    fitted = Logistic(LogisticConfig(penalty=0.1, latent_width=4))
    return fitted.fit(cells[unit != "u3"].copy(), cells[unit == "u3"].copy())


@pytest.fixture(scope="module")
def version(model: Logistic, tmp_path_factory: pytest.TempPathFactory) -> Version:
    folder = tmp_path_factory.mktemp("model")
    model.save(folder)
    return Version("endoprint-toy", "3", "run", artefact.digest(folder), "logistic", {})


def raw_cells(n_cells: int = 6, seed: int = 5) -> AnnData:
    """Cells as a user has them: no exposure, and in no order."""
    cells = planted_cells(n_units=2, n_cells=n_cells, seed=seed)
    return AnnData(X=cells.X, obs=cells.obs[["unit", "sample"]], var=cells.var[[]])


def written(cells: AnnData, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells.write_h5ad(path)
    return path


def rows_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / scoring.SCORES)


@pytest.fixture
def run(model: Logistic, version: Version) -> Callable[..., ScoreSummary]:
    def scored(path: Path, out: Path, *, shard_cells: int = 16, **named: object) -> ScoreSummary:
        return score(
            named.pop("model", model), named.pop("version", version), path, out,
            cells=named.pop("cells", KEYS), layout=Layout(shard_cells=shard_cells), **named,
        )  # fmt: skip

    return scored


# -- what every row says ------------------------------------------------------------------------
def test_every_cell_has_one_row_in_the_files_order_with_the_models_own_answer(
    model: Logistic, version: Version, run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    cells = raw_cells()
    path = written(cells, tmp_path / "new.h5ad")
    seen: list[tuple[int, int]] = []
    summary = run(path, tmp_path / "out", watch=lambda done, total: seen.append((done, total)))
    rows = rows_of(tmp_path / "out")
    assert list(rows["cell_id"]) == list(cells.obs_names)
    whole = planted_cells(n_units=2, n_cells=6, seed=5)  # the same cells, curated
    told = model.predict_proba(whole)
    answers = rows[[f"p_{name}" for name in model.exposures]].to_numpy()
    np.testing.assert_allclose(answers, told.loc[rows["cell_id"]].to_numpy(), atol=1e-9)
    np.testing.assert_allclose(answers.sum(axis=1), 1.0)
    assert list(rows["call"]) == list(told.loc[rows["cell_id"]].idxmax(axis=1))
    np.testing.assert_allclose(rows["confidence"], answers.max(axis=1))
    np.testing.assert_allclose(rows["second_confidence"], np.sort(answers, axis=1)[:, -2])
    assert (rows["second_call"] != rows["call"]).all()
    assert list(rows["sample"]) == list(cells.obs["sample"])
    assert list(rows["n_genes"]) == list(np.diff(cells.X.indptr))
    assert set(rows["model_version"]) == {"3"}
    assert set(rows["model_sha256"]) == {version.sha256}
    assert set(rows["input_md5"]) == {md5(path)}
    assert (rows["known_share"] == 1.0).all()
    assert summary.n_cells == len(cells) == len(rows)
    assert seen[-1] == (len(cells), len(cells))
    assert json.loads((tmp_path / "out" / scoring.SUMMARY).read_text())["n_cells"] == len(cells)


@pytest.mark.parametrize("shard_cells", [1, 5, 1000])
def test_rows_do_not_depend_on_the_chunks(
    run: Callable[..., ScoreSummary], tmp_path: Path, shard_cells: int
) -> None:
    path = written(raw_cells(), tmp_path / "new.h5ad")
    run(path, tmp_path / "a", shard_cells=11)
    run(path, tmp_path / "b", shard_cells=shard_cells)
    a, b = (rows_of(tmp_path / name).drop(columns="job_key") for name in "ab")
    pd.testing.assert_frame_equal(a, b, atol=1e-9)


def test_novel_cells_are_marked_and_abstained_from(
    model: Logistic, run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    cells = raw_cells()
    strange = cells.X.toarray()
    strange[:6] = np.random.default_rng(0).poisson(3, strange[:6].shape)[:, ::-1]
    strange[:6, :20] += 60
    path = written(AnnData(sparse.csr_matrix(strange), cells.obs, cells.var), tmp_path / "n.h5ad")
    summary = run(path, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert rows["is_novel"][:6].all()
    assert (rows["is_novel"] == (rows["novelty"] > model.novelty_threshold)).all()
    assert rows["abstain"][rows["is_novel"]].all()
    assert summary.n_novel == rows["is_novel"].sum()
    assert sum(summary.calls.values()) + summary.n_abstained == len(rows)


def test_empty_cells_keep_their_row_without_a_call(
    run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    cells = raw_cells()
    counts = cells.X.toarray()
    counts[[0, 5, 35]] = 0
    path = written(AnnData(sparse.csr_matrix(counts), cells.obs, cells.var), tmp_path / "e.h5ad")
    summary = run(path, tmp_path / "out", shard_cells=1)  # also a chunk of nothing else
    rows = rows_of(tmp_path / "out")
    empty = rows.iloc[[0, 5, 35]]
    assert list(rows["cell_id"]) == list(cells.obs_names)
    assert (empty["quarantine"] == "no counts").all()
    assert empty["abstain"].all()
    assert empty["call"].isna().all()
    assert empty[[c for c in rows if c.startswith("p_")]].isna().all(axis=None)
    assert summary.quarantined == {"no counts": 3}
    assert summary.n_quarantined == 3


def test_cells_with_no_count_the_model_knows_are_said_so(
    run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    cells = raw_cells()
    counts = np.hstack([cells.X.toarray(), np.full((cells.n_obs, 1), 5)])
    counts[3, :-1] = 0
    var = pd.DataFrame(index=[*cells.var_names, "ENSG00000999999"])
    path = written(AnnData(sparse.csr_matrix(counts), cells.obs, var), tmp_path / "k.h5ad")
    run(path, tmp_path / "out")
    row = rows_of(tmp_path / "out").iloc[3]
    assert row["quarantine"] == scoring.NO_GENES
    assert row["known_share"] == 0.0
    assert pd.isna(row["call"])


def test_an_answer_that_is_no_number_is_no_call(
    run: Callable[..., ScoreSummary], model: Logistic, tmp_path: Path
) -> None:
    class Broken(Logistic):
        def evidence(self, cells: AnnData) -> np.ndarray:
            answers = super().evidence(cells)
            answers[cells.obs_names == bad] = np.nan
            return answers

    cells = raw_cells()
    bad = cells.obs_names[4]
    broken = Broken()
    broken.__dict__.update(model.__dict__)
    path = written(cells, tmp_path / "b.h5ad")
    run(path, tmp_path / "out", model=broken)
    rows = rows_of(tmp_path / "out").set_index("cell_id")
    assert rows.loc[bad, "quarantine"] == scoring.NO_ANSWER
    assert rows["call"].isna().sum() == 1


# -- folders ------------------------------------------------------------------------------------
def test_a_folder_is_scored_file_by_file_and_repeated_ids_are_told_apart_by_file(
    run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    inbox = tmp_path / "inbox"
    second, first = raw_cells(seed=5), raw_cells(n_cells=3, seed=6)
    written(second, inbox / "b.h5ad")
    written(first, inbox / "a.h5ad")
    (inbox / ".c.h5ad").write_bytes(b"still being copied")
    (inbox / "notes.txt").write_text("not cells")
    summary = run(inbox, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    told = [("a.h5ad", i) for i in first.obs_names] + [("b.h5ad", i) for i in second.obs_names]
    assert list(zip(rows["file"], rows["cell_id"])) == told
    assert not rows[["file", "cell_id"]].duplicated().any()
    assert summary.n_repeated_ids == first.n_obs  # their ids stand in both
    assert [each.n_cells for each in summary.inputs] == [first.n_obs, second.n_obs]
    assert rows.groupby("file")["input_md5"].nunique().eq(1).all()


def test_shuffled_cells_keep_their_answers_and_their_own_order(
    run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    cells = raw_cells()
    order = np.random.default_rng(1).permutation(cells.n_obs)
    run(written(cells, tmp_path / "x.h5ad"), tmp_path / "a")
    run(written(cells[order].copy(), tmp_path / "y.h5ad"), tmp_path / "b")
    a, b = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert list(b["cell_id"]) == list(cells.obs_names[order])
    same = [c for c in a if c.startswith("p_") or c == "call"]
    pd.testing.assert_frame_equal(
        a.set_index("cell_id")[same].loc[b["cell_id"]], b.set_index("cell_id")[same], atol=1e-9
    )


# -- again --------------------------------------------------------------------------------------
def test_the_same_job_again_computes_nothing(
    run: Callable[..., ScoreSummary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(raw_cells(), tmp_path / "new.h5ad")
    first = run(path, tmp_path / "out")
    stamp = (tmp_path / "out" / scoring.SCORES).stat().st_mtime_ns

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(ExposureModel, "predict_proba", never)
    again = run(path, tmp_path / "out")
    assert again.was_done_before
    assert not first.was_done_before
    assert again.job_key == first.job_key
    assert (tmp_path / "out" / scoring.SCORES).stat().st_mtime_ns == stamp


@pytest.mark.parametrize("change", ["cells", "model", "rules", "damage", "no summary"])
def test_another_job_or_a_damaged_result_is_computed_anew(
    run: Callable[..., ScoreSummary], version: Version, tmp_path: Path, change: str
) -> None:
    path, out = written(raw_cells(), tmp_path / "new.h5ad"), tmp_path / "out"
    run(path, out)
    named: dict[str, object] = {}
    if change == "cells":
        written(raw_cells(n_cells=4), path)
    elif change == "model":
        named["version"] = Version("endoprint-toy", "4", "run", "f" * 64, "logistic", {})
    elif change == "rules":
        named["cells"] = KEYS.model_copy(update={"min_genes": 3})
    elif change == "damage":
        content = bytearray((out / scoring.SCORES).read_bytes())
        content[100] ^= 1
        (out / scoring.SCORES).write_bytes(content)
    else:
        (out / scoring.SUMMARY).unlink()
    again = run(path, out, **named)
    assert not again.was_done_before
    assert len(rows_of(out)) == again.n_cells == len(anndata.read_h5ad(path))


def test_a_rerun_gives_the_same_bytes(run: Callable[..., ScoreSummary], tmp_path: Path) -> None:
    path = written(raw_cells(), tmp_path / "new.h5ad")
    first, second = run(path, tmp_path / "a"), run(path, tmp_path / "b")
    assert first.scores_sha256 == second.scores_sha256


@pytest.mark.parametrize("at", [0, 2])
def test_a_run_that_dies_leaves_the_old_result_whole_and_no_fragment(
    run: Callable[..., ScoreSummary], model: Logistic, tmp_path: Path, at: int
) -> None:
    class Dies(Logistic):
        left = at

        def evidence(self, cells: AnnData) -> np.ndarray:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return super().evidence(cells)

    path, out = written(raw_cells(), tmp_path / "new.h5ad"), tmp_path / "out"
    old = run(path, out)
    written(raw_cells(seed=8), path)
    dying = Dies()
    dying.__dict__.update(model.__dict__)
    with pytest.raises(KeyboardInterrupt):
        run(path, out, model=dying)
    seen = sorted(each.name for each in out.iterdir() if not each.name.startswith("."))
    assert seen == [scoring.SCORES, scoring.SUMMARY]
    assert ScoreSummary.read(out / scoring.SUMMARY) == old
    assert run(path, out).job_key != old.job_key


def test_a_file_that_changes_while_it_is_read_is_refused(
    run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    path = written(raw_cells(), tmp_path / "new.h5ad")

    def change(done: int, total: int) -> None:
        if done == total:
            with path.open("ab") as stream:
                stream.write(b"more")

    with pytest.raises(Refusal, match="changed while it was read"):
        run(path, tmp_path / "out", watch=change)
    seen = list((tmp_path / "out").iterdir())
    assert [each.name[:5] for each in seen] == [".job-"]
    assert not [each for each in seen[0].iterdir() if each.suffix == ".parquet"]


# -- what is refused ----------------------------------------------------------------------------
def strangers(n_known: int) -> AnnData:
    cells = raw_cells()
    names = [f"ENSG{i:011d}" for i in range(500, 500 + cells.n_vars)]
    names[:n_known] = cells.var_names[:n_known]
    return AnnData(cells.X, cells.obs, pd.DataFrame(index=names))


def test_a_file_that_shares_almost_no_gene_with_the_model_is_refused(
    run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match="of the model's genes") as refusal:
        run(written(strangers(3), tmp_path / "s.h5ad"), tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
    summary = run(written(strangers(30), tmp_path / "s.h5ad"), tmp_path / "out")
    assert summary.inputs[0].gene_share == pytest.approx(0.25)


def normalised(path: Path) -> None:
    cells = raw_cells()
    cells.X.data = np.log1p(cells.X.data)
    written(cells, path)


def doubled(path: Path) -> None:
    cells = raw_cells()
    cells.obs_names = [f"c{i // 2}" for i in range(cells.n_obs)]
    written(cells, path)


def symbols(path: Path) -> None:
    cells = raw_cells()
    cells.var_names = [f"GENE{i}" for i in range(cells.n_vars)]
    written(cells, path)


BAD: dict[str, Callable[[Path], object]] = {
    "log-normalised": normalised,
    "doubled ids": doubled,
    "symbols": symbols,
    "no cells": lambda path: written(raw_cells()[:0].copy(), path),
    "no genes": lambda path: written(raw_cells()[:, :0].copy(), path),
    "not HDF5": lambda path: path.write_text("cells"),
    "truncated": lambda path: written(raw_cells(), path).write_bytes(path.read_bytes()[:3000]),
    "absent": lambda path: None,
    "an empty folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scored_is_one_line_and_leaves_nothing(
    run: Callable[..., ScoreSummary], tmp_path: Path, name: str
) -> None:
    path = tmp_path / "bad.h5ad"
    BAD[name](path)
    with pytest.raises(Refusal) as refusal:
        run(path, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_of_a_folder_the_bad_file_is_named_before_anything_is_scored(
    run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    written(raw_cells(), tmp_path / "in/a.h5ad")
    normalised(tmp_path / "in/b.h5ad")
    with pytest.raises(Refusal, match=r"b\.h5ad"):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_to_score_into(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(Refusal, match="go into a folder; got a file"):
        score(None, None, tmp_path, tmp_path / "out", cells=None)


# -- what is published --------------------------------------------------------------------------
def test_every_column_has_one_meaning_in_the_table_the_file_and_the_page(
    run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    run(written(raw_cells(), tmp_path / "new.h5ad"), tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out" / scoring.SCORES)
    page = (Path(__file__).parents[1] / "docs/scoring.md").read_text()
    meanings = {column.name: column.meaning for column in scoring.COLUMNS}
    for name, meaning in meanings.items():
        assert f"| `{name}` | {meaning} |" in page
    for field in schema:
        spelled = "p_<exposure>" if field.name.startswith("p_") else field.name
        assert field.metadata[b"meaning"].decode() == meanings[spelled]


def test_calls_too_unsure_are_withheld(
    run: Callable[..., ScoreSummary], model: Logistic, tmp_path: Path
) -> None:
    shy = Logistic()
    shy.__dict__.update(model.__dict__)
    shy.abstention_threshold = 0.9
    summary = run(written(raw_cells(), tmp_path / "new.h5ad"), tmp_path / "out", model=shy)
    rows = rows_of(tmp_path / "out")
    assert (rows["is_unsure"] == (rows["confidence"] < 0.9)).all()
    assert 0 < summary.n_unsure == rows["is_unsure"].sum() < len(rows)
    assert rows["abstain"][rows["is_unsure"]].all()


# -- several workers, and files damaged between -------------------------------------------------
@pytest.fixture
def planned(
    run: Callable[..., ScoreSummary], model: Logistic, version: Version, tmp_path: Path
) -> tuple[Path, Job, ScoreSummary]:
    """A folder for scores, a job of 18 parts, and what one worker makes of it elsewhere."""
    path = written(raw_cells(n_cells=30), tmp_path / "new.h5ad")
    out, layout = tmp_path / "out", Layout(shard_cells=10)
    job = scoring.plan(model, version, path, out, cells=KEYS, layout=layout)
    return out, job, run(path, tmp_path / "alone", shard_cells=10)


def test_two_workers_at_once_make_each_part_once_and_the_same_bytes(
    planned: tuple[Path, Job, ScoreSummary], model: Logistic
) -> None:
    out, job, alone = planned

    def work(begin: int) -> int:
        with scoring.desk(out, job) as own:
            own.work(model, watch=lambda done, total: None, begin=begin)
            return own.n_computed

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(work, (0, 5, 9, 14)))
    assert sum(made) == len(job.shards) == 18
    together = scoring.score_job(model, job, out)
    assert together.scores_sha256 == alone.scores_sha256
    assert sorted(each.name for each in out.iterdir()) == [scoring.SCORES, scoring.SUMMARY]


def test_only_missing_parts_are_made_again_and_a_damaged_one_is(
    planned: tuple[Path, Job, ScoreSummary], model: Logistic
) -> None:
    out, job, alone = planned
    with scoring.desk(out, job) as own:
        own.work(model, watch=lambda done, total: None)
        assert own.n_computed == 18
    parts = sorted(own.folder.glob("*.parquet"))
    parts[3].unlink()
    content = bytearray(parts[7].read_bytes())
    content[len(content) // 3] ^= 255
    parts[7].write_bytes(content)
    parts[9].write_bytes(parts[9].read_bytes()[:500])
    counted: list[int] = []

    class Counts(Logistic):
        def evidence(self, cells: AnnData) -> np.ndarray:
            counted.append(cells.n_obs)
            return super().evidence(cells)

    counts = Counts()
    counts.__dict__.update(model.__dict__)
    again = scoring.score_job(counts, job, out)
    assert again.scores_sha256 == alone.scores_sha256
    assert counted == [10, 10, 10]


def test_a_pattern_names_files_of_several_folders(
    run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    written(raw_cells(), tmp_path / "x/one.h5ad")
    written(raw_cells(n_cells=3, seed=6), tmp_path / "y/two.h5ad")
    summary = run(f"{tmp_path}/*/*.h5ad", tmp_path / "out")
    assert [each.file for each in summary.inputs] == ["one.h5ad", "two.h5ad"]
    assert len(rows_of(tmp_path / "out")) == summary.n_cells == 54


def test_every_kind_of_file_gives_the_same_rows(
    run: Callable[..., ScoreSummary], tmp_path: Path
) -> None:
    cells = raw_cells()
    run(written(cells, tmp_path / "a/cells.h5ad"), tmp_path / "out0")
    by_gene = cells.copy()
    by_gene.X = sparse.csc_matrix(cells.X)
    written(by_gene, tmp_path / "b/cells.h5ad")
    (tmp_path / "c").mkdir()
    cells.write_zarr(tmp_path / "c/cells.zarr")
    write_10x(cells, tmp_path / "cells.h5")
    write_mtx(cells, tmp_path / "mtx")
    wanted = rows_of(tmp_path / "out0")
    kinds = ("b/cells.h5ad", "c/cells.zarr", "cells.h5", "mtx")
    for number, name in enumerate(kinds, start=1):
        run(tmp_path / name, tmp_path / f"out{number}")
        rows = rows_of(tmp_path / f"out{number}")
        same = [x for x in rows if x not in ("file", "input_md5", "job_key", "unit", "sample")]
        pd.testing.assert_frame_equal(rows[same], wanted[same])
        left = sorted(each.name for each in (tmp_path / f"out{number}").iterdir())
        assert left == [scoring.SCORES, scoring.SUMMARY]
