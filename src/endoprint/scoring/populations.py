"""What whole populations of a finished scoring look exposed to, read back from its rows.

A population is a value of a column of the cells' `obs`. Cells are read again only where a model
weighs populations by itself, or where a projection is asked for: so many of each, always the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from anndata import AnnData

from endoprint import drift
from endoprint.annotations import UNKNOWN, text
from endoprint.cells import CellsConfig
from endoprint.config import Refusal
from endoprint.model import ExposureModel
from endoprint.population import Pools, weighs_itself
from endoprint.scoring import inputs
from endoprint.scoring.job import Job, Shard, scratch
from endoprint.scoring.summary import SCORES

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLE = "sample"  # the column of scores that tells populations apart unless another is named
MOST_POPULATIONS = 5000  # more are cells, not populations
CELLS_READ_AGAIN = 300  # of a population in a unit, where cells themselves are needed
LOOKED_AT_FOR_DRIFT = 50_000  # cells, evenly spaced: memory stays flat


@dataclass(frozen=True)
class Told:
    """What a scoring came to beyond single cells.

    `calls`: one row per population (`population.sample_calls`); `units`: per population and unit;
    `shares`: of each population's cells, by the call they show; `drift`: one row per quantity.
    """

    calls: pd.DataFrame
    units: pd.DataFrame
    shares: pd.DataFrame
    drift: pd.DataFrame


def check_by(paths: Sequence[Path], config: CellsConfig, by: str, out_dir: Path) -> None:
    """Refuse a column that a file has not, before anything is looked at or scored."""
    if by == SAMPLE:
        return
    for path in paths:
        opening = inputs.opened(path, config, scratch(out_dir, path), also=[by])
        with inputs.naming(path), opening as reading:
            if by not in reading.found.obs(0, 1):
                raise Refusal(
                    "populations are told apart by a column of obs", f"no {by!r} in {path.name}",
                    "name one that every file has, or leave --by out for samples",
                )  # fmt: skip


def tell(
    model: ExposureModel, job: Job, out_dir: Path, *, by: str = SAMPLE, control: str | None = None
) -> Told:
    """Read the rows back, some at a time, and add them up per population."""
    pools = Pools(model)
    columns = [f"p_{exposure}" for exposure in model.exposures]
    every = max(1, -(-job.n_cells // LOOKED_AT_FOR_DRIFT))
    seen = []
    wanted = ["unit", *columns, "abstain", *drift.QUANTITIES]
    for shard, rows, population in _rows(job, out_dir, by, wanted):
        pools.add(
            population,
            rows["unit"].to_numpy(dtype=object),
            rows[columns].to_numpy(),
            rows["novelty"].to_numpy(),
            rows["abstain"].to_numpy(),
        )
        if len(pools) > MOST_POPULATIONS:
            raise Refusal(
                "a column that tells populations apart has few values",
                f"more than {MOST_POPULATIONS:,} in {by!r}",
                "name a sample, a well or a cell type",
            )
        seen.append(rows.loc[shard.start % every :: every, list(drift.QUANTITIES)])
    if weighs_itself(model):
        cells = read_again(job, out_dir, by=by)
        for name, unit in sorted(set(zip(cells.obs["population"], cells.obs["unit"]))):
            inside = (cells.obs["population"] == name) & (cells.obs["unit"] == unit)
            weighed = model.population_proba(cells[inside.to_numpy()].copy())
            pools.weigh(name, unit, weighed.to_numpy())
    return Told(
        calls=pools.calls(by=by, control=control),
        units=pools.units(),
        shares=pools.shares(),
        drift=drift.compare(model.drift_reference, pd.concat(seen)),
    )


def read_again(job: Job, out_dir: Path, *, by: str = SAMPLE) -> AnnData:
    """Return up to CELLS_READ_AGAIN cells of every population and unit, with their counts.

    The first of each by a hash of their ids, so that always the same are read; none that was
    quarantined. `obs` has `population`, `unit` and what else curation keeps.
    """
    chosen: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for shard, rows, population in _rows(job, out_dir, by, ["unit", "quarantine"]):
        mark = pd.util.hash_array(rows["cell_id"].to_numpy(dtype=object), categorize=False)
        is_fine = (rows["quarantine"] == "").to_numpy()
        unit = rows["unit"].to_numpy(dtype=object)[is_fine]
        at = np.arange(shard.start, shard.stop)[is_fine]
        own = zip(population[is_fine], unit, mark[is_fine], at)
        for name, of, hashed, place in own:
            chosen.setdefault((name, of), []).append((int(hashed), shard.input, int(place)))
        for kept in chosen.values():
            kept.sort()
            del kept[CELLS_READ_AGAIN:]
    parts = []
    with ExitStack() as stack:
        readings: dict[int, inputs.Reading] = {}
        for shard in job.shards:
            wanted = {
                place: name
                for (name, _), own in chosen.items()
                for _, file, place in own
                if file == shard.input and shard.start <= place < shard.stop
            }
            if not wanted:
                continue
            if shard.input not in readings:
                path = Path(job.inputs[shard.input].path)
                readings[shard.input] = stack.enter_context(
                    inputs.opened(path, job.cells, scratch(out_dir, path))
                )
            places = np.array(sorted(wanted))
            cells = readings[shard.input].part(shard.start, shard.stop)[places - shard.start]
            cells = cells.copy()
            cells.obs["population"] = [wanted[place] for place in places]
            parts.append(cells)
    if not parts:
        raise Refusal("populations have cells", "none that was not quarantined", "see the scores")
    return ad.concat(parts, join="outer", merge="same") if len(parts) > 1 else parts[0]


def _rows(
    job: Job, out_dir: Path, by: str, columns: list[str]
) -> Iterator[tuple[Shard, pd.DataFrame, Array]]:
    """Yield every part's rows and the population of each cell; one row group is one part.

    Of the rows, the cells' ids, their sample and `columns`.
    """
    wanted = ["cell_id", SAMPLE, *columns]
    with pq.ParquetFile(out_dir / SCORES) as file, ExitStack() as stack:
        opened: tuple[int, inputs.Reading | None] = (-1, None)
        for shard in job.shards:
            rows = file.read_row_group(shard.number, columns=wanted).to_pandas()
            if by == SAMPLE:
                yield shard, rows, rows["sample"].to_numpy(dtype=object)
                continue
            if opened[0] != shard.input or opened[1] is None:
                stack.close()
                path = Path(job.inputs[shard.input].path)
                reading = stack.enter_context(
                    inputs.opened(path, job.cells, scratch(out_dir, path), also=[by])
                )
                opened = (shard.input, reading)
            obs = opened[1].found.obs(shard.start, shard.stop) if opened[1] else pd.DataFrame()
            of = job.inputs[shard.input].file
            if not np.array_equal(obs.index.to_numpy(), rows["cell_id"].to_numpy()):
                raise Refusal(
                    "cells stand where they were scored", f"others in {of}",
                    "score it again when nothing writes to it",
                )  # fmt: skip
            yield shard, rows, text(obs[by]).fillna(UNKNOWN).to_numpy(dtype=object)
