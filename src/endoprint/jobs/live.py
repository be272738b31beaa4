"""The job that clears up: what no version needs."""

from __future__ import annotations

from typing import Any

from endoprint.workspace import Workspace


def gc(workspace: str, *, delete: bool = False) -> dict[str, Any]:
    """Find (or delete) what no version needs: failed and killed runs, scratch, old backbones."""
    space = Workspace.open(workspace)
    from endoprint import runs, tracking

    closed = tracking.sweep(space)
    unneeded, scratch = runs.unneeded(space), runs.scratch(space)
    items = [f"run {run_id} ({status})" for run_id, status in unneeded.items()]
    items += [f"scratch of run {path.name}" for path in scratch]
    torn = runs.torn(space)
    items += [f"half-written {path.relative_to(space.root)}" for path in torn]
    if delete:
        runs.delete(space, list(unneeded))
        runs.clear([*scratch, *torn])
    return {"items": items, "closed": closed, "deleted": delete}
