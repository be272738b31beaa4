"""How fast an h5ad becomes tokens on disk, and in how much memory.

The reference is Geneformer's own tokeniser end to end on the same shape (20,000 cells x 20,000
genes, about 2,800 genes per cell, lzf): 1,137-1,218 cells/s at its best setting, peak 4.0 GB, two
cores. Run alone on the machine: `python benchmarks/tokenise.py [--dictionaries FOLDER]`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import psutil
from scipy import sparse

from endoprint.tokens import Vocabulary, tokenize_file

UPSTREAM_CELLS_PER_SECOND = 1218.0  # the best of its runs


def cells(n_cells: int, genes: tuple[str, ...], seed: int = 0) -> anndata.AnnData:
    """Poisson counts around log-normal means: about 2,800 genes per cell of 20,000."""
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(-3.67, 2.2, len(genes)).clip(None, 200)
    depth = rng.lognormal(0.35, 0.35, (n_cells, 1))
    rows = [
        sparse.csr_matrix(rng.poisson(depth[start : start + 500] * mean).astype(np.float32))
        for start in range(0, n_cells, 500)
    ]
    obs = pd.DataFrame(index=[f"cell{i:07d}" for i in range(n_cells)])
    counts = sparse.csr_matrix(sparse.vstack(rows))
    obs["n_counts"] = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=list(genes)))


def measure(path: Path, out: Path, vocabulary: Path) -> dict[str, float]:
    """Tokenise once in this process; seconds exclude imports, peak memory includes them."""
    start = psutil.Process().memory_info().rss
    began, busy = time.perf_counter(), time.process_time()
    made = tokenize_file(path, out, Vocabulary.read(vocabulary))
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    # not getrusage: its peak is inherited from the process that started this one
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return {
        "cells_per_second": made.n_cells / seconds,
        "times_upstream": made.n_cells / seconds / UPSTREAM_CELLS_PER_SECOND,
        "seconds": seconds,
        "cpu_seconds": busy,  # other work on the machine changes this less
        "peak_gib": peak / 2**30,
        "peak_above_imports_gib": (peak - start) / 2**30,
        "mean_n_tokens": made.mean_n_tokens,
        "bytes_per_token": out.stat().st_size / (made.mean_n_tokens * made.n_cells),
    }


def main() -> None:
    """Print one JSON line per compression and number of cells."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cells", type=int, nargs="+", default=[20_000])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--vocabulary", default="v2")
    options.add_argument("--dictionaries", help="folder of official ones; else one is fitted")
    options.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.measure:
        print(json.dumps(measure(*map(Path, chosen.measure))))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        genes = tuple(f"ENSG9{i:010d}" for i in range(20_000))  # no real ones
        if chosen.dictionaries:
            vocabulary = Vocabulary.load(chosen.vocabulary, chosen.dictionaries)
            genes = vocabulary.genes[:19_000] + genes[:1_000]  # some that it does not know
        else:
            vocabulary = Vocabulary.fit(cells(2_000, genes, seed=1), max_length=4096)
        vocabulary.write(place / "vocabulary.json")
        for n_cells in chosen.cells:
            made = cells(n_cells, genes)
            for compression in ("lzf", None):
                path = place / f"{n_cells}.{compression}.h5ad"
                made.write_h5ad(path, compression=compression)
                for _ in range(chosen.repeats):  # a process each: peak memory is its own
                    files = [path, place / "tokens.parquet", place / "vocabulary.json"]
                    line = subprocess.run(
                        [sys.executable, __file__, "--measure", *map(str, files)],
                        check=True,
                        capture_output=True,
                        text=True,
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                    ).stdout
                    about = {"compression": compression, "n_cells": n_cells}
                    about["genes_per_cell"] = round(made.X.nnz / n_cells)
                    print(json.dumps({**about, **json.loads(line)}), flush=True)
                path.unlink()


if __name__ == "__main__":
    main()
