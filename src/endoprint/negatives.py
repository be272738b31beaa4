"""Models made blind, judged like any other: what must not be possible, and what must not suffice.

`controls` makes the cells (or the blind model); here they are fitted and judged (judging rule 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anndata import AnnData

from endoprint import controls, judge
from endoprint.config import Refusal
from endoprint.design import DesignConfig, make_split
from endoprint.paired import FEWEST_FOR_INTERVAL

if TYPE_CHECKING:
    from endoprint.design import Split


FEWEST_UNITS_PER_BATCH = 3  # two to fit on and one to judge by


def shuffled_control(
    build: judge.Build,
    cells: AnnData,
    split: Split,
    *,
    seed: int = 0,
    folds: Sequence[int] | None = None,
) -> controls.Control:
    """Judge the same model after permuting exposures among each unit's samples (judging rule 5).

    Above chance means that something other than the exposure leaks from training to held-out.
    """
    found = judge.cross_fit(build, controls.shuffled(cells, seed=seed), split, folds=folds)
    return _control("shuffled labels", found, asks_for_units=True)


def depth_control(
    cells: AnnData, split: Split, *, seed: int = 0, folds: Sequence[int] | None = None
) -> controls.Control:
    """Judge a model that sees only the number of counts and of genes of a cell."""
    found = judge.cross_fit(lambda: controls.DepthOnly(seed=seed), cells, split, folds=folds)
    return _control("depth only", found)


def gene_controls(
    build: judge.Build, cells: AnnData, split: Split, *, folds: Sequence[int] | None = None
) -> list[controls.Control]:
    """Judge the same model on parts of the genes, leaving out parts that were not measured.

    Published targets only; targets removed; mitochondrial and ribosomal genes only.
    """
    targets = controls.target_genes(cells)
    housekeeping = controls.mitochondrial_and_ribosomal(cells)
    views: list[tuple[str, AnnData]] = []
    if targets:
        views.append(("targets only", controls.only_genes(cells, targets)))
        views.append(("targets removed", controls.without_genes(cells, targets)))
    if housekeeping:
        only = controls.only_genes(cells, housekeeping)
        views.append(("mitochondrial and ribosomal only", only))
    return [
        _control(name, judge.cross_fit(build, view, split, folds=folds)) for name, view in views
    ]


def batch_probe(
    build: judge.Build, cells: AnnData, *, control: str, seed: int = 0
) -> controls.Control | str:
    """Judge how well a model tells the batches of control cells apart, on units it never saw.

    Where batches are told, whatever tells them is there to be mistaken for an exposure. Asked only
    where at least two batches each hold control cells of several units; else the reason is
    returned: batch and unit are `not separable`.
    """
    vehicle = cells[(cells.obs["exposure"].astype(str) == control).to_numpy()].copy()
    batch = vehicle.obs["batch"].astype(str) if "batch" in vehicle.obs else None
    unit = vehicle.obs["unit"].astype(str)
    if batch is None or not (batch != "").any():
        return "batch probe: batch unknown"
    n_units = unit[unit != ""].groupby(batch).nunique()
    repeated = n_units.index[n_units >= FEWEST_UNITS_PER_BATCH]
    if len(repeated) < 2:
        return "batch probe: not separable (no two batches hold control cells of several units)"
    vehicle = vehicle[batch.isin(repeated).to_numpy()].copy()
    vehicle.obs["exposure"] = batch[batch.isin(repeated)].to_numpy()
    vehicle.obs["sample"] = vehicle.obs["unit"].astype(str) + "|" + vehicle.obs["exposure"]
    vehicle = vehicle[(vehicle.obs["unit"].astype(str) != "").to_numpy()].copy()
    try:
        split = make_split(vehicle.obs, DesignConfig(n_test_units=0), seed)
    except Refusal as refused:
        return f"batch probe: not separable ({refused.got})"
    return _control("batch of control cells", judge.cross_fit(build, vehicle, split, seed=seed))


def _control(
    name: str, found: judge.Judgement, *, asks_for_units: bool = False
) -> controls.Control:
    n_units = len(found.by_unit) if found.is_replicated else 0
    n_exposures = found.probabilities.shape[1]
    return controls.Control(
        name=name,
        macro_f1=found.metrics["macro_f1"],
        chance=controls.chance_macro_f1(found.predictions["truth"], n_exposures),
        by_unit=found.by_unit["macro_f1"],
        is_informative=n_units >= FEWEST_FOR_INTERVAL or not asks_for_units,
    )
