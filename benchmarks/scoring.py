"""What scoring costs beside the model and reading, and whether its memory grows with the file.

`python benchmarks/scoring.py [--cells 50000 200000] [--genes 20000] [--detected 2800]
[--model logistic]`: each size
is scored once in a process of its own. `reading` is from disk to a sparse matrix, `digest` the md5
that makes out whether these bytes were scored before, `door` checks and names, `model` is
`predict_proba` and `novelty`, `told` adds up populations and drift; each in processor seconds of
its own thread. `overhead` is the share of the clock in which the model was not at work, which is
stricter than all but the model and reading: what is read beside the model costs no time. The
machine has to be idle for it. `overhead_cpu` is the share of processor seconds that went neither
into the model nor into reading. Memory is the process's peak, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

BLOCK_CELLS = 2500  # made once and repeated: what is measured does not depend on the values
TRAINED_ON = 600


def counts(n_cells: int, n_genes: int, n_detected: int, seed: int) -> sparse.csr_matrix:
    """Return counts with `n_detected` genes in every cell, the first genes oftener."""
    rng = np.random.default_rng(seed)
    weight = 1.0 / np.arange(1, n_genes + 1) ** 0.3
    order = np.argsort(rng.random((n_cells, n_genes), np.float32) ** (1 / weight), axis=1)
    indices = np.sort(order[:, -n_detected:], axis=1).astype(np.int32)
    data = rng.geometric(0.5, indices.size).astype(np.float32)
    indptr = np.arange(0, indices.size + 1, n_detected)
    return sparse.csr_matrix((data, indices.ravel(), indptr), shape=(n_cells, n_genes))


def write(path: Path, block: sparse.csr_matrix, n_cells: int) -> None:
    """Write `n_cells` as an h5ad, the block again and again, with int64 row pointers."""
    n = -(-n_cells // block.shape[0])
    genes = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(block.shape[1])])
    ids = [f"cell{i:07d}" for i in range(n_cells)]
    obs = pd.DataFrame({"unit": np.arange(n_cells) % 6}, index=ids).astype(str)
    obs["sample"] = obs["unit"]
    AnnData(obs=obs, var=genes).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["encoding-version"] = "csr_matrix", "0.1.0"
        group.attrs["shape"] = (n_cells, block.shape[1])
        per_cell = block.nnz // block.shape[0]
        n_values = n_cells * per_cell
        group["indptr"] = np.arange(0, n_values + 1, per_cell, dtype=np.int64)
        for name, values in (("data", block.data), ("indices", block.indices)):
            stored = group.create_dataset(name, (n_values,), values.dtype, chunks=(1 << 18,))
            for i in range(n):
                start, stop = i * block.nnz, min((i + 1) * block.nnz, n_values)
                stored[start:stop] = values[: stop - start]


# as cheap to fit as may be: what is measured is answering
FITTED_BY: dict[str, dict[str, Any]] = {
    "logistic": {"penalty": 0.1},
    "geneformer": {"layers": 2, "hidden": 64, "epochs": 1, "min_steps": 1},
}


def train(folder: Path, block: sparse.csr_matrix, name: str) -> None:
    """Fit a model on some cells of the block, exposures made up."""
    from endoprint.model import model_class

    part = block[:TRAINED_ON]
    i = np.arange(TRAINED_ON)
    obs = pd.DataFrame({"exposure": np.array(["DMSO", "A", "B"])[i % 3]}, index=i.astype(str))
    obs["unit"] = np.array(["u0", "u1", "u2", "u3"])[i // 150]
    obs["n_counts"], obs["n_genes"] = np.asarray(part.sum(axis=1)).ravel(), np.diff(part.indptr)
    names = [f"ENSG{i:011d}" for i in range(block.shape[1])]
    cells = AnnData(part, obs=obs, var=pd.DataFrame(index=names))
    found = model_class(name)
    model = found(found.Config.of(FITTED_BY[name], "config"))
    model.fit(cells[i < 450].copy(), cells[i >= 450].copy()).save(folder)


def measure(path: Path, model_folder: Path, out: Path) -> dict[str, Any]:
    """Score once in this process, timing the model, the reading and the door."""
    from endoprint import artefact, scoring, stored
    from endoprint import cells as door
    from endoprint.cells import CellsConfig
    from endoprint.model import load
    from endoprint.registry import Version
    from endoprint.scoring import inputs, populations

    spent = dict.fromkeys(("reading", "digest", "door", "model", "told"), 0.0)
    lasted = dict(spent)

    def timed(owner: Any, name: str, into: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def run(*given: Any, **named: Any) -> Any:
            began, clock = time.thread_time(), time.perf_counter()
            try:
                return inner(*given, **named)
            finally:
                spent[into] += time.thread_time() - began
                lasted[into] += time.perf_counter() - clock

        setattr(owner, name, run)

    model = load(model_folder)
    timed(stored.Stored, "part", "reading")
    timed(door, "to_score", "door")
    timed(inputs, "md5", "digest")
    timed(populations, "tell", "told")
    timed(type(model), "predict_proba", "model")
    timed(type(model), "novelty", "model")
    version = Version("bench", "1", "", artefact.digest(model_folder), model.name, {})
    config = CellsConfig(unit_keys=["unit"], sample_key="sample")
    began, wall = time.process_time(), time.perf_counter()
    job = scoring.plan(model, version, path, out, cells=config, is_begun=True)

    def describe(summary: scoring.ScoreSummary) -> list[str]:
        populations.tell(model, job, out)
        return []

    done = scoring.score_job(model, job, out, describe=describe)
    total, lasted_in_all = time.process_time() - began, time.perf_counter() - wall
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return {
        "model": model.name,
        "cells": done.n_cells,
        "wall_seconds": lasted_in_all,
        "cpu_seconds": total,
        **{f"{name}_cpu_seconds": value for name, value in spent.items()},
        "model_wall_seconds": lasted["model"],
        "overhead": 1 - lasted["model"] / lasted_in_all,
        "overhead_cpu": 1 - (spent["model"] + spent["reading"]) / total,
        "peak_gib": int(peak) * 1024 / 2**30,
    }


def main() -> None:
    """Print one line per size, and how memory compares."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cells", type=int, nargs="+", default=[50_000, 200_000])
    options.add_argument("--genes", type=int, default=20_000)
    options.add_argument("--detected", type=int, default=2_800)
    options.add_argument("--model", choices=list(FITTED_BY), default="logistic")
    options.add_argument("--measure", nargs=3, type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.measure:
        print(json.dumps(measure(*chosen.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        block = counts(BLOCK_CELLS, chosen.genes, chosen.detected, seed=0)
        train(top / "model", block, chosen.model)
        found = []
        for n_cells in chosen.cells:
            path = top / f"{n_cells}.h5ad"
            write(path, block, n_cells)
            os.sync()  # or its last gigabytes are written while it is read
            out = top / f"{n_cells}"  # of its own: where scores stand, nothing begins early
            words = [sys.executable, __file__, "--measure", path, top / "model", out]
            done = subprocess.run(
                list(map(str, words)), check=True, capture_output=True, text=True, env=os.environ
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(found[-1]), flush=True)
            path.unlink()
        growth = found[-1]["peak_gib"] / found[0]["peak_gib"] - 1
        print(f"memory of the largest against the smallest: {growth:+.1%}")


if __name__ == "__main__":
    main()
