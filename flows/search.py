"""Tune one model, or all, on development units; a proposal, never a change of params.yaml."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.concurrency.sync import concurrency

from endoprint import jobs
from flows.care import HOUR_SECONDS, NOTED, TRIED_AGAIN

# searches that fit on one GPU take turns where `prefect gcl create gpu --limit 1` was said once;
# without that limit nobody waits
GPU = "gpu"


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
    run: str = task(
        in_turn, name=f"search {model}", timeout_seconds=24 * HOUR_SECONDS, **TRIED_AGAIN
    )(
        workspace, model=model, trials=trials, budget=budget, target=target, objective=objective
    )  # fmt: skip
    if offer:
        task(
            offer_in_turn, name=f"offer {model}", timeout_seconds=12 * HOUR_SECONDS, **TRIED_AGAIN
        )(workspace, model=model, objective=objective)
    return run


def offer_in_turn(workspace: str, *, model: str, objective: str) -> dict[str, Any]:
    """Refit and offer a search's winner once the GPU is free."""
    with concurrency(GPU):
        return jobs.offer(workspace, model=model, objective=objective)


def in_turn(
    workspace: str, *, model: str, trials: int, budget: str, target: float, objective: str
) -> str:
    """Search once the GPU is free."""
    with concurrency(GPU):
        if model == "all":
            return jobs.search_all(workspace, budget=budget)
        return jobs.search(
            workspace, model=model, trials=trials, budget=budget, target=target,
            objective=objective,
        )  # fmt: skip
