"""Fit the field and compare it."""

from __future__ import annotations

from prefect import flow, task

from endoprint import jobs


@flow
def train(workspace: str = ".", models: list[str] | None = None) -> str:
    """Fit models (all that the params name, unless told) and write the leaderboard; its path."""
    for model in models or jobs.model_names(workspace):
        task(jobs.train, name=f"train {model}", retries=1)(workspace, model=model)
    return task(jobs.leaderboard, name="leaderboard")(workspace)
