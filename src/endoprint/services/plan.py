"""Which services a workspace needs, with which command, environment and address.

Addresses of databases and every secret come from the environment and stay in it: a command line
can be read by everybody on a machine.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import platform
import re
import sys
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import endoprint
from endoprint.config import Refusal
from endoprint.roles import ROLES, password_name
from endoprint.services.prefect_api import POOL, Prefect
from endoprint.services.processes import MARK, mark_of
from endoprint.workspace import Workspace

MLFLOW_PORT, PREFECT_PORT = 5000, 4200
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
UNPROXIED = ("NO_PROXY", "no_proxy")  # some read the one, some the other
MLFLOW_ORIGINS = "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"
PREFECT_UI_APIS = ("PREFECT_UI_API_URL", "PREFECT_SERVER_UI_API_URL")
# at once: a night that waits for the GPU, the search that holds it, a promotion that waits for a
# person: none of them keeps the inbox waiting
WORKER_RUNS = 4
SERVERS_OWN = (  # a worker, and whatever it runs, has no business with these
    "MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_BACKEND_STORE_URI", "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_SERVER_API_AUTH_STRING",
)  # fmt: skip
AUTH_SECRETS = ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")
AUTH_NAMES = (  # whoever sets one of these means MLflow to ask who is there
    *AUTH_SECRETS, "MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_CONFIG_PATH",
    *(password_name(role) for role in ROLES),
)  # fmt: skip
# Prefect's server reads the first, everything that asks it the second
PREFECT_LOGINS = ("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING")
AUTH_INI = """\
# MLflow's basic auth; secrets are in the environment (docs/operations.md)
[mlflow]
default_permission = READ
database_uri = sqlite:///{database}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Service:
    """One process to keep running, and how to tell that it does."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    url: str  # what a person opens; empty: nothing to open
    is_healthy: Callable[[float], bool]  # told when it was started (seconds since the epoch)


@dataclass(frozen=True)
class Plan:
    """What to start for a workspace, and what is somebody else's to keep running."""

    space: Workspace
    home: Path  # the checkout: where flows/ and prefect.yaml are
    host: str
    mlflow_port: int
    prefect_port: int
    allowed_hosts: tuple[str, ...] = ()

    @classmethod
    def of(cls, space: Workspace, *, host: str, ports: tuple[int, int], allowed: str) -> Plan:
        """Check what is asked for; refused where it would open a door without a lock."""
        _check_locks(host)
        if not _has_prefect():
            raise Refusal(
                "schedules are Prefect's; every other command works without it",
                "none installed",
                "pip install -c constraints.txt -e '.[flows]'",
            )
        names = tuple(name.strip() for name in allowed.split(",") if name.strip())
        own = LOOPBACK if host == "localhost" else host  # which may be two addresses
        return cls(space, checkout(), own, ports[0], ports[1], names)

    # -- addresses ------------------------------------------------------------------------------
    @property
    def own_host(self) -> str:
        """Where this machine finds what is started here: the one address that it listens on."""
        return LOOPBACK if self.host == EVERYWHERE else self.host

    @property
    def mlflow_url(self) -> str:
        """Where runs are logged: the environment's server, else the one started here."""
        given = os.environ.get("MLFLOW_TRACKING_URI", "")
        return given if given.startswith("http") else f"http://{self.own_host}:{self.mlflow_port}"

    @property
    def prefect_url(self) -> str:
        """Prefect's API: the environment's server, else the one started here."""
        return (
            os.environ.get("PREFECT_API_URL") or f"http://{self.own_host}:{self.prefect_port}/api"
        )

    @property
    def worker_name(self) -> str:
        """What Prefect knows this machine's worker by, before and after a restart."""
        return f"endoprint-{platform.node()}"

    @property
    def services(self) -> list[Service]:
        """The servers that are ours to start, then the worker."""
        own = []
        if _starts_mlflow():
            own.append(self._mlflow())
        if _starts_prefect():
            own.append(self._prefect())
        return [*own, self._worker()]

    @property
    def has_auth(self) -> bool:
        """Whether MLflow's server is started here and asks who is there."""
        return _starts_mlflow() and _has_auth()

    def hosts(self, port: int) -> list[str]:
        """Return the names a server answers to."""
        names = dict.fromkeys((LOOPBACK, "localhost", self.own_host, *self.allowed_hosts))
        return [*names, *(f"{name}:{port}" for name in names)]

    def origins(self, port: int) -> list[str]:
        """Return where pages that may change things come from: the server, or its proxy."""
        return [f"{scheme}://{name}" for name in self.hosts(port) for scheme in ("http", "https")]

    def environment(self) -> dict[str, str]:
        """Return what everything started here has in common."""
        return {
            **self.space.environment(),
            **dict.fromkeys(UNPROXIED, self._unproxied()),
            MARK: mark_of(self.space),
            "ENDOPRINT_HOME": str(self.home),
            "ENDOPRINT_WORKSPACE": str(self.space.root),
            "PYTHONPATH": os.pathsep.join(
                [*filter(None, [os.environ.get("PYTHONPATH")]), str(self.home)]
            ),
            "PYTHONUNBUFFERED": "1",
        }

    def _unproxied(self) -> str:
        """Return the names that no proxy is asked for: the user's own, and this machine's."""
        given = [each for name in UNPROXIED for each in os.environ.get(name, "").split(",")]
        names = [each.strip() for each in given if each.strip()]
        if "*" in names:  # all of them, as long as it stands alone
            return "*"
        return ",".join(dict.fromkeys((*names, LOOPBACK, "localhost", self.own_host)))

    def of_worker(self) -> dict[str, str]:
        """Return a worker's environment: it talks to servers, and knows none of their secrets."""
        known = {key: value for key, value in self.environment().items() if key not in SERVERS_OWN}
        return {
            **known,
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "PREFECT_API_URL": self.prefect_url,
            "PREFECT_LOGGING_LEVEL": "INFO",  # what a run's page in Prefect's UI shows
            "PREFECT_WORKER_QUERY_SECONDS": "5",
            "PREFECT_CLIENT_MAX_RETRIES": "7",  # four minutes, as MLflow's: a server is restarted
            "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",  # its answer while the database is away
        }

    # -- the three ------------------------------------------------------------------------------
    def _mlflow(self) -> Service:
        space = self.space
        command = [sys.executable, "-m", "mlflow", "server", "--host", self.host]
        command += ["--port", str(self.mlflow_port), "--workers", "1"]
        command += ["--allowed-hosts", ",".join(self.hosts(self.mlflow_port))]
        if not os.environ.get(MLFLOW_ORIGINS):
            command += ["--cors-allowed-origins", ",".join(self.origins(self.mlflow_port))]
        own = {
            **self.environment(),
            "MLFLOW_BACKEND_STORE_URI": space.tracking_uri,
            "MLFLOW_DEFAULT_ARTIFACT_ROOT": space.artifacts,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # four processes for what we never use
        }
        own.pop("MLFLOW_TRACKING_URI", None)  # it is the tracking server
        if _has_auth():
            command += ["--app-name", "basic-auth"]
            own.setdefault("MLFLOW_AUTH_CONFIG_PATH", str(self._auth_ini()))
            own.setdefault("MLFLOW_AUTH_ADMIN_USERNAME", "admin")
        url = f"http://{self.own_host}:{self.mlflow_port}"
        return Service("mlflow", tuple(command), own, url, lambda _: answers(f"{url}/health"))

    def _prefect(self) -> Service:
        url, port = f"http://{self.own_host}:{self.prefect_port}", str(self.prefect_port)
        command = [sys.executable, "-m", "uvicorn", "--factory", "flows.server:app"]
        command += ["--host", self.host, "--port", port, "--log-level", "warning"]
        hosts = sorted({name.rpartition(":")[0] or name for name in self.hosts(0)})
        own = {
            **self.environment(),
            "ENDOPRINT_ALLOWED_HOSTS": ",".join(hosts),
            "PREFECT_API_URL": f"{url}/api",
            "PREFECT_SERVER_API_HOST": self.host,
            "PREFECT_SERVER_API_PORT": port,
            "PREFECT_SERVER_DATABASE_TIMEOUT": "60",  # 10 is too little for a busy laptop's SQLite
            "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "30",
            # on disk: a server that forgot who holds a deployment's slot cancels that very run
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES,
        }
        own.setdefault("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", f"{url},http://localhost:{port}")
        if not any(own.get(name) for name in PREFECT_UI_APIS):
            # on whatever name and port the page was opened under; seen to work in both of its UIs
            own["PREFECT_UI_API_URL"] = "/api"
        api = Prefect(f"{url}/api")
        return Service("prefect", tuple(command), own, url, lambda _: api.is_healthy())

    def _worker(self) -> Service:
        name = self.worker_name
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL]
        command += ["--type", "process", "--name", name, "--limit", str(WORKER_RUNS)]
        api = Prefect(self.prefect_url)
        return Service(
            "worker", tuple(command), self.of_worker(), "",
            lambda since: api.has_worker(name, since=since),
        )  # fmt: skip

    def _auth_ini(self) -> Path:
        place = self.space.local / "mlflow-auth.ini"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(AUTH_INI.format(database=self.space.local / "mlflow-auth.db"))
        return place


