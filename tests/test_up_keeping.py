"""How `endoprint up` keeps what it started, looked at without its servers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from children import MAIN, ROOT, environment
from endoprint.config import Refusal
from endoprint.services import processes, up
from endoprint.services.plan import Plan, Service
from endoprint.services.prefect_api import Prefect, Reaped
from endoprint.services.up import Up, running
from endoprint.workspace import Workspace
from test_prefect_api import saying, serving


def a_plan(space: Path) -> Plan:
    return Plan(Workspace.at(space), ROOT, "127.0.0.1", 1, 2)


class Keeper:
    """An `Up` of an empty workspace, what it said, and a Prefect that only remembers."""

    def __init__(self, space: Path) -> None:
        self.space, self.said, self.begun = space, list[str](), list[str]()
        self.open: list[dict[str, Any]] = []  # flow runs under way
        (space / "params.yaml").write_text("task: toy\n")
        (space / ".endoprint").mkdir()
        self.up = Up(a_plan(space), self.said.append)

    def ask(self, what: str, payload: dict[str, Any] | None = None, *, method: str = "") -> Any:
        if what == "deployments/filter":
            return [{"id": "1", "name": "hourly-score"}, {"id": "2", "name": "nightly"}]
        if what == "flow_runs/filter":
            return self.open
        self.begun.append(what)
        return {}

    def look(self, n_times: int = 2) -> None:
        """Look at the inbox: what came is asked for once it is no longer growing."""
        for _ in range(n_times):
            self.up._look_at_inbox()


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keeper:
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    keeper = Keeper(tmp_path)
    monkeypatch.setattr(Prefect, "ask", lambda _, *words, **more: keeper.ask(*words, **more))
    return keeper


ASKED_FOR = "deployments/1/create_flow_run"


def test_a_file_that_comes_while_others_are_scored_is_scored_after_them(keeper: Keeper) -> None:
    (keeper.space / "inbox").mkdir()
    (keeper.space / "inbox/new.h5ad").write_bytes(b"cells")
    keeper.open = [{"deployment_id": "1"}]
    keeper.look(5)
    assert keeper.begun == []  # Prefect would cancel it
    keeper.open = [{"deployment_id": "2"}]  # a night is another matter
    keeper.look(5)
    assert keeper.begun == [ASKED_FOR]


def test_a_link_to_nothing_in_the_inbox_keeps_no_other_file_waiting(keeper: Keeper) -> None:
    (keeper.space / "inbox").mkdir()
    (keeper.space / "inbox/gone.h5ad").symlink_to("/nowhere/gone.h5ad")
    keeper.look()
    (keeper.space / "inbox/new.h5ad").write_bytes(b"cells")
    keeper.look()
    assert keeper.begun == [ASKED_FOR]


# a `recover` that waits, as it does for an MLflow that is away, until a file says how it ends
WAITING = """\
import pathlib, sys, time
told, how = pathlib.Path("told.txt"), pathlib.Path("how.txt")
told.open("a").write("began ")
for _ in range(100):
    if how.exists():
        break
    time.sleep(0.1)
