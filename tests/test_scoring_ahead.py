"""What scoring does ahead of need changes no byte, and nothing of it is lost or done twice."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
import threadpoolctl
from anndata import AnnData

from conftest import planted_cells
from endoprint import artefact, scoring
from endoprint.cells import CellsConfig
from endoprint.config import Refusal
from endoprint.models.logistic import Logistic, LogisticConfig
from endoprint.registry import Version
from endoprint.scoring import Desk, Job, Layout, Shard, inputs
from endoprint.scoring.rows import with_threads
from endoprint.stored import Stored

KEYS = CellsConfig(sample_key="sample", unit_keys=["unit"])
LAYOUT = Layout(shard_cells=10)


class Counts(Logistic):
    """Remembers how many cells it was asked about, part by part."""

    def __init__(self, config: LogisticConfig) -> None:
        super().__init__(config)
        self.asked: list[int] = []
        self.is_asked = threading.Event()  # three times at least

    def evidence(self, cells: AnnData) -> np.ndarray:
        self.asked.append(cells.n_obs)
        if len(self.asked) == 3:
            self.is_asked.set()
        return super().evidence(cells)


@pytest.fixture
def model() -> Counts:
    cells = planted_cells(n_units=4)
    unit = cells.obs["unit"].to_numpy()
    fitted = Counts(LogisticConfig(penalty=0.1, latent_width=4))
    fitted.fit(cells[unit != "u3"].copy(), cells[unit == "u3"].copy())
    fitted.asked.clear()
    fitted.is_asked.clear()
    return fitted


@pytest.fixture
def version(model: Counts, tmp_path: Path) -> Version:
    model.save(tmp_path / "model")
    return Version("toy", "3", "run", artefact.digest(tmp_path / "model"), "logistic", {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """180 cells, so 18 parts."""
    cells = planted_cells(n_units=2, n_cells=30, seed=5)
    new = AnnData(X=cells.X, obs=cells.obs[["unit", "sample"]], var=cells.var[[]])
    new.write_h5ad(tmp_path / "new.h5ad")
    return tmp_path / "new.h5ad"


@pytest.fixture
def slow_md5(model: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that take as long to identify as three parts to judge."""
    real = inputs.md5

    def md5(path: Path) -> str:
        assert model.is_asked.wait(60)
        return real(path)

    monkeypatch.setattr(inputs, "md5", md5)


def planned(model: Counts, version: Version, file: Path, out: Path, *, is_begun: bool) -> Job:
    return scoring.plan(model, version, file, out, cells=KEYS, layout=LAYOUT, is_begun=is_begun)