def checkout() -> Path:
    """Return the folder of flows/ and prefect.yaml: ENDOPRINT_HOME, else where this code lies."""
    given = os.environ.get("ENDOPRINT_HOME")
    home = Path(given) if given else Path(endoprint.__file__).parents[2]
    if not (home / "prefect.yaml").is_file():
        raise Refusal(
            "schedules are in the checkout's prefect.yaml",
            f"none in {home}",
            "name the checkout in ENDOPRINT_HOME",
        )
    return home.resolve()


def runs_page(url: str, experiment: str) -> str:
    """Return where MLflow's UI shows a task's runs; unless told, it opens for language models.

    It is shown and written down: without the name and password that the address may hold.
    """
    url = re.sub(r"://[^/]*@", "://", url)
    return f"{url}/#/experiments/{experiment}?workflowType=machine_learning"


def answers(url: str) -> bool:
    """Whether a server of this machine answers there; no proxy would know."""
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with directly.open(url, timeout=5):
            return True
    except OSError:
        return False


def _has_prefect() -> bool:
    try:
        return importlib.util.find_spec("prefect") is not None
    except ValueError:  # made unimportable
        return False


def _starts_mlflow() -> bool:
    return not os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http")


def _starts_prefect() -> bool:
    return not os.environ.get("PREFECT_API_URL")


