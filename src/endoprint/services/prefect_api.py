"""Prefect asked over HTTP: what runs, what comes next, and what a dead process left open."""

from __future__ import annotations

import base64
import http.client
import json
import os
import platform
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import psutil

from endoprint.alive import is_alive
from endoprint.config import Refusal
from endoprint.spelled import without_secrets

POOL = "endoprint"
OPEN_STATES = ("RUNNING", "PENDING", "CANCELLING", "PAUSED")
ATTEMPTS = 3  # of one flow run; one that kills its process each time is given up (a guess)
PATIENCE_SECONDS = 10.0  # for one answer
RECENT_SECONDS = 24 * 3600.0  # a crash of the day before yesterday has a night after it
CONFLICT = 409  # it exists already
TURNED_AWAY = (401, 403)  # no password, or a wrong one
NOTE = "failure"  # the artifact's key
RUN_ID = "PREFECT__FLOW_RUN_ID"  # in the environment of a flow run's process: Prefect's own word
# from a state's change until its process must be known, and until a worker has let go of a run
# that crashed: one that is scheduled again before then stops Prefect 3.8's worker (seen)
SETTLING_SECONDS = 30.0


@dataclass(frozen=True)
class Reaped:
    """A flow run that nobody would ever have closed, and what became of it."""

    name: str
    deployment: str
    is_repeated: bool


