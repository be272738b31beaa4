"""Jobs that let a night's work skip itself: what it depends on, and what it was last time."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from endoprint.config import Refusal
from endoprint.jobs.data import write_json
from endoprint.workspace import Workspace

VALUES = ("params.yaml", "dvc.yaml", "registry/policy.yaml")
SOFTWARE = ("torch", "scikit-learn", "lightgbm", "transformers", "numpy", "anndata")


def night(workspace: str) -> dict[str, Any]:
    """Return what tonight's work depends on, and what of it changed since the last finished night.

    `changed`: "data", "code", "values", those of them that differ; empty: nothing did. `last`:
    when the last night was finished. `key`: names tonight's work, also after a crash.
    """
    space = Workspace.open(workspace)
    known = _known(space)
    parts = {"data": _data(space), "code": _code(), "values": _values(space)}
    before = known.get("parts", {})
    changed = [name for name, digest in parts.items() if before.get(name) != digest]
    last = str(known.get("last", ""))
    key = _hash([parts, last, space.tracking_uri.rpartition("@")[2], str(space.root)])
    return {"key": key, "parts": parts, "changed": ", ".join(changed), "last": last}


def end_night(workspace: str, *, night: dict[str, Any]) -> str:
    """Remember what a finished night depended on; return where."""
    space = Workspace.at(workspace)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return write_json(_place(space), {"parts": night["parts"], "last": now})


def wants_pretraining(workspace: str) -> bool:
    """Whether the models of this workspace start from a backbone that is made here."""
    return bool(Workspace.open(workspace).params.pretrain)


def _place(space: Workspace) -> Path:
    return space.local / "night.json"


def _known(space: Workspace) -> dict[str, Any]:
    try:
        return dict(json.loads(_place(space).read_text()))
    except (OSError, ValueError):
        return {}  # no night yet, or none that can be read: everything is new


def _data(space: Workspace) -> str:
    """Return the digest of the source files; a file of the size and time it had is not read."""
    place = space.local / "digests.json"
    try:
        known = dict(json.loads(place.read_text()))
    except (OSError, ValueError):
        known = {}
    found: dict[str, list[Any]] = {}
    for key in ("source", "pool"):
        path = space.params.cells.get(key)
        if not path:
            continue
        top = space.root / str(path)
        files = (
            sorted(each for each in top.rglob("*") if each.is_file()) if top.is_dir() else [top]
        )
        if not files or not files[0].is_file():
            raise Refusal(
                "a night's work begins with cells",
                f"nothing at {path}",
                "link yours with `endoprint run --file PATH`, or simulate the demo's",
            )
        for file in files:
            stat = file.stat()
            stamp = [stat.st_size, stat.st_mtime_ns]
            name, before = str(file), known.get(str(file), [])
            digest = before[2] if before[:2] == stamp else _md5(file)
            found[name] = [*stamp, digest]
    write_json(place, found)
    return _hash({name: each[2] for name, each in found.items()})


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def _code() -> str:
    """Return the digest of this package's code and of what it computes with."""
    top = Path(__file__).parents[1]
    files = {str(path.relative_to(top)): _md5(path) for path in sorted(top.rglob("*.py"))}
    return _hash([files, {name: version(name) for name in SOFTWARE}])


def _values(space: Workspace) -> str:
    files = [space.root / name for name in VALUES]
    return _hash({str(path): _md5(path) for path in files if path.is_file()})


def _hash(said: object) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
