"""A job that `torchrun` started several times at once: one process leads, the others fit along.

The lead alone talks to MLflow and writes; it tells the others what to fit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

Plan = dict[str, Any]  # what is fitted, as JSON knows it


class Member(Protocol):
    """One process of a team, as the job sees it."""

    @property
    def is_lead(self) -> bool:
        """Whether it talks for all."""

    def told(self, values: Plan) -> Plan:
        """Return the lead's plan, whoever asks."""


class Alone:
    """The only process there is."""

    is_lead = True

    def told(self, values: Plan) -> Plan:
        """Return its own plan."""
        return values


@contextmanager
def team() -> Iterator[Member]:
    """Give this process's place in its team while a job runs; alone, without importing torch."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield Alone()
        return
    from endoprint.encoder.team import joined

    with joined() as member:
        yield member
