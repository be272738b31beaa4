"""A small workspace with a fitted, tracked model, for tests of tracking, registry and scoring."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from anndata import AnnData

from endoprint import artefact, curated, tracking
from endoprint.cells import CellsConfig
from endoprint.confounding import audit
from endoprint.design import DesignConfig, Split, make_split
from endoprint.lineage import Lineage
from endoprint.model import ExposureModel
from endoprint.models.logistic import Logistic, LogisticConfig
from endoprint.scoring import inputs
from endoprint.workspace import Workspace

POLICY = "must_beat_champion: {by: 0.0}\nallow_few_units: true\n"


def bare_workspace(root: Path, task: str = "toy") -> Workspace:
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(f"task: {task}\n")
    return Workspace.at(root)


def furnish(space: Workspace, cells: AnnData, *, n_test_units: int | None = 2) -> Workspace:
    curated.write(cells, space.cells)
    split = make_split(cells.obs, DesignConfig(n_test_units=n_test_units), seed=0)
    space.split.parent.mkdir(parents=True, exist_ok=True)
    split.write(space.split)
    found = audit(cells.obs, exposure="exposure", control="DMSO", units=["unit"], batch="batch")
    space.audit.write_text(json.dumps(found.to_json()))
    space.policy.parent.mkdir()
    space.policy.write_text(POLICY)
    return space


def fit_and_track(
    space: Workspace,
    *,
    model: ExposureModel | None = None,
    cells: AnnData | None = None,
    train: Sequence[int] | None = None,
    valid: Sequence[int] | None = None,
    trainer: str = "tom",
) -> str:
    """Fit on the development units (or rows told) and track it; return the run's id."""
    cells = cells if cells is not None else curated.load(space.cells)
    split = Split.read(space.split)
    parts = split.parts(cells.obs, None)
    model = model or Logistic(LogisticConfig(penalty=0.1, latent_width=4))
    model.fit(
        cells[parts.train if train is None else train].copy(),
        cells[parts.valid if valid is None else valid].copy(),
    )
    lineage = Lineage.of(
        space,
        model=model.name,
        seed=model.seed,
        exposures=model.exposures,
        units={
            "training": model.provenance["training_units"],
            "validation": model.provenance["validation_units"],
            "test": split.test,
        },
        split_hash=split.hash,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        tracking.run(
            space, name=model.name, kind="train", model=model.name, tags={"trainer": trainer}
        ) as run,
    ):
        model.save(folder)
        run.params(model.config)
        run.lineage(lineage)
        run.model(Path(folder), sha256=artefact.digest(Path(folder)))
        run.record("audit", json.loads(space.audit.read_text()))
        run.metrics({"macro_f1": 0.5})
    return run.run_id


def chunks(path: Path, config: CellsConfig, n_cells: int) -> Iterator[AnnData]:
    """Read a file as scoring does, some cells at a time."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        inputs.opened(path, config, Path(scratch)) as reading,
    ):
        for start in range(0, reading.found.n_cells, n_cells):
            yield reading.part(start, min(start + n_cells, reading.found.n_cells))


def misled(cells: AnnData) -> AnnData:
    """Cells whose exposures are other cells': whatever is fitted on them is worse."""
    told = cells.copy()
    told.obs["exposure"] = np.roll(cells.obs["exposure"].to_numpy(), 1)
    return told


def moved_copy(space: Workspace, to: Path) -> Workspace:
    """Return a copy of a workspace elsewhere, its store's addresses included."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()  # which knows runs by id alone: the copy's are elsewhere
    shutil.copytree(space.root, to)
    old, new = (each.as_uri() for each in (space.root, to))
    with closing(sqlite3.connect(to / ".endoprint/mlflow.db")) as store:
        for table, column in (
            ("experiments", "artifact_location"),
            ("runs", "artifact_uri"),
            ("logged_models", "artifact_location"),
            ("model_versions", "storage_location"),
        ):
            store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (old, new))
        store.commit()
    return Workspace.at(to)
