"""Tune one model, or all, on development units; a proposal, never a change of params.yaml."""

from __future__ import annotations

from typing import Any

from prefect import flow, task

from endoprint import jobs
from flows.care import HOUR_SECONDS, NOTED, TRIED_AGAIN
from flows.gpu import a_turn


@flow(**NOTED)
def search(
    workspace: str = ".",
    model: str = "geneformer",
    trials: int = 0,
    budget: str = "",
    target: float = 0.0,
    objective: str = "",
    offer: bool = False,
) -> str:
    """Ask Optuna for better values (`model` all: of every model); return the study's run id.

    `offer`: refit the winner, judge it, and make it @candidate.
    """
    if model == "all":
        jobs.refuse_more_than_a_budget(trials, target, objective, offer)
    long: dict[str, Any] = {"timeout_seconds": 24 * HOUR_SECONDS, **TRIED_AGAIN}
    with a_turn():
        if model == "all":
            every: str = task(jobs.search_all, name="search all", **long)(workspace, budget=budget)
            return every
        run: str = task(jobs.search, name=f"search {model}", **long)(
            workspace, model=model, trials=trials, budget=budget, target=target,
            objective=objective,
        )  # fmt: skip
        if offer:
            task(jobs.offer, name=f"offer {model}", **long)(
                workspace, model=model, objective=objective
            )
    return run
