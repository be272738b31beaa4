"""Jobs compose the rooms: what a workspace asks for, in order, and what each refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from children import ROOT, cpu_seconds, endoprint, environment
from conftest import TINY, a_workspace
from endoprint import blueprint, jobs
from endoprint.config import Refusal, read_params
from endoprint.jobs.scoring import score_if_live
from endoprint.model import model_class
from endoprint.search import SearchConfig
from endoprint.table import TABLE
from endoprint.workspace import Workspace
from lab import moved_copy


def changed(space: Path, section: str, values: Any) -> Path:
    """Change one section of a workspace's params."""
    file = space / "params.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), section: values}))
    return space


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A tiny workspace without its cells."""
    return a_workspace(tmp_path / "space", is_simulated=False)


# -- the job list -------------------------------------------------------------------------------
FIELD = ["train logistic", "train signature", "train geneformer"]
END = ["leaderboard", "register", "promote"]


@pytest.mark.parametrize(
    ("without", "names"),
    [
        (
            (),
            ["simulate", "prepare", "pretrain", "search geneformer", *FIELD, *END, "score"],
        ),
        (("simulate", "pretrain"), ["prepare", "search geneformer", *FIELD, *END, "score"]),
        (("search", "score"), ["simulate", "prepare", "pretrain", *FIELD, *END]),
        (
            ("simulate", "pretrain", "search", "score", "models"),
            ["prepare", "train logistic", *END],
        ),
    ],
)
def test_a_workspace_gets_the_steps_that_its_values_ask_for(
    without: tuple[str, ...], names: list[str], tmp_path: Path
) -> None:
    params = {key: value for key, value in TINY.items() if key not in without}
    space = a_workspace(tmp_path / "space", is_simulated=False, params=params)
    assert [step.name for step in jobs.story_steps(str(space))] == names


def test_only_the_model_that_was_searched_is_trained_with_its_winner(bare: Path) -> None:
    steps = {step.name: step.arguments for step in jobs.story_steps(str(bare))}
    assert steps["search geneformer"] == {"model": "geneformer", "trials": 2}
    assert [name for name in FIELD if steps[name]["tuned"]] == ["train geneformer"]


def test_trials_that_nobody_chose_are_the_defaults(bare: Path) -> None:
    changed(bare, "search", {"model": "logistic"})
    steps = {step.name: step.arguments for step in jobs.story_steps(str(bare))}
    assert steps["search logistic"]["trials"] == SearchConfig().trials


def test_a_story_without_a_champion_is_told_all_the_same(bare: Path) -> None:
    board = {"models": [{"model": "logistic"}], "replicated": False, "confounded": True}
    verdict = {"champion": None, "champion_model": None, "decision": "hold", "reasons": ["few"]}
    for name, values in (("board", board), ("verdict", verdict)):
        (bare / name).write_text(json.dumps(values))
    told = {"leaderboard": str(bare / "board"), "promote": str(bare / "verdict"), "score": ""}
    story = json.loads(Path(jobs.tell(str(bare), told=told)).read_text())
    assert story["champion"] == {"version": None, "model": None}
    assert (story["decision"], story["reasons"]) == ("hold", ["few"])
    assert (story["scores"], story["n_scored"], story["minutes"]) == (None, 0, None)
    assert (story["replicated"], story["confounded"]) == (False, True)


def test_where_nothing_is_live_a_story_scores_nothing(space: Workspace) -> None:
    assert score_if_live(str(space.root), file="new.h5ad", out="scores") == ""
    assert not (space.root / "scores").exists()


# -- what stands in the repository ----------------------------------------------------------------
def test_the_demos_pipeline_is_the_one_that_every_workspace_gets() -> None:
    assert (ROOT / "dvc.yaml").read_text() == blueprint.dvc_yaml(has_pool=True)


@pytest.mark.parametrize("has_pool", [True, False])
def test_every_stage_runs_a_command_that_exists(has_pool: bool) -> None:
    stages = yaml.safe_load(blueprint.dvc_yaml(has_pool=has_pool))["stages"]
    assert list(stages) == ["check", "curate", "audit", "split", "tokenise"]
    assert ("pool" in json.dumps(stages)) is has_pool
    text = endoprint("--help").stdout
    for stage in stages.values():
        program, command = stage["cmd"].split()
        assert program == "endoprint"
        assert f" {command} " in text


def test_every_value_of_the_demo_is_known_to_its_owner() -> None:
    from endoprint.cells import CellsConfig
    from endoprint.design import DesignConfig
    from endoprint.encoder.pretrain import PretrainConfig
    from endoprint.simulate import SimulateConfig
    from endoprint.tokens import TokensConfig

    params = read_params(ROOT / "params.yaml")
    owners: dict[str, Any] = {
        "cells": CellsConfig, "design": DesignConfig, "tokens": TokensConfig,
        "simulate": SimulateConfig, "pretrain": PretrainConfig, "search": SearchConfig,
    }  # fmt: skip
    for section, owner in owners.items():
        params.section(section, owner)
    for name, values in params.models.items():
        model_class(name).Config.of(values, where=f"models.{name}")
    assert {"logistic", "signature", "geneformer"} <= set(params.models) <= set(TABLE)


# -- out of order, or asked for what is not there -------------------------------------------------
@pytest.mark.parametrize(
    ("job", "words", "rule"),
    [
        (jobs.prepare, {}, "cells"),
        (jobs.pretrain, {}, "pool"),
        (jobs.train, {"model": "logistic"}, "curated cells"),
        (jobs.search, {"model": "logistic", "trials": 1}, "curated cells"),
        (jobs.leaderboard, {}, "curated cells"),
        (jobs.register, {}, "leaderboard"),
        (jobs.promote, {}, "version"),
        (jobs.score, {"file": "data/raw/new.h5ad", "out": "scores"}, "version"),
    ],
)
def test_a_job_out_of_order_says_what_it_needs_and_writes_nothing(
    job: Callable[..., str], words: dict[str, Any], rule: str, space: Workspace
) -> None:
    a_workspace(space.root, is_simulated=False)

    def here() -> set[str]:
        files = {str(x.relative_to(space.root)) for x in space.root.rglob("*") if x.is_file()}
        return {name for name in files if not name.startswith(".endoprint/")}

    before = here()
    with pytest.raises(Refusal, match=rule):
        job(str(space.root), **words)
    assert here() == before


def test_a_model_that_is_not_in_the_table_is_refused_with_the_table(bare: Path) -> None:
    with pytest.raises(Refusal, match=", ".join(TABLE)):
        jobs.train(str(bare), model="oracle")


def test_a_vocabulary_fitted_in_every_fit_leaves_a_note_instead_of_tokens(bare: Path) -> None:
    changed(bare, "tokens", {"vocabulary": "training"})
    note = json.loads(Path(jobs.tokenise(str(bare))).read_text())
    assert "inside every fit" in note["fitted"]
    assert not (bare / "data/tokens/cells.parquet").exists()


def test_a_vocabulary_of_the_pool_needs_a_pool(bare: Path) -> None:
    with pytest.raises(Refusal, match=r"name cells\.pool"):
        jobs.tokenise(str(bare))


def test_a_pool_may_not_hold_a_judged_unit(tmp_path: Path) -> None:
    space = a_workspace(tmp_path / "space")
    changed(space, "cells", {**TINY["cells"], "pool": "data/raw/atlas.h5ad"})
    with pytest.raises(Refusal, match="pre-training must not see a judged unit"):
        jobs.curate(str(space))
    assert not (space / "data/cells/pool.h5ad").exists()


def test_what_a_stage_refuses_is_said_in_its_own_words(tmp_path: Path) -> None:
    space = a_workspace(tmp_path / "space")
    changed(space, "cells", {**TINY["cells"], "exposure_key": "dose"})
    with pytest.raises(Refusal) as refused:
        jobs.prepare(str(space))
    with pytest.raises(Refusal) as directly:
        jobs.check(str(space))
    assert str(refused.value) == str(directly.value)
    assert "dose" in str(refused.value)


def test_an_environment_variable_may_say_where_the_cells_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = a_workspace(tmp_path / "space")
    cells = {key: value for key, value in TINY["cells"].items() if key != "pool"}
    changed(space, "cells", {**cells, "source": "${MY_ATLAS}"})
    with pytest.raises(Refusal, match="MY_ATLAS"):
        jobs.check(str(space))
    monkeypatch.setenv("MY_ATLAS", str(space / "data/raw/atlas.h5ad"))
    report = json.loads(Path(jobs.check(str(space))).read_text())
    assert report["n_cells"] == 720


# -- a second time --------------------------------------------------------------------------------
def repro(space: Path) -> tuple[list[str], list[str]]:
    """What `dvc repro` ran and skipped."""
    own = environment()
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]])  # activated
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=space, env=own, capture_output=True,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ran = re.findall(r"Running stage '(\w+)'", done.stdout)
    skipped = sorted(re.findall(r"Stage '(\w+)' didn't change, skipping", done.stdout))
    return ran, skipped


@pytest.mark.slow
def test_a_second_repro_does_nothing_and_a_changed_design_only_splits_anew(
    plain_story: Path, tmp_path: Path
) -> None:
    space = moved_copy(Workspace.at(plain_story), tmp_path / "space").root
    lock = (space / "dvc.lock").read_bytes()
    repro(space)  # fills the moved workspace's memory of md5s
    stages = sorted(["check", "curate", "audit", "split", "tokenise"])
    done = []
    seconds = cpu_seconds(lambda: done.append(repro(space)))
    assert done == [([], stages)]
    assert (space / "dvc.lock").read_bytes() == lock
    assert seconds < 2.5  # about a second is promised

    changed(space, "design", {**TINY["design"], "n_folds": 3})
    assert repro(space) == (["split"], [name for name in stages if name != "split"])
    changed(space, "models", {"logistic": {}})  # no stage reads it
    assert repro(space)[0] == []


@pytest.mark.slow
def test_two_preparations_at_once_refuse_one_another_in_a_line(
    plain_story: Path, tmp_path: Path
) -> None:
    space = moved_copy(Workspace.at(plain_story), tmp_path / "space").root
    # something holds DVC's lock, as another repro would
    holder = (
        "import sys; from dvc.repo import Repo\n"
        "with Repo('.').lock:\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], cwd=space, env=environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        done = endoprint("run", cwd=space)
        other.communicate("", timeout=30)
    assert done.returncode == 2
    assert done.stderr.startswith("endoprint: one `dvc repro` at a time; ")
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_the_story_told_again_makes_no_data_again_and_changes_no_answer(
    plain_story: Path, tmp_path: Path
) -> None:
    space = moved_copy(Workspace.at(plain_story), tmp_path / "space").root
    first = json.loads((space / ".endoprint/story.json").read_text())
    lock = (space / "dvc.lock").read_bytes()
    scores = (space / "scores/scores.parquet").read_bytes()
    done = endoprint("demo", "--json", cwd=space, block="prefect")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert (space / "dvc.lock").read_bytes() == lock
    assert again["steps"]["pretrain"] == first["steps"]["pretrain"]
    assert again["champion"] == first["champion"]
    figures = [
        [(row["model"], row["macro_f1"], row["model_sha256"]) for row in told["leaderboard"]]
        for told in (first, again)
    ]
    assert figures[0] == figures[1]
    assert (space / "scores/scores.parquet").read_bytes() == scores
