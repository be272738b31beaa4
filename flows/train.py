"""Fit the field and compare it."""

from __future__ import annotations

from typing import Any

from prefect import flow, task

from endoprint import jobs
from flows.care import HOUR_SECONDS, NOTED, TRIED_AGAIN
from flows.gpu import a_turn


@flow(**NOTED)
def train(workspace: str = ".", models: list[str] | None = None, night: str = "") -> str:
    """Fit models (all that the params name, unless told) and write the leaderboard; its path.

    `night`: a name for this night's work; a fit that was finished under it is not made again.
    """
    long: dict[str, Any] = {"timeout_seconds": 12 * HOUR_SECONDS, **TRIED_AGAIN}
    with a_turn():
        for model in models or jobs.model_names(workspace):
            task(jobs.train, name=f"train {model}", **long)(workspace, model=model, night=night)
        # its controls are fits too
        return task(jobs.leaderboard, name="leaderboard", **long)(workspace)
