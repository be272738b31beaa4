"""Further processes on one job: each claims parts until none is left.

`python -m endoprint.scoring.workers PLAN BEGIN PARENT` is one of them. A plan is plain values; who
holds the same plan, on this machine or another that sees the same folder, works on the same job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from endoprint import artefact
from endoprint.cells import CellsConfig
from endoprint.config import Refusal
from endoprint.model import load
from endoprint.registry import Version
from endoprint.scoring.desk import desk
from endoprint.scoring.inputs import Input
from endoprint.scoring.job import Job, Layout

GRACE_SECONDS = 10.0  # for a worker to end by itself once its job is done


@contextmanager
def helpers(
    n: int, job: Job, out_dir: Path, model_folder: Path, environment: Mapping[str, str]
) -> Iterator[None]:
    """Let `n` further processes work on a job while the block does."""
    if n < 1:
        yield
        return
    plan = Path(write_plan(job, out_dir, model_folder))
    every = len(job.shards)
    words = [sys.executable, "-m", "endoprint.scoring.workers", str(plan)]
    started = [
        subprocess.Popen(
            [*words, str(every * (i + 1) // (n + 1)), str(os.getpid())],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for i in range(n)
    ]
    try:
        yield
        for process in started:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # nothing of it is missing: the job is done
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()


def work_on(plan: Path, *, begin: int = 0, parent: int = 0) -> int:
    """Work on a planned job until no part is left or `parent` is gone; return parts made."""
    told = json.loads(plan.read_text())
    folder = Path(told["model_folder"])
    job = Job(
        key=told["key"],
        version=Version(**told["version"]),
        inputs=[Input(**each) for each in told["inputs"]],
        cells=CellsConfig.of(told["cells"], "cells"),
        layout=Layout(**told["layout"]),
    )
    if artefact.digest(folder) != job.version.sha256:
        raise Refusal("a model's bytes are those that were registered", "others", "score it again")
    model = load(folder)
    with desk(Path(told["out_dir"]), job) as own:
        own.work(
            model,
            watch=lambda done, total: None,
            begin=begin,
            is_wanted=lambda: not parent or os.getppid() == parent,
        )
        return own.n_computed


def write_plan(job: Job, out_dir: Path, model_folder: Path) -> str:
    """Write a job down for other processes; return where. It lies beside the job's parts."""
    folder = out_dir / f".job-{job.key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    beside = folder / f".plan.{os.getpid()}.part"
    beside.write_text(json.dumps(_told(job, out_dir, model_folder)))
    os.replace(beside, plan)
    return str(plan)


def _told(job: Job, out_dir: Path, model_folder: Path) -> dict[str, object]:
    return {
        "key": job.key,
        "version": {**asdict(job.version), "tags": dict(job.version.tags)},
        "inputs": [asdict(each) for each in job.inputs],
        "cells": job.cells.model_dump(mode="json"),
        "layout": asdict(job.layout),
        "out_dir": str(out_dir),
        "model_folder": str(model_folder),
    }


if __name__ == "__main__":
    work_on(Path(sys.argv[1]), begin=int(sys.argv[2]), parent=int(sys.argv[3]))
