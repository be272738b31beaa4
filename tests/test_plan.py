"""What `endoprint up` would start, and what it refuses to: read off the plan, before it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from mlflow.server.security_utils import should_block_cors_request

from children import ROOT
from endoprint.config import Refusal
from endoprint.services.grants import Admin
from endoprint.services.plan import AUTH_SECRETS, Plan, Service, answers, runs_page
from endoprint.services.processes import free_port
from endoprint.workspace import Workspace
from lab import bare_workspace

pytest.importorskip("prefect", reason="the flows extra is not installed")
SERVER, CLIENT = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"
ADDRESSES = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_UI_API_URL")


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("ENDOPRINT_HOME", str(ROOT))
    for name in (*ADDRESSES, *AUTH_SECRETS, SERVER, CLIENT):
        monkeypatch.delenv(name, raising=False)
    return bare_workspace(tmp_path / "space")


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every password that docs/operations.md names."""
    for name in AUTH_SECRETS:
        monkeypatch.setenv(name, "planted-password")
    for name in (SERVER, CLIENT):
        monkeypatch.setenv(name, "ann:planted-password")


@contextmanager
def answering(said: bytes) -> Iterator[str]:
    """A server on this machine that says one thing, whatever it is asked."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *words: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def planned(space: Workspace, host: str = "127.0.0.1", allowed: str = "") -> Plan:
    return Plan.of(space, host=host, ports=(5000, 4200), allowed=allowed)


# -- doors with locks ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", [SERVER, *AUTH_SECRETS])
def test_a_server_that_others_reach_needs_the_password_that_it_reads(
    space: Workspace, locks: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert planned(space, "0.0.0.0").services
    monkeypatch.delenv(name)
    with pytest.raises(Refusal, match=f"{name} unset or empty"):
        planned(space, "0.0.0.0")


def test_without_any_password_only_this_machine_may_be_served(space: Workspace) -> None:
    for host in ("127.0.0.1", "localhost"):
        assert len(planned(space, host).services) == 3
    for host in ("0.0.0.0", "10.1.2.3"):
        with pytest.raises(Refusal, match=f"ask for a password.*{AUTH_SECRETS[0]}"):
            planned(space, host)


def test_prefects_server_and_those_who_ask_it_have_the_same_password(
    space: Workspace, locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CLIENT, "ann:another")
    with pytest.raises(Refusal, match=f"{SERVER} and {CLIENT} are the same") as refused:
        planned(space)
    assert "another" not in str(refused.value)


@pytest.mark.parametrize(
    "meant", ["MLFLOW_AUTH_ADMIN_PASSWORD", "ENDOPRINT_READER_PASSWORD", "MLFLOW_AUTH_CONFIG_PATH"]
)
def test_half_a_lock_is_refused_and_not_left_open(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, meant: str
) -> None:
    monkeypatch.setenv(meant, "planted-password")
    monkeypatch.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "")  # $(cat FILE) of a file that is not
    with pytest.raises(Refusal, match="MLFLOW_FLASK_SERVER_SECRET_KEY unset or empty") as refused:
        planned(space)
    assert "planted" not in str(refused.value)


def test_a_machine_that_starts_no_server_needs_no_servers_password(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://lab:5000")
    monkeypatch.setenv("PREFECT_API_URL", "http://lab:4200/api")
    monkeypatch.setenv("ENDOPRINT_TRAINER_PASSWORD", "planted-password")
    monkeypatch.setenv(CLIENT, "ann:planted-password")
    assert [each.name for each in planned(space, "0.0.0.0").services] == ["worker"]


# -- reached from elsewhere ---------------------------------------------------------------------
def service(plan: Plan, name: str) -> Service:
    return next(each for each in plan.services if each.name == name)


def test_pages_opened_under_an_allowed_name_may_ask_their_server(
    space: Workspace, locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(space, "0.0.0.0", "lab.example.org")
    command = service(plan, "mlflow").command
    origins = command[command.index("--cors-allowed-origins") + 1].split(",")
    for origin in ("http://lab.example.org:5000", "https://lab.example.org"):
        assert not should_block_cors_request(origin, "POST", origins)
    assert should_block_cors_request("https://evil.example.org", "POST", origins)
    assert service(plan, "prefect").environment["PREFECT_UI_API_URL"] == "/api"
    monkeypatch.setenv("PREFECT_UI_API_URL", "https://lab.example.org/api")
    chosen = service(plan, "prefect").environment
    assert chosen["PREFECT_UI_API_URL"] == "https://lab.example.org/api"


@pytest.mark.parametrize(
    ("host", "own"),
    [("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1"), ("10.1.2.3", "10.1.2.3")],
)
def test_what_listens_on_one_address_is_looked_for_there(
    space: Workspace, locks: None, host: str, own: str
) -> None:
    plan = planned(space, host)
    assert (plan.mlflow_url, plan.prefect_url) == (f"http://{own}:5000", f"http://{own}:4200/api")
    assert [each.url for each in plan.services[:2]] == [
        f"http://{own}:5000", f"http://{own}:4200",
    ]  # fmt: skip
    assert plan.of_worker()["PREFECT_API_URL"] == plan.prefect_url
    assert f"{own}:5000" in plan.hosts(5000)  # it answers under that name


# -- behind a proxy -----------------------------------------------------------------------------
def test_nothing_here_asks_a_proxy_for_this_machine(
    space: Workspace, locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("no_proxy", "lab.example.org")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with answering(b"{}") as url:
        assert answers(url)
        assert Admin(url).ask("anything") == {}
    plan = planned(space, "10.1.2.3")
    for environment in (plan.of_worker(), service(plan, "mlflow").environment):
        wanted = "lab.example.org,127.0.0.1,localhost,10.1.2.3"
        assert environment["no_proxy"] == environment["NO_PROXY"] == wanted
    monkeypatch.setenv("NO_PROXY", "*")
    assert plan.environment()["no_proxy"] == "*"


# -- addresses ----------------------------------------------------------------------------------
def test_an_address_that_is_shown_holds_no_password() -> None:
    page = runs_page("http://ann:planted@word@lab:5000", "1")
    assert page.startswith("http://lab:5000/#/experiments/1")


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])  # no machine's, RFC 5737, 2606
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(Refusal, match=f"an address of this machine; got {host}"):
        free_port(5000, host=host)


def test_no_port_is_left_above_the_last() -> None:
    with pytest.raises(Refusal, match="none from 65535 on"):
        free_port(65535, taken=[65535])


@pytest.mark.parametrize("words", [("--mlflow-port", "99999"), ("--prefect-port", "-1")])
def test_a_port_that_cannot_be_is_a_mistake_in_the_command(words: tuple[str, str]) -> None:
    from endoprint.cli import UsageError, up

    with pytest.raises(UsageError) as refused:
        up.app(["up", *words], standalone_mode=False)
    assert words[0] in refused.value.format_message()


def test_ui_leaves_a_taken_port_to_who_has_it_and_starts_no_more_than_up(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from endoprint.cli import registry

    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda _, words, given: started.append((words, given)))
    with answering(b"somebody else's") as url:
        taken = url.rpartition(":")[2]
        registry.app(
            ["ui", "--port", taken, "--workspace", str(space.root)], standalone_mode=False
        )
    ((command, environment),) = started
    port = command[command.index("--port") + 1]
    assert port != taken
    assert f"http://127.0.0.1:{port}/" in capsys.readouterr().out
    assert command[command.index("--workers") + 1] == "1"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
