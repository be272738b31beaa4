"""How `endoprint up` keeps what it started, looked at without its servers."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from children import ROOT
from endoprint.services import processes, up
from endoprint.services.plan import Plan, Service
from endoprint.services.prefect_api import Prefect, Reaped
from endoprint.services.up import Up
from endoprint.workspace import Workspace


class Keeper:
    """An `Up` of an empty workspace, what it said, and a Prefect that only remembers."""

    def __init__(self, space: Path) -> None:
        self.space, self.said, self.begun = space, list[str](), list[str]()
        self.open: list[dict[str, Any]] = []  # flow runs under way
        (space / "params.yaml").write_text("task: toy\n")
        (space / ".endoprint").mkdir()
        plan = Plan(Workspace.at(space), ROOT, "127.0.0.1", 1, 2)
        self.up = Up(plan, self.said.append)

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
    planted = "planted-word"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://trainer:{planted}@lab:5000")
    monkeypatch.setenv("PREFECT_API_URL", f"http://ann:{planted}@lab:4200/api")
    monkeypatch.setattr(Prefect, "has_planned", lambda _: True)
    monkeypatch.setattr(Up, "_await", lambda *_: None)
    monkeypatch.setattr(Up, "_register", lambda *_: None)
    monkeypatch.setattr(Up, "_reap", lambda *_, worker_started: 0)
    monkeypatch.setattr(Up, "_start", lambda *_: None)
    monkeypatch.setattr(Up, "_child", lambda *_: '{"experiment": "1"}')
    keeper.up.begin()
    assert keeper.up.runs_page.startswith("http://***@lab:5000/#/experiments/1")
    written = (keeper.space / ".endoprint/up.json").read_text()
    assert "lab:5000" in written
    assert planted not in written
    assert planted not in json.dumps(up.state_of(keeper.up.plan.space))
    log = keeper.space / "last.txt"
    log.write_text(f"cannot reach http://ann:{planted}@lab:4200/api/health\n")
    assert planted not in up._last_words(log)
