"""Fit the field and compare it."""

from __future__ import annotations

from typing import Any

from prefect import flow, task

from endoprint import jobs
from flows.care import HOUR_SECONDS, NOTED, TRIED_AGAIN


@flow(**NOTED)
def train(workspace: str = ".", models: list[str] | None = None, night: str = "") -> str:
    """Fit models (all that the params name, unless told) and write the leaderboard; its path.

    `night`: a name for this night's work; a fit that was finished under it is not made again.
    """
    for model in models or jobs.model_names(workspace):
        task(
            jobs.train, name=f"train {model}", timeout_seconds=12 * HOUR_SECONDS,
            **TRIED_AGAIN, **_remembered(f"{night} {model}" if night else ""),
        )(workspace, model=model)  # fmt: skip
    return task(
        jobs.leaderboard, name="leaderboard", timeout_seconds=12 * HOUR_SECONDS, **TRIED_AGAIN
    )(workspace)


def _remembered(key: str) -> dict[str, Any]:
    """Return the settings that let Prefect remember a task's result under a key."""
    if not key:
        return {}
    return {"cache_key_fn": lambda context, given: key, "persist_result": True}
