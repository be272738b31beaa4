"""Jobs out of order, done twice, or after values changed: one line, and nothing stale believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import a_workspace
from endoprint import curated, jobs, registry
from endoprint.config import Refusal
from endoprint.workspace import Workspace
from lab import moved_copy


@pytest.fixture
def told(plain_story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A workspace in which the whole story was told."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return str(moved_copy(Workspace.at(plain_story), tmp_path / "space").root)


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A workspace in which nothing was made yet."""
    return str(a_workspace(tmp_path / "space", is_simulated=False))


def change(workspace: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = Path(workspace) / "params.yaml"
    values = yaml.safe_load(file.read_text())
    edit(values)
    file.write_text(yaml.safe_dump(values, sort_keys=False))


def board_of(workspace: str) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(Path(jobs.leaderboard(workspace)).read_text())
    return board


# -- what was tuned where it is judged ------------------------------------------------------------
@pytest.mark.slow
def test_the_board_says_which_figures_chose_the_values_they_judge(told: str) -> None:
    flags = " ".join(board_of(told)["flags"])
    assert "geneformer: tuned on these units. Its values are the best of 2 trials" in flags
    assert "logistic: tuned" not in flags


@pytest.mark.slow
def test_a_winner_written_into_params_is_as_tuned_as_one_taken_by_option(told: str) -> None:
    best = jobs.search_result(told, model="geneformer")["values"]
    change(told, lambda values: values["models"]["geneformer"].update(best))
    jobs.train(told, model="geneformer")
    assert "geneformer: tuned on these units" in " ".join(board_of(told)["flags"])


@pytest.mark.slow
def test_trials_of_other_values_or_cells_do_not_count_as_these(told: str) -> None:
    change(told, lambda values: values["models"]["geneformer"].update(hidden=32))
    with pytest.raises(Refusal, match="run `endoprint search geneformer` first"):
        jobs.search_result(told, model="geneformer")
    with pytest.raises(Refusal, match="run `endoprint search geneformer` first"):
        jobs.train(told, model="geneformer", tuned="yes")


# -- stale things ---------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_backbone_of_other_values_is_not_taken_for_todays(told: str) -> None:
    change(told, lambda values: values["pretrain"].update(hidden=8))
    with pytest.raises(Refusal, match="run `endoprint pretrain` first"):
        jobs.train(told, model="geneformer")
    jobs.train(told, model="logistic")  # which needs none
    change(told, lambda values: values.update(pretrain={}))
    jobs.train(told, model="geneformer")
    label = next(x["label"] for x in board_of(told)["models"] if x["model"] == "geneformer")
    assert "never pre-trained" in label


@pytest.mark.slow
def test_a_candidate_is_not_taken_from_a_board_older_than_the_newest_fit(told: str) -> None:
    jobs.train(told, model="signature")
    with pytest.raises(Refusal, match="run `endoprint leaderboard` first"):
        jobs.register(told)
    jobs.leaderboard(told)
    assert jobs.register(told) == "1"


@pytest.mark.slow
def test_fits_of_other_cells_stand_on_no_board_of_these(told: str) -> None:
    space = Workspace.at(told)
    cells = curated.load(space.cells)
    curated.write(cells[: cells.n_obs - 50].copy(), space.cells)
    with pytest.raises(Refusal, match="none of these cells"):
        jobs.leaderboard(told)
    jobs.train(told, model="logistic")
    assert [row["model"] for row in board_of(told)["models"]] == ["logistic"]


# -- ways on --------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_champion_of_another_split_is_retired_by_command_and_may_come_back(told: str) -> None:
    # other units are held out, so the refitted model is another one, to the byte
    change(told, lambda values: values["design"].update(n_test_units=1))
    jobs.split(told)
    jobs.train(told, model="logistic")
    jobs.leaderboard(told)
    version = jobs.register(told)
    with pytest.raises(Refusal, match="endoprint retire"):
        jobs.promote(told, version=version)
    assert jobs.retire(told, why="other folds") == {"retired": "version 1 (logistic)"}
    assert registry.champion(Workspace.at(told)) is None
    verdict = json.loads(Path(jobs.promote(told, version=version)).read_text())
    assert verdict["champion"] == version
    assert jobs.rollback(told) == {"champion": "version 1 (logistic)"}


# -- mistakes in values are said before anything is made ------------------------------------------
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda v: v["models"].update(nonesuch={}), "stands in the table; got nonesuch"),
        (lambda v: v["models"].update(logistic={"penaltee": 1}), "models.logistic.penaltee"),
        (lambda v: v["design"].update(n_fold=2), "design.n_fold"),
        (lambda v: v["cells"].update(control=["DMSO"]), "cells.control"),
        (lambda v: v["pretrain"].update(layers="many"), "pretrain.layers"),
        (lambda v: v["search"].update(model="nonesuch"), "stands in the table; got nonesuch"),
        (lambda v: v["simulate"].update(difficulty="brutal"), "simulate.difficulty"),
        (lambda v: v["tokens"].update(vocab="v1"), "tokens.vocab"),
        (lambda v: v.update(task="a/b"), "task"),
        (lambda v: v.update(task="it's"), "task"),
    ],
)
def test_a_mistake_anywhere_in_params_stops_a_story_before_its_first_step(
    bare: str, edit: Callable[[dict[str, Any]], Any], said: str
) -> None:
    change(bare, edit)
    with pytest.raises(Refusal, match=said):
        jobs.story_steps(bare)


def test_a_search_without_a_number_of_trials_takes_the_usual_one(bare: str) -> None:
    change(bare, lambda values: values["search"].pop("trials"))
    search = next(step for step in jobs.story_steps(bare) if step.name.startswith("search"))
    assert search.arguments["trials"] == 20


# -- what a kill leaves behind --------------------------------------------------------------------
def test_gc_lists_what_dead_writers_left_and_spares_those_who_live(space: Workspace) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [space.root / f"data/cells/.cells.h5ad.{dead.pid}.part"]
    left += [space.local / f"models/.{'0' * 64}.{dead.pid}.part"]
    mine = space.root / f"data/cells/.cells.h5ad.{os.getpid()}.part"
    for path in (*left[:1], mine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    left[1].mkdir(parents=True)
    said = jobs.gc(str(space.root))["items"]
    assert said == [f"half-written {path.relative_to(space.root)}" for path in left]
    assert jobs.gc(str(space.root), delete=True)["items"] == said
    assert [path.exists() for path in (*left, mine)] == [False, False, True]


def test_a_pool_that_is_refused_leaves_no_curated_cells_behind(tmp_path: Path) -> None:
    root = a_workspace(tmp_path / "space")
    change(str(root), lambda values: values["cells"].update(pool=values["cells"]["source"]))
    with pytest.raises(Refusal, match="other units than the labelled"):
        jobs.curate(str(root))
    # without units to compare, the same cells are still the same
    change(str(root), lambda values: values["cells"].update(unit_keys=[], technical_fold="run"))
    with pytest.raises(Refusal, match="cell .* in both"):
        jobs.curate(str(root))
    assert not Workspace.at(root).cells.exists()
