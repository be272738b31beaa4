"""Where a job is worked on: each part claimed by one worker, written whole, and put together last.

A claim is a lock of the operating system: it ends with its process, however that died. Parts are
files that appear whole; the summary, written last, says that all is there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from endoprint.model import ExposureModel
from endoprint.scoring import inputs
from endoprint.scoring.abandoned import remove
from endoprint.scoring.columns import few_words, schema
from endoprint.scoring.inputs import Reading
from endoprint.scoring.job import Job, Shard, scratch
from endoprint.scoring.rows import rows
from endoprint.scoring.summary import (
    SCORES,
    SUMMARY,
    ScoreSummary,
    Tally,
    is_sealed,
    sha256,
    write,
)

Watch = Callable[[int, int], None]


class Damaged(Exception):
    """A part is not what its worker wrote; it was removed, to be made again."""


class Desk:
    """One worker's place at a job; several processes may each have one."""

    def __init__(self, out_dir: Path, job: Job) -> None:
        self.out_dir, self.job = out_dir, job
        self.folder = out_dir / f".job-{job.key[:16]}"
        self.n_computed = 0  # parts this worker made

    # -- parts ----------------------------------------------------------------------------------
    def work(
        self,
        model: ExposureModel,
        *,
        watch: Watch,
        begin: int = 0,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Make every part that is missing; those claimed by others are waited for.

        Begins with part number `begin`, so that workers meet late. A worker that died leaves its
        part to the next.
        """
        shards = self.job.shards
        begin %= max(len(shards), 1)
        order = [*shards[begin:], *shards[:begin]]
        with _threads(self.job.layout.threads), _Readings(self.job, self.out_dir) as readings:
            for waits in (False, True):
                for shard in order:
                    if self.is_done(shard):
                        continue
                    if not is_wanted():
                        return
                    with self._claimed(shard, waits=waits) as is_mine:
                        if is_mine and not self.is_done(shard):
                            self._make(model, shard, readings)
                    watch(self.n_cells_done(), self.job.n_cells)
            readings.close()
            self._refuse_changed(readings.made)

    def is_done(self, shard: Shard) -> bool:
        """Say whether a part is there; parts appear whole."""
        return (self.folder / shard.name).is_file()

    def n_cells_done(self) -> int:
        """Count the cells of all parts that are there, whoever made them."""
        there = {entry.name for entry in os.scandir(self.folder)}
        return sum(shard.stop - shard.start for shard in self.job.shards if shard.name in there)

    def _make(self, model: ExposureModel, shard: Shard, readings: _Readings) -> None:
        of = self.job.inputs[shard.input]
        same = {
            "file": of.file,
            "input_md5": of.md5,
            "job_key": self.job.key,
            "model_version": self.job.version.version,
            "model_sha256": self.job.version.sha256,
        }
        with inputs.naming(Path(of.path)):
            table = rows(model, readings.of(shard).part(shard.start, shard.stop), same)
        beside = self.folder / f".{shard.name}.{os.getpid()}.part"
        # not compressed: it is read once more and goes; the checksums are for disks that err
        pq.write_table(
            table,
            beside,
            compression="none",
            write_page_checksum=True,
            use_dictionary=few_words(table.schema),
        )
        os.replace(beside, self.folder / shard.name)
        readings.made.append(shard)
        self.n_computed += 1

    def _refuse_changed(self, made: list[Shard]) -> None:
        """Take back what was made of a file that changed meanwhile."""
        for number in sorted({shard.input for shard in made}):
            try:
                inputs.refuse_changed(self.job.inputs[number])
            except BaseException:
                for shard in made:
                    if shard.input == number:
                        (self.folder / shard.name).unlink(missing_ok=True)
                raise

    @contextmanager
    def _claimed(self, shard: Shard, *, waits: bool) -> Iterator[bool]:
        """Hold a part for this worker alone, if nobody else does."""
        with (self.folder / f".{shard.name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    # -- the whole ------------------------------------------------------------------------------
    def publish(self, model: ExposureModel, *, seconds: Callable[[], float]) -> ScoreSummary:
        """Put all parts together as the scores, cell for cell the input; return what they say.

        The summary of what stood here before is gone from then on; `seal` writes the new one.
        Raises Damaged where a part has to be made again.
        """
        whole = self.folder / f".{SCORES}.{os.getpid()}.part"
        tally = Tally(self.job)
        wanted = schema(model.exposures)
        words = few_words(wanted)
        with pq.ParquetWriter(whole, wanted, compression="zstd", use_dictionary=words) as writer:
            for shard in self.job.shards:
                table = self._read(shard, wanted)
                writer.write_table(table)
                tally.add(shard, table)
        # digested before it is in place: a summary never speaks for another's scores
        summary = tally.close(model, sha256(whole), seconds())
        (self.out_dir / SUMMARY).unlink(missing_ok=True)
        os.replace(whole, self.out_dir / SCORES)
        return summary

    def seal(self, summary: ScoreSummary) -> None:
        """Write the summary, which says that all is there."""
        write(self.out_dir / SUMMARY, summary, beside=self.folder)

    def _read(self, shard: Shard, wanted: pa.Schema) -> pa.Table:
        path = self.folder / shard.name
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read(use_threads=False)  # of one part, they cost more than they save
        except (OSError, ValueError, pa.ArrowException):  # also a name that is no text
            table = None
        if table is None or table.num_rows != shard.stop - shard.start or table.schema != wanted:
            path.unlink(missing_ok=True)
            raise Damaged(shard.name)
        return table


@contextmanager
def alone(out_dir: Path) -> Iterator[None]:
    """Let no other process change what stands in a folder of scores."""
    handle = os.open(out_dir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def desk(out_dir: Path, job: Job) -> Iterator[Desk]:
    """Take a place at a job; the last worker to leave a finished one clears up."""
    out_dir.mkdir(parents=True, exist_ok=True)
    found = Desk(out_dir, job)
    handle = _join(found.folder)
    try:
        yield found
    finally:
        os.close(handle)
        if is_sealed(out_dir, job.key):
            _clear(out_dir, job)


def _join(folder: Path) -> int:
    """Hold a shared lock on a job's folder, made if need be; return its handle."""
    while True:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_SH)
        if folder.is_dir() and os.fstat(handle).st_ino == folder.stat().st_ino:
            return handle
        os.close(handle)  # cleared between being opened and being held


