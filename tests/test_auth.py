"""Who may do what: a reader scores and moves nothing, a trainer logs, a promoter decides.

Against MLflow's own server with basic auth, started as `endoprint up` starts it.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowException

from children import ROOT
from conftest import planted_cells
from endoprint import jobs, registry, tracking
from endoprint.config import Refusal
from endoprint.roles import NAME, PASSWORD, acting
from endoprint.services import grants, processes
from endoprint.services.plan import AUTH_SECRETS, Plan
from endoprint.workspace import Workspace
from lab import bare_workspace, fit_and_track, furnish
from test_schedule import free_port

pytestmark = [pytest.mark.service, pytest.mark.slow]
ROLE_PASSWORDS = [f"ENDOPRINT_{role}_PASSWORD" for role in ("READER", "TRAINER", "PROMOTER")]
SECRETS = {name: f"planted-{secrets.token_hex(12)}" for name in (*AUTH_SECRETS, *ROLE_PASSWORDS)}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace whose store is a server that asks who is there."""
    pytest.importorskip("flask_wtf", reason="the services extra is not installed")
    made = bare_workspace(tmp_path_factory.mktemp("auth") / "space")
    furnish(made, planted_cells(n_units=6, n_cells=8))
    made.local.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENDOPRINT_HOME", str(ROOT))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        plan = Plan.of(made, host="127.0.0.1", ports=(free_port(), free_port()), allowed="")
        mlflow = plan.services[0]
        server = processes.start(
            mlflow.command, environment=mlflow.environment, cwd=made.local,
            log=made.local / "logs/mlflow.txt",
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 180
            while not mlflow.is_healthy(0.0):
                assert server.poll() is None, (made.local / "logs/mlflow.txt").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.3)
            grants.grant(plan.mlflow_url, made.experiment)
            patch.setenv("MLFLOW_TRACKING_URI", plan.mlflow_url)
            yield made
        finally:
            processes.stop([psutil.Process(server.pid)], patience=10)
            processes.stop_marked(processes.mark_of(made), patience=5)


@pytest.fixture(scope="module")
def champion(space: Workspace) -> registry.Version:
    """The live version, fitted by a trainer and promoted by a promoter."""
    with acting("trainer"):
        run_id = fit_and_track(space)
    with acting("promoter"):
        version = registry.register(space, run_id)
        with registry.lock(space):
            registry.flip(space, version, expected=None, why="a test")
    return version


def refusal_of(error: MlflowException) -> int:
    return error.get_http_status_code()


def test_who_is_nobody_sees_nothing(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "nobody")
    monkeypatch.setenv(PASSWORD, "guessed-guessed")
    with pytest.raises(Refusal, match="lets in whom it knows.*401"):
        tracking.experiment(space, tracking.client(space))
    with pytest.raises(MlflowException) as refused:
        tracking.client(space).search_experiments()
    assert refusal_of(refused.value) == 401


def test_a_reader_finds_and_loads_the_champion(
    space: Workspace, champion: registry.Version
) -> None:
    with acting("reader"):
        found, model = registry.load_version(space)
    assert found.version == champion.version
    assert model.exposures


def test_a_reader_cannot_move_an_alias(space: Workspace, champion: registry.Version) -> None:
    for role in ("reader", "trainer"):
        store = tracking.client(space)
        with acting(role), pytest.raises(MlflowException) as refused:
            store.set_registered_model_alias(champion.name, "champion", champion.version)
        assert refusal_of(refused.value) == 403
        with acting(role), pytest.raises(MlflowException) as refused:
            store.delete_registered_model_alias(champion.name, "champion")
        assert refusal_of(refused.value) == 403


def test_a_reader_cannot_log_or_register(space: Workspace, champion: registry.Version) -> None:
    store = tracking.client(space)
    with acting("reader"), pytest.raises(MlflowException) as refused:
        store.create_run(tracking.experiment(space, store))
    assert refusal_of(refused.value) == 403
    with acting("trainer"), pytest.raises(MlflowException) as refused:
        tracking.client(space).create_model_version(champion.name, "models:/m-0")
    assert refusal_of(refused.value) == 403


def test_granting_again_changes_nothing(space: Workspace, champion: registry.Version) -> None:
    url = os.environ["MLFLOW_TRACKING_URI"]
    assert grants.grant(url, space.experiment) == ["reader", "trainer", "promoter"]
    with acting("reader"):
        found = registry.champion(space)
    assert found is not None
    assert found.version == champion.version


def test_a_password_that_is_changed_lets_in_and_the_old_one_no_more(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, name = os.environ["MLFLOW_TRACKING_URI"], "ENDOPRINT_READER_PASSWORD"
    old = os.environ[name]
    monkeypatch.setenv(name, f"planted-{secrets.token_hex(12)}")
    grants.grant(url, space.experiment)
    with acting("reader"):
        assert tracking.client(space).search_experiments()
    monkeypatch.setenv(name, old)
    with acting("reader"), pytest.raises(MlflowException) as refused:
        tracking.client(space).search_experiments()
    assert refusal_of(refused.value) == 401
    grants.grant(url, space.experiment)


def test_a_role_that_cannot_log_in_is_not_reported_as_made(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("ENDOPRINT_READER_PASSWORD", "short")
    with pytest.raises(Refusal, match="HTTP 400.*assword.*mend what it names"):
        grants.grant(url, space.experiment)
    # a server that takes a password and then knows it not
    monkeypatch.setattr(grants.Admin, "ask", lambda *_, **__: {"experiment": {"experiment_id": 1}})
    monkeypatch.setenv("ENDOPRINT_READER_PASSWORD", "planted-but-unknown")
    with pytest.raises(Refusal, match="reader can log in with ENDOPRINT_READER_PASSWORD.*401"):
        grants.grant(url, space.experiment)


def test_the_scorer_runs_as_a_reader_and_needs_no_more(
    space: Workspace, champion: registry.Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nobody's name in the environment, and no other role's password either
    for role in ("TRAINER", "PROMOTER"):
        monkeypatch.delenv(f"ENDOPRINT_{role}_PASSWORD")
    summary = jobs.score(str(space.root), file=str(space.cells), out=str(tmp_path / "scores"))
    assert Path(summary).is_file()


def test_a_promoter_can_take_the_champion_down(
    space: Workspace, champion: registry.Version
) -> None:
    with acting("promoter"):
        assert registry.retire(space, why="the last test").version == champion.version


def test_no_secret_is_in_any_file_run_or_command_line(
    space: Workspace, champion: registry.Version
) -> None:
    words = [value.encode() for value in SECRETS.values()]
    files = [path for path in space.root.parent.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow-auth.db" for path in files)
    assert any(path.name == "mlflow.txt" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [word for word in words if word in content], path
    for process in processes.marked(processes.mark_of(space)):
        said = " ".join(process.cmdline()).encode()
        assert not [word for word in words if word in said], process