def test_what_is_judged_while_bytes_are_identified_is_the_same_and_judged_once(
    model: Counts, version: Version, file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job = planned(model, version, file, tmp_path / "a", is_begun=False)
    expected = scoring.score_job(model, job, tmp_path / "a")
    assert len(model.asked) == 18
    model.asked.clear()
    model.is_asked.clear()
    request.getfixturevalue("slow_md5")
    job = planned(model, version, file, tmp_path / "b", is_begun=True)
    assert len(job.early) >= 3
    assert sum(model.asked) == 10 * len(job.early)
    found = scoring.score_job(model, job, tmp_path / "b")
    assert found.job_key == expected.job_key
    assert found.scores_sha256 == expected.scores_sha256
    assert sum(model.asked) == 180


def test_nothing_is_judged_before_it_is_known_whether_it_was_judged_already(
    model: Counts, version: Version, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = planned(model, version, file, tmp_path / "out", is_begun=True)
    scoring.score_job(model, job, tmp_path / "out")
    model.asked.clear()
    real = inputs.md5

    def md5(path: Path) -> str:
        model.is_asked.wait(0.5)
        return real(path)

    monkeypatch.setattr(inputs, "md5", md5)
    again = planned(model, version, file, tmp_path / "out", is_begun=True)
    assert scoring.score_job(model, again, tmp_path / "out").was_done_before
    assert not model.asked


@pytest.mark.usefixtures("slow_md5")
def test_what_cannot_be_read_early_is_refused_and_leaves_nothing(
    model: Counts, version: Version, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_from(20, monkeypatch, model.is_asked.set)
    with pytest.raises(Refusal, match=r"new\.h5ad: whole"):
        planned(model, version, file, tmp_path / "out", is_begun=True)
    assert not (tmp_path / "out").exists()


def test_a_part_that_cannot_be_read_takes_none_of_the_others_with_it(
    model: Counts, version: Version, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = planned(model, version, file, out, is_begun=False)
    with pytest.MonkeyPatch.context() as patched:
        refuse_from(50, patched)
        with pytest.raises(Refusal, match="whole"):
            scoring.score_job(model, job, out)
    assert len(list(out.glob(".job-*/*.parquet"))) == 5
    model.asked.clear()
    with scoring.desk(out, job) as own:  # its claims went with it: nobody waits for them
        own.work(model, watch=lambda done, total: None)
        assert own.n_computed == 13
    whole = scoring.score_job(model, planned(model, version, file, tmp_path / "b", is_begun=False),
                              tmp_path / "b")  # fmt: skip
    assert scoring.score_job(model, job, out).scores_sha256 == whole.scores_sha256


@pytest.mark.parametrize("at", [0, 16, 17])
def test_a_disk_that_fills_up_ends_the_job_and_room_lets_it_go_on(
    model: Counts, version: Version, file: Path, tmp_path: Path, at: int
) -> None:
    out = tmp_path / "out"
    job = planned(model, version, file, out, is_begun=False)
    real = Desk.write

    def write(self: Desk, shard: Shard, table: pa.Table) -> None:
        if shard.number == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, shard, table)

    def ended() -> None:
        with pytest.raises(OSError, match="No space left"):
            scoring.score_job(model, job, out)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Desk, "write", write)
        told = threading.Thread(target=ended, daemon=True)  # what hangs fails, and hangs no test
        told.start()
        told.join(60)
        assert not told.is_alive()
    whole = scoring.score_job(model, job, out)
    alone = planned(model, version, file, tmp_path / "b", is_begun=False)
    assert whole.scores_sha256 == scoring.score_job(model, alone, tmp_path / "b").scores_sha256


def test_a_part_of_other_bytes_is_never_there_even_when_the_right_ones_come_back(
    model: Counts, version: Version, file: Path, tmp_path: Path
) -> None:
    out, right = tmp_path / "out", file.read_bytes()
    with h5py.File(file, "r+") as stored:  # as long, same ids, other counts
        stored["X/data"][:] = stored["X/data"][:][::-1]
    other = file.read_bytes()
    file.write_bytes(right)
    job = planned(model, version, file, out, is_begun=False)

    def overwrite(done: int, total: int) -> None:
        if done >= 40:
            file.write_bytes(other)

    with pytest.raises(Refusal, match="changed while it was read"):
        scoring.score_job(model, job, out, watch=overwrite)
    assert list(out.glob(".job-*/*.parquet"))
    file.write_bytes(right)
    again = scoring.score_job(model, planned(model, version, file, out, is_begun=False), out)
    alone = planned(model, version, file, tmp_path / "b", is_begun=False)
    assert again.job_key == job.key
    assert again.scores_sha256 == scoring.score_job(model, alone, tmp_path / "b").scores_sha256


def test_a_refused_command_leaves_alone_what_a_job_at_work_laid_out(
    model: Counts, version: Version, tmp_path: Path
) -> None:
    laid = tmp_path / "out/.rows-0123456789abcdef/cells.h5ad.rows.h5"
    laid.parent.mkdir(parents=True)
    laid.write_bytes(b"rows")
    with pytest.raises(Refusal, match="none at"):
        planned(model, version, tmp_path / "mistyped.h5ad", tmp_path / "out", is_begun=True)
    assert laid.read_bytes() == b"rows"


def test_workers_in_one_process_share_one_limit_until_the_last_leaves() -> None:
    def limits() -> list[int]:
        return [int(each["num_threads"]) for each in threadpoolctl.threadpool_info()]

    torch = pytest.importorskip("torch")  # whose threads are limited as well
    torch.get_num_threads()  # it sets its own when asked first
    with threadpoolctl.threadpool_limits(2):
        before = limits()
        with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
            first.enter_context(with_threads(1))
            second.enter_context(with_threads(1))
            first.close()
            assert set(limits()) == {1}
        assert limits() == before != [1] * len(before)


def refuse_from(
    cell: int, patched: pytest.MonkeyPatch, told: Callable[[], None] = lambda: None
) -> None:
    """Let no cell from this one on be read."""
    real = Stored.part

    def part(self: Stored, start: int, stop: int) -> AnnData:
        if start and stop > cell:
            told()
            raise Refusal("whole files are scored", "half a file", "copy it again")
        return real(self, start, stop)

    patched.setattr(Stored, "part", part)
