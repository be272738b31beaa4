"""Bytes: check, curate, audit, split and tokenise, through DVC."""

from __future__ import annotations

from prefect import flow, task

from endoprint import jobs

# a second repro in one workspace is refused by DVC's lock: waiting is the cure
reproduce = task(jobs.prepare, name="prepare", retries=3, retry_delay_seconds=20)


@flow(log_prints=False)
def prepare(workspace: str = ".") -> str:
    """Bring a workspace's data up to date; what is unchanged is not made again."""
    return reproduce(workspace)
