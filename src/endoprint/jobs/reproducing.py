"""Make a version again from its commit and its data, in a worktree of its own, and compare."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from endoprint import progress
from endoprint.config import Refusal
from endoprint.workspace import Workspace

COMMAND = "import sys; sys.argv[0] = 'endoprint'; from endoprint.cli import main; main()"
MADE = ("data/cells/", "data/design/", "data/tokens/")  # by the stages of dvc.yaml
ELSEWHERE = ("MLFLOW_TRACKING_URI", "DVC_ROOT", "GIT_DIR", "GIT_WORK_TREE")  # never in a worktree


def reproduce(workspace: str, *, version: str, tolerance: float = 1e-4) -> dict[str, Any]:
    """Check out a version's commit, run `dvc repro`, fit again with its values and compare.

    `tolerance`: the largest difference of a development cell's probability that counts as the
    same; equal bytes are the same without asking. The software is that of today: what differs
    from the version's is said.
    """
    space = Workspace.open(workspace)
    from endoprint import registry, runs
    from endoprint.lineage import Lineage, software

    registry.settle(space)
    found, saved = registry.resolve(space, version)
    told = Lineage.model_validate_json(found.tags["lineage"])
    config = runs.read_record(space, found.run_id, "config")
    with progress.task(f"reproduce {found.label}"), _checked_out(space, told) as again:
        _bring_sources(space, again, told)
        _write_values(space, again, told.model, config)
        _run(again, sys.executable, "-m", "dvc", "repro", "--quiet")
        if told.units.get("pretraining") and again.params.pretrain:
            _run(again, sys.executable, "-c", COMMAND, "pretrain", "--json")
        _run(again, sys.executable, "-c", COMMAND, "train", told.model, "--json")
        compared = _compared(saved, again, tolerance)
        data = _data(again, told)
    newer = {
        name: f"{then} then, {software().get(name)} now"
        for name, then in told.versions.items()
        if software().get(name) != then
    }
    changed = [name for name, is_same in data.items() if not is_same]
    result = {
        "version": found.version,
        "commit": told.git_sha,
        **compared,
        "is_reproduced": compared["is_reproduced"] and not changed,
        "data": data,
        "software": newer,
        "tolerance": tolerance,
    }
    return {**result, "lines": _lines(found.label, result)}


@contextmanager
def _checked_out(space: Workspace, told: Any) -> Iterator[Workspace]:
    """Give the workspace as it stood at a lineage's commit, in a worktree that goes afterwards."""
    if told.git_sha is None or told.is_dirty is not False:
        got = "one outside git" if told.git_sha is None else "one fitted on uncommitted changes"
        raise Refusal(
            "a version is made again from its commit", got, "commit, train and register again"
        )
    top = Path(_git(space.root, "rev-parse", "--show-toplevel").strip())
    tree = space.local / "reproduce" / f"{told.git_sha[:12]}.{os.getpid()}"
    tree.parent.mkdir(parents=True, exist_ok=True)
    _git(top, "worktree", "add", "--detach", "--quiet", str(tree), told.git_sha)
    try:
        yield Workspace.at(tree / space.root.relative_to(top))
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        _git(top, "worktree", "prune")


