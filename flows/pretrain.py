"""Masked learning on unlabelled cells."""

from __future__ import annotations

from prefect import flow, task

from endoprint import jobs
from flows.care import HOUR_SECONDS, NOTED, TRIED_AGAIN


@flow(**NOTED)
def pretrain(workspace: str = ".") -> str:
    """Pre-train the workspace's small backbone; return its run id."""
    return task(jobs.pretrain, name="pretrain", timeout_seconds=24 * HOUR_SECONDS, **TRIED_AGAIN)(
        workspace
    )
