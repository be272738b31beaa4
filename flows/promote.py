"""Register the leader, judge it on test units, and promote it if the policy allows."""

from __future__ import annotations

from prefect import flow, task

from endoprint import jobs


@flow
def promote(workspace: str = ".", version: str = "") -> str:
    """Judge a version (the leader, newly registered, unless told); return the verdict's path."""
    chosen = version or task(jobs.register, name="register")(workspace)
    return task(jobs.promote, name="promote")(workspace, version=chosen)
