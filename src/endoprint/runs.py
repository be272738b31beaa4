"""Reading back what runs logged, and finding what nothing needs any more."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from filelock import FileLock, Timeout

from endoprint import tracking
from endoprint.config import Refusal
from endoprint.workspace import Workspace


def finished(workspace: Workspace, kind: tracking.Kind, tags: Mapping[str, str]) -> list[str]:
    """Return the ids of the finished runs of a kind that carry these tags, newest first."""
    asked = [f"tags.kind = '{kind}'", "attributes.status = 'FINISHED'"]
    asked += [f"tags.{name} = '{value}'" for name, value in tags.items()]
    return [run.info.run_id for run in _search(workspace, " and ".join(asked))]


def final_metrics(workspace: Workspace, run_id: str) -> dict[str, float]:
    """Return the last value of every figure of a run."""
    return dict(tracking.client(workspace).get_run(run_id).data.metrics)


def tag(workspace: Workspace, run_id: str, name: str) -> str:
    """Return one tag of a run."""
    return str(tracking.client(workspace).get_run(run_id).data.tags[name])


def read_record(workspace: Workspace, run_id: str, name: str) -> Any:
    """Return the plain values that a run kept with `Run.record`."""
    with tempfile.TemporaryDirectory() as scratch:
        path = _download(workspace, run_id, f"{name}.json", scratch)
        return json.loads(path.read_text())


def read_text(workspace: Workspace, run_id: str, name: str) -> str:
    """Return a file of text that a run kept."""
    with tempfile.TemporaryDirectory() as scratch:
        return _download(workspace, run_id, name, scratch).read_text()


def read_table(workspace: Workspace, run_id: str, name: str) -> pd.DataFrame:
    """Return a table that a run kept with `Run.table`; its first column is the index."""
    with tempfile.TemporaryDirectory() as scratch:
        path = _download(workspace, run_id, f"tables/{name}.csv", scratch)
        return pd.read_csv(path, index_col=0, dtype={"unit": str, "truth": str, "sample": str})


def unneeded(workspace: Workspace) -> dict[str, str]:
    """Return run id -> status of the runs that failed or were killed: no version needs them."""
    return {
        run.info.run_id: run.info.status
        for status in ("FAILED", "KILLED")
        for run in _search(workspace, f"attributes.status = '{status}'")
    }


def delete(workspace: Workspace, run_ids: Sequence[str]) -> None:
    """Delete runs (MLflow keeps them restorable until its own garbage collection)."""
    for run_id in run_ids:
        tracking.client(workspace).delete_run(run_id)


def scratch(workspace: Workspace) -> list[Path]:
    """Return the folders of intermediate files that no process works in."""
    running = {run.info.run_id for run in _search(workspace, "attributes.status = 'RUNNING'")}
    return [
        path
        for path in sorted((workspace.local / "work").glob("[!.]*"))
        if path.name not in running and not _is_held(path)
    ]


def lock_of(folder: Path) -> FileLock:
    """Return the lock that whoever works in a folder holds; it dies with its process."""
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def _is_held(folder: Path) -> bool:
    try:
        with lock_of(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True


def torn(workspace: Workspace) -> list[Path]:
    """Return what writers that died left half-written, `.NAME.PID.part`.

    Under `data` and `.endoprint`; a writer that still lives keeps its own.
    """
    return [
        path
        for top in (workspace.root / "data", workspace.local / "models")
        for path in sorted(top.rglob(".*.part"))
        if not _is_being_written(path)
    ]


def _is_being_written(path: Path) -> bool:
    pid = path.name.removesuffix(".part").rpartition(".")[2]
    return not pid.isdigit() or psutil.pid_exists(int(pid))


def clear(paths: Sequence[Path]) -> None:
    """Remove intermediate files and folders."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _search(workspace: Workspace, asked: str) -> list[Any]:  # mlflow.entities.Run, untyped
    store = tracking.client(workspace)
    found = store.search_runs(
        [tracking.experiment(workspace, store)],
        filter_string=asked,
        order_by=["attributes.start_time DESC"],
        max_results=1000,
    )
    return list(found)


def _download(workspace: Workspace, run_id: str, name: str, into: str) -> Path:
    store = tracking.client(workspace)
    parent = Path(name).parent.as_posix()
    kept = {entry.path for entry in store.list_artifacts(run_id, parent.removeprefix("."))}
    if name not in kept:
        raise Refusal(
            f"run {run_id} keeps {name}", ", ".join(sorted(kept)) or "nothing", "fit again"
        )
    return Path(store.download_artifacts(run_id, name, into))
