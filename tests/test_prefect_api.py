"""Prefect asked over HTTP: what goes wrong on the way, and whose process a run's number names."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from uuid import uuid4

import psutil
import pytest

from endoprint.services.prefect_api import Prefect, _why_dead

RUN_ID = "PREFECT__FLOW_RUN_ID"


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server that gives one answer to whatever is asked; yields its API's address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api"
    finally:
        server.shutdown()
        server.server_close()


def saying(status: int, text: str, *, n_promised: int = 0) -> Callable[..., None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("content-length", str(n_promised or len(text)))
        handler.end_headers()
        handler.wfile.write(text.encode())

    return answer


def test_an_answer_that_breaks_off_is_as_none() -> None:
    with serving(saying(200, "[1", n_promised=1000)) as url:
        assert not Prefect(url).is_healthy()
        with pytest.raises(OSError, match="IncompleteRead"):
            Prefect(url).deployments()


def test_a_proxy_is_asked_for_other_machines_and_never_for_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def proxy(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        saying(200, "true")(handler)

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(saying(200, "true")) as url, serving(proxy) as between:
        monkeypatch.setenv("http_proxy", between.removesuffix("/api"))
        assert Prefect(url).is_healthy()
        assert Prefect(url.replace("127.0.0.1", "localhost")).is_healthy()
        Prefect(url.replace("127.0.0.1", platform.node())).is_healthy()  # it listens on loopback
        assert asked == []
        assert Prefect("http://lab.invalid:4200/api").is_healthy()
        assert asked == ["http://lab.invalid:4200/api/health"]


@contextmanager
def idling(**told: str) -> Iterator[int]:
    """A process that does nothing, with words in its environment; yields its number."""
    words = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(
        words, env={**os.environ, **told}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # from here on the environment is its own
        yield process.pid
        process.kill()


def a_run(pid: int, *, hours_ago: float, run_id: str = "", state: str = "RUNNING") -> Any:
    changed = datetime.now(UTC) - timedelta(hours=hours_ago)
    told = {"name": state.capitalize(), "timestamp": changed.isoformat()}
    known = {"id": run_id or str(uuid4()), "infrastructure_pid": f"host:{pid}"}
    return {**known, "state_type": state, "state": told}


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_a_run_whose_number_another_process_has_is_dead(state: str) -> None:
    run_id = str(uuid4())
    with idling() as pid:
        assert _why_dead(a_run(pid, hours_ago=10, state=state), 0.0) == "its process died"
    with idling(**{RUN_ID: str(uuid4())}) as pid:  # or another run
        assert _why_dead(a_run(pid, hours_ago=10, state=state), 0.0) == "its process died"
    with idling(**{RUN_ID: run_id}) as pid:  # by whatever clock the server has
        assert _why_dead(a_run(pid, hours_ago=10, run_id=run_id, state=state), 0.0) == ""
    gone = a_run(pid, hours_ago=10, run_id=run_id, state=state)
    assert _why_dead(gone, 0.0) == "its process died"


def test_of_another_users_process_only_its_birth_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: psutil.Process) -> dict[str, str]:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "environ", refuse)
    with idling() as pid:
        assert _why_dead(a_run(pid, hours_ago=10), 0.0) == "its process died"
    just_settled = 31 / 3600  # and this process had begun by then
    assert _why_dead(a_run(os.getpid(), hours_ago=just_settled), 0.0) == ""
