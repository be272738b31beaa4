"""Score cells with the champion: one file, an inbox, or one job by many workers."""

from __future__ import annotations

from typing import Any

from prefect import State, flow, task
from prefect.states import Completed

from endoprint import jobs
from flows.care import HOUR_SECONDS, NOTED, TRIED_AGAIN

LONG: dict[str, Any] = {"timeout_seconds": 24 * HOUR_SECONDS, **TRIED_AGAIN}


@flow(**NOTED)
def score(workspace: str = ".", file: str = "inbox", out: str = "scores", model: str = "") -> str:
    """Score a file, or a folder of them, with the champion; return the summary's path."""
    scored = task(jobs.score, name="score", **LONG)
    return scored(workspace, file=file, out=out, model=model)


@flow(**NOTED)
def score_inbox(
    workspace: str = ".", inbox: str = "inbox", out: str = "scores/inbox", model: str = ""
) -> dict[str, Any] | State[Any]:
    """Score each new file of the inbox once, in order; return what became of which."""
    if not jobs.has_files(workspace, inbox=inbox):
        return Completed(name="Skipped", message=f"skipped: nothing lies in {inbox}")
    scored = task(jobs.score_inbox, name="score inbox", **LONG)
    return scored(workspace, inbox=inbox, out=out, model=model)


@flow(**NOTED)
def score_with_workers(
    workspace: str = ".",
    file: str = "inbox",
    out: str = "scores",
    model: str = "",
    workers: int = 2,
) -> str:
    """Score one job with many workers, wherever the flow's task runner starts them.

    With `prefect-dask`: `score_with_workers.with_options(task_runner=DaskTaskRunner(...))`. All
    must see the workspace and `out` under the same paths; a part is made by whoever claims it.
    """
    planned = task(jobs.plan_scoring, name="plan scoring", **LONG)
    plan = planned(workspace, file=file, out=out, model=model)
    part = task(jobs.score_part, name="score part", **LONG)
    shares = [part.submit(workspace, plan=plan, begin=97 * i) for i in range(workers)]
    for share in shares:
        share.result()
    return score(workspace, file=file, out=out, model=model)
