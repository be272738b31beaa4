"""Which cell stands in which sample: units, runs, labels, and the source atlas's flaws.

Three levels of confounding between exposure and run:

- `none`: every run holds every exposure, control included; each culture is spread over the runs.
- `partial`: control and the first four pathways are crossed like that; each exposure of the others
  has a run of its own.
- `complete`: one run per exposure, control included, as in the source atlas.

`as_published` adds what went wrong there (NOHA, run table): run 508 (RET_AGONIST) lost its tags,
so each line is one sample of unknown replicate; run 509 lost sample 2_CTL08A; hence 85 samples
instead of 90. About 2 % of replicate labels are swapped within line and run (inferred there from
3.3 % of cells whose tag and genotype disagreed on the line).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from endoprint.config import Refusal
from endoprint.simulate.config import SimulateConfig
from endoprint.simulate.law import CELL_TYPES, CONTROL, SHARE_OF_NEURONS, stream

Array = np.ndarray[Any, np.dtype[Any]]

LINES = ("CTL04E", "CTL08A", "CTL01A", "CTL02A")  # the source's, main arm first
EDCS = ("3-PBA", "BPA", "BPF", "DPHP", "MBzP", "MEP", "MIX", "TCP")
RUN_OF = {  # the source's run of each exposure
    "ESTROGEN_AGONIST": "491",
    "ESTROGEN_ANTAGONIST": "492",
    "ANDROGEN_AGONIST": "493",
    "ANDROGEN_ANTAGONIST": "494",
    "ARYL_HYD_AGONIST": "495",
    "ARYL_HYD_ANTAGONIST": "496",
    "LIVER-X_AGONIST": "497",
    "LIVER-X_ANTAGONIST": "498",
    "GLUCOCORT_AGONIST": "499",
    "GLUCOCORT_ANTAGONIST": "500",
    "THYROID_AGONIST": "501",
    "THYROID_ANTAGONIST": "502",
    "DMSO": "505",
    "RET_AGONIST": "508",
    "RET_ANTAGONIST": "509",
}
CROSSED_PATHWAYS = ("ESTROGEN", "GLUCOCORT", "LIVER-X", "RET")  # partial: share runs with control
POOLED, LOST = "RET_AGONIST", ("RET_ANTAGONIST", "CTL08A", "2")
SWAPPED_SHARE = 0.02
FIRST_CROSSED_RUN, FIRST_POOL_RUN, FIRST_NEW_RUN = 601, 701, 801  # numbers the source never used

# Columns of a plan: exposure and replicate as they truly are; label_replicate as it is written.
PLAN = ["exposure", "line", "replicate", "label_replicate", "run", "sample_id", "cell_type"]


def line_names(n: int) -> list[str]:
    """Return the first n lines: the source's four, then numbered ones."""
    return [LINES[i] if i < len(LINES) else f"SIM{i + 1:02d}" for i in range(n)]


def labelled_plan(config: SimulateConfig, exposures: tuple[str, ...], seed: int) -> pd.DataFrame:
    """Lay out the labelled cells, one row per cell in random order, columns `PLAN`."""
    rows = [
        (exposure, line, str(replicate))
        for line in line_names(config.lines)
        for replicate in range(1, config.replicates + 1)
        for exposure in exposures
        if not (config.as_published and (exposure, line, str(replicate)) == LOST)
    ]
    cells = _deal(pd.DataFrame(rows, columns=PLAN[:3]), config.cells, what="cells")
    turn = cells.groupby(PLAN[:3], sort=False).cumcount()
    crossed = (FIRST_CROSSED_RUN + turn % config.runs).astype(str)
    own = cells["exposure"].map(RUN_OF)
    if config.confounding == "complete" or config.as_published:
        cells["run"] = own
    elif config.confounding == "partial":
        pathway = cells["exposure"].str.rsplit("_", n=1).str[0]
        is_crossed = pathway.isin(CROSSED_PATHWAYS) | (cells["exposure"] == CONTROL)
        cells["run"] = crossed.where(is_crossed, own)
    else:
        cells["run"] = crossed
    cells["label_replicate"] = cells["replicate"]
    if config.as_published:
        _swap_replicates(cells, stream(seed, "swaps"))
        cells.loc[cells["exposure"] == POOLED, "label_replicate"] = None
    cells["sample_id"] = _sample_ids(cells, seed)
    return _finish(cells, stream(seed, "labelled order"))


def pool_plan(config: SimulateConfig, exposures: tuple[str, ...], seed: int) -> pd.DataFrame:
    """Lay out the pool: units of their own lines and runs, every exposure, nothing labelled."""
    rows = [
        (exposure, f"POOL{unit + 1:02d}", "1")
        for unit in range(config.pool_units)
        for exposure in exposures
    ]
    cells = _deal(pd.DataFrame(rows, columns=PLAN[:3]), config.pool_cells, what="pool_cells")
    turn = cells.groupby(PLAN[:3], sort=False).cumcount()
    cells["run"] = (FIRST_POOL_RUN + turn % config.runs).astype(str)
    cells["label_replicate"] = cells["replicate"]
    cells["sample_id"] = _sample_ids(cells, seed)
    return _finish(cells, stream(seed, "pool order"))


