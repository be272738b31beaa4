"""Backbones as registered versions: what masked learning made here, found again by its address.

They stand under the registered model `endoprint-<task>-backbone`, apart from the models that
answer: nothing is ever live here, so a version has no alias, only its number. Tags say which
vocabulary it speaks and which units it has seen; its files are checked as every artefact is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from endoprint import registry, tracking
from endoprint.config import Refusal
from endoprint.fetched import fetch
from endoprint.workspace import Workspace

PREFIX = "models:/"
ADDRESS = re.compile(r"models:/(?P<name>[\w.-]+)/(?P<version>\d+)")
KIND = "backbone"


@dataclass(frozen=True)
class Backbone:
    """One registered backbone."""

    address: str  # for `checkpoint` in params.yaml
    label: str  # a sentence for the reader of a result
    run_id: str
    sha256: str  # of all its files together
    weights_sha256: str
    vocabulary_sha256: str
    units: list[str]  # biological units of the cells it was pre-trained on
    made: str  # UTC

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def register(workspace: Workspace, run_id: str, label: Mapping[str, Any]) -> Backbone:
    """Make the backbone that a run has logged a version; the same files keep theirs.

    `label`: what its `backbone.json` says.
    """
    store = tracking.client(workspace)
    tags = store.get_run(run_id).data.tags
    name = f"{workspace.experiment}-{KIND}"
    said = {
        "kind": KIND,
        "model_sha256": tags["model_sha256"],
        "weights_sha256": str(label["sha256"]),
        "vocabulary_sha256": str(label["vocabulary_sha256"]),
        "units": json.dumps(sorted(label["units"])),
        "label": str(label["label"]),
    }
    with registry.lock(workspace):
        if not store.search_registered_models(filter_string=f"name = '{name}'"):
            store.create_registered_model(name)
        stood = [each for each in versions(workspace) if each.sha256 == tags["model_sha256"]]
        if stood:
            return stood[0]
        with tracking.ambient(workspace):
            made = store.create_model_version(
                name,
                source=f"{PREFIX}{tags['model_id']}",
                run_id=run_id,
                tags=said,
                model_id=tags["model_id"],
            )
    return _backbone(made)


def versions(workspace: Workspace) -> list[Backbone]:
    """Return the backbones of this workspace, newest first."""
    name = f"{workspace.experiment}-{KIND}"
    found = tracking.client(workspace).search_model_versions(
        f"name = '{name}'", order_by=["version_number DESC"]
    )
    return [_backbone(each) for each in found if each.tags.get("kind") == KIND]


def of_run(workspace: Workspace, run_id: str) -> Backbone:
    """Return the backbone that a pre-training run has made."""
    sha256 = tracking.client(workspace).get_run(run_id).data.tags.get("model_sha256")
    for each in versions(workspace):
        if each.sha256 == sha256:
            return each
    raise Refusal(
        "a pre-training registers what it made", f"run {run_id} without", "pre-train again"
    )


def folder(workspace: Workspace, address: str) -> Path:
    """Return the folder of a registered backbone, brought here and checked."""
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        raise Refusal(
            "a backbone's address is models:/NAME/VERSION, which means the same for ever",
            address,
            "see `endoprint backbones`",
        )
    found = tracking.client(workspace).search_model_versions(f"name = '{parts['name']}'")
    known = {str(each.version): each for each in found if each.tags.get("kind") == KIND}
    if parts["version"] not in known:
        raise Refusal(
            "a backbone's address leads to one that was registered",
            f"{address}, with versions: {', '.join(sorted(known, key=int)) or 'none'}",
            "see `endoprint backbones`, or pre-train one",
        )
    return fetch(workspace, address, sha256=known[parts["version"]].tags["model_sha256"])


def _backbone(found: Any) -> Backbone:  # mlflow's ModelVersion, which carries no types
    made = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return Backbone(
        address=f"{PREFIX}{found.name}/{found.version}",
        label=found.tags["label"],
        run_id=str(found.run_id),
        sha256=found.tags["model_sha256"],
        weights_sha256=found.tags["weights_sha256"],
        vocabulary_sha256=found.tags["vocabulary_sha256"],
        units=json.loads(found.tags["units"]),
        made=made.isoformat(timespec="seconds"),
    )
