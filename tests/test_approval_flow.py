"""A run that waits in Prefect's UI for a person's word, on a real server that asks for a login."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from children import ROOT, environment
from conftest import planted_cells
from endoprint import curated, jobs, registry
from endoprint.workspace import Workspace
from lab import POLICY, bare_workspace, fit_and_track, furnish, misled
from standing import until
from test_schedule import free_port

pytest.importorskip("prefect", reason="the flows extra is not installed")
pytestmark = [pytest.mark.service, pytest.mark.slow]
PATIENCE_SECONDS = 300
LOGIN = "ann:apple"


class Server:
    """Prefect's own server, entered by one name and its password, or by anybody."""

    def __init__(self, home: Path, login: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.environment = {
            **environment(),
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        if login:
            self.environment["PREFECT_SERVER_API_AUTH_STRING"] = login
            self.environment["PREFECT_API_AUTH_STRING"] = login
        self.login = login
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1",
             "--port", str(self.port), "--no-services"],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        until(lambda: self.ask("admin/version") is not None, "Prefect's server")

    def ask(self, what: str, payload: dict[str, Any] | None = None) -> Any:
        body = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(f"{self.url}/{what}", body)
        request.add_header("content-type", "application/json")
        if self.login:
            known = base64.b64encode(self.login.encode()).decode()
            request.add_header("Authorization", f"Basic {known}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or "null")

    def begin(self, space: Workspace) -> subprocess.Popen[str]:
        code = (
            "import sys; from flows.promote import promote\n"
            "promote(sys.argv[1], version='2', wait=True)"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, str(space.root)],
            env=self.environment, cwd=ROOT, text=True, stderr=subprocess.PIPE,
        )  # fmt: skip

    def paused(self) -> str:
        """Wait for the run that waits; return its id."""
        asked = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}}
        until(lambda: bool(self.ask("flow_runs/filter", asked)), "a run that waits")
        return str(self.ask("flow_runs/filter", asked)[0]["id"])


@pytest.fixture(params=[LOGIN, ""], ids=["asks", "asks nobody"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "prefect", request.param)
    yield made
    os.killpg(made.process.pid, 9)
    made.process.wait(60)


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A champion, a better version 2, and a policy that asks for a person."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = furnish(bare_workspace(tmp_path / "space"), planted_cells(n_units=6, n_cells=8))
    root = str(made.root)
    weak = fit_and_track(made, cells=misled(curated.load(made.cells)))
    jobs.promote(root, version=jobs.register(root, run_id=weak))
    jobs.register(root, run_id=fit_and_track(made))
    made.policy.write_text(POLICY + "approval: human\n")
    return made


def test_a_run_waits_in_the_ui_for_a_word_and_only_where_the_server_asks_for_a_name(
    server: Server, waiting: Workspace
) -> None:
    run = server.begin(waiting)
    if not server.login:
        _, said = run.communicate(timeout=PATIENCE_SECONDS)
        assert run.returncode == 0, said
        assert "asks nobody who they are" in said
        assert registry.champion(waiting).version == "1"
        return
    run_id = server.paused()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.url}/flow_runs/{run_id}")
    # what the UI's form asks for, and what its button sends
    form = server.ask(f"flow_runs/{run_id}/input/paused-approval-schema")
    assert set(form["properties"]) == {"approve", "why"}
    word = {"approve": True, "why": "figures read"}
    server.ask(f"flow_runs/{run_id}/resume", {"run_input": word})
    _, said = run.communicate(timeout=PATIENCE_SECONDS)
    assert run.returncode == 0, said
    assert registry.champion(waiting).version == "2"
    assert registry.find(waiting, "2").tags["reasons"].startswith("approved by ann: figures read")