told.open("a").write("ended ")
sys.exit(how.read_text() if how.exists() else 0)
"""


def test_nothing_waits_for_a_recovery_and_only_one_runs_at_a_time(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("endoprint.services.up.RECOVER", [sys.executable, "-c", WAITING])
    crashed = Reaped("a run", "nightly", is_repeated=True)
    monkeypatch.setattr(Prefect, "reap", lambda *_, worker_started: [crashed])
    told, how = keeper.space / "told.txt", keeper.space / "how.txt"
    sleeping = (sys.executable, "-c", "import time; time.sleep(60)")
    for name in ("mlflow", "worker"):
        keeper.up._start(Service(name, sleeping, dict(os.environ), "", lambda _: True))

    def waits_for(text: str) -> bool:
        deadline = time.monotonic() + 30
        while not told.is_file() or told.read_text() != text:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    try:
        keeper.up._care()
        assert waits_for("began ")  # and has not ended: this line is reached meanwhile
        keeper.up._care()
        first = keeper.up.kept[0]
        first.process.kill()
        first.process.wait()
        keeper.up._look(first)
        again = next(each for each in keeper.up.kept if each.service.name == "mlflow")
        assert again.process.poll() is None  # the server it may wait for is there again
        assert told.read_text() == "began "
        how.write_text("no store")
        assert waits_for("began ended ")
        monkeypatch.setattr(Prefect, "reap", lambda *_, worker_started: [])
        keeper.up._recovery.wait(30)
        keeper.up._care()  # it came to nothing, and another was due
        assert [line for line in keeper.said if "recover succeeds; got no store" in line]
        assert waits_for("began ended began ended ")
    finally:
        processes.stop_marked(processes.mark_of(keeper.up.plan.space))
        for kept in keeper.up.kept:
            kept.process.kill()
            kept.process.wait()


def test_an_address_with_a_password_is_neither_written_nor_shown(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = "planted-w@rd"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://trainer:{planted}@lab:5000")
    monkeypatch.setenv("PREFECT_API_URL", f"http://ann:{planted}@lab:4200/api")
    monkeypatch.setattr(Prefect, "has_planned", lambda _: True)
    monkeypatch.setattr(Up, "_await", lambda *_: None)
    monkeypatch.setattr(Up, "_register", lambda *_: None)
    monkeypatch.setattr(Up, "_reap", lambda *_, worker_started: 0)
    monkeypatch.setattr(Up, "_start", lambda *_: None)
    monkeypatch.setattr(Up, "_child", lambda *_: '{"experiment": "1"}')
    keeper.up.begin()
    assert keeper.up.runs_page.startswith("http://lab:5000/#/experiments/1")
    written = (keeper.space / ".endoprint/up.json").read_text()
    assert "lab:5000" in written
    assert planted not in written
    assert planted not in json.dumps(up.state_of(keeper.up.plan.space))
    log = keeper.space / "last.txt"
    log.write_text(f"cannot reach http://ann:{planted}@lab:4200/api/health\n")
    assert planted not in up._last_words(log)


# -- what is refused, in a line ------------------------------------------------------------------
def told_by(space: Path, api: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `up` says at its start on a machine whose two servers are others'."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("PREFECT_API_URL", api)
    (space / "params.yaml").write_text("task: toy\n")
    with pytest.raises(Refusal) as refused:
        Up(a_plan(space), print).begin()
    return str(refused.value)


def test_a_wrong_password_and_a_wrong_address_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(saying(401, "no")) as api:
        said = told_by(tmp_path, api, monkeypatch)
        assert f"HTTP 401 from {api}" in said
        assert "PREFECT_API_AUTH_STRING" in said
    for answer, got in ((saying(404, "no"), "HTTP 404"), (saying(200, "<html>"), "Expecting")):
        with serving(answer) as api:
            said = told_by(tmp_path, api, monkeypatch)
            assert got in said
            assert "set PREFECT_API_URL" in said
    assert "refused" in told_by(tmp_path, "http://127.0.0.1:1/api", monkeypatch)
    assert "unknown url type" in told_by(tmp_path, "127.0.0.1:4200/api", monkeypatch)
    said = told_by(tmp_path, "http://ann:planted@lab:4200/api", monkeypatch)
    assert "from http://***@lab:4200/api" in said
    assert "planted" not in said


@pytest.mark.skipif(
    importlib.util.find_spec("prefect") is None, reason="the flows extra is not installed"
)
def test_a_first_machine_that_is_down_is_one_line_on_a_further_one(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("task: toy\n")
    nobody = dict.fromkeys(("MLFLOW_TRACKING_URI", "PREFECT_API_URL"), "http://127.0.0.1:1/api")
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "up"], cwd=tmp_path, env={**environment(), **nobody},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("endoprint: Prefect's API answers")
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".endoprint").write_text("a file")
    with pytest.raises(Refusal, match="File exists"), running(a_plan(tmp_path), print):
        pass

    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(Refusal, match="Permission denied"), running(a_plan(tmp_path), print):
        pass


def test_a_second_up_is_told_whether_the_first_still_starts(keeper: Keeper) -> None:
    plan = keeper.up.plan
    with running(plan, print) as first:
        with pytest.raises(Refusal, match=r"one here already \(it is starting\)"):
            running(plan, print).__enter__()
        first._write()
        known = rf"one here already \(process {os.getpid()}, http://127.0.0.1:"
        with pytest.raises(Refusal, match=known):
            running(plan, print).__enter__()
