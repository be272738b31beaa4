"""The job of a scheduled flow: score each new file of an inbox once, in order."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from endoprint.config import Refusal
from endoprint.jobs.scoring import score
from endoprint.passing import is_passing
from endoprint.workspace import Workspace


def score_inbox(workspace: str, *, inbox: str, out: str, model: str = "") -> dict[str, Any]:
    """Score every file of `inbox` that is new and whole, each into a folder below `out`.

    Returns names by what became of them: scored, waiting (still being copied, or it does not
    open yet), refused (with the reason; tried again next time). Two at once: the second does
    nothing.
    """
    space = Workspace.open(workspace)
    from endoprint import registry
    from endoprint.cells import CellsConfig
    from endoprint.scoring import inbox as box
    from endoprint.scoring.job import make

    config = space.params.section("cells", CellsConfig).located(space.root)
    registry.find(space, model or registry.CHAMPION)  # none live is no fault of the files
    place, folder = space.root / out, space.root / inbox
    if place.resolve() == folder.resolve():
        raise Refusal(
            "an inbox is not written to",
            f"scores that go into {place.name}",
            "name another folder",
        )
    space.local.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"scored": [], "waiting": {}, "refused": {}}
    try:
        with FileLock(space.local / "inbox.lock", timeout=0):
            if folder.is_dir():
                make(place)
            known = box.read(place)
            scratch = place / ".looked"
            files, waiting = box.ready(folder, known, cells=config, scratch=scratch)
            shutil.rmtree(scratch, ignore_errors=True)
            for entry in waiting:
                known[entry.file] = entry
                told["waiting"][entry.file] = entry.reason
            for path in files:
                entry = _scored(workspace, path, place, model)
                known[path.name] = entry
                box.write(place, known)  # after every file: a crash repeats none
                if entry.state == "scored":
                    told["scored"].append(path.name)
                else:
                    told[entry.state][path.name] = entry.reason
            if waiting:
                box.write(place, known)
    except Timeout:
        told["waiting"][inbox] = "another command is scoring this inbox"
    return told


def _scored(workspace: str, path: Path, place: Path, model: str) -> Any:
    """Score one file; what refuses it is remembered, so that it does not hold up the others."""
    from endoprint.scoring import ScoreSummary, inputs
    from endoprint.scoring.inbox import Entry, reason

    signature = ""
    own = place / path.name
    try:
        signature = inputs.signature(path)
        written = score(workspace, file=str(path), out=str(own), model=model)
        summary = ScoreSummary.read(Path(written))
    except Exception as error:
        if is_passing(error):  # a store that is away is no fault of the file
            raise
        state = "waiting" if "changed while" in str(error) else "refused"
        return Entry(path.name, signature, state, reason(error))
    return Entry(path.name, signature, "scored", md5=summary.inputs[0].md5, scores=path.name)
