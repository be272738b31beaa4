"""Whether the process that began something still lives: told by its number and its start."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import psutil

TOLERANCE_SECONDS = 2.0  # process start times are kept to clock ticks


def is_alive(pid: int, *, born: float | None = None) -> bool:
    """Whether a process lives; `born` (seconds since the epoch) tells it from a later one.

    A number is used again: the same number with another start is another process. One that may
    not be looked at is taken to live.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return born is None or abs(process.create_time() - born) < TOLERANCE_SECONDS
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def named() -> dict[str, str]:
    """Return the words by which this process is known to others later."""
    return {
        "host": platform.node(),
        "pid": str(os.getpid()),
        "process_started": f"{psutil.Process().create_time():.2f}",
    }


def is_named(words: Mapping[str, str]) -> bool:
    """Whether the process of this machine that such words name still lives."""
    try:
        return is_alive(int(words["pid"]), born=float(words["process_started"]))
    except (KeyError, ValueError):
        return True  # not known to be dead