def new_plan(config: SimulateConfig, exposures: tuple[str, ...], seed: int) -> pd.DataFrame:
    """Lay out new units: each a line and a run of its own, every exposure and EDC, two controls.

    The second control sample is the null of an EDC's projection: DMSO against DMSO.
    """
    lines = line_names(config.lines + config.new_units)[config.lines :]
    rows = [
        (exposure, line, "1", f"{FIRST_NEW_RUN + unit}", tag)
        for unit, line in enumerate(lines)
        for tag, exposure in enumerate([*exposures, CONTROL, *EDCS])
    ]
    samples = pd.DataFrame(rows, columns=["exposure", "line", "replicate", "run", "tag"])
    rng = stream(seed, "new tags")  # a tag must not tell the exposure
    by_run = samples.groupby("run", sort=False)["tag"]
    tag = by_run.transform(lambda tags: rng.permutation(len(tags)))
    samples["sample_id"] = _spell(samples) + "_CMO" + (301 + tag).astype(str)
    cells = _deal(samples, config.new_cells, what="new_cells")
    cells["label_replicate"] = cells["replicate"]
    return _finish(cells, stream(seed, "new order"))


def cell_ids(run: pd.Series, seed: int, part: str) -> pd.Index:
    """Return barcodes with their run: `AAACCCTGTCGATTAC-1-491`; barcodes repeat across runs."""
    n = len(run)
    rng = stream(seed, "barcodes", part)
    number = np.empty(n, dtype=np.uint64)
    for name in sorted(set(run)):
        here = np.flatnonzero(run.to_numpy() == name)
        number[here] = rng.choice(2 * n, size=len(here), replace=False)
    scattered = (number * np.uint64(2654435761)) % np.uint64(2**32)  # odd factor: one to one
    digits = (scattered[:, None] >> np.arange(0, 32, 2, dtype=np.uint64)) & np.uint64(3)
    letters = np.frombuffer(b"ACGT", dtype="S1")[digits.astype(np.intp)]
    barcode = np.ascontiguousarray(letters).view("S16").ravel().astype(str)
    return pd.Index([f"{b}-1-{r}" for b, r in zip(barcode, run)])


def _deal(samples: pd.DataFrame, n_cells: int, *, what: str) -> pd.DataFrame:
    """Give every sample its share of the cells, as equal as can be. One row per cell."""
    if n_cells < len(samples):
        raise Refusal(
            "every sample holds at least one cell",
            f"{what}: {n_cells} for {len(samples)} samples",
            f"set {what} to {len(samples)} or more",
        )
    return samples.iloc[np.arange(n_cells) % len(samples)].reset_index(drop=True)


def _swap_replicates(cells: pd.DataFrame, rng: np.random.Generator) -> None:
    """Write 2 % of cells into another replicate's sample of the same line and run, in place.

    The first cell of each sample stays, so that no sample vanishes; none that was lost comes back.
    """
    key = ["exposure", "line"]
    is_first = ~cells.duplicated(PLAN[:3])
    may = np.flatnonzero(~is_first & (cells["exposure"] != POOLED))
    chosen = rng.choice(may, size=min(len(may), round(SWAPPED_SHARE * len(cells))), replace=False)
    present = cells.groupby(key)["replicate"].unique()
    for i in np.sort(chosen):
        exposure, line, replicate = cells.loc[i, PLAN[:3]]
        others = sorted(set(present[exposure, line]) - {replicate})
        cells.loc[i, "label_replicate"] = others[rng.integers(len(others))]


def _spell(cells: pd.DataFrame) -> pd.Series:
    """Spell as the source does, `{replicate}_{line}_{run}`; an unknown replicate is `NA`."""
    column = "label_replicate" if "label_replicate" in cells else "replicate"
    return cells[column].fillna("NA") + "_" + cells["line"] + "_" + cells["run"]


def _sample_ids(cells: pd.DataFrame, seed: int) -> pd.Series:
    """Spell as the source does; where a run holds several exposures, add the sample's tag."""
    spelled = _spell(cells)
    exposures = sorted(set(cells["exposure"]))
    is_crossed = cells.groupby("run")["exposure"].transform("nunique") > 1
    tag = stream(seed, "tags").permutation(len(exposures))
    number = cells["exposure"].map(dict(zip(exposures, 301 + tag))).astype(str)
    return spelled.where(~is_crossed, spelled + "_CMO" + number)


def _finish(cells: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Draw cell types and put the cells in no convenient order."""
    is_neuron = rng.random(len(cells)) < SHARE_OF_NEURONS
    cells["cell_type"] = np.where(is_neuron, *CELL_TYPES)
    return cells.iloc[rng.permutation(len(cells))][PLAN].reset_index(drop=True)
