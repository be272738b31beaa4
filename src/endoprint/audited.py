"""The history held against the registry: who was live when, and what moved behind its back."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from endoprint import history, registry
from endoprint.config import Refusal
from endoprint.workspace import Workspace


@dataclass(frozen=True)
class Reign:
    """A span of time in which one version, or none, was live."""

    version: str | None
    since: str | None  # ISO, UTC; None: before the first line
    until: str | None  # None: still
    who: str | None
    why: str | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Move:
    """One thing the registry holds that the history does not account for."""

    what: str  # an alias, or a version's digest
    told: str | None  # by the history
    found: str | None  # in the registry

    def sentence(self) -> str:
        """Say it in one line."""
        return f"{self.what}: the history says {self.told or 'none'}, found {self.found or 'none'}"


def reigns(workspace: Workspace) -> list[Reign]:
    """Return who was live when, oldest first, as the history tells it."""
    found = [Reign(None, None, None, None, None)]
    for line in history.read(workspace):
        if line["what"] != "done":
            continue
        last = found.pop()
        found.append(Reign(last.version, last.since, line["at"], last.who, last.why))
        found.append(Reign(line["to"], line["at"], None, line["who"], line["why"]))
    return found


def reign_at(workspace: Workspace, moment: str) -> Reign:
    """Return who was live at a time: ISO 8601; without an offset it is UTC."""
    try:
        at = datetime.fromisoformat(moment)
    except ValueError:
        raise Refusal(
            "a time is ISO 8601", moment, "write 2026-11-22T14:30, in UTC unless it says its zone"
        ) from None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    if at > datetime.now(UTC):
        raise Refusal("the history tells what was", f"{moment}, which is yet to come", "ask later")
    return next(
        each
        for each in reversed(reigns(workspace))
        if each.since is None or datetime.fromisoformat(each.since) <= at
    )


def plan(workspace: Workspace) -> list[Move]:
    """Return what stands otherwise than the history says: aliases, and versions' digests."""
    lines = history.read(workspace)
    standing = registry.aliases(workspace)
    moves = [
        Move(f"@{alias}", version, found)
        for alias, version in registry.told_aliases(workspace).items()
        if (found := standing.get(alias)) != version
    ]
    digests = {line["version"]: line["sha256"] for line in lines if line["what"] == "register"}
    known = {each.version: each.sha256 for each in registry.versions(workspace)}
    return moves + [
        Move(f"digest of version {version}", digests.get(version), known.get(version))
        for version in sorted({*digests, *known}, key=int)
        if digests.get(version) != known.get(version)
    ]


def verify(workspace: Workspace) -> list[str]:
    """Return what is wrong with the history and its export, one sentence each."""
    wrong = registry.verify(workspace)
    place = exported(workspace)
    if place.is_file() and not history.text(workspace).startswith(place.read_text()):
        wrong.append(f"{place.name} in registry/history is no beginning of this history")
    return wrong


def exported(workspace: Workspace) -> Path:
    """Return where the exported history stands: in the workspace, for git to keep."""
    return workspace.policy.parent / "history" / history.path(workspace).name


def export(workspace: Workspace) -> Path:
    """Write the history where git keeps it; one that does not verify is not exported."""
    wrong = verify(workspace)
    if wrong:
        raise Refusal("an exported history is whole", wrong[0], "restore it from a copy")
    place = exported(workspace)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        beside.write_text(history.text(workspace))
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)
    return place
