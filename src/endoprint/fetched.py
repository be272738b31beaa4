"""Bring a logged model here, looked at before and after: the only way an artefact comes in."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import mlflow
from filelock import FileLock
from mlflow.artifacts import download_artifacts
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from endoprint import artefact, tracking
from endoprint.config import Refusal
from endoprint.workspace import Workspace


def fetch(workspace: Workspace, address: str, *, sha256: str) -> Path:
    """Bring a logged model here and return its folder, checked (`artefact.check`) every time.

    `address` is one that MLflow resolves (`models:/...`). Nothing of an artefact that fails a
    check stays here, and nothing of it was run.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise Refusal("a version carries its sha256", repr(sha256), "register it again")
    kept = workspace.local / "models" / sha256
    if kept.is_dir():
        try:
            return artefact.check(kept, sha256=sha256)
        except Refusal:  # changed here since it was brought; the store's copy decides
            shutil.rmtree(kept)
    beside = kept.with_name(f".{sha256}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        with tracking.ambient(workspace):
            _look(address)
            download_artifacts(artifact_uri=address, dst_path=str(beside))
        artefact.check(beside, sha256=sha256)
        with FileLock(kept.with_suffix(".lock")):
            if not kept.is_dir():
                os.replace(beside, kept)
    except (mlflow.MlflowException, OSError) as error:
        raise Refusal(
            "a version's artefact can be fetched", str(error)[:200], "register it again"
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return artefact.check(kept, sha256=sha256)


def _look(address: str) -> None:
    """Refuse what does not belong into an artefact before any byte of it is brought here."""
    store = get_artifact_repository(address).repo
    if isinstance(store, LocalArtifactRepository):
        artefact.check_entries(
            Path(store.artifact_dir)
        )  # which alone shows links for what they are
        return
    listed, n_seen = store.list_artifacts(), 0
    while listed:
        entry, n_seen = listed.pop(), n_seen + 1
        artefact.check_entry(
            entry.path, is_folder=entry.is_dir, size=entry.file_size or 0, n_seen=n_seen
        )
        listed += store.list_artifacts(entry.path) if entry.is_dir else []
