"""A folder into which files of cells fall: which of them are new, whole and still to be scored.

Nothing in it is moved or changed. What was scored is remembered beside the scores, by the file's
bytes; a file is whole when nothing wrote to it between two looks and it opens.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from endoprint.cells import CellsConfig
from endoprint.config import Refusal
from endoprint.scoring import inputs

LEDGER = "inbox.json"
MOST_LETTERS = 300  # of an error that is no refusal
SETTLE_SECONDS = 5.0  # between two looks at a file's size and time of change


@dataclass(frozen=True)
class Entry:
    """One file of the inbox: its bytes, and what became of it."""

    file: str
    signature: str
    state: str  # scored | refused (for the reason; tried again each time) | waiting (not whole)
    reason: str = ""
    md5: str = ""
    scores: str = ""  # its folder, below the inbox's scores


def read(out_dir: Path) -> dict[str, Entry]:
    """Return what became of every file seen, by name; nothing where nobody looked yet."""
    try:
        rows = json.loads((out_dir / LEDGER).read_text())
        return {row["file"]: Entry(**row) for row in rows}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError):
        raise Refusal(
            f"{LEDGER} says which files were scored",
            f"one in {out_dir} that can not be read",
            "remove it: files are then compared with their scores again",
        ) from None


def write(out_dir: Path, known: dict[str, Entry]) -> None:
    """Remember what became of every file; whole or not at all."""
    out_dir.mkdir(parents=True, exist_ok=True)
    beside = out_dir / f".{LEDGER}.{os.getpid()}.part"
    rows = [asdict(known[name]) for name in sorted(known)]
    beside.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(beside, out_dir / LEDGER)


def ready(
    folder: Path,
    known: dict[str, Entry],
    *,
    cells: CellsConfig,
    scratch: Path,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[Path], list[Entry]]:
    """Return the files to be scored, in order of their names, and those to wait for.

    That is: new, changed since, or not scored for a reason before; unchanged over SETTLE_SECONDS;
    and it opens. What keeps one from opening never holds up the others.
    """
    if not folder.is_dir():
        raise Refusal("an inbox is a folder", f"none at {folder}", "make it, or name another")
    try:
        found = inputs.find(folder)
    except Refusal:  # nothing there yet
        return [], []
    before = {path: _signature(path) for path in found}
    new = [
        path
        for path in found
        if path.name not in known
        or known[path.name].state != "scored"
        or known[path.name].signature != before[path]
    ]
    if new:
        sleep(SETTLE_SECONDS)
    whole, waiting = [], []
    for path in new:
        now = _signature(path)
        if not now or now != before[path]:
            waiting.append(Entry(path.name, now, "waiting", "something still writes to it"))
            continue
        try:
            with inputs.opened(path, cells, scratch) as reading:
                reading.found.ids(0, 1)
            whole.append(path)
        except Exception as error:  # noqa: BLE001  # whatever it is, the other files go on
            waiting.append(Entry(path.name, now, "waiting", reason(error)))
    return whole, waiting


def reason(error: Exception) -> str:
    """Return in one line why a file was not scored."""
    if isinstance(error, Refusal):
        return " ".join(f"{error.rule}; {error.got}".split())
    return " ".join(f"{type(error).__name__}: {error}".split())[:MOST_LETTERS]


def _signature(path: Path) -> str:
    try:
        return inputs.signature(path)
    except FileNotFoundError:  # taken away between two looks
        return ""
