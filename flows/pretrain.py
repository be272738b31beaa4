"""Masked learning on unlabelled cells."""

from __future__ import annotations

from prefect import flow, task

from endoprint import jobs


@flow
def pretrain(workspace: str = ".") -> str:
    """Pre-train the workspace's small backbone; return its run id."""
    return task(jobs.pretrain, name="pretrain")(workspace)
