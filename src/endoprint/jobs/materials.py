"""What a fit is given: cells and split, what the workspace offers, room to work in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from endoprint.config import Refusal
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    from anndata import AnnData

    from endoprint.design import Split
    from endoprint.model import Resources, Watch


def cells_and_split(space: Workspace) -> tuple[AnnData, Split]:
    """Return the curated cells and their split."""
    from endoprint import cells
    from endoprint.design import Split

    if not space.split.is_file() or not space.cells.is_file():
        raise Refusal(
            "a fit needs curated cells and a split", "neither here yet", "run `dvc repro` first"
        )
    return cells.load(space.cells), Split.read(space.split)


def resources(space: Workspace) -> Resources:
    """Return what the workspace offers every model; what it lacks is None."""
    from endoprint import runs
    from endoprint.model import Resources

    has_tokens = space.tokens.is_file()  # else every fit makes its own, on its training cells
    backbone = None
    if space.params.checkpoint:
        backbone = space.root / Path(space.params.checkpoint).expanduser()
        if not (backbone / "config.json").is_file():
            raise Refusal(
                "checkpoint names a folder with config.json and model.safetensors",
                str(backbone),
                "mend the path in params.yaml",
            )
    elif has_tokens:
        sha256 = json.loads(space.vocabulary.read_text())["sha256"]
        found = runs.finished(space, "pretrain", {"vocabulary_sha256": sha256})
        backbone = (
            runs.fetch(space, found[0], "backbone", space.local / "backbones") if found else None
        )
    return Resources(
        vocabulary=space.vocabulary if has_tokens else None,
        tokens=space.tokens if has_tokens else None,
        backbone=backbone,
    )


def scratch(space: Workspace, run_id: str) -> Path:
    """Return the folder of a run's intermediate files, made here if absent."""
    folder = space.local / "work" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def both(first: Watch, second: Watch) -> Watch:
    """Tell two watchers."""

    def watch(epoch: int, metrics: dict[str, float]) -> None:
        first(epoch, metrics)
        second(epoch, metrics)

    return watch