def _clear(out_dir: Path, job: Job) -> None:
    """Remove the parts of jobs in this folder that nobody works on: of this, and dead ones."""
    remove(list(out_dir.glob(".job-*")))  # but where another worker is still at it
    for each in job.inputs:
        if not any(out_dir.glob(".job-*")):
            shutil.rmtree(out_dir / f".rows-{each.signature[:16]}", ignore_errors=True)


class _Readings:
    """The file that is read now: opened when a part asks for it, closed for the next."""

    def __init__(self, job: Job, out_dir: Path) -> None:
        self._job, self._out_dir = job, out_dir
        self._stack = ExitStack()
        self._input = -1
        self._reading: Reading | None = None
        self.made: list[Shard] = []

    def __enter__(self) -> _Readings:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, shard: Shard) -> Reading:
        if shard.input != self._input:
            self.close()
        if self._reading is None:
            path = Path(self._job.inputs[shard.input].path)
            self._reading = self._stack.enter_context(
                inputs.opened(path, self._job.cells, scratch(self._out_dir, path))
            )
            self._input = shard.input
        return self._reading

    def close(self) -> None:
        self._stack.close()
        self._input, self._reading = -1, None


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Compute with so many threads: their number can change a sum's last bits."""
    torch = sys.modules.get("torch")  # never loaded only to be told
    before = torch.get_num_threads() if torch is not None else 0
    with threadpool_limits(limits=n):
        if torch is not None:
            torch.set_num_threads(n)
        try:
            yield
        finally:
            if torch is not None:
                torch.set_num_threads(before)
