"""The two public workspaces under examples/: they parse, and they reach what their pages claim."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from children import ROOT, endoprint, environment
from endoprint import blueprint
from endoprint.cells import CellsConfig
from endoprint.config import Params
from endoprint.design import DesignConfig
from endoprint.model import model_class
from endoprint.policy import read_policy
from endoprint.tokens import TokensConfig
from endoprint.workspace import Workspace

FILES = {
    "kang-interferon": "kang_ifnb_muscat_example.h5ad",
    "a549-dexamethasone": "a549_dex_sciCAR_scAI.h5ad",
}
CHEAP = ("logistic", "signature")
OWNERS = {"cells": CellsConfig, "design": DesignConfig, "tokens": TokensConfig}
# an absolute path of some machine: its roots, or a drive
MACHINE = re.compile(r"(?<![\w.])/(?:home|work|root|tmp|mnt|Users|usr)/|\b[A-Z]:\\")
examples = pytest.mark.parametrize("name", FILES)


def folder_of(name: str) -> Path:
    return ROOT / "examples" / name


def kept_by_git(name: str) -> list[Path]:
    """What a clone holds of an example: everything but data and local state."""
    ours = folder_of(name)
    ignored = {"data", ".endoprint", "scores", "tmp", "cache"}
    files = (path for path in ours.rglob("*") if path.is_file())
    return [path for path in files if not ignored & set(path.relative_to(ours).parts)]


# -- what stands in the folder ------------------------------------------------------------------
@examples
def test_every_value_is_one_its_owner_knows(name: str) -> None:
    params = Workspace.at(folder_of(name)).params
    for section, config in OWNERS.items():
        params.section(section, config)
    for model, values in params.models.items():
        model_class(model).Config.of(values, where=f"models.{model}")
    assert list(params.models) == ["logistic", "signature", "geneformer"]
    assert not params.simulate, "an example never judges simulated cells"


@examples
def test_a_new_workspace_would_have_the_same_pipeline(name: str) -> None:
    ours = folder_of(name)
    assert (ours / "dvc.yaml").read_text() == blueprint.dvc_yaml(has_pool=False)
    assert (ours / ".dvc/config").read_text() == blueprint.DVC_CONFIG
    assert (ours / ".gitignore").read_text() == blueprint.IGNORED


@examples
def test_the_lock_is_of_the_values_that_stand_there(name: str) -> None:
    ours = folder_of(name)
    locked = yaml.safe_load((ours / "dvc.lock").read_text())["stages"]
    values = yaml.safe_load((ours / "params.yaml").read_text())
    for stage in locked.values():
        for key, value in stage["params"]["params.yaml"].items():
            assert value == values[key]


@examples
def test_no_policy_lets_so_few_units_through(name: str) -> None:
    policy = read_policy(Workspace.at(folder_of(name)).policy)
    assert policy.baselines == ("logistic",)
    assert not policy.allow_few_units
    assert policy.confounded == "hold"


@examples
def test_no_path_of_a_machine_and_no_data_is_kept(name: str) -> None:
    for path in kept_by_git(name):
        assert path.stat().st_size < 20_000, f"{path.name} is no value, rule or page"
        assert not MACHINE.search(path.read_text()), path


@examples
def test_git_keeps_what_a_clone_needs_and_hides_what_a_run_leaves(name: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    left = [
        "data/raw/cells.h5ad",
        "data/cells/cells.h5ad",
        ".endoprint/mlflow.db",
        ".dvc/tmp/lock",
    ]
    needed = [str(path.relative_to(folder_of(name))) for path in kept_by_git(name)]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *left, *needed],
        cwd=folder_of(name), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == left, done.stderr


@examples
def test_the_page_of_an_example_names_its_source_and_its_command(name: str) -> None:
    page = (folder_of(name) / "README.md").read_text()
    assert f"endoprint run --workspace examples/{name} --file" in page
    assert re.search(r"\b[0-9a-f]{64}\b", page), "the file is told by its sha256"
    assert len(page.splitlines()) <= 40


@examples
def test_without_its_cells_an_example_says_how_to_link_them(name: str, tmp_path: Path) -> None:
    space = copy_of(name, tmp_path)
    done = endoprint("run", "--workspace", str(space))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "endoprint run --file PATH" in done.stderr


# -- what it comes to ---------------------------------------------------------------------------
def copy_of(name: str, folder: Path) -> Path:
    """The example as a clone has it, elsewhere, with the models that fit in seconds."""
    space = folder / name
    for path in kept_by_git(name):
        to = space / path.relative_to(folder_of(name))
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    values = yaml.safe_load((space / "params.yaml").read_text())
    values["models"] = {model: values["models"][model] for model in CHEAP}
    (space / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return space


class Told:
    """An example after `endoprint run`: its screen and what it left."""

    def __init__(self, space: Path, screen: str) -> None:
        self.space, self.screen = space, screen
        self.board = self._json("leaderboard")
        self.story = self._json("story")
        self.verdict = self._json("verdict")
        self.page = (space / ".endoprint/leaderboard.html").read_text()
        self.models = {row["model"]: row for row in self.board["models"]}

    def _json(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.space / f".endoprint/{name}.json").read_text())
        return found


def run(name: str, folder: Path, shared: Path) -> Told:
    space = copy_of(name, folder)
    file = shared / "data/real" / FILES[name]
    done = endoprint("run", "--workspace", str(space), "--file", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    return Told(space, done.stdout)


@pytest.fixture(scope="module")
def kang(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Told:
    return run("kang-interferon", tmp_path_factory.mktemp("kang"), shared)


@pytest.fixture(scope="module")
def a549(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Told:
    return run("a549-dexamethasone", tmp_path_factory.mktemp("a549"), shared)


@pytest.mark.slow
def test_interferon_is_told_on_a_donor_never_seen(kang: Told) -> None:
    logistic = kang.models["logistic"]
    assert set(logistic["by_unit"]) == {"101", "107"}
    assert logistic["macro_f1"] >= 0.985
    assert logistic["auroc_macro"] >= 0.999
    assert min(logistic["by_unit"].values()) >= 0.98
    assert kang.models["signature"]["macro_f1"] < logistic["macro_f1"]


@pytest.mark.slow
def test_two_donors_promote_nothing_and_the_reason_is_said(kang: Told) -> None:
    assert kang.verdict["decision"] == "hold"
    assert kang.verdict["champion"] is None
    assert kang.verdict["was_opened"] is False
    assert kang.verdict["reasons"][0].startswith("no test units")
    assert kang.board["replicated"] is True
    assert "n = 2 units: no interval" in " ".join(kang.screen.split())
    assert "batch unknown" in kang.screen
    assert "Nothing is live." in kang.screen


@pytest.mark.slow
def test_dexamethasone_is_told_by_the_hour(a549: Told) -> None:
    logistic = a549.models["logistic"]
    assert set(logistic["by_unit"]) == set("ABCDE")
    assert logistic["balanced_accuracy"] >= 0.92
    assert logistic["auroc_macro"] >= 0.98


@pytest.mark.slow
def test_replicated_false_stands_before_anything_else(a549: Told) -> None:
    said = [line for line in a549.screen.splitlines() if line.strip()]
    assert said[1].startswith("STOP replicated: false.")  # the first is the section's head
    assert "replicated: false" in a549.page
    assert a549.page.index("replicated: false") < a549.page.index("macro-F1")
    assert a549.board["verdict"][0]["text"].startswith("replicated: false")
    assert a549.story["replicated"] is False
    assert a549.story["reasons"][0].startswith("replicated: false")
    assert a549.verdict["decision"] == "hold"
    assert a549.verdict["champion"] is None
    again = endoprint("train", "signature", "--workspace", str(a549.space))
    assert again.stdout.startswith("replicated: false")


@pytest.mark.slow
def test_library_sizes_are_the_true_ones(a549: Told) -> None:
    curation = json.loads((a549.space / "data/cells/curation.json").read_text())["cells"]
    assert curation["library_size"] == "implied_total_counts"
    assert curation["removed_genes"] == {"mouse-style symbol": 32}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_bytes_are_those_of_the_committed_lock(
    name: str, request: pytest.FixtureRequest
) -> None:
    told: Told = request.getfixturevalue(name.split("-")[0])
    locked = yaml.safe_load((folder_of(name) / "dvc.lock").read_text())
    assert yaml.safe_load((told.space / "dvc.lock").read_text()) == locked
    again = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=told.space, capture_output=True, text=True, check=False,
        env=Workspace.at(told.space).environment() | environment(),
    )  # fmt: skip
    assert "Data and pipelines are up to date." in again.stdout


@pytest.mark.slow
def test_unlabelled_cells_are_scored_by_a_version_that_is_named(
    kang: Told, shared: Path, tmp_path: Path
) -> None:
    import anndata as ad

    cells = ad.read_h5ad(shared / "data/real" / FILES["kang-interferon"])
    truth = cells.obs.pop("group_id")
    cells.write_h5ad(tmp_path / "new.h5ad")
    words = ("score", str(tmp_path / "new.h5ad"), str(tmp_path / "scores"))
    where = ("--workspace", str(kang.space))
    refused = endoprint(*words, *where)
    assert refused.returncode == 2
    assert "with versions: 1" in refused.stderr
    assert not (tmp_path / "scores").exists()
    done = endoprint(*words, *where, "--model", "models:/endoprint-interferon/1")
    assert done.returncode == 0, done.stderr
    assert "Sample stim107 (306 cells) looks exposed to interferon-beta" in done.stdout
    scores = pd.read_parquet(tmp_path / "scores/scores.parquet")
    assert list(scores["cell_id"]) == list(cells.obs_names)
    is_called = scores["call"].notna().to_numpy()
    called = scores["call"].map({"ctrl": "ctrl", "interferon-beta": "stim"})
    assert (called[is_called].to_numpy() == truth[is_called].astype(str).to_numpy()).mean() > 0.98


def test_params_are_read_as_written() -> None:
    """The donor is read by a pattern, and hours become names, whatever YAML thinks of `0`."""
    a549 = Params.of(
        yaml.safe_load((folder_of("a549-dexamethasone") / "params.yaml").read_text()), "params"
    )
    aliases = a549.section("cells", CellsConfig).aliases
    assert aliases["0"] == a549.cells["control"] == "0h"
    kang = Workspace.at(folder_of("kang-interferon")).params.section("cells", CellsConfig)
    found = [re.search(kang.unit_pattern or "", name) for name in ("ctrl101", "stim107")]
    assert [match.group(1) for match in found if match] == ["101", "107"]
