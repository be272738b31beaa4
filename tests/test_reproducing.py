"""A version is made again from its commit and its data, and compared with what was registered."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import TINY, a_workspace
from endoprint import blueprint, jobs
from endoprint.config import Refusal
from endoprint.jobs import reproducing
from endoprint.workspace import Workspace
from lab import moved_copy


def git(folder: Path, *words: str) -> str:
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
        ["git", "-C", str(folder), *name, *words], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in a repository of its own, with one registered fit of its only commit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        root = a_workspace(
            tmp_path_factory.mktemp("committed") / "space",
            params={**TINY, "pretrain": {}, "search": {}, "models": {"logistic": {}}},
        )
        (root / ".gitignore").write_text(blueprint.IGNORED)
        jobs.prepare(str(root))
        git(root, "init", "--quiet")
        git(root, "add", ".")
        git(root, "commit", "--quiet", "-m", "all of it")
        jobs.register(str(root), run_id=jobs.train(str(root), model="logistic"))
    return Workspace.at(root)


@pytest.fixture
def space(committed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return moved_copy(committed, tmp_path / "space")


@pytest.mark.slow
def test_a_version_is_made_again_to_the_byte_and_leaves_nothing_behind(space: Workspace) -> None:
    found = jobs.reproduce(str(space.root), version="1")
    assert found["is_reproduced"], found["lines"]
    assert found["is_byte_equal"]
    assert found["commit"] == git(space.root, "rev-parse", "HEAD").strip()
    assert set(found["data"]) >= {"data/raw/atlas.h5ad", "data/cells/cells.h5ad"}
    assert all(found["data"].values())
    assert "reproduced from commit" in found["lines"][0]
    assert git(space.root, "status", "--porcelain") == ""
    assert len(git(space.root, "worktree", "list").splitlines()) == 1
    assert list((space.local / "reproduce").iterdir()) == []


@pytest.mark.slow
def test_a_version_that_comes_out_otherwise_is_said_to(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = reproducing._write_values
    monkeypatch.setattr(
        reproducing,
        "_write_values",
        lambda *told: write(*told[:-1], {**told[-1], "penalty": 100.0}),
    )
    found = jobs.reproduce(str(space.root), version="1")
    assert not found["is_reproduced"]
    assert found["largest_difference"] > found["tolerance"]
    assert "not reproduced" in found["lines"][0]


@pytest.mark.slow
def test_what_cannot_be_made_again_is_refused_in_one_line(space: Workspace) -> None:
    root = str(space.root)
    with (space.root / "data/raw/atlas.h5ad").open("ab") as file:
        file.write(b"x")
    with pytest.raises(Refusal, match=r"atlas\.h5ad, other bytes by now"):
        jobs.reproduce(root, version="1")
    assert len(git(space.root, "worktree", "list").splitlines()) == 1
    (space.root / "params.yaml").write_text((space.root / "params.yaml").read_text() + "# more\n")
    changed = jobs.register(root, run_id=jobs.train(root, model="logistic"))
    with pytest.raises(Refusal, match="uncommitted changes"):
        jobs.reproduce(root, version=changed)
    shutil.rmtree(space.root / ".git")
    with pytest.raises(Refusal, match="git worktree"):
        jobs.reproduce(root, version="1")
