"""`endoprint up`: what daily use needs runs, answers here only, survives kills, leaves nothing.

In order, on one workspace: what is killed in one test has to serve the next.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from children import endoprint
from conftest import TINY, a_workspace
from endoprint import tracking
from endoprint.services.plan import AUTH_SECRETS
from endoprint.workspace import Workspace
from standing import Standing, kill, until
from test_schedule import free_port

pytestmark = [
    pytest.mark.service,
    pytest.mark.slow,
    pytest.mark.xdist_group("up"),
    pytest.mark.skipif(
        importlib.util.find_spec("prefect") is None, reason="the flows extra is not installed"
    ),
]
SLOWEST_START_SECONDS = 600  # 60 is promised of an idle machine; tests share theirs


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    models = {"logistic": {}, "signature": {}}
    params = {key: value for key, value in TINY.items() if key != "pretrain"}
    folder = tmp_path_factory.mktemp("up") / "space"
    standing = Standing(a_workspace(folder, params={**params, "models": models}), *PORTS)
    yield standing
    if standing.process.poll() is None:
        standing.stop()


PORTS = ("--mlflow-port", "15000", "--prefect-port", "14200")


def answer(url: str, *, host: str = "") -> int:
    """The status a server gives to a page asked for under a name."""
    place = urlsplit(url)
    line = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    line.request("GET", place.path or "/", headers={"Host": host or place.netloc})
    return line.getresponse().status


def logged(up: Standing, kind: str = "train") -> list[dict[str, Any]]:
    """The runs MLflow knows of a kind, whatever became of them."""
    space = Workspace.at(up.space)
    store = tracking.client(space)
    found = store.search_runs([tracking.experiment(space, store)], f"tags.kind = '{kind}'")
    return [{"status": each.info.status, **each.data.tags} for each in found]


# -- what a user sees ---------------------------------------------------------------------------
def test_a_fresh_workspace_has_all_of_it_answering_soon(up: Standing) -> None:
    assert up.seconds < SLOWEST_START_SECONDS
    said = up.screen.read_text()
    for name in ("mlflow", "prefect", "worker", "nightly", "weekly-search"):
        assert name in said
    assert answer(up.told["mlflow"]) == 200
    assert answer(up.told["prefect"]) == answer(up.told["prefect"] + "/api/health") == 200
    assert f"answered after {up.told['seconds_to_start']:.0f} s" in said
    pages = {each["name"]: each["url"] for each in up.told["services"]}
    assert pages["mlflow"].startswith(up.told["mlflow"] + "/#/experiments/")


def test_a_name_that_is_not_this_machines_is_turned_away(up: Standing) -> None:
    # a page elsewhere can bind its own name to 127.0.0.1 and let a browser here ask
    assert answer(up.told["mlflow"] + "/api/2.0/mlflow/experiments/search", host="evil.org") == 403
    assert answer(up.told["prefect"] + "/api/flows/count", host="evil.org") == 400


def test_only_this_machine_can_reach_what_listens(up: Standing) -> None:
    heard = [
        line.laddr.ip
        for each in up.family
        for line in each.net_connections("inet")
        if line.status == psutil.CONN_LISTEN
    ]
    assert len(heard) >= 2
    assert set(heard) == {"127.0.0.1"}


def test_a_second_one_on_the_same_workspace_is_refused_and_told_where_the_first_is(
    up: Standing,
) -> None:
    done = endoprint("up", cwd=up.space)
    assert done.returncode == 2
    assert up.told["mlflow"] in done.stderr
    assert up.process.poll() is None


def test_a_night_is_worked_once_and_skipped_when_nothing_changed(up: Standing) -> None:
    first = up.finished(up.begin("nightly"))
    assert first["state_name"] == "Completed", up.log()
    assert json.loads((up.space / ".endoprint/verdict.json").read_text())["decision"]
    second = up.finished(up.begin("nightly"))
    assert second["state_name"] == "Skipped"
    assert "data, code and values" in second["state"]["message"]
    assert len(logged(up)) == 2  # each model once
    assert {run["status"] for run in logged(up)} == {"FINISHED"}


def test_status_says_what_is_running_what_is_next_and_what_was_last(up: Standing) -> None:
    done = endoprint("status", "--json", cwd=up.space)
    told = json.loads(done.stdout)
    assert told["is_running"]
    assert [each["is_alive"] for each in told["services"]] == [True] * 3
    assert {row["deployment"] for row in told["next"]} >= {"nightly", "weekly-search"}
    assert [row["state"] for row in told["last"]] == ["Completed", "Skipped"]


def test_what_is_refused_is_not_tried_again_and_leaves_a_note_with_the_remedy(
    up: Standing,
) -> None:
    params = up.space / "params.yaml"
    before = params.read_text()
    params.write_text(before + "nonsense: 1\n")
    run_id = up.begin("nightly")
    try:
        ended = up.finished(run_id)
    finally:
        params.write_text(before)
    assert ended["state_type"] == "FAILED"
    asked = {"artifacts": {"flow_run_id": {"any_": [run_id]}, "key": {"any_": ["failure"]}}}
    (note,) = up.ask("artifacts/filter", asked)
    (row,) = json.loads(note["data"]) if isinstance(note["data"], str) else note["data"]
    assert row["what"] == "nightly"
    assert "nonsense" in row["reason"]
    assert "fields here are" in row["next step"]
    (task,) = up.ask("task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [run_id]}}})
    assert task["run_count"] == 1


def test_a_file_that_comes_into_the_inbox_is_scored(up: Standing) -> None:
    inbox = up.space / "inbox"
    inbox.mkdir()
    shutil.copy(up.space / "data/raw/new.h5ad", inbox / "new.h5ad")
    scored = up.space / "scores/inbox/new.h5ad/scores.parquet"
    until(scored.is_file, "its scores", up.log)


# -- kills --------------------------------------------------------------------------------------
def begun(up: Standing) -> str:
    """Begin a night; return when its first model is fitted and the second is not."""
    run_id = up.begin("nightly", workspace=str(up.space), force=True)

    def has_fitted_one() -> bool:
        states = up.task_states(run_id)
        assert states.get("leaderboard") != "Completed", "too late to kill anything"
        return states.get("train logistic") == "Completed"

    until(has_fitted_one, "the first fit", up.log)
    return run_id


def is_recovered(up: Standing, run_id: str, *, n_before: int, is_resumed: bool) -> None:
    ended = up.finished(run_id)
    assert ended["state_name"] == "Completed", up.log()
    assert (ended["run_count"] > 1) is is_resumed
    assert [run for run in logged(up) if run["status"] == "RUNNING"] == []
    finished = [run["model"] for run in logged(up) if run["status"] == "FINISHED"]
    assert len(finished) == n_before + 2  # no model was fitted to its end twice
    assert up.finished(up.begin("nightly"))["state_name"] == "Skipped"  # no slot is kept


def n_fits(up: Standing) -> int:
    return sum(run["status"] == "FINISHED" for run in logged(up))


def test_a_night_whose_process_is_killed_goes_on_by_itself(up: Standing) -> None:
    before, run_id = n_fits(up), begun(up)
    kill(int(up.run(run_id)["infrastructure_pid"]))
    is_recovered(up, run_id, n_before=before, is_resumed=True)


def test_a_night_whose_process_and_worker_are_killed_goes_on_by_itself(up: Standing) -> None:
    before, run_id = n_fits(up), begun(up)
    worker = up.service("worker")
    kill(worker, int(up.run(run_id)["infrastructure_pid"]))
    is_recovered(up, run_id, n_before=before, is_resumed=True)
    assert up.service("worker") != worker


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_a_night_outlives_a_server_that_is_killed(up: Standing, name: str) -> None:
    before, run_id, server = n_fits(up), begun(up), up.service(name)
    kill(server)
    is_recovered(up, run_id, n_before=before, is_resumed=False)
    assert up.service(name) != server


# -- the end ------------------------------------------------------------------------------------
def test_stopping_it_leaves_no_process_and_starting_again_goes_on_from_there(
    up: Standing,
) -> None:
    run_id, n_known = begun(up), len(up.ask("flow_runs/filter", {}))
    before = n_fits(up)
    up.stop(signal.SIGINT)
    assert up.process.returncode == 0
    assert up.family == []
    assert not (up.space / ".endoprint/up.json").exists()
    assert "nothing is running" in endoprint("status", cwd=up.space).stdout
    assert [run for run in logged(up) if run["status"] == "RUNNING"] == []

    again = Standing(up.space, *PORTS)
    try:
        assert len(again.ask("flow_runs/filter", {})) >= n_known
        ended = again.finished(run_id)  # what was cut short is gone on with
        assert ended["state_name"] == "Completed"
        assert n_fits(again) == before + 1
    finally:
        again.process.kill()  # and kill -9 leaves nothing either
        again.process.wait(30)
        until(lambda: again.family == [], "the end of the family")


def test_nothing_left_this_machine(up: Standing) -> None:
    lines = up.network.read_text().splitlines()
    assert sum(line.startswith("watched") for line in lines) > 10
    assert [line for line in lines if line.startswith("refused")] == []


# -- doors with locks ----------------------------------------------------------------------------
def test_with_passwords_both_servers_let_in_who_has_one_and_no_secret_is_written(
    tmp_path: Path,
) -> None:
    pytest.importorskip("flask_wtf", reason="the services extra is not installed")
    roles = [f"ENDOPRINT_{role}_PASSWORD" for role in ("READER", "TRAINER", "PROMOTER")]
    planted = {name: f"planted-{token_hex(12)}" for name in (*AUTH_SECRETS, *roles)}
    login = f"ann:planted-{token_hex(12)}"
    planted |= dict.fromkeys(("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"), login)
    models: dict[str, Any] = {"logistic": {}}
    params = {key: value for key, value in TINY.items() if key != "pretrain"} | {"models": models}
    ports = ("--mlflow-port", str(free_port()), "--prefect-port", str(free_port()))
    up = Standing(a_workspace(tmp_path / "space", params=params), *ports, extra=planted)
    try:
        assert answer(up.told["mlflow"] + "/api/2.0/mlflow/experiments/search") == 401
        assert answer(up.told["prefect"] + "/api/admin/version") == 401
        ended = up.finished(up.begin("nightly"))  # by a trainer, then by a promoter
        assert ended["state_name"] == "Completed", up.log()
        assert json.loads((up.space / ".endoprint/verdict.json").read_text())["decision"]
        words = [each.partition(":")[2] or each for each in planted.values()]
        said = [word for each in up.family for word in each.cmdline()]
        assert not [word for word in words if any(word in each for each in said)]
    finally:
        up.stop()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow-auth.db", "prefect.db", "worker.txt"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not [word for word in words if word.encode() in content], path


def test_ports_that_are_taken_are_left_to_those_who_have_them(tmp_path: Path) -> None:
    import socket

    from endoprint.services.processes import free_port

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert free_port(taken) > taken
        assert free_port(taken, taken=[taken + 1]) > taken + 1
