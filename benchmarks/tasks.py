"""The tasks that costs are compared on: real cells where a folder of them is given, and simulated.

Every task holds out what its design allows: a donor (interferon in blood cells, Kang 2018), a
plate (dexamethasone in a lung line, Cao 2018; plates are no biological units), two cultures of six
(simulated). How the real files are read stands in `examples/*/params.yaml`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from anndata import AnnData

from endoprint import cells
from endoprint.cells import CellsConfig
from endoprint.config import read_params
from endoprint.design import DesignConfig, make_split
from endoprint.simulate import SimulateConfig, simulate

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# name of the task -> (its example, its file)
REAL = {
    "kang": ("kang-interferon", "kang_ifnb_muscat_example.h5ad"),
    "a549": ("a549-dexamethasone", "a549_dex_sciCAR_scAI.h5ad"),
}
# Five of the simulator's fifteen, named before anything was measured: control and the agonists of
# four nuclear receptors, none of them the largest response (retinoic acid)
FIVE = (
    "DMSO",
    "ANDROGEN_AGONIST",
    "ESTROGEN_AGONIST",
    "GLUCOCORT_AGONIST",
    "THYROID_AGONIST",
)
# 2,000 cells of five exposures, 1,213 genes detected per cell
SIMULATED = SimulateConfig(cells=6000, genes=3000, median_umi=2500, pool_cells=0)
SIMULATED_CELLS = CellsConfig(
    exposure_key="condition",
    control="DMSO",
    unit_keys=["line", "replicate"],
    line_key="line",
    batch_key="run",
    cell_type_key="cell_type",
    sample_key="sample_id",
    gene_id_key="gene_ids",
)


@dataclass(frozen=True)
class Fold:
    """One thing held out: cells to fit on, to stop early by, and to judge by."""

    task: str
    name: str  # what is held out
    train: AnnData
    valid: AnnData
    held_out: AnnData


def real(task: str, folder: Path, seed: int = 0) -> Iterator[Fold]:
    """Read a public data set as its example does; one fold per donor or plate, in name order."""
    example, file = REAL[task]
    params = read_params(EXAMPLES / example / "params.yaml")
    config = CellsConfig.of({**params.cells, "source": str(folder / file)}, where="cells")
    known, _ = cells.curate(cells.read(config.source, config), config)
    split = make_split(known.obs, params.section("design", DesignConfig), seed)
    for number in sorted(range(split.n_folds), key=lambda n: split.folds[n]):
        parts = split.parts(known.obs, number)
        yield Fold(
            task,
            "+".join(split.folds[number]),
            *(known[at].copy() for at in (parts.train, parts.valid, parts.held_out)),
        )


def simulated(config: SimulateConfig = SIMULATED, seed: int = 0) -> Iterator[Fold]:
    """Draw five exposures at the easy difficulty; one fold: development against test units."""
    drawn = simulate(config, seed).cells
    drawn = drawn[np.isin(drawn.obs["condition"], FIVE)].copy()
    known, _ = cells.curate(drawn, SIMULATED_CELLS)
    split = make_split(known.obs, DesignConfig(), seed)
    parts = split.parts(known.obs, None)
    yield Fold(
        "simulator",
        "+".join(split.test),
        *(known[at].copy() for at in (parts.train, parts.valid, parts.held_out)),
    )