def _has_auth() -> bool:
    return not _unset(AUTH_SECRETS)


def _unset(names: Sequence[str]) -> list[str]:
    return [name for name in names if not os.environ.get(name)]


def _check_locks(host: str) -> None:
    """Refuse a server that others reach without a password, and a lock that is half there.

    A name that is misspelt or empty would else turn asking off without a word.
    """
    doors = []
    if _starts_mlflow():
        doors.append(("MLflow", AUTH_SECRETS, AUTH_NAMES))
    if _starts_prefect():
        doors.append(("Prefect", PREFECT_LOGINS, PREFECT_LOGINS))
    for server, needed, meant in doors:
        unset, named = _unset(needed), [name for name in meant if name in os.environ]
        if unset and named:
            raise Refusal(
                f"{server} asks who is there where both {' and '.join(needed)} are set",
                f"{', '.join(named)} set, and {' and '.join(unset)} unset or empty",
                f"set {' and '.join(unset)}, or unset {', '.join(named)}",
            )
        if unset and not _is_this_machine(host):
            raise Refusal(
                "services that other machines can reach ask for a password",
                f"--host {host} without {' and '.join(unset)}",
                "set what docs/operations.md names, or leave --host out",
            )
    if _starts_prefect() and len({os.environ.get(name) for name in PREFECT_LOGINS}) > 1:
        raise Refusal(
            f"{PREFECT_LOGINS[0]} and {PREFECT_LOGINS[1]} are the same",
            "two that differ",
            "set both to one name:password",
        )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
