"""As whom a job asks MLflow's server: as the least of the roles it can do its work with.

A role's password is in the environment (`ENDOPRINT_READER_PASSWORD`, ...); where it is not, the
process asks as whoever MLFLOW_TRACKING_USERNAME names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from endoprint.config import Refusal

ROLES = ("reader", "trainer", "promoter")
NAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"  # read at every request


class NotAllowed(Refusal):
    """MLflow's server knows who asks, or nobody, and does not let them do this."""


def turned_away(error: Exception) -> NotAllowed | None:
    """Return the refusal that an error of MLflow's stands for, if a role was turned away."""
    status = getattr(error, "get_http_status_code", lambda: None)()
    if status not in (401, 403):
        return None
    return NotAllowed(
        "MLflow's server lets in whom it knows, as far as their role goes",
        f"HTTP {status} for {os.environ.get(NAME, 'nobody')}",
        f"set {NAME} and {PASSWORD}, or the password of a role that may",
    )


def password_name(role: str) -> str:
    """Return the variable that holds a role's password."""
    return f"ENDOPRINT_{role.upper()}_PASSWORD"


def password_of(role: str) -> str:
    """Return a role's password from the environment; empty: none there."""
    return os.environ.get(password_name(role), "")


def assume_reader() -> None:
    """Ask as a reader from now on, where nobody else is named."""
    password = password_of("reader")
    if password and NAME not in os.environ:
        os.environ[NAME], os.environ[PASSWORD] = "reader", password


@contextmanager
def acting(role: str) -> Iterator[None]:
    """Ask as a role while the block, or the function decorated with this, runs."""
    password = password_of(role)
    if not password:
        yield
        return
    before = {key: os.environ.get(key) for key in (NAME, PASSWORD)}
    os.environ[NAME], os.environ[PASSWORD] = role, password
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
