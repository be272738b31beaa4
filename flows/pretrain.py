"""Masked learning on unlabelled cells."""

from __future__ import annotations

from typing import Any

from prefect import flow, task

from endoprint import jobs
from flows.care import HOUR_SECONDS, NOTED, TRIED_AGAIN
from flows.gpu import a_turn


@flow(**NOTED)
def pretrain(workspace: str = ".") -> str:
    """Pre-train the workspace's small backbone; return its run id."""
    long: dict[str, Any] = {"timeout_seconds": 24 * HOUR_SECONDS, **TRIED_AGAIN}
    with a_turn():
        return task(jobs.pretrain, name="pretrain", **long)(workspace)
