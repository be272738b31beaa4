"""A search that may be killed anywhere: what it begins with, and what it has to end in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import planted_cells
from endoprint import jobs, runs, search, tracking
from endoprint.jobs.searching import journal_of, study_name
from endoprint.search.tuning import ONCE
from endoprint.workspace import Workspace
from lab import bare_workspace, furnish

N_TRIALS = 5


def before_a_search(folder: Path) -> Workspace:
    """A workspace in which nothing was searched."""
    made = furnish(bare_workspace(folder), planted_cells(n_units=6, n_cells=8))
    (made.root / "params.yaml").write_text("task: toy\nmodels: {neighbours: {smoothing: 2.0}}\n")
    space = Workspace.at(made.root)
    tracking.experiment(space, tracking.client(space))
    return space


def search_the_neighbours(workspace: str) -> object:
    return jobs.search(workspace, model="neighbours", trials=N_TRIALS)


def searched(space: Workspace) -> Any:
    """Counts, and what is the same whichever trials a kill cost: what they are asked differs."""
    study = search.find_study(journal_of(space, "neighbours"), study_name(space, "neighbours"))
    assert study is not None
    table = search.table_of(study)
    done = table[table["state"] == "complete"]
    newest = runs.finished(space, "search", {"model": "neighbours"})[0]
    first = [t for t in study.trials if t.number in done.index and ONCE in t.user_attrs]
    return {
        "complete": len(done),
        "distinct": len({tuple(row) for row in done.filter(like="value.").to_numpy()}),
        "running": int((table["state"] == "running").sum()),
        "todays values": [t.params["smoothing"] for t in first if t.params["smoothing"] == 2.0],
        "kept": len(runs.read_table(space, newest, "trials").query("state == 'complete'")),
        "tracked": bool(set(done["run_id"]) <= set(runs.finished(space, "trial", {}))),
    }
