"""The jobs that make models blind, or show them strangers, keep what they find beside the fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import planted_cells
from endoprint import jobs, runs
from endoprint.config import Refusal
from endoprint.design import Split
from endoprint.workspace import Workspace
from lab import furnish


@pytest.fixture
def fitted(space: Workspace) -> Workspace:
    cells = planted_cells(n_units=7, n_cells=8)
    cells.uns["endoprint"] = {"control": "DMSO"}
    made = furnish(space, cells, n_test_units=2)
    (made.root / "params.yaml").write_text("task: toy\nmodels: {logistic: {}, signature: {}}\n")
    for model in ("logistic", "signature"):
        jobs.train(str(made.root), model=model)
    return Workspace.at(made.root)


def test_every_model_meets_its_controls_once_and_the_board_says_so(fitted):
    root = str(fitted.root)
    board = json.loads(Path(jobs.leaderboard(root, controls="all")).read_text())
    rows = {row["model"]: row for row in board["models"]}
    for model in ("logistic", "signature"):
        assert rows[model]["against_shuffled"] == "better"
        assert rows[model]["shuffled_macro_f1"] < rows[model]["macro_f1"]
        assert any(f"{model}, shuffled labels" in flag for flag in board["flags"])
    assert any("depth only" in flag for flag in board["flags"])
    assert any("batch probe: not separable" in flag for flag in board["flags"])
    assert any(flag.startswith("signature: its published panels") for flag in board["flags"])
    kept = runs.finished(fitted, "control", {})
    jobs.leaderboard(root, controls="all")
    assert runs.finished(fitted, "control", {}) == kept  # nothing is fitted twice
    html = (fitted.local / "leaderboard.html").read_text()
    assert "UMAP" in html
    with pytest.raises(Refusal, match="say all"):
        jobs.leaderboard(root, controls="some")


def test_strangers_are_shown_to_a_fitted_model_only(fitted):
    root = str(fitted.root)
    found = jobs.strangers_of(root, jobs.strangers(root, model="logistic"))
    assert [row["exposure"] for row in found] == ["LIVER-X_AGONIST", "RET_AGONIST"]
    assert all(row["novelty_auroc"] > 0.5 for row in found)
    with pytest.raises(Refusal, match="train neighbours"):
        jobs.strangers(root, model="neighbours")


def test_whole_lines_are_held_out_of_development_units_and_never_of_test_units(fitted):
    root = str(fitted.root)
    board = json.loads(Path(jobs.leaderboard_by(root, by="line")).read_text())
    assert board["scheme"] == "line"
    assert {*board["models"][0]["by_unit"]} == {"L0", "L1"}
    assert any("2" in note["text"] and "line" in note["text"] for note in board["verdict"])
    kept = runs.finished(fitted, "control", {})
    judged = runs.read_table(fitted, kept[0], "predictions")
    assert not set(judged["unit"]) & set(Split.read(fitted.split).test)
    jobs.leaderboard_by(root, by="line")
    assert runs.finished(fitted, "control", {}) == kept  # nothing is fitted twice
    with pytest.raises(Refusal, match="batch"):  # one batch holds all cells
        jobs.leaderboard_by(root, by="batch")
    with pytest.raises(Refusal, match="lines or batches"):
        jobs.leaderboard_by(root, by="plate")