def _bring_sources(space: Workspace, again: Workspace, told: Any) -> None:
    """Link the files that no stage makes; their bytes must be those of then."""
    from endoprint.cells import md5

    cells = again.params.cells
    named = {str(cells[key]) for key in ("source", "pool") if cells.get(key)}
    for name in sorted(named | set(told.inputs)):
        source, place = space.root / name, again.root / name
        if name.startswith(MADE) or place.exists():
            continue
        if not source.exists() or (source.is_file() and md5(source) != told.inputs.get(name)):
            raise Refusal(
                "a version is made again from the bytes it was made from",
                f"{name}, {'other bytes by now' if source.exists() else 'gone'}",
                f"bring back the file of md5 {told.inputs.get(name, 'unknown')}",
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(source.resolve())
    fetched = space.local / "checkpoints"  # once; their digests are checked
    if fetched.is_dir() and again.params.checkpoint:
        again.local.mkdir(exist_ok=True)
        (again.local / fetched.name).symlink_to(fetched.resolve())


def _write_values(
    space: Workspace, again: Workspace, model: str, config: Mapping[str, Any]
) -> None:
    """Let the model have the values its run had: a search's winner stands in no commit."""
    from endoprint import backbones

    path = again.root / "params.yaml"
    values = yaml.safe_load(path.read_text())
    if str(values.get("checkpoint") or "").startswith(backbones.PREFIX):
        # registered in the store of now, which the worktree does not see
        values["checkpoint"] = str(backbones.folder(space, values["checkpoint"]))
    values["models"] = {model: dict(config)}
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def _run(again: Workspace, *command: str) -> None:
    kept = {name: value for name, value in again.environment().items() if name not in ELSEWHERE}
    package = Path(_git(again.root, "rev-parse", "--show-toplevel").strip()) / "src"
    if (package / "endoprint").is_dir():  # the code of then, where it is in the same repository
        kept["PYTHONPATH"] = str(package)
    done = subprocess.run(
        command, cwd=again.root, env=kept, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Refusal(
            "what made a version runs again",
            said[-1][:300] if said else f"exit status {done.returncode}",
            "see whether today's software still suits that commit",
        )


def _compared(saved: Path, again: Workspace, tolerance: float) -> dict[str, Any]:
    """Compare two saved models: by their bytes, else by their answers on development cells."""
    from endoprint import artefact
    from endoprint.cells import load
    from endoprint.design import Split
    from endoprint.model import load as load_model

    # a backbone that was pre-trained on the way is an artefact as well
    (head,) = again.local.glob(f"artifacts/models/*/artifacts/{artefact.MODEL}/model.json")
    made = head.parent
    if artefact.digest(made) == artefact.digest(saved):
        same = {"is_byte_equal": True, "largest_difference": 0.0, "agreement": 1.0}
        return {**same, "is_reproduced": True}
    cells = load(again.cells)
    parts = Split.read(again.split).parts(cells.obs, None)
    known = cells[[*parts.train, *parts.valid]].copy()  # the test units stay shut
    then, now = (load_model(folder).predict_proba(known) for folder in (saved, made))
    if list(then.columns) != list(now.columns):
        raise Refusal(
            "a model made again tells the same exposures apart",
            ", ".join(now.columns),
            "check the data",
        )
    difference = float((then - now).abs().to_numpy().max())
    return {
        "is_byte_equal": False,
        "largest_difference": difference,
        "agreement": float((then.idxmax(axis=1) == now.idxmax(axis=1)).mean()),
        "is_reproduced": difference <= tolerance,
    }


def _data(again: Workspace, told: Any) -> dict[str, bool]:
    """Return path -> whether it came out, or was brought, with the bytes of then."""
    from endoprint.lineage import input_hashes

    now, _ = input_hashes(again)
    return {name: now.get(name) == md5 for name, md5 in told.inputs.items()}


def _lines(label: str, result: Mapping[str, Any]) -> list[str]:
    verb = "reproduced" if result["is_reproduced"] else "not reproduced"
    how = (
        "to the byte"
        if result["is_byte_equal"]
        else f"probabilities differ by at most {result['largest_difference']:.2g} "
        f"(tolerance {result['tolerance']:g}); {result['agreement']:.1%} of calls agree"
    )
    lines = [f"{label}: {verb} from commit {result['commit'][:12]}; {how}"]
    lines += [f"  {name}: other bytes" for name, is_same in result["data"].items() if not is_same]
    return lines + [f"  {name}: {said}" for name, said in result["software"].items()]


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        raise Refusal(
            "a version is made again in a git worktree",
            (done.stderr.strip().splitlines() or ["git failed"])[-1],
            "check that the workspace is in a repository that has the commit",
        )
    return done.stdout
