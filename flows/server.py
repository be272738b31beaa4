"""Prefect's own server, kept to this machine: `endoprint up` starts it with uvicorn."""

from __future__ import annotations

import os

from prefect.server.api import collections
from prefect.server.api.server import create_app
from starlette.middleware.trustedhost import TrustedHostMiddleware


def app() -> TrustedHostMiddleware:
    """Return the application, answering under the names in ENDOPRINT_ALLOWED_HOSTS only.

    A page elsewhere whose name is bound to this machine's address is turned away: Prefect 3.8
    has no such list of its own. Nor has it a setting that keeps it from asking GitHub which
    types of worker exist; without an address it takes the copy that it ships.
    """
    collections.KNOWN_VIEWS = dict.fromkeys(collections.KNOWN_VIEWS, "")
    hosts = os.environ.get("ENDOPRINT_ALLOWED_HOSTS", "127.0.0.1,localhost").split(",")
    return TrustedHostMiddleware(create_app(), allowed_hosts=hosts, www_redirect=False)
