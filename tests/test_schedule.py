"""A scheduled run is really created and executed: calling flows proves nothing about schedules.

With sqlalchemy 2.1 and prefect 3.8 everything else works and scheduled runs are silently never
created, hence a server, a worker and deployments of this project, all real, on loopback.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from children import ROOT, environment
from conftest import TINY, a_workspace
from endoprint.workspace import QUIET

pytestmark = [
    pytest.mark.service,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("prefect") is None, reason="the flows extra is not installed"
    ),
]
PATIENCE_SECONDS = 240  # a busy machine is slow, not wrong
# A server started as Prefect does it asks there which types of worker exist, and takes its own
# copy where it gets no answer. The embedded server of the demo never asks, nor that of `up`.
CATALOGUE = "raw.githubusercontent.com"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A Prefect server on loopback with a home of its own, asked over its API."""

    def __init__(self, folder: Path) -> None:
        self.folder, port = folder, free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        self.log = folder / "server.txt"
        self.environment = {
            **environment(network=folder / "network.txt"),
            **QUIET,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.url,
            "ENDOPRINT_HOME": str(ROOT),
        }
        self.words = ["server", "start", "--no-ui", "--port", str(port)]

    def prefect(self, *words: str) -> None:
        """Run a command of Prefect's in the checkout, as docs/operations.md says."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=PATIENCE_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    @contextmanager
    def running(self, *words: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Keep a process of Prefect's running; somewhere else than in the checkout."""
        command = [sys.executable, "-m", "prefect", *words]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=output, stderr=output
            )
            try:
                yield process
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(30)

    def ask(self, what: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        request = urllib.request.Request(
            f"{self.url}/{what}",
            json.dumps(payload).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: list[dict[str, Any]] = json.loads(answer.read())
        return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    with server.running(*server.words, log=server.log) as process:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                urllib.request.urlopen(server.url + "/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, server.log.read_text()[-2000:]
                assert time.monotonic() < deadline, "the Prefect server did not answer"
                time.sleep(0.5)
        yield server


def test_a_scheduled_run_is_created_by_the_server_and_executed_by_a_worker(
    server: Server, tmp_path: Path
) -> None:
    models = {"logistic": {}, "signature": {}}
    space = a_workspace(tmp_path / "space", params={**TINY, "models": models})
    server.prefect("work-pool", "create", "endoprint", "--type", "process")
    # the nightly flow itself, every few seconds instead of every night
    server.prefect(
        "deploy", "flows/nightly.py:nightly", "--name", "often", "--pool", "endoprint",
        "--interval", "20", "--param", f"workspace={space}",
    )  # fmt: skip
    log = tmp_path / "worker.txt"
    words = ("worker", "start", "--pool", "endoprint", "--limit", "1")
    with server.running(*words, log=log) as worker:
        scheduled: list[dict[str, Any]] = []
        completed: list[dict[str, Any]] = []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not completed and time.monotonic() < deadline:
            time.sleep(1)
            assert worker.poll() is None, log.read_text()[-3000:]
            scheduled = [x for x in server.ask("flow_runs/filter", {}) if x["auto_scheduled"]]
            failed = [x for x in scheduled if x["state_type"] in ("FAILED", "CRASHED")]
            assert not failed, log.read_text()[-3000:]
            completed = [x for x in scheduled if x["state_type"] == "COMPLETED"]
    assert scheduled, "the server never created a scheduled run"
    assert completed, f"no scheduled run came to its end: {log.read_text()[-3000:]}"
    # it did the flow's work: new data in, a judged model out
    assert (space / "dvc.lock").is_file()
    verdict = json.loads((space / ".endoprint/verdict.json").read_text())
    assert verdict["decision"] == "promote"
    lines = (tmp_path / "network.txt").read_text().splitlines()
    assert len(lines) > 5
    refused = {line.split()[2] for line in lines if line.startswith("refused")}
    assert refused <= {CATALOGUE}  # and it did without


def test_prefect_takes_every_deployment_and_schedules_only_what_is_active(server: Server) -> None:
    server.prefect("work-pool", "create", "endoprint", "--type", "process")
    server.prefect("deploy", "--all")
    found = {row["name"]: row for row in server.ask("deployments/filter", {})}
    told = {
        x["name"]: x for x in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    }
    assert found.keys() == told.keys()
    for name, row in told.items():
        wanted = [(x["cron"], x.get("active", True)) for x in row.get("schedules", [])]
        got = [(x["schedule"]["cron"], x["active"]) for x in found[name]["schedules"]]
        assert got == wanted
    # a daily run is planned days ahead; nobody waits for it
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        planned = {x["deployment_id"] for x in server.ask("flow_runs/filter", {})}
        if len(planned) == 3:
            break
        time.sleep(1)
    names = {row["id"]: name for name, row in found.items()}
    assert {names[each] for each in planned} == {"nightly", "weekly-search", "hourly-score"}
