"""Small synthetic cells that every test can plant a signal in, and paths of the reference data."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from anndata import AnnData
from filelock import FileLock
from scipy import sparse

from children import ROOT, endoprint, python
from endoprint import blueprint, jobs
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


TINY = {
    "task": "tiny",
    "seed": 0,
    "score": "data/raw/new.h5ad",
    "simulate": {
        # little noise but the counts', so that the repository's own policy lets a model go live
        "cells": 720, "genes": 200, "median_umi": 6000.0,
        "line_sd": 0.05, "replicate_sd": 0.05, "run_sd": 0.05,
        "pool_cells": 80, "pool_units": 2, "new_cells": 60,
    },
    "cells": {
        "source": "data/raw/atlas.h5ad", "pool": "data/raw/pool.h5ad",
        "exposure_key": "condition", "control": "DMSO", "unit_keys": ["line", "replicate"],
        "line_key": "line", "batch_key": "run", "cell_type_key": "cell_type",
        "sample_key": "sample_id", "gene_id_key": "gene_ids",
    },
    "design": {"n_folds": 2},
    "tokens": {"vocabulary": "pool"},
    "pretrain": {"layers": 1, "hidden": 16, "ffn": 16, "epochs": 1},
    "search": {"model": "geneformer", "trials": 2},
    "models": {
        "logistic": {}, "signature": {},
        "geneformer": {"layers": 1, "hidden": 16, "ffn": 16, "epochs": 1, "min_steps": 1},
    },
}  # fmt: skip


def a_workspace(folder: Path, *, is_simulated: bool = True, params: dict = TINY) -> Path:
    """The demo's workspace in small: 15 exposures, 2 lines x 3 replicates, 720 cells x 200 genes.

    With the repository's policy. `is_simulated=False` leaves the raw cells to the story.
    """
    files = {
        "params.yaml": yaml.safe_dump(params, sort_keys=False),
        "dvc.yaml": blueprint.dvc_yaml(has_pool="pool" in params["cells"]),
        ".dvc/config": blueprint.DVC_CONFIG,
        ".dvcignore": ".endoprint\n",
        "registry/policy.yaml": (ROOT / "registry/policy.yaml").read_text(),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if is_simulated:
        jobs.simulate(str(folder))
    return folder


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


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that is made once in a test run, by whichever worker needs it first."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = base / name, base / f"{name}.made"
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def plain_story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny workspace after `endoprint demo`, where neither Prefect nor a network was in reach.

    Beside it: `plain_screen.txt`, what was printed, and `plain_network.txt`, the watch's log.
    Not to be changed: copy it with `lab.moved_copy`.
    """

    def walk(folder: Path) -> None:
        a_workspace(folder, is_simulated=False)
        log = folder.parent / "plain_network.txt"
        done = endoprint("demo", cwd=folder, block="prefect", network=log)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder.parent / "plain_screen.txt").write_text(done.stdout)

    return once(tmp_path_factory, "plain", walk)


@pytest.fixture(scope="session")
def flow_story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same workspace after `python -m flows.story`, a real flow on a real server."""
    if importlib.util.find_spec("prefect") is None:
        pytest.skip("the flows extra is not installed")

    def walk(folder: Path) -> None:
        a_workspace(folder, is_simulated=False)
        log = folder.parent / "flow_network.txt"
        done = python("-m", "flows.story", cwd=folder, network=log)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder.parent / "flow_screen.txt").write_text(done.stdout)

    return once(tmp_path_factory, "flow", walk)
