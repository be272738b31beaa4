"""Small synthetic cells that every test can plant a signal in, and paths of the reference data."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from endoprint.workspace import Workspace

SHARED = Path(os.environ.get("ENDOPRINT_SHARED", Path(__file__).parents[2] / "shared"))


def planted_cells(
    *,
    exposures: tuple[str, ...] = ("DMSO", "LIVER-X_AGONIST", "RET_AGONIST"),
    n_units: int = 4,
    n_cells: int = 20,
    n_genes: int = 120,
    n_responders: int = 8,
    fold: float = 6.0,
    seed: int = 0,
) -> AnnData:
    """Curated cells: `n_cells` per unit and exposure; each exposure but DMSO raises its own genes.

    Counts are Poisson around gamma means; `fold=1` plants nothing.
    """
    rng = np.random.default_rng(seed)
    mean = rng.gamma(1.0, 2.0, n_genes)
    obs, rows = [], []
    for unit in range(n_units):
        for e, exposure in enumerate(exposures):
            raised = np.ones(n_genes)
            if exposure != "DMSO":
                raised[e * n_responders : (e + 1) * n_responders] = fold
            depth = rng.lognormal(0.0, 0.3, (n_cells, 1))
            rows.append(rng.poisson(depth * (mean * raised + 0.05)))
            obs += [
                {"exposure": exposure, "unit": f"u{unit}", "line": f"L{unit % 2}", "batch": "b0"}
            ] * n_cells
    counts = np.vstack(rows)
    counts[counts.sum(axis=1) == 0, 0] = 1
    frame = pd.DataFrame(obs)
    frame["sample"] = frame["unit"] + "|" + frame["exposure"]
    frame["cell_type"] = np.where(np.arange(len(frame)) % 2, "Neurons", "Progenitors")
    frame["n_counts"] = counts.sum(axis=1).astype(float)
    frame["n_genes"] = (counts > 0).sum(axis=1)
    frame.index = pd.Index([f"c{i:05d}" for i in range(len(frame))])
    order = rng.permutation(len(frame))  # cells come in no convenient order
    genes = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(1, n_genes + 1)])
    return AnnData(
        X=sparse.csr_matrix(counts[order].astype(np.float32)), obs=frame.iloc[order], var=genes
    )


@pytest.fixture
def planted() -> AnnData:
    return planted_cells()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden references, or a skip that says so."""
    if not SHARED.is_dir():
        pytest.skip(f"reference data absent: no folder {SHARED.name} beside the project")
    return SHARED


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables made: making them takes two seconds each time."""
    from endoprint import tracking
    from lab import bare_workspace

    made = bare_workspace(tmp_path_factory.mktemp("template"))
    tracking.client(made).search_experiments()
    return made.local / "mlflow.db"


@pytest.fixture
def space(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace with nothing tracked in it yet."""
    from lab import bare_workspace

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = bare_workspace(tmp_path / "space")
    made.local.mkdir()
    shutil.copy(empty_store, made.local / "mlflow.db")
    return made


@pytest.fixture
def lab(space: Workspace) -> Workspace:
    """A workspace with curated cells, a split, an audit and a lenient policy."""
    from lab import furnish

    return furnish(space, planted_cells(n_units=6, n_cells=8))
