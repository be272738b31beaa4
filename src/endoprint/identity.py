"""Who is asking: a name the machine gives, or one that a server vouches for.

MLflow's server with its basic-auth app says who the credentials in use belong to. A store without
such a server vouches for nobody: whoever can write the file can write any name.
"""

from __future__ import annotations

import base64
import getpass
import json
import os
import urllib.error
import urllib.request
from urllib.parse import unquote, urlsplit, urlunsplit

from endoprint.roles import ROLES

ASK = "/api/2.0/mlflow/users/current"  # mlflow 3.17, server/auth/routes.py
PATIENCE_SECONDS = 60.0  # a busy server checks a password for ten seconds and more (seen)
REFUSED = (401, 403)


def login() -> str:
    """Return the name of the user this process runs as: a name, not a proof."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def authenticated(tracking_uri: str) -> str | None:
    """Return the user that MLflow's server says we are; None where no server authenticates.

    Credentials are those MLflow itself takes: in the address, or in MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN. A server that answers without any is no
    witness, whatever name it gives.
    """
    parts = urlsplit(tracking_uri)
    credentials = _credentials(parts.username, parts.password)
    if parts.scheme not in ("http", "https") or credentials is None:
        return None
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
    address = urlunsplit(bare).rstrip("/") + ASK
    status, name = _asked(address, credentials)
    if status != 200 or not name or name in ROLES:  # an account that many share is nobody
        return None
    return name if _asked(address, None)[0] in REFUSED else None


def known_as(tracking_uri: str) -> str:
    """Return the name work is signed with: the authenticated one, else the login."""
    return authenticated(tracking_uri) or login()


def _credentials(name: str | None, password: str | None) -> str | None:
    name = unquote(name) if name else os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = unquote(password) if password else os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if name and password:
        return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return f"Bearer {token}" if token else None


def _asked(address: str, credentials: str | None) -> tuple[int, str]:
    """Return the server's status and the name it gives; 0 where nobody answers."""
    request = urllib.request.Request(address)
    if credentials:
        request.add_header("Authorization", credentials)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            told = json.loads(answer.read())
            return int(answer.status), str(told["user"]["username"])
    except urllib.error.HTTPError as error:
        return error.code, ""
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""
