"""A scoring that may be killed anywhere: what it begins with, and what it has to end in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from conftest import planted_cells
from endoprint import jobs, registry, scoring, tracking
from endoprint.cells import CellsConfig
from endoprint.model import ExposureModel
from endoprint.workspace import Workspace
from lab import bare_workspace, fit_and_track, furnish

N_TIMES = 214  # 10,272 cells, six parts, the last of 32 cells


def score(
    model: ExposureModel,
    version: registry.Version,
    where: str | Path,
    out: Path,
    *,
    cells: CellsConfig,
    layout: scoring.Layout | None = None,
    watch: scoring.Watch = scoring.silent,
) -> scoring.ScoreSummary:
    """Plan a job and do it, as one worker."""
    job = scoring.plan(model, version, where, out, cells=cells, layout=layout)
    return scoring.score_job(model, job, out, watch=watch)


def before_a_scoring(folder: Path) -> Workspace:
    """A workspace with a registered model and a file that it has not scored."""
    made = furnish(bare_workspace(folder), planted_cells(n_units=6, n_cells=8))
    registry.register(made, fit_and_track(made))
    cells = planted_cells(n_units=2, n_cells=8, seed=7)
    rows = np.tile(np.arange(cells.n_obs), N_TIMES)
    obs = pd.DataFrame(index=[f"c{i:06d}" for i in range(len(rows))])
    new = AnnData(sparse.csr_matrix(cells.X[rows]), obs=obs, var=cells.var[[]])
    new.write_h5ad(made.root / "new.h5ad")
    return made


def score_the_new_cells(workspace: str) -> object:
    model = f"models:/{Workspace.at(workspace).experiment}/1"
    return jobs.score(workspace, file="new.h5ad", out="out", model=model)


def scored(space: Workspace) -> Any:
    out, store = space.root / "out", tracking.client(space)
    summary = scoring.ScoreSummary.read(out / scoring.SUMMARY)
    rows = pd.read_parquet(out / scoring.SCORES, columns=["cell_id"])
    finished = store.search_runs(
        [tracking.experiment(space, store)],
        "tags.kind = 'score' and attributes.status = 'FINISHED'",
    )
    return {
        "bytes": summary.scores_sha256,
        "stands": scoring.finished(out, summary.job_key) is not None,
        "is_the_input": list(rows["cell_id"])
        == list(anndata.read_h5ad(space.root / "new.h5ad", backed="r").obs_names),
        "samples": json.loads((out / "samples.json").read_text()),
        "drift": json.loads((out / "drift.json").read_text()),
        "files": sorted(each.name for each in out.iterdir()),
        "n_runs": len(finished),
    }
