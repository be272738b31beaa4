"""Score cells with the champion."""

from __future__ import annotations

from prefect import flow, task

from endoprint import jobs


@flow
def score(workspace: str = ".", file: str = "inbox", out: str = "scores", model: str = "") -> str:
    """Score an h5ad, or a folder of them, with the champion; return the summary's path."""
    scored = task(jobs.score, name="score", retries=1)
    return scored(workspace, file=file, out=out, model=model)
