"""Tune one model on development units; the result is a proposal, never a change."""

from __future__ import annotations

from prefect import flow, task

from endoprint import jobs
from flows.care import HOUR_SECONDS, NOTED, TRIED_AGAIN


@flow(**NOTED)
def search(workspace: str = ".", model: str = "geneformer", trials: int = 20) -> str:
    """Ask Optuna for better values; return the study's run id."""
    return task(
        jobs.search, name=f"search {model}", timeout_seconds=24 * HOUR_SECONDS, **TRIED_AGAIN
    )(workspace, model=model, trials=trials)
