"""Work that fits models takes turns on one GPU, where that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

GPU = "gpu"  # of `prefect gcl create gpu --limit 1`, said once


@contextmanager
def a_turn() -> Iterator[None]:
    """Hold a slot of the GPU's limit while the block does; nobody waits where there is none."""
    if not _is_limited():  # asked first: Prefect warns of a limit that does not exist
        yield
        return
    with concurrency(GPU):
        yield


def _is_limited() -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(GPU)
        except ObjectNotFound:
            return False
    return True
