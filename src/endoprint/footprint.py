"""How much memory a model needs to score cells: asked of a fresh process that holds nothing else.

`python -m endoprint.footprint MODEL_FOLDER CELLS` is that process. Whoever judges several models
at once holds all of them, and its own memory says nothing about any one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from anndata import AnnData

from endoprint import curated
from endoprint.config import Refusal
from endoprint.lineage import metered
from endoprint.model import load


def peak_memory_gib(folder: Path, cells: AnnData, *, scratch: Path) -> float:
    """Return the most memory resident while a process loads a checked model and scores cells.

    Interpreter, libraries and cells are part of it; it costs some seconds of imports. `scratch`:
    where the cells are written meanwhile.
    """
    ours = f".{os.getpid()}.part"  # by which `gc` knows what a killed process left
    with tempfile.TemporaryDirectory(ours, ".footprint", dir=scratch) as place:
        written = Path(place) / "cells.h5ad"
        curated.write(cells, written)
        done = subprocess.run(
            [sys.executable, "-m", "endoprint.footprint", str(folder), str(written)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        said = (done.stderr.strip() or "no word").splitlines()[-1][:200]
        raise Refusal(
            "a version under a ceiling of memory is weighed in a process of its own",
            f"exit status {done.returncode}: {said}",
            "see to that, or lift `peak_memory_gib` in registry/policy.yaml; then promote again",
        )
    return float(done.stdout.split()[-1])  # the last word: libraries may speak before


def _weigh(folder: Path, cells: Path) -> float:
    with metered() as meter:
        load(folder).predict_proba(curated.load(cells))
    return meter.cost.peak_memory_gib


if __name__ == "__main__":
    sys.stdout.write(f"{_weigh(Path(sys.argv[1]), Path(sys.argv[2]))}\n")
