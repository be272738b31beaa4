"""How `endoprint up` keeps what it started, looked at without its servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from children import ROOT
from endoprint.services.plan import Plan
from endoprint.services.prefect_api import Prefect
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
