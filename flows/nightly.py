"""What runs every night: new data in, a judged model out."""

from __future__ import annotations

from prefect import flow

from flows.prepare import prepare
from flows.promote import promote
from flows.train import train


@flow
def nightly(workspace: str = ".") -> str:
    """Prepare, train and promote; return the verdict's path."""
    prepare(workspace)
    train(workspace)
    return promote(workspace)
