"""What a scoring job is: which model on which bytes by which rules, and in which parts.

The same key means the same rows, byte for byte: everything the bytes depend on is in it, also how
many cells are computed together and with how many threads.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from endoprint.cells import CellsConfig
from endoprint.config import Refusal
from endoprint.lineage import hash_of
from endoprint.model import ExposureModel
from endoprint.registry import Version
from endoprint.scoring import inputs
from endoprint.scoring.columns import FORMAT, schema
from endoprint.scoring.inputs import Input


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
) -> Job:
    """Look at every file and decide the job, or refuse in one line and leave nothing behind.

    `where`: a file, a folder of them, or a pattern. `look(name)` is told which file is looked at.
    """
    refuse_file(out_dir)
    layout = layout or Layout()
    was_there = out_dir.exists()
    found = []
    try:
        for path in inputs.find(where):
            look(path.name)
            if path.is_dir() and out_dir.resolve().is_relative_to(path.resolve()):
                raise Refusal(
                    "scores go beside the cells, never into them", f"{out_dir}", "name another"
                )
            found.append(inputs.look_at(path, model, cells, scratch(out_dir, path)))
    except Refusal:
        for path in out_dir.glob(".rows-*"):
            shutil.rmtree(path, ignore_errors=True)
        if not was_there and out_dir.is_dir():
            out_dir.rmdir()
        raise
    make(out_dir)
    return Job(job_key(model, version.sha256, found, cells, layout), version, found, cells, layout)


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
