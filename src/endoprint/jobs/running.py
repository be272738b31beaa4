"""Jobs on what runs by itself: what is up and what is next, and clearing up after a crash."""

from __future__ import annotations

from typing import Any

from endoprint.workspace import Workspace


def recover(workspace: str) -> dict[str, Any]:
    """Mark the runs of dead processes KILLED, and close a promotion that a crash cut short.

    `experiment`: the id of the task's, made on first use: `endoprint up` leads a person there.
    """
    space = Workspace.open(workspace)
    from endoprint import registry, tracking

    closed = tracking.sweep(space)
    experiment = tracking.experiment(space, tracking.client(space))
    with registry.lock(space):
        promotion = registry.recover(space)
    return {"closed": closed, "promotion": promotion, "experiment": experiment}


def status(workspace: str) -> dict[str, Any]:
    """Return what `endoprint up` keeps running here, what runs in it, what is next, what was last.

    `is_running` says whether there is an `up`; without one, nothing is known of the rest.
    """
    space = Workspace.open(workspace)
    from endoprint.services.prefect_api import Prefect
    from endoprint.services.up import state_of

    told = state_of(space)
    agenda: dict[str, Any] = {"running": [], "next": [], "last": []}
    if told["is_running"]:
        try:
            agenda = Prefect(told["prefect_api"]).agenda()
        except (OSError, ValueError):
            told["prefect_is_silent"] = True
    return {**told, **agenda}


def has_files(workspace: str, *, inbox: str) -> bool:
    """Whether anything lies in a workspace's inbox: where nothing does, nothing is to be said."""
    folder = Workspace.at(workspace).root / inbox
    return folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir())
