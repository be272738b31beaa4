"""The job that clears up: what no version needs."""

from __future__ import annotations

from typing import Any

from endoprint.workspace import Workspace


def gc(workspace: str, *, delete: bool = False) -> dict[str, Any]:
    """Find (or delete) what nobody needs: failed and killed runs, scratch, given-up scorings."""
    space = Workspace.open(workspace)
    from endoprint import runs, tracking
    from endoprint.scoring import abandoned

    closed = tracking.sweep(space)
    unneeded, scratch = runs.unneeded(space), runs.scratch(space)
    items = [f"run {run_id} ({status})" for run_id, status in unneeded.items()]
    items += [f"scratch of run {path.name}" for path in scratch]
    torn = runs.torn(space)
    items += [f"half-written {path.relative_to(space.root)}" for path in torn]
    given_up = abandoned.abandoned(space.root)
    when = f"given up over {abandoned.KEPT_DAYS:.0f} days ago"
    items += [f"{path.relative_to(space.root)}, of a scoring {when}" for path in given_up]
    if delete:
        runs.delete(space, list(unneeded))
        runs.clear([*scratch, *torn])
        abandoned.remove(given_up)
    return {"items": items, "closed": closed, "deleted": delete}
