"""Tune one model on development units; the result is a proposal, never a change."""

from __future__ import annotations

from prefect import flow, task

from endoprint import jobs


@flow
def search(workspace: str = ".", model: str = "geneformer", trials: int = 20) -> str:
    """Ask Optuna for better values; return the study's run id."""
    return task(jobs.search, name=f"search {model}")(workspace, model=model, trials=trials)
