"""Say of every cell of a file what it was exposed to: one row per cell, in the file's order.

Streams, so that memory does not grow with the file. Nothing is dropped: a cell that cannot be
judged keeps its row and says why. Killed at any moment, the same command finishes what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from endoprint.model import ExposureModel
from endoprint.scoring.columns import COLUMNS, NO_ANSWER, NO_GENES, schema
from endoprint.scoring.desk import Damaged, Desk, Watch, alone, desk
from endoprint.scoring.job import Job, Layout, Shard, plan
from endoprint.scoring.summary import SCORES, SUMMARY, ScoreSummary, finished, is_described, sha256

__all__ = [
    "COLUMNS",
    "NO_ANSWER",
    "NO_GENES",
    "SCORES",
    "SUMMARY",
    "Damaged",
    "Desk",
    "Job",
    "Layout",
    "ScoreSummary",
    "Shard",
    "alone",
    "desk",
    "finished",
    "plan",
    "schema",
    "score_job",
]

Describe = Callable[[ScoreSummary], list[str]]


def silent(done: int, total: int) -> None:
    """Show no progress."""


def nothing_else(summary: ScoreSummary) -> list[str]:
    """Write nothing beside the scores."""
    return []


def score_job(
    model: ExposureModel,
    job: Job,
    out_dir: Path,
    *,
    watch: Watch = silent,
    by: str = "",
    describe: Describe = nothing_else,
) -> ScoreSummary:
    """Do what is missing of a job, beside whoever else works on it; return what it came to.

    `scores.parquet` has one row per cell (`columns`), `summary.json` says that it is whole. The
    same job again changes nothing; another job replaces the old one whole. `watch(done, total)`
    counts cells.

    `describe(summary)` writes what stands beside the scores, which tells of the populations of
    column `by`, and returns the names of its files; the summary is written after them.
    """
    began = time.perf_counter()
    done = finished(out_dir, job.key)
    if done is not None and is_described(out_dir, done, by):
        return done
    with desk(out_dir, job) as own:
        while True:
            if done is None:
                own.work(model, watch=watch)
            with alone(out_dir):
                done = finished(out_dir, job.key)
                if done is not None and is_described(out_dir, done, by):
                    return done  # another worker put it together
                try:
                    told = done or own.publish(model, seconds=lambda: time.perf_counter() - began)
                except Damaged:
                    continue
                names = describe(told)
                beside = {name: sha256(out_dir / name) for name in names}
                told = replace(told, by=by, beside=beside, was_done_before=False)
                own.seal(told)
                return told
