"""Bytes: check, curate, audit, split and tokenise, through DVC."""

from __future__ import annotations

from prefect import flow, task

from endoprint import jobs
from flows.care import HOUR_SECONDS, NOTED, TRIED_AGAIN


@flow(log_prints=False, **NOTED)
def prepare(workspace: str = ".") -> str:
    """Bring a workspace's data up to date; what is unchanged is not made again."""
    return task(jobs.prepare, name="prepare", timeout_seconds=4 * HOUR_SECONDS, **TRIED_AGAIN)(
        workspace
    )
