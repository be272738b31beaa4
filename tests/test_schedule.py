"""A scheduled run is really created and executed: calling flows proves nothing about schedules.

With sqlalchemy 2.1 and prefect 3.8 everything else works and scheduled runs are silently never
created, hence a server, a worker and a deployment of this project, all real, on loopback.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("prefect", reason="the flows extra is not installed")

from conftest import a_workspace

from endoprint.workspace import Workspace

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.service, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, payload: dict[str, object]) -> list[dict[str, object]]:
    body = json.dumps(payload).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


@pytest.fixture
def prefect(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Prefect server that runs on loopback, with a home of its own."""
    port = free_port()
    environment = {
        **Workspace.at(tmp_path).environment(),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "ENDOPRINT_HOME": str(ROOT),
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui"]
    server = subprocess.Popen([*command, "--port", str(port)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(environment["PREFECT_API_URL"] + "/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None, "the Prefect server died"
                assert time.monotonic() < deadline, "the Prefect server did not answer"
                time.sleep(0.5)
        yield environment
    finally:
        server.terminate()
        server.wait(30)


def test_a_scheduled_run_is_created_by_the_server_and_executed_by_a_worker(
    prefect: dict[str, str], tmp_path: Path
) -> None:
    workspace = a_workspace(tmp_path / "space")

    def run(*words: str) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
        subprocess.run(command, env=prefect, cwd=ROOT, check=True, capture_output=True, timeout=120)

    run("work-pool", "create", "endoprint", "--type", "process")
    run(
        "deploy", "flows/prepare.py:prepare", "--name", "often", "--pool", "endoprint",
        "--interval", "15", "--param", f"workspace={workspace}",
    )  # fmt: skip
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "endoprint"]
    worker = subprocess.Popen([*command, "--limit", "1"], env=prefect, cwd=ROOT)
    try:
        completed: list[dict[str, object]] = []
        deadline = time.monotonic() + 180
        while not completed and time.monotonic() < deadline:
            time.sleep(2)
            runs = ask(prefect["PREFECT_API_URL"] + "/flow_runs/filter", {})
            scheduled = [r for r in runs if r["auto_scheduled"]]
            assert not [r for r in scheduled if r["state_type"] in ("FAILED", "CRASHED")]
            completed = [r for r in scheduled if r["state_type"] == "COMPLETED"]
        assert scheduled, "the server never created a scheduled run"
        assert completed, "no scheduled run was executed to its end"
    finally:
        worker.terminate()
        worker.wait(30)
    assert (workspace / "data/tokens/vocabulary.json").is_file()  # it did the flow's work
    assert os.path.exists(workspace / "dvc.lock")
