"""Who decided what, when, about which version: an append-only record that shows if it was edited.

Every line is JSON and carries the hash of the line before it, so that a changed, removed or
inserted line breaks the chain at that place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from endoprint.config import Refusal
from endoprint.identity import login
from endoprint.lineage import hash_of
from endoprint.workspace import Workspace

START = "0" * 64  # what the first line names as the one before it
Line = dict[str, Any]  # plain JSON values


def path(workspace: Workspace) -> Path:
    """Return where the history of a workspace's task is kept."""
    return workspace.history / f"{workspace.experiment}.jsonl"


def append(workspace: Workspace, what: str, said: Mapping[str, Any]) -> Line:
    """Add one line: `what` was done and what is said about it; return the line as written.

    `who` is the user this process runs as: a name, not a proof.
    """
    place = path(workspace)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        _drop_torn_tail(place)
        lines = read(workspace)
        line: Line = {
            **said,
            "n": len(lines) + 1,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "who": login(),
            "what": what,
            "previous": lines[-1]["hash"] if lines else START,
        }
        line["hash"] = hash_of(line)
        with place.open("a") as stream:
            stream.write(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    return line


def text(workspace: Workspace) -> str:
    """Return the history as written, without what follows the last newline: never finished."""
    place = path(workspace)
    whole, newline, _ = (place.read_text() if place.is_file() else "").rpartition("\n")
    return whole + newline


def read(workspace: Workspace) -> list[Line]:
    """Return all lines, oldest first; one that is not JSON is refused, a torn last one is not."""
    place = path(workspace)
    try:
        return [dict(json.loads(line)) for line in text(workspace).split("\n")[:-1]]
    except (ValueError, TypeError):
        raise Refusal(
            "the history holds one JSON record per line",
            f"something else in {place.name}",
            "restore it from a copy; it is never edited by hand",
        ) from None


def verify(workspace: Workspace, *, head: str | None = None) -> list[str]:
    """Return what is wrong with the chain, one sentence each; nothing if it is whole.

    `head`, where known from elsewhere, is the hash of a line that must stand in it: a chain cut
    off at its end is whole in itself.
    """
    wrong = []
    before = START
    lines = read(workspace)
    for number, line in enumerate(lines, start=1):
        unsigned = {key: value for key, value in line.items() if key != "hash"}
        if line.get("hash") != hash_of(unsigned):
            wrong.append(f"line {number} was changed after it was written")
        if line.get("previous") != before or line.get("n") != number:
            wrong.append(f"line {number} does not follow the line before it")
        before = str(line.get("hash"))
    if head is not None and head not in {line.get("hash") for line in lines}:
        wrong.append("lines at the end are missing: the last one known to the registry is absent")
    return wrong


def refuse_cut_off(workspace: Workspace, head: str | None) -> None:
    """Refuse a history that lacks the line whose hash is known from elsewhere.

    Written on, it would end in a line that is known, and never be found out.
    """
    if head is None or head in {line.get("hash") for line in read(workspace)}:
        return
    place = path(workspace)
    raise Refusal(
        "a history is written on where it reaches as far as the registry remembers",
        f"{place.relative_to(workspace.root)}, whose lines at the end are missing",
        f"restore it from a copy, such as registry/history/{place.name}, as docs/registry.md says",
    )


def _drop_torn_tail(place: Path) -> None:
    """Cut off a line whose writer died in the middle of it: nobody was told it was written."""
    if not place.is_file():
        return
    content = place.read_bytes()
    if content and not content.endswith(b"\n"):
        with place.open("r+b") as stream:
            stream.truncate(content.rfind(b"\n") + 1)