class Prefect:
    """A Prefect server's API at `http://HOST:PORT/api`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def ask(self, what: str, payload: dict[str, Any] | None = None, *, method: str = "") -> Any:
        """Return the server's answer; raises OSError where there is none."""
        headers = {"content-type": "application/json"}
        secret = os.environ.get("PREFECT_API_AUTH_STRING")
        if secret:
            headers["authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
        body = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(
            f"{self.url}/{what}", body, headers, method=method or ("POST" if body else "GET")
        )
        # a proxy that the environment names leads to other machines, and never back to this one
        proxies = urllib.request.ProxyHandler({} if _is_here(self.url) else None)
        opener = urllib.request.build_opener(proxies)
        try:
            with opener.open(request, timeout=PATIENCE_SECONDS) as answer:
                text = answer.read()
        except http.client.HTTPException as error:  # a server that died while it spoke
            # the name alone: its text may hold an address with a password
            raise ConnectionError(f"no whole answer ({type(error).__name__})") from error
        return json.loads(text) if text else None

    def is_healthy(self) -> bool:
        """Whether the server answers."""
        try:
            return self.ask("health") is True
        except (OSError, ValueError):
            return False

    def deployments(self) -> dict[str, str]:
        """Return deployment id -> name."""
        return {row["id"]: row["name"] for row in self.ask("deployments/filter", {})}

    def make_pool(self) -> None:
        """Make the pool that workers of this project serve, where there is none."""
        types = self.ask("collections/views/aggregate-worker-metadata")
        template = types["prefect"]["process"]["default_base_job_configuration"]
        try:
            self.ask(
                "work_pools/", {"name": POOL, "type": "process", "base_job_template": template}
            )
        except urllib.error.HTTPError as error:
            if error.code != CONFLICT:
                raise

    def has_planned(self) -> bool:
        """Whether the next run of every schedule stands: the server makes them by and by."""
        rows = self.ask("deployments/filter", {})
        due = {
            str(row["id"])
            for row in rows
            if not row["paused"] and any(each["active"] for each in row["schedules"])
        }
        return due <= {str(row["deployment_id"]) for row in self._next_of_each()}

    def begin(self, deployment: str) -> bool:
        """Ask for a run of a deployment now; False where none has that name."""
        found = [key for key, name in self.deployments().items() if name == deployment]
        for key in found:
            self.ask(f"deployments/{key}/create_flow_run", {})
        return bool(found)

    def is_open(self, deployment: str) -> bool:
        """Whether a run of a deployment is under way, beside which no other may begin."""
        names = self.deployments()
        under_way = self.runs(OPEN_STATES, sort="START_TIME_ASC", limit=200)
        return any(names.get(str(run["deployment_id"])) == deployment for run in under_way)

    def has_worker(self, name: str, *, since: float) -> bool:
        """Whether the pool has heard from this worker after `since` (seconds since the epoch)."""
        try:
            rows = self.ask(f"work_pools/{POOL}/workers/filter", {})
        except (OSError, ValueError):
            return False
        heard = [_seconds(row["last_heartbeat_time"]) for row in rows if row["name"] == name]
        return any(at >= since for at in heard)

    def runs(self, states: tuple[str, ...], *, sort: str, limit: int) -> list[dict[str, Any]]:
        """Return flow runs in any of these states; not those that other flows called."""
        called = {"parent_task_run_id": {"is_null_": True}}
        asked = {"flow_runs": {"state": {"type": {"any_": list(states)}}, **called}}
        found = self.ask("flow_runs/filter", {**asked, "sort": sort, "limit": limit})
        return list(found)

    def agenda(self) -> dict[str, list[dict[str, str]]]:
        """Return what runs now, what comes next and what was last, each oldest first."""
        names = self.deployments()
        last = self.runs(
            ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"), sort="END_TIME_DESC", limit=5
        )
        return {
            "running": [
                _line(row, names, "start_time")
                for row in self.runs(OPEN_STATES, sort="START_TIME_ASC", limit=20)
            ],
            "next": [
                _line(row, names, "expected_start_time")
                for row in self._next_of_each()
            ],
            "last": [_line(row, names, "end_time") for row in reversed(last)],
        }  # fmt: skip

    def _next_of_each(self) -> list[dict[str, Any]]:
        seen: dict[str, dict[str, Any]] = {}
        for row in self.runs(("SCHEDULED",), sort="EXPECTED_START_TIME_ASC", limit=200):
            seen.setdefault(str(row["deployment_id"]), row)
        return list(seen.values())

    def reap(self, worker: str, *, worker_started: float) -> list[Reaped]:
        """Close this worker's runs whose process is dead, and run again what crashed today.

        A run goes on after the last step it finished (its tasks' results are kept), but not more
        than ATTEMPTS times. `worker_started` (seconds since the epoch): what was handed over
        before then, and never began, has no worker any more.
        """
        names = self.deployments()
        found = self.runs((*OPEN_STATES, "CRASHED"), sort="EXPECTED_START_TIME_DESC", limit=200)
        reaped = []
        for run in found:
            labels = run.get("labels") or {}
            mine = labels.get("prefect.worker.name") == worker and run["deployment_id"] in names
            why = _why_dead(run, worker_started) if mine else ""
            if not why or self._is_known(run["id"], run["run_count"]):
                continue
            if run["state_type"] != "CRASHED":
                self._set_state(run["id"], "CRASHED", "Crashed", why)
            again = run["run_count"] < ATTEMPTS
            deployment = names[run["deployment_id"]]
            self._note(run, deployment, why, again)
            if again:
                self._set_state(run["id"], "SCHEDULED", "AwaitingRetry", f"{why}; goes on")
            reaped.append(Reaped(run["name"], deployment, again))
        return reaped

    def _is_known(self, run_id: str, attempt: int) -> bool:
        """Whether a note says already that this attempt of a run died."""
        asked = {"artifacts": {"flow_run_id": {"any_": [run_id]}, "key": {"any_": [NOTE]}}}
        ending = f"attempt {attempt} of {ATTEMPTS}"
        return any(
            ending in str(row.get("description")) for row in self.ask("artifacts/filter", asked)
        )

    def _set_state(self, run_id: str, kind: str, name: str, message: str) -> None:
        state: dict[str, Any] = {"type": kind, "name": name, "message": message}
        if kind == "SCHEDULED":
            at = datetime.now(UTC) + timedelta(seconds=1)
            state["state_details"] = {"scheduled_time": at.isoformat()}
        self.ask(f"flow_runs/{run_id}/set_state", {"state": state, "force": True})

    def _note(self, run: dict[str, Any], deployment: str, why: str, again: bool) -> None:
        """Leave the readable artifact that a failed run leaves (`flows.care`)."""
        step = (
            "none: it was scheduled again and goes on after its last finished step"
            if again
            else "read .endoprint/logs/worker.txt, mend the cause, then run the deployment again"
        )
        attempt = f"attempt {run['run_count']} of {ATTEMPTS}"
        artifact = {
            "key": NOTE,
            "type": "table",
            "flow_run_id": run["id"],
            "description": f"**{deployment} crashed**, {attempt}: {why}",
            "data": json.dumps([{"what": deployment, "reason": why, "next step": step}]),
        }
        self.ask("artifacts/", artifact)


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Refuse in one line where a block's questions find no server, another one, or a shut door."""
    address = without_secrets(url)
    try:
        yield
    except Refusal:  # of something else, in its own words
        raise
    except urllib.error.HTTPError as error:
        if error.code in TURNED_AWAY:
            raise Refusal(
                "Prefect's server asks for its password",
                f"HTTP {error.code} from {address}",
                "set PREFECT_API_AUTH_STRING to what the server was started with",
            ) from None
        raise _elsewhere(address, f"HTTP {error.code}") from None
    except urllib.error.URLError as error:
        raise _elsewhere(address, str(error.reason)) from None
    except (ConnectionError, TimeoutError, ValueError) as error:
        raise _elsewhere(address, without_secrets(str(error))) from None


def _elsewhere(address: str, said: str) -> Refusal:
    return Refusal(
        "Prefect's API answers at its address",
        f"{said} from {address}",
        "start the server there, or set PREFECT_API_URL to its http://HOST:PORT/api",
    )


def _why_dead(run: dict[str, Any], worker_started: float) -> str:
    """Return why nobody will go on with this run; empty where somebody may."""
    state = run["state"] or {}
    changed = _seconds(state.get("timestamp"))
    if run["state_type"] == "CRASHED":
        recent = SETTLING_SECONDS < time.time() - changed < RECENT_SECONDS
        return " ".join(str(state.get("message") or "it crashed").split())[:300] if recent else ""
    if state.get("name") == "Suspended" or time.time() - changed < SETTLING_SECONDS:
        return ""  # a suspended run has no process, by design
    pid = str(run.get("infrastructure_pid") or "").rpartition(":")[2]
    if pid.isdigit():
        is_gone = not is_alive(int(pid)) or _is_anothers(int(pid), run["id"], changed)
        return "its process died" if is_gone else ""
    waited = run["state_type"] == "PENDING" and changed < worker_started
    return "its worker died before it began" if waited else ""


def _is_anothers(pid: int, run_id: str, changed: float) -> bool:
    """Whether a living process only has the number of a run's: after a reboot anything may.

    Its environment names its run, which asks no two clocks to agree. Where that is another
    user's secret, its birth tells: long after the run's last change of state, it is another.
    """
    try:
        process = psutil.Process(pid)
        try:
            return process.environ().get(RUN_ID) != run_id
        except psutil.AccessDenied:
            return process.create_time() > changed + SETTLING_SECONDS
    except psutil.NoSuchProcess:
        return True


def _is_here(url: str) -> bool:
    """Whether an address is one of this machine's."""
    cards = psutil.net_if_addrs().values()
    own = {each.address for card in cards for each in card}
    return (urlsplit(url).hostname or "") in {"localhost", platform.node().lower(), *own}


def _line(row: dict[str, Any], names: dict[str, str], when: str) -> dict[str, str]:
    state = row["state"] or {}
    return {
        "deployment": names.get(str(row["deployment_id"]), "by hand"),
        "run": row["name"],
        "state": row["state_name"],
        "at": str(row[when] or ""),
        "message": " ".join(str(state.get("message") or "").split())[:200],
    }


def _seconds(stamp: str | None) -> float:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp() if stamp else 0.0
