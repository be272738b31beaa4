"""`endoprint up` as a user types it, on a workspace of its own, asked and killed by tests."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from children import MAIN, environment
from endoprint.services.processes import marked
from endoprint.workspace import Workspace

PATIENCE_SECONDS = 900  # a busy machine is slow, not wrong


class Standing:
    """One `endoprint up`, and how to reach what it started."""

    def __init__(self, space: Path, *words: str, extra: dict[str, str] | None = None) -> None:
        self.space, self.screen = space, space.parent / "screen.txt"
        self.network = space.parent / "network.txt"
        self.environment = {**environment(network=self.network), **(extra or {})}
        began = time.monotonic()
        with self.screen.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", MAIN, "up", *words], cwd=space, env=self.environment,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        n_before = self.screen.read_text().count("Ctrl-C stops")

        def is_up() -> bool:
            assert self.process.poll() is None, self.screen.read_text()[-2000:]
            return self.screen.read_text().count("Ctrl-C stops") > n_before

        until(is_up, "the screen of `endoprint up`")
        self.seconds = time.monotonic() - began

    @property
    def told(self) -> dict[str, Any]:
        return json.loads((self.space / ".endoprint/up.json").read_text())

    @property
    def family(self) -> list[psutil.Process]:
        """Every process that belongs to it, the one a user stops excepted."""
        return marked(str(Workspace.at(self.space).root))

    def service(self, name: str) -> int:
        """The process id of a service, as it is now."""
        return next(each["pid"] for each in self.told["services"] if each["name"] == name)

    def ask(self, what: str, payload: dict[str, Any] | None = None) -> Any:
        headers = {"content-type": "application/json"}
        login = self.environment.get("PREFECT_API_AUTH_STRING")
        if login:
            headers["authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        request = urllib.request.Request(
            f"{self.told['prefect_api']}/{what}",
            None if payload is None else json.dumps(payload).encode(),
            headers,
        )
        for attempt in range(6):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.loads(answer.read())
            except (
                urllib.error.HTTPError
            ) as error:  # 503: its SQLite is busy, and nothing was done
                if error.code != 503 or attempt == 5:
                    raise
                time.sleep(2)
        raise AssertionError("unreachable")

    def begin(self, deployment: str, **parameters: Any) -> str:
        """Ask for a run of a deployment now; return its id."""
        rows = self.ask("deployments/filter", {})
        found = next(row["id"] for row in rows if row["name"] == deployment)
        made = self.ask(f"deployments/{found}/create_flow_run", {"parameters": parameters})
        return str(made["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        return dict(self.ask(f"flow_runs/{run_id}"))

    def task_states(self, run_id: str) -> dict[str, str]:
        """The newest state of each task of a flow run and of the flows it calls, by name."""
        runs, tasks = {run_id}, {}
        for _ in range(2):
            asked = {"task_runs": {"flow_run_id": {"any_": sorted(runs)}}, "sort": "ID_DESC"}
            rows = self.ask("task_runs/filter", asked)
            tasks |= {row["id"]: row for row in rows}
            inner = {"flow_runs": {"parent_task_run_id": {"any_": [row["id"] for row in rows]}}}
            runs |= {row["id"] for row in self.ask("flow_runs/filter", inner)}
        newest = sorted(tasks.values(), key=lambda row: str(row["created"]))
        return {row["name"].rpartition("-")[0]: row["state_name"] for row in newest}

    def finished(self, run_id: str) -> dict[str, Any]:
        """Wait until a run is over; return it as it ended."""
        over = ("COMPLETED", "FAILED", "CANCELLED")
        until(lambda: self.run(run_id)["state_type"] in over, f"the end of {run_id}", self.log)
        return self.run(run_id)

    def log(self) -> str:
        log = (self.space / ".endoprint/logs/worker.txt").read_text()[-3000:]
        return log + self.screen.read_text()[-1000:]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(90)


def until(is_so: Callable[[], bool], what: str, log: Callable[[], str] = str) -> None:
    """Wait for a claim to hold; a server that is being started again answers nothing meanwhile."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if is_so():
                return
        except (OSError, ValueError):
            pass
        assert time.monotonic() < deadline, f"waited in vain for {what}: {log()}"
        time.sleep(0.3)


def kill(*pids: int) -> None:
    """`kill -9`, on each process and on what it started that stayed in its group."""
    for pid in pids:
        os.killpg(os.getpgid(pid), signal.SIGKILL)
