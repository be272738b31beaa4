"""Score cells with the champion: one file, an inbox, or one job by many workers."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from prefect import Flow, State, flow, task
from prefect.states import Completed

from endoprint import jobs
from endoprint.config import Refusal
from flows.care import HOUR_SECONDS, NOTED, TRIED_AGAIN

DASK = "ENDOPRINT_DASK"  # a scheduler's address, for example tcp://scheduler:8786
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
    """Score one job with many workers: of Dask where ENDOPRINT_DASK says so, else of this machine.

    All must see the workspace and `out` under the same paths; a part is made by whoever claims it.
    """
    planned = task(jobs.plan_scoring, name="plan scoring", **LONG)
    plan = planned(workspace, file=file, out=out, model=model)
    spread(score_parts)(workspace, plan=plan, workers=workers)
    return score(workspace, file=file, out=out, model=model)


@flow(**NOTED)
def score_parts(workspace: str, plan: str, workers: int) -> list[int]:
    """Let workers make a planned job's parts, each once; return how many each made."""
    part = task(jobs.score_part, name="score part", **LONG)
    shares = [part.submit(workspace, plan=plan, begin=97 * i) for i in range(workers)]
    return [share.result() for share in shares]


def spread(parts: Flow[..., Any]) -> Flow[..., Any]:
    """Return a flow whose tasks run on Dask's workers, if there is an address of a scheduler."""
    address = os.environ.get(DASK, "")
    if not address:
        return parts
    if importlib.util.find_spec("prefect_dask") is None:
        raise Refusal(
            f"{DASK} names a scheduler for prefect-dask",
            f"{address}, and no prefect-dask here",
            "pip install 'endoprint[dask]', or unset it",
        )
    from prefect_dask import DaskTaskRunner

    return parts.with_options(task_runner=DaskTaskRunner(address=address))
