"""How far a long step has come: a bar on a terminal, at most one line in a log.

Everything is written to standard error, so that `--json` on standard output stays clean.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

WORTH_A_LINE_SECONDS = 3.0  # shorter steps leave no trace
NOTE_WIDTH = 36  # keeps name, bar and clock of a nested step within 100 columns


class Task:
    """One running step: call it to advance, or hand one of its methods out as a callback."""

    def __init__(self, name: str, total: int | None, screen: _Screen) -> None:
        self.name, self.total = name, total
        self.completed = 0
        self.note = ""
        self._screen = screen
        self._row = screen.add(self)

    def __call__(self, n: int = 1, note: str = "") -> None:
        """Advance by `n`; `note` says what is going on, in a few words."""
        self.completed += n
        self.note = note or self.note
        self._screen.draw(self)

    def watch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Advance by one epoch and show its metrics: the `watch` of `ExposureModel.fit`.

        Epochs may count from 0 or 1; a resumed fit starts where its first epoch says.
        """
        self.completed = max(self.completed + 1, epoch)
        self.note = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())
        self._screen.draw(self)

    def reach(self, done: int, total: int) -> None:
        """Stand at `done` of `total`: for callers who count themselves."""
        self.completed, self.total = done, total
        self._screen.draw(self)


@contextmanager
def task(name: str, total: int | None = None) -> Iterator[Task]:
    """Show one step while the block runs; steps may nest and may run in several threads.

    `total` is the number of calls expected, None where nobody knows. A step that fails leaves no
    "done" behind; its error is the caller's to show.
    """
    began = time.monotonic()
    step = Task(name, total, _SCREEN)
    succeeded = False
    try:
        yield step
        succeeded = True
    finally:
        _SCREEN.remove(step, seconds=time.monotonic() - began if succeeded else 0.0)


class _Screen:
    """The bars now on the terminal: one live display per process, open while any step runs."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._live: Progress | None = None
        self._open = 0

    def add(self, step: Task) -> TaskID | None:
        with self._lock:
            self._open += 1
            if self._live is None:
                console = Console(stderr=True)  # asked anew: streams change under tests and jobs
                if not console.is_terminal or console.is_dumb_terminal:
                    return None
                self._live = _bars(console)
                self._live.start()
            indent = "  " * min(self._open - 1, 3)
            return self._live.add_task(indent + escape(step.name), total=step.total, note="")

    def draw(self, step: Task) -> None:
        with self._lock:
            if self._live is None or step._row is None:
                return
            note = step.note if len(step.note) <= NOTE_WIDTH else step.note[: NOTE_WIDTH - 1] + "…"
            self._live.update(
                step._row, completed=step.completed, total=step.total, note=escape(note)
            )

    def remove(self, step: Task, *, seconds: float) -> None:
        """Take a step off; the trace it leaves says how long it took."""
        with self._lock:
            self._open -= 1
            live = self._live
            if live is not None and step._row is not None:
                live.remove_task(step._row)
            if seconds >= WORTH_A_LINE_SECONDS:
                indent = "  " * min(self._open, 3)
                console = live.console if live is not None else Console(stderr=True)
                counted = f"  {step.completed:,}" if step.completed > 1 else ""
                line = f"{indent}{step.name}{counted}  {seconds:.0f} s"
                console.print(line, markup=False, highlight=False)
            if live is not None and self._open == 0:
                live.stop()
                self._live = None


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(show_speed=False),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
        transient=True,  # the trace is the line `remove` prints
        # text printed by a step goes above the bars, unless it is bound for a file or a pipe
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=True,
    )


_SCREEN = _Screen()
