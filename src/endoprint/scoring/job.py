"""What a scoring job is: which model on which bytes by which rules, and in which parts.

The same key means the same rows, byte for byte: everything the bytes depend on is in it, also how
many cells are computed together and with how many threads.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event

import pyarrow as pa

from endoprint.cells import CellsConfig
from endoprint.config import Refusal
from endoprint.lineage import hash_of
from endoprint.model import ExposureModel
from endoprint.registry import Version
from endoprint.scoring import inputs
from endoprint.scoring.columns import FORMAT, schema
from endoprint.scoring.inputs import Input
from endoprint.scoring.rows import rows, with_threads

SOON = 0.02  # seconds: what is identified by then is not worth a second reader
MOST_EARLY = 64  # parts kept in memory, some 400 kB each


@dataclass(frozen=True)
class Layout:
    """How a job is cut: it changes no answer, but may change its last bits."""

    shard_cells: int = 2048  # computed and written at once; 4096 took a third longer per cell
    threads: int = 1  # of one worker; more workers, not more threads, use more cores


@dataclass(frozen=True)
class Shard:
    """A range of one file's cells, and its place in the whole."""

    number: int
    input: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The file it is written as."""
        return f"{self.number:06d}.parquet"


@dataclass(frozen=True)
class Job:
    """A scoring, fully decided: workers that hold the same job write the same rows."""

    key: str
    version: Version
    inputs: list[Input]
    cells: CellsConfig
    layout: Layout
    # rows of first parts that were found while the md5 was taken, by the part's number
    early: dict[int, pa.Table] = field(default_factory=dict, compare=False, repr=False)

    @property
    def n_cells(self) -> int:
        """Cells in all files together."""
        return sum(each.n_cells for each in self.inputs)

    @property
    def shards(self) -> list[Shard]:
        """Every part, in the order of the rows."""
        step = self.layout.shard_cells
        parts = [
            (number, start, min(start + step, each.n_cells))
            for number, each in enumerate(self.inputs)
            for start in range(0, each.n_cells, step)
        ]
        return [Shard(i, *part) for i, part in enumerate(parts)]


def plan(
    model: ExposureModel,
    version: Version,
    where: str | Path,
    out_dir: Path,
    *,
    cells: CellsConfig,
    layout: Layout | None = None,
    look: Callable[[str], None] = lambda name: None,
    is_begun: bool = False,
) -> Job:
    """Look at every file and decide the job, or refuse in one line and leave nothing behind.

    `where`: a file, a folder of them, or a pattern. `look(name)` is told which file is looked at.
    `is_begun`: judge first cells already while files are identified by their bytes, unless
    `out_dir` holds scores that may turn out to be these.
    """
    refuse_file(out_dir)
    layout = layout or Layout()
    was_there, laid_out = out_dir.exists(), set(out_dir.glob(".rows-*"))
    is_begun = is_begun and not (was_there and any(out_dir.iterdir()))
    found = []
    try:
        for path in inputs.find(where):
            look(path.name)
            if path.is_dir() and out_dir.resolve().is_relative_to(path.resolve()):
                raise Refusal(
                    "scores go beside the cells, never into them", f"{out_dir}", "name another"
                )
            found.append(inputs.look_at(path, model, cells, scratch(out_dir, path)))
        job = _identified(Job("", version, found, cells, layout), model, out_dir, is_begun)
    except Refusal:
        for path in set(out_dir.glob(".rows-*")) - laid_out:  # others are of a job at work
            shutil.rmtree(path, ignore_errors=True)
        if not was_there and out_dir.is_dir():
            out_dir.rmdir()
        raise
    make(out_dir)
    return job


def _identified(job: Job, model: ExposureModel, out_dir: Path, is_begun: bool) -> Job:
    """Return a job with its files' md5 and its key, and with what was found meanwhile."""
    is_known = Event()
    with ThreadPoolExecutor(1) as beside:  # an md5 leaves the processor's other cores idle
        begun = beside.submit(_first_rows, job, model, out_dir, is_known) if is_begun else None
        try:
            read = [replace(each, md5=inputs.md5(Path(each.path))) for each in job.inputs]
        finally:
            is_known.set()
        early = begun.result() if begun else {}
    key = job_key(model, job.version.sha256, read, job.cells, job.layout)
    return replace(job, key=key, inputs=read, early=early)


def _first_rows(
    job: Job, model: ExposureModel, out_dir: Path, is_known: Event
) -> dict[int, pa.Table]:
    """Judge the first file's first cells until its bytes are known."""
    found: dict[int, pa.Table] = {}
    path = Path(job.inputs[0].path)
    if is_known.wait(SOON):
        return found
    with (
        with_threads(job.layout.threads),
        inputs.naming(path),
        inputs.opened(path, job.cells, scratch(out_dir, path)) as reading,
    ):
        for shard in job.shards[:MOST_EARLY]:
            if shard.input or is_known.is_set():
                break
            found[shard.number] = rows(model, reading.part(shard.start, shard.stop))
    return found


def job_key(
    model: ExposureModel, sha256: str, found: list[Input], cells: CellsConfig, layout: Layout
) -> str:
    """Return what a job is known by; where files lie is no part of it."""
    return hash_of(
        {
            "model": sha256,
            "inputs": [[each.file, each.md5, each.table_md5] for each in found],
            "cells": cells.model_dump(mode="json", exclude={"source", "pool"}),
            "format": FORMAT,
            "columns": [[field.name, str(field.type)] for field in schema(model.exposures)],
            "layout": asdict(layout),
        }
    )


def refuse_file(out_dir: Path) -> None:
    """Refuse a file where scores are to go."""
    if out_dir.exists() and not out_dir.is_dir():
        raise Refusal("scores go into a folder", f"a file at {out_dir}", "name a folder")


def make(out_dir: Path) -> None:
    """Make the folder of scores, or refuse in one line where nothing can be written."""
    refuse_file(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as error:
        raise Refusal(
            "scores go into a folder that can be written", str(error), "name another, or make room"
        ) from None


def scratch(out_dir: Path, path: Path) -> Path:
    """Return where a file that is not stored by rows is laid out anew, if it must be."""
    return out_dir / f".rows-{inputs.signature(path)[:16]}"
