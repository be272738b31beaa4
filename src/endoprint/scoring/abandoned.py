"""What scorings that were given up left behind: their parts, which nobody will put together.

A job that was killed is finished by the same command, so its parts are kept for a while; a folder
that a living worker holds is never touched.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEPT_DAYS = 7.0  # after its last change: who wants to go on does so sooner (a guess)
SCRATCH = (".job-", ".rows-")  # parts of a job; a file laid out anew by cells
ELSEWHERE = (".endoprint", ".git", ".dvc", ".venv")  # no scores there, and much to look through


def abandoned(top: Path) -> list[Path]:
    """Return the folders of given-up scorings below `top` that nobody holds, in order."""
    found = []
    for place, names, _ in os.walk(top):
        is_kept = any(_is_needed(Path(place, each)) for each in names if each.startswith(SCRATCH))
        if not is_kept:  # a file laid out anew serves whichever job is still wanted beside it
            found += [Path(place, each) for each in names if each.startswith(SCRATCH)]
        names[:] = [x for x in names if x not in ELSEWHERE and not x.startswith(SCRATCH)]
    return sorted(found)


def remove(folders: list[Path]) -> None:
    """Remove such folders, but for one that a worker took up again meanwhile."""
    for folder in folders:
        with unheld(folder) as is_free:
            if is_free:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def unheld(folder: Path) -> Iterator[bool]:
    """Hold a folder that no living process holds; False where one does, or it is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _is_needed(folder: Path) -> bool:
    with unheld(folder) as is_free:
        if not is_free:
            return True
        try:
            times = [each.lstat().st_mtime for each in (folder, *folder.iterdir())]
        except FileNotFoundError:  # somebody is at work in it
            return True
        return time.time() - max(times) < KEPT_DAYS * 24 * 3600
