"""Scoring as people call it: reports, runs, populations, late labels, an inbox, many workers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from conftest import planted_cells
from endoprint import jobs, registry, scoring, tracking
from endoprint.config import Away, Refusal
from endoprint.jobs import inbox as box_jobs
from endoprint.jobs.scoring import _Pace
from endoprint.model import ExposureModel
from endoprint.scoring import inbox
from endoprint.workspace import Workspace
from lab import fit_and_track

MODEL = "models:/endoprint-toy/1"
PARAMS = """task: toy
cells: {exposure_key: exposure, unit_keys: [unit], sample_key: sample, control: DMSO}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A workspace with one registered model; not to be changed."""
    from lab import bare_workspace, furnish

    space = bare_workspace(tmp_path_factory.mktemp("scoring") / "space")
    space.local.mkdir()
    shutil.copy(empty_store, space.local / "mlflow.db")
    (space.root / "params.yaml").write_text(PARAMS)
    space = furnish(Workspace.at(space.root), planted_cells(n_units=6, n_cells=12))
    registry.register(space, fit_and_track(space))
    return space.root


@pytest.fixture
def lab(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from lab import moved_copy

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return moved_copy(Workspace.at(trained), tmp_path / "space").root


def new_cells(path: Path, *, n_units: int = 2, n_cells: int = 8, seed: int = 7) -> AnnData:
    cells = planted_cells(n_units=n_units, n_cells=n_cells, seed=seed)
    cells.obs["treatment"] = cells.obs["exposure"].astype(str)
    cells.obs = cells.obs[["unit", "sample", "treatment", "exposure"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    cells.write_h5ad(path)
    return cells


def scored(lab: Path, **words: object) -> scoring.ScoreSummary:
    path = jobs.score(str(lab), file="new.h5ad", out="out", model=MODEL, **words)
    return scoring.ScoreSummary.read(Path(path))


def score_runs(lab: Path) -> list:
    space = Workspace.at(lab)
    store = tracking.client(space)
    return list(store.search_runs([tracking.experiment(space, store)], "tags.kind = 'score'"))


# -- one command --------------------------------------------------------------------------------
def test_scoring_writes_its_report_and_is_one_finished_run_with_its_drift(lab: Path) -> None:
    new_cells(lab / "new.h5ad")
    summary = scored(lab)
    out = lab / "out"
    assert not [each for each in out.iterdir() if each.name.startswith(".")]
    assert set(summary.beside) == {"report.html", "samples.json", "units.json", "drift.json"}
    (run,) = score_runs(lab)
    assert run.info.status == "FINISHED"
    assert run.data.tags["job_key"] == summary.job_key
    assert run.data.metrics["n_cells"] == summary.n_cells == 48
    drift = json.loads((out / "drift.json").read_text())
    for name in ("n_genes", "n_counts", "known_share", "confidence", "novelty"):
        assert run.data.metrics[f"drift.{name}.psi"] == pytest.approx(drift[name]["psi"])
    # again: nothing is computed, nothing logged
    stamps = {each: each.stat().st_mtime_ns for each in out.iterdir()}
    scored(lab)
    assert {each: each.stat().st_mtime_ns for each in out.iterdir()} == stamps
    assert len(score_runs(lab)) == 1


def test_cells_unlike_the_training_cells_are_said_to_have_drifted(lab: Path) -> None:
    cells = new_cells(lab / "new.h5ad", n_cells=20)
    rng = np.random.default_rng(0)
    cells.X.data = rng.binomial(cells.X.data.astype(int), 0.15).astype(np.float32)
    cells.X.eliminate_zeros()
    cells.write_h5ad(lab / "new.h5ad")
    scored(lab)
    drift = json.loads((lab / "out/drift.json").read_text())
    assert drift["n_counts"]["has_drifted"]
    assert "Drift in counts per cell" in (lab / "out/report.html").read_text()


@pytest.mark.parametrize("where", ["before its run", "before the summary", "in the report"])
def test_a_command_that_dies_late_is_finished_by_the_next(
    lab: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_cells(lab / "new.h5ad")
    target = {
        "before its run": "endoprint.jobs.scoring._log_once",
        "before the summary": "endoprint.scoring.Desk.seal",
        "in the report": "endoprint.jobs.scoring._describe",
    }[where]

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, dies)
        with pytest.raises(KeyboardInterrupt):
            scored(lab)
    summary = scored(lab)
    assert [run.info.status for run in score_runs(lab)] == ["FINISHED"]
    assert scoring.finished(lab / "out", summary.job_key) is not None
    assert not [each for each in (lab / "out").iterdir() if each.name.startswith(".")]


def test_another_jobs_scores_in_the_same_folder_are_not_taken_for_ones_own(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_cells(lab / "new.h5ad")
    new_cells(lab / "other.h5ad", seed=8)
    done = scoring.score_job

    def beaten(*given: Any, **words: Any) -> scoring.ScoreSummary:
        monkeypatch.setattr(scoring, "score_job", done)
        summary = done(*given, **words)
        jobs.score(str(lab), file="other.h5ad", out="out", model=MODEL)
        return summary

    monkeypatch.setattr(scoring, "score_job", beaten)
    with pytest.raises(Refusal, match="another command wrote"):
        scored(lab, annotate="annotated.h5ad")
    assert not (lab / "annotated.h5ad").exists()
    (run,) = score_runs(lab)
    kept = scoring.ScoreSummary.read(lab / "out" / scoring.SUMMARY)
    assert run.data.tags["job_key"] == kept.job_key
    assert kept.inputs[0].file == "other.h5ad"


def test_bad_cells_are_set_aside_counted_and_said(lab: Path) -> None:
    cells = new_cells(lab / "new.h5ad")
    values = cells.X.astype(np.float32)
    values.data[values.indptr[3]] = np.nan
    values.data[values.indptr[9]] = -4
    cells.X = values
    cells.write_h5ad(lab / "new.h5ad")
    summary = scored(lab)
    assert summary.quarantined == {"counts that are no numbers": 1, "negative counts": 1}
    rows = pd.read_parquet(lab / "out/scores.parquet")
    assert len(rows) == len(cells)
    assert list(np.flatnonzero(rows["quarantine"] != "")) == [3, 9]
    assert rows["call"].isna().sum() == 2
    assert "negative counts" in (lab / "out/report.html").read_text()


def test_a_file_of_which_no_cell_can_be_judged_has_a_report_all_the_same(lab: Path) -> None:
    new_cells(lab / "new.h5ad")
    (lab / "params.yaml").write_text(PARAMS.replace("{exposure", "{min_genes: 500, exposure"))
    summary = scored(lab)
    assert summary.quarantined == {"fewer than 500 genes": 48}
    assert json.loads((lab / "out/samples.json").read_text()) == {}
    assert "48 cells without a call: fewer than 500 genes" in (lab / "out/report.html").read_text()


# -- populations --------------------------------------------------------------------------------
def test_populations_of_any_column_are_called_with_what_their_units_allow(lab: Path) -> None:
    cells = new_cells(lab / "new.h5ad", n_units=3, seed=0)
    summary = scored(lab, by="treatment")
    told = json.loads((lab / "out/samples.json").read_text())
    assert set(told) == {"DMSO", "LIVER-X_AGONIST", "RET_AGONIST"}
    for name, row in told.items():
        assert row["call"] == name
        assert row["n_cells"] == (cells.obs["treatment"] == name).sum()
        assert (row["n_units"], row["interval"]) == (3, "range of 3 units, no interval")
        assert row["low"] <= row["confidence"] <= row["high"]
    units = pd.read_json(lab / "out/units.json", orient="index")
    assert len(units) == 9
    assert "3 of 3 units agree" in (lab / "out/report.html").read_text()
    # another column: the rows stay, only what tells of them is made again
    stamp = (lab / "out/scores.parquet").stat().st_mtime_ns
    again = scored(lab, by="sample")
    assert (lab / "out/scores.parquet").stat().st_mtime_ns == stamp
    assert again.job_key == summary.job_key
    assert len(json.loads((lab / "out/samples.json").read_text())) == 9


def test_cells_of_no_population_are_one_of_their_own(lab: Path) -> None:
    cells = new_cells(lab / "new.h5ad")
    cells.obs["dose"] = np.where(np.arange(len(cells)) % 2, 10.0, np.nan)
    cells.write_h5ad(lab / "new.h5ad")
    scored(lab, by="dose")
    assert set(json.loads((lab / "out/samples.json").read_text())) == {"10", "?"}


def test_a_column_that_no_file_has_is_refused_before_anything_is_scored(lab: Path) -> None:
    new_cells(lab / "new.h5ad")
    with pytest.raises(Refusal, match="no 'dish'"):
        scored(lab, by="dish")
    assert not (lab / "out").exists()


def test_populations_are_projected_where_their_control_is_told(lab: Path) -> None:
    cells = new_cells(lab / "new.h5ad", n_units=2, n_cells=30)
    names = ",".join(sorted({x for x in cells.obs["sample"] if x.endswith("DMSO")}))
    scored(lab, control=names)
    told = json.loads((lab / "out/projection.json").read_text())["samples"]
    weights = told["u0|RET_AGONIST"]["weights"]
    assert weights["RET_AGONIST"]["weight"] > 3 * weights["LIVER-X_AGONIST"]["weight"]
    assert "projection on the known exposures" in (lab / "out/report.html").read_text()
    with pytest.raises(Refusal, match="no tank"):
        scored(lab, control="tank")


def test_a_version_that_does_not_answer_is_refused_before_anything_is_scored(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(self: ExposureModel, cells: AnnData) -> pd.DataFrame:
        return pd.DataFrame(np.nan, index=cells.obs_names, columns=self.exposures)

    new_cells(lab / "new.h5ad")
    monkeypatch.setattr(ExposureModel, "predict_proba", silent)
    with pytest.raises(Refusal, match="answers with probabilities"):
        scored(lab)
    assert not (lab / "out").exists()


# -- the way scanpy reads them ------------------------------------------------------------------
def test_annotating_copies_the_cells_with_their_scores(lab: Path) -> None:
    cells = new_cells(lab / "new.h5ad")
    before = (lab / "new.h5ad").read_bytes()
    scored(lab, annotate="annotated.h5ad")
    assert (lab / "new.h5ad").read_bytes() == before
    found = anndata.read_h5ad(lab / "annotated.h5ad")
    rows = pd.read_parquet(lab / "out/scores.parquet").set_index("cell_id")
    assert list(found.obs_names) == list(cells.obs_names)
    assert (found.X != cells.X).nnz == 0
    assert list(found.obs["endoprint_call"]) == list(rows["call"])
    told = found.obsm["endoprint_probabilities"]
    assert list(told.columns) == ["DMSO", "LIVER-X_AGONIST", "RET_AGONIST"]
    np.testing.assert_array_equal(told["DMSO"], rows["p_DMSO"])
    assert found.uns["endoprint"]["job_key"] == rows["job_key"].iloc[0]
    assert list(found.obs["treatment"]) == list(cells.obs["treatment"])


def test_annotating_copies_the_file_that_was_named_not_the_one_where_it_lay_before(
    lab: Path,
) -> None:
    cells = new_cells(lab / "new.h5ad")
    scored(lab)
    (lab / "later").mkdir()
    (lab / "new.h5ad").rename(lab / "later/new.h5ad")
    new_cells(lab / "new.h5ad", seed=9)  # next week's
    jobs.score(str(lab), file="later/new.h5ad", out="out", model=MODEL, annotate="a.h5ad")
    assert (anndata.read_h5ad(lab / "a.h5ad").X != cells.X).nnz == 0


@pytest.mark.parametrize("out", ["new.h5ad", "new.csv", "."])
def test_what_can_not_be_annotated_is_refused_before_scoring(lab: Path, out: str) -> None:
    new_cells(lab / "new.h5ad")
    with pytest.raises(Refusal, match="--annotate copies one h5ad"):
        scored(lab, annotate=out)
    assert not (lab / "out").exists()


# -- late labels --------------------------------------------------------------------------------
def test_late_labels_join_by_cell_id_in_any_order(lab: Path) -> None:
    cells = new_cells(lab / "new.h5ad")
    scored(lab)
    labels = cells.obs[["exposure"]].rename_axis("cell_id").sample(frac=1, random_state=0)
    labels.iloc[:40].to_csv(lab / "labels.csv")
    found = jobs.evaluate_scores(str(lab), scores="out", labels="labels.csv")
    rows = pd.read_parquet(lab / "out/scores.parquet").set_index("cell_id")
    right = rows.loc[labels.index[:40], "call"] == labels["exposure"].iloc[:40]
    assert found["n_judged"] == 40
    assert found["accuracy"] == pytest.approx(right.mean())
    assert set(found["by_unit"]) == {"u0", "u1"}
    assert found["n_labels_without_score"] == 0
    run = max(score_runs(lab), key=lambda run: run.info.start_time)
    assert run.data.metrics["accuracy"] == pytest.approx(right.mean())
    # an h5ad of labelled cells does as well, also with its ids as a column
    cells.obs["cell_id"] = "of another table"
    cells.write_h5ad(lab / "new.h5ad")
    again = jobs.evaluate_scores(str(lab), scores="out/scores.parquet", labels="new.h5ad")
    assert again["n_judged"] == 48


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cell,exposure\na,DMSO\n", "cell_id and exposure"),
        ("cell_id,exposure\nnobody,DMSO\n", "0 of 1 cells joined"),
        ("cell_id,exposure\nc00000,DMSO\nc00000,DMSO\n", "twice in the labels"),
        ("cell_id,exposure\nc00000,ELSEWHERE\n", "unknown exposures: ELSEWHERE"),
        ("", "CSV, parquet or h5ad"),
    ],
)
def test_labels_that_fit_no_score_are_refused(lab: Path, text: str, words: str) -> None:
    new_cells(lab / "new.h5ad")
    scored(lab)
    (lab / "labels.csv").write_text(text)
    with pytest.raises(Refusal) as refusal:
        jobs.evaluate_scores(str(lab), scores="out", labels="labels.csv")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


# -- the inbox ----------------------------------------------------------------------------------
@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "SETTLE_SECONDS", 0.0)


def look(lab: Path) -> dict:
    return jobs.score_inbox(str(lab), inbox="inbox", out="scored", model=MODEL)


@pytest.mark.usefixtures("quick")
def test_an_inbox_scores_each_new_file_once_in_order_and_moves_nothing(lab: Path) -> None:
    for name in ("b", "a"):
        new_cells(lab / f"inbox/{name}.h5ad", seed=ord(name))
    assert look(lab)["scored"] == ["a.h5ad", "b.h5ad"]
    assert look(lab) == {"scored": [], "waiting": {}, "refused": {}}
    assert sorted(x.name for x in (lab / "inbox").iterdir()) == ["a.h5ad", "b.h5ad"]
    new_cells(lab / "inbox/c.h5ad", seed=3)
    assert look(lab)["scored"] == ["c.h5ad"]
    for name in "abc":
        rows = pd.read_parquet(lab / f"scored/{name}.h5ad/scores.parquet")
        assert list(rows["cell_id"]) == list(
            anndata.read_h5ad(lab / f"inbox/{name}.h5ad").obs_names
        )
    new_cells(lab / "inbox/a.h5ad", seed=99)  # other bytes under an old name are new
    assert look(lab)["scored"] == ["a.h5ad"]


@pytest.mark.usefixtures("quick")
def test_a_half_copied_file_waits_and_holds_up_no_other(lab: Path) -> None:
    new_cells(lab / "inbox/whole.h5ad")
    new_cells(lab / "elsewhere.h5ad", seed=4)
    content = (lab / "elsewhere.h5ad").read_bytes()
    (lab / "inbox/half.h5ad").write_bytes(content[: len(content) // 2])
    told = look(lab)
    assert told["scored"] == ["whole.h5ad"]
    assert "can not be read" in told["waiting"]["half.h5ad"]
    assert not (lab / "scored/half.h5ad").exists()
    (lab / "inbox/half.h5ad").write_bytes(content)
    assert look(lab)["scored"] == ["half.h5ad"]


def test_a_file_that_grows_between_two_looks_waits(lab: Path) -> None:
    from endoprint.cells import CellsConfig

    new_cells(lab / "inbox/grows.h5ad")

    def grow(seconds: float) -> None:
        with (lab / "inbox/grows.h5ad").open("ab") as file:
            file.write(b"more")

    config = CellsConfig(unit_keys=["unit"])
    files, waiting = inbox.ready(
        lab / "inbox", {}, cells=config, scratch=lab / "scratch", sleep=grow
    )
    assert files == []
    assert [entry.reason for entry in waiting] == ["something still writes to it"]


@pytest.mark.usefixtures("quick")
def test_a_file_that_can_not_be_scored_is_said_and_passed_by(lab: Path) -> None:
    cells = new_cells(lab / "inbox/a.h5ad")
    cells.X.data = np.log1p(cells.X.data)
    cells.write_h5ad(lab / "inbox/a.h5ad")
    new_cells(lab / "inbox/b.h5ad")
    told = look(lab)
    assert told["scored"] == ["b.h5ad"]
    assert "raw counts" in told["refused"]["a.h5ad"]
    new_cells(lab / "inbox/a.h5ad")
    assert look(lab)["scored"] == ["a.h5ad"]


@pytest.mark.usefixtures("quick")
def test_damaged_files_hold_up_no_other(lab: Path) -> None:
    cells = new_cells(lab / "inbox/whole.h5ad")
    cells.obs["unit"] = pd.Categorical(cells.obs["unit"])
    cells.write_h5ad(lab / "inbox/codes.h5ad")
    with h5py.File(lab / "inbox/codes.h5ad", "r+") as file:
        file["obs/unit/codes"][3] = 99
    cells.write_zarr(lab / "inbox/index.zarr")
    for part in (lab / "inbox/index.zarr/obs/_index").rglob("*"):
        if part.is_file() and not part.name.startswith((".z", "zarr.json")):
            part.write_bytes(part.read_bytes()[:20])
    for _ in range(2):  # the next hour as well
        told = look(lab)
        assert "whole.h5ad" not in told["refused"]
        assert "99 for 2" in told["refused"]["codes.h5ad"]
        assert "can not be read" in told["waiting"]["index.zarr"]
    assert (lab / "scored/whole.h5ad/scores.parquet").is_file()


@pytest.mark.usefixtures("quick")
def test_no_error_of_one_file_holds_up_the_others(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        new_cells(lab / f"inbox/{name}.h5ad", seed=ord(name))
    real = box_jobs.score

    def score(workspace: str, *, file: str, out: str, model: str = "") -> str:
        if file.endswith("a.h5ad"):
            raise ZeroDivisionError("a\nb")
        return real(workspace, file=file, out=out, model=model)

    monkeypatch.setattr(box_jobs, "score", score)
    assert look(lab) == {
        "scored": ["b.h5ad"], "waiting": {}, "refused": {"a.h5ad": "ZeroDivisionError: a b"}
    }  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("error", [ConnectionError("line"), Away("a store", "none", "start it")])
def test_a_store_that_is_away_is_no_fault_of_a_file(
    lab: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    new_cells(lab / "inbox/a.h5ad")

    def score(*words: object, **more: object) -> str:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(box_jobs, "score", score)
        with pytest.raises(type(error)):
            look(lab)
    assert inbox.read(lab / "scored") == {}
    assert look(lab)["scored"] == ["a.h5ad"]


@pytest.mark.usefixtures("quick")
def test_an_inbox_is_never_written_to(lab: Path) -> None:
    new_cells(lab / "inbox/a.h5ad")
    with pytest.raises(Refusal, match="not written to"):
        jobs.score_inbox(str(lab), inbox="inbox", out="inbox", model=MODEL)
    assert [each.name for each in (lab / "inbox").iterdir()] == ["a.h5ad"]


@pytest.mark.usefixtures("quick")
def test_where_nothing_is_live_an_inbox_blames_no_file(lab: Path) -> None:
    new_cells(lab / "inbox/a.h5ad")
    with pytest.raises(Refusal, match="promote one first"):
        jobs.score_inbox(str(lab), inbox="inbox", out="scored")
    assert not (lab / "scored").exists()


# -- many workers -------------------------------------------------------------------------------
def big_cells(path: Path) -> None:
    cells = planted_cells(n_units=2, n_cells=8, seed=7)
    rows = np.tile(np.arange(cells.n_obs), 200)  # 9,600 cells, five parts
    obs = cells.obs[["unit", "sample"]].iloc[rows]
    obs.index = [f"c{i}" for i in range(len(rows))]
    AnnData(sparse.csr_matrix(cells.X[rows]), obs=obs, var=cells.var[[]]).write_h5ad(path)


@pytest.mark.slow
def test_workers_share_a_job_to_the_single_workers_bytes(lab: Path) -> None:
    big_cells(lab / "new.h5ad")
    alone = scored(lab)
    shutil.rmtree(lab / "out")
    together = scored(lab, workers=3)
    assert together.scores_sha256 == alone.scores_sha256
    assert together.n_cells == 9_600
    shutil.rmtree(lab / "out")
    # and by parts, as a flow hands them to workers elsewhere
    plan = jobs.plan_scoring(str(lab), file="new.h5ad", out="out", model=MODEL)
    assert jobs.score_part(str(lab), plan=plan, begin=3) == 5
    assert jobs.score_part(str(lab), plan=plan) == 0
    assert scored(lab).scores_sha256 == alone.scores_sha256


def test_the_pace_says_speed_and_time_left() -> None:
    class Step:
        note = ""
        seen: list[tuple[int, int]] = []

        def reach(self, done: int, total: int) -> None:
            self.seen.append((done, total))

    step = Step()
    pace = _Pace(step)  # type: ignore[arg-type]
    pace.reach(100, 1000)
    pace._began -= 10.0
    pace.reach(300, 1000)
    assert step.note.startswith("20 cells/s, 3")
    assert step.note.endswith(" s left")
    assert step.seen == [(100, 1000), (300, 1000)]
