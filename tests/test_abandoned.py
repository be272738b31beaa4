"""What given-up scorings left is found by its age, and never taken from under a living worker."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from endoprint import jobs
from endoprint.scoring.abandoned import KEPT_DAYS, abandoned, unheld
from lab import bare_workspace

DAY_SECONDS = 24 * 3600


@pytest.fixture
def lab(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    space = bare_workspace(tmp_path / "space")
    space.local.mkdir()
    shutil.copy(empty_store, space.local / "mlflow.db")
    return space.root


def left(place: Path, *, days: float) -> Path:
    """A folder of parts, last written to so many days ago."""
    place.mkdir(parents=True)
    (place / "000000.parquet").write_bytes(b"rows")
    then = time.time() - days * DAY_SECONDS
    for each in (place / "000000.parquet", place):
        os.utime(each, (then, then))
    return place


def test_gc_says_then_removes_what_was_given_up_long_ago_and_nothing_else(lab: Path) -> None:
    old = left(lab / "scores/a/.job-1", days=KEPT_DAYS + 1)
    laid_out = left(lab / "scores/a/.rows-1", days=KEPT_DAYS + 1)
    young = left(lab / "scores/b/.job-2", days=KEPT_DAYS - 1)
    beside_young = left(lab / "scores/b/.rows-2", days=KEPT_DAYS + 1)
    (lab / "scores/a/scores.parquet").write_bytes(b"kept")
    said = jobs.gc(str(lab))["items"]
    assert [item.partition(",")[0] for item in said] == ["scores/a/.job-1", "scores/a/.rows-1"]
    assert old.exists()  # only said
    assert jobs.gc(str(lab), delete=True)["items"] == said
    assert not old.exists()
    assert not laid_out.exists()
    assert young.exists()
    assert beside_young.exists()
    assert (lab / "scores/a/scores.parquet").exists()
    assert jobs.gc(str(lab))["items"] == []


def test_a_part_written_lately_keeps_the_whole_job(tmp_path: Path) -> None:
    folder = left(tmp_path / ".job-1", days=KEPT_DAYS + 1)
    os.utime(folder / "000000.parquet")
    assert abandoned(tmp_path) == []


def test_a_job_that_a_living_process_holds_is_not_abandoned_however_old(tmp_path: Path) -> None:
    folder = left(tmp_path / ".job-1", days=KEPT_DAYS + 30)
    with unheld(folder) as is_mine:
        assert is_mine
        assert abandoned(tmp_path) == []
    assert abandoned(tmp_path) == [folder]
