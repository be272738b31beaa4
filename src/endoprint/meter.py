"""What a piece of work costs: seconds, processor seconds, and the most memory it held."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

import psutil

GIB = 2.0**30
LOOK_EVERY_SECONDS = 0.02  # at resident memory; a shorter peak may be missed


class Meter:
    """Measure a block: `with Meter() as cost: ...`, then read its fields.

    `peak_memory_gib` is the resident memory of the whole process, data and interpreter included,
    at its highest within the block; processor seconds are those of all its threads.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.peak_memory_gib = 0.0

    def __enter__(self) -> Self:
        self._process = psutil.Process()
        self._is_over = threading.Event()
        self._look()
        self._watcher = threading.Thread(target=self._keep_looking, daemon=True)
        self._watcher.start()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        self.cpu_seconds = time.process_time() - self._cpu_started
        self._is_over.set()
        self._watcher.join()
        self._look()

    def _keep_looking(self) -> None:
        while not self._is_over.wait(LOOK_EVERY_SECONDS):
            self._look()

    def _look(self) -> None:
        held = self._process.memory_info().rss / GIB
        self.peak_memory_gib = max(self.peak_memory_gib, held)
