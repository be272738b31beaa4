"""Where a job is worked on: each part claimed by one worker, written whole, and put together last.

A claim is a lock of the operating system: it ends with its process, however that died. Parts are
files that appear whole; the summary, written last, says that all is there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
from anndata import AnnData

from endoprint.model import ExposureModel
from endoprint.scoring import inputs
from endoprint.scoring.abandoned import remove
from endoprint.scoring.columns import few_words, schema
from endoprint.scoring.inputs import Reading
from endoprint.scoring.job import Job, Shard, scratch
from endoprint.scoring.rows import rows, stamped, with_threads
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
        with with_threads(self.job.layout.threads), _Aside(self) as aside:
            for held in self._held(order, aside):
                if not is_wanted():
                    return
                aside.write(held, self._rows(model, held))
                watch(self.n_cells_done(), self.job.n_cells)
            aside.settle()
        self.n_computed += len(aside.made)
        watch(self.n_cells_done(), self.job.n_cells)
        self._refuse_changed(aside.made)

    def _held(self, order: Sequence[Shard], aside: _Aside) -> Iterator[Held]:
        """Yield every part that is this worker's to make, while the one after it is being read."""
        ahead: Held | None = None
        for shard in order:
            claim = None if self.is_done(shard) else self._claimed(shard)
            if claim:
                held, ahead = ahead, aside.read(shard, claim)
                if held:
                    yield held
        if ahead:
            yield ahead
        for shard in order:  # of others: theirs to finish, or left by the dead
            aside.settle()  # who waits holds nothing that another, or itself, may wait for
            claim = None if self.is_done(shard) else self._claimed(shard, waits=True)
            if claim:
                yield aside.read(shard, claim)

    def is_done(self, shard: Shard) -> bool:
        """Say whether a part is there; parts appear whole."""
        return (self.folder / shard.name).is_file()

    def n_cells_done(self) -> int:
        """Count the cells of all parts that are there, whoever made them."""
        there = {entry.name for entry in os.scandir(self.folder)}
        return sum(shard.stop - shard.start for shard in self.job.shards if shard.name in there)

    def _rows(self, model: ExposureModel, held: Held) -> pa.Table:
        of = self.job.inputs[held.shard.input]
        same = {
            "file": of.file,
            "input_md5": of.md5,
            "job_key": self.job.key,
            "model_version": self.job.version.version,
            "model_sha256": self.job.version.sha256,
        }
        with inputs.naming(Path(of.path)):
            table = (
                rows(model, held.cells.result())
                if held.cells
                else self.job.early.pop(held.shard.number)
            )
        return stamped(table, same, schema(model.exposures))

    def write(self, shard: Shard, table: pa.Table) -> None:
        """Let a part appear, whole."""
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

    def _claimed(self, shard: Shard, *, waits: bool = False) -> IO[str] | None:
        """Hold a missing part for this worker alone, until what is returned is closed.

        None where another made it, or is at it and this one does not wait.
        """
        file = (self.folder / f".{shard.name}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        if self.is_done(shard):
            file.close()
            return None
        return file

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


@dataclass(frozen=True)
class Held:
    """A part that is this worker's to make: its claim, and its cells once they are read.

    No cells: its rows were found early, while the file's md5 was taken.
    """

    shard: Shard
    claim: IO[str]
    cells: Future[AnnData] | None


class _Aside:
    """A thread beside the model's: it reads and checks the next part, and writes the last one.

    It alone touches the file that is read: opened when a part asks for it, closed for the next.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._claims = ExitStack()  # whatever happens, none outlives this worker's turn
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._file = ExitStack()
        self._input = -1
        self._reading: Reading | None = None
        self.made: list[Shard] = []

    def __enter__(self) -> _Aside:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()  # what was begun is ended: a part is never half there
        self._file.close()
        self._claims.close()

    def read(self, shard: Shard, claim: IO[str]) -> Held:
        """Begin to read a part."""
        self._claims.enter_context(claim)
        is_early = shard.number in self._desk.job.early
        return Held(shard, claim, None if is_early else self._thread.submit(self._read, shard))

    def write(self, held: Held, table: pa.Table) -> None:
        """Begin to write a part, once the one before is written."""
        self.settle()
        self._writing = self._thread.submit(self._write, held, table)

    def settle(self) -> None:
        """Wait until all that was given is written; raises what went wrong."""
        if self._writing:
            self._writing.result()

    def _read(self, shard: Shard) -> AnnData:
        if shard.input != self._input:
            self._file.close()
            path = Path(self._desk.job.inputs[shard.input].path)
            scratched = scratch(self._desk.out_dir, path)
            opening = inputs.opened(path, self._desk.job.cells, scratched)
            self._reading, self._input = self._file.enter_context(opening), shard.input
        assert self._reading is not None
        return self._reading.part(shard.start, shard.stop)

    def _write(self, held: Held, table: pa.Table) -> None:
        with held.claim:
            # now, not once at the end, which a killed run never reaches: a part that is there
            # was made of the bytes whose md5 is in the job's key
            inputs.refuse_changed(self._desk.job.inputs[held.shard.input])
            self._desk.write(held.shard, table)
        self.made.append(held.shard)
