"""Draw a whole atlas from a config and a seed, and write it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from endoprint.config import Refusal
from endoprint.simulate.config import SimulateConfig
from endoprint.simulate.counts import Means, Watch, draw, silent
from endoprint.simulate.law import (
    CELL_TYPE_CORRELATION,
    CELL_TYPES,
    CONTROL,
    Law,
    law_of,
    shares,
    stream,
)
from endoprint.simulate.samples import EDCS, cell_ids, labelled_plan, new_plan, pool_plan

Array = np.ndarray[Any, np.dtype[Any]]

UNMODELLED_SHARE = 0.3  # of an EDC's squared log effect (judging rule 10)
MIXED_PATHWAYS = {"MIX": 4}  # pathways behind an EDC; others draw one to three
SOURCE = "patterned on NOHA, bioRxiv 10.1101/2025.08.14.669814; background genes are synthetic"


@dataclass(frozen=True)
class Atlas:
    """A simulated neural-organoid hormone atlas, and what only its maker knows.

    `cells`, `pool`, `new`: raw counts (CSR float32) in the source atlas's spelling: `var_names`
    are symbols, `var["gene_ids"]` Ensembl ids; `obs` has condition (labelled cells only), line,
    replicate, run, cell_type, sample_id. `pool` and `new` are None where none were asked for.
    `truth`: one row per sample of `new` (index sample_id): line, replicate, run, exposure,
    n_cells, unmodelled_share and w_<exposure>, the weights >= 0 of the known exposures in it.
    `hidden`: one row per cell of all parts (index cell id): part, exposure, line, replicate (the
    true one), run, cell_type, library (expected counts).
    """

    cells: AnnData
    pool: AnnData | None
    new: AnnData | None
    truth: pd.DataFrame
    hidden: pd.DataFrame
    law: Law


def simulate(config: SimulateConfig, seed: int, watch: Watch | None = None) -> Atlas:
    """Draw an atlas; the same config and seed give the same bytes on any number of cores.

    `watch(cells done, cells in all)` is told of progress. Raises `Refusal` where the sizes leave
    a sample without cells or the panel without background.
    """
    law = law_of(config, seed)
    plans = {"cells": labelled_plan(config, law.exposures, seed)}
    if config.pool_cells:
        plans["pool"] = pool_plan(config, law.exposures, seed)
    if config.new_cells:
        plans["new"] = new_plan(config, law.exposures, seed)
    weights = _mixtures(law, seed)
    log_share = np.concatenate([law.log_share, _mixture_shares(law, weights, seed)])
    total, done = sum(len(plan) for plan in plans.values()), 0
    parts: dict[str, AnnData] = {}
    hidden: list[pd.DataFrame] = []
    for part, plan in plans.items():
        told = _shifted(watch or silent, done, total)
        parts[part], known = _draw_part(config, law, log_share, plan, seed, part, told)
        hidden.append(known)
        done += len(plan)
    return Atlas(
        cells=parts["cells"],
        pool=parts.get("pool"),
        new=parts.get("new"),
        truth=_truth(law, plans.get("new"), weights),
        hidden=pd.concat(hidden),
        law=law,
    )


def save(
    atlas: Atlas,
    out: Path,
    pool: Path | None = None,
    new: Path | None = None,
    truth: Path | None = None,
) -> None:
    """Write the parts of an atlas: cells as h5ad, truth as CSV; equal atlases, equal bytes.

    Every file is written beside its place first, and all are moved there together at the end.
    Raises `Refusal` when a part is asked for that the atlas does not hold.
    """
    writers: dict[Path, Callable[[Path], None]] = {Path(out): _h5ad(atlas.cells)}
    for name, part, path in (("pool", atlas.pool, pool), ("new", atlas.new, new)):
        if path is None:
            continue
        if part is None:
            raise Refusal(
                "an atlas is saved with the parts it holds",
                f"a path for {name}, but no such cells",
                f"set {name}_cells above 0",
            )
        writers[Path(path)] = _h5ad(part)
    if truth is not None:
        writers[Path(truth)] = lambda path: atlas.truth.to_csv(path, lineterminator="\n")
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in writers}
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(beside[path])
        for path in writers:
            os.replace(beside[path], path)
    finally:
        for partial in beside.values():
            with suppress(FileNotFoundError):
                partial.unlink()


def _h5ad(cells: AnnData) -> Callable[[Path], None]:
    # uncompressed: readable everywhere, and gzip would take longer than drawing the cells
    return lambda path: cells.write_h5ad(path)


def _draw_part(
    config: SimulateConfig,
    law: Law,
    log_share: Array,
    plan: pd.DataFrame,
    seed: int,
    part: str,
    watch: Watch,
) -> tuple[AnnData, pd.DataFrame]:
    n_types, n_genes = len(CELL_TYPES), len(law.gene_ids)
    rng = stream(seed, "library", part)
    library = config.median_umi * np.exp(config.library_sd * rng.standard_normal(len(plan)))
    exposure = pd.Index([*law.exposures, *EDCS]).get_indexer(pd.Index(plan["exposure"]))
    cell_type = pd.Index(CELL_TYPES).get_indexer(pd.Index(plan["cell_type"]))
    means = Means(
        library=library,
        factors=(
            (
                np.exp(log_share).reshape(-1, n_genes).astype(np.float32),
                exposure * n_types + cell_type,
            ),
            _nuisance(plan["line"], law.line_sd, n_genes, seed, "line"),
            _nuisance(
                plan["line"] + " " + plan["replicate"],
                law.replicate_sd,
                n_genes,
                seed,
                "replicate",
            ),
            _nuisance(plan["run"], law.run_sd, n_genes, seed, "run"),
        ),
    )
    counts = draw(means, dispersion=law.dispersion, seed=seed, part=part, watch=watch)
    ids = cell_ids(plan["run"], seed, part)
    obs = pd.DataFrame(
        {
            "condition": plan["exposure"],
            "line": plan["line"],
            "replicate": plan["label_replicate"],
            "run": plan["run"],
            "cell_type": plan["cell_type"],
            "sample_id": plan["sample_id"],
        }
    ).set_index(ids)
    if part != "cells":
        obs = obs.drop(columns="condition")
    var = pd.DataFrame({"gene_ids": list(law.gene_ids)}, index=pd.Index(law.symbols))
    # file names, not paths: the same atlas has the same bytes wherever its files stand
    names = {name: Path(getattr(config, name)).name for name in ("effects", "effects_names")}
    values = config.model_copy(update=names).model_dump_json()
    described = {"source": SOURCE, "config": values, "seed": seed, "part": part}
    cells = AnnData(X=counts, obs=obs.astype("category"), var=var, uns={"simulated": described})
    cells.var_names_make_unique()  # as in the source; a table of effects may repeat a symbol
    known = plan[["exposure", "line", "replicate", "run", "cell_type"]].set_index(ids)
    known.insert(0, "part", part)
    return cells, known.assign(library=library)


def _nuisance(
    name: pd.Series, sd: float, n_genes: int, seed: int, kind: str
) -> tuple[Array, Array]:
    """Draw log-normal factors of mean one per name and gene, from the name's own stream."""
    row, names = pd.factorize(name, sort=True)
    drawn = [
        np.exp(sd * stream(seed, kind, n).standard_normal(n_genes) - sd**2 / 2) for n in names
    ]
    return np.asarray(drawn, dtype=np.float32), row


def _mixtures(law: Law, seed: int) -> pd.DataFrame:
    """Draw what each EDC mixes: weights of the known exposures that sum to one. (EDC, exposure).

    Which pathways stand behind a name is drawn, not known: nothing here says what BPA does.
    """
    known = [exposure for exposure in law.exposures if exposure != CONTROL]
    pathways = sorted({exposure.rsplit("_", 1)[0] for exposure in known})
    weights = pd.DataFrame(0.0, index=pd.Index(EDCS), columns=pd.Index(known))
    for edc in EDCS:
        rng = stream(seed, "edc", edc)
        n = MIXED_PATHWAYS.get(edc, int(rng.integers(1, 4)))
        for pathway, weight in zip(rng.permutation(pathways)[:n], rng.dirichlet(np.full(n, 2.0))):
            direction = "AGONIST" if rng.random() < 0.5 else "ANTAGONIST"
            weights.loc[edc, f"{pathway}_{direction}"] = weight
    return weights


def _mixture_shares(law: Law, weights: pd.DataFrame, seed: int) -> Array:
    """Log shares of every EDC: the mixed effects plus what no known exposure does. (EDC, T, G)."""
    column = [law.exposures.index(exposure) for exposure in weights.columns]
    effect = np.einsum("me,etg->mtg", weights.to_numpy(), law.effect[column])
    for m, edc in enumerate(weights.index):
        rng = stream(seed, "unmodelled", edc)
        common = rng.standard_normal(effect.shape[2])
        own = rng.standard_normal(effect.shape[1:])
        rho = CELL_TYPE_CORRELATION
        other = np.sqrt(rho) * common + np.sqrt(1.0 - rho) * own
        size = np.linalg.norm(effect[m], axis=1) / np.linalg.norm(other, axis=1)
        factor = np.sqrt(UNMODELLED_SHARE / (1.0 - UNMODELLED_SHARE)) * size
        effect[m] += factor[:, None] * other
    return shares(law.log_level, effect)


def _truth(law: Law, plan: pd.DataFrame | None, weights: pd.DataFrame) -> pd.DataFrame:
    """Tell what each new sample truly is."""
    known = list(weights.columns)
    columns = ["line", "replicate", "run", "exposure", "n_cells", "unmodelled_share"]
    if plan is None:
        return pd.DataFrame(columns=[*columns, *(f"w_{e}" for e in known)])
    samples = plan.groupby("sample_id", sort=True).agg(
        line=("line", "first"),
        replicate=("replicate", "first"),
        run=("run", "first"),
        exposure=("exposure", "first"),
        n_cells=("line", "size"),
    )
    is_edc = samples["exposure"].isin(EDCS)
    samples["unmodelled_share"] = np.where(is_edc, UNMODELLED_SHARE, 0.0)
    pure = pd.DataFrame(np.eye(len(known)), index=known, columns=known)
    w = (
        pd.concat([weights, pure])
        .reindex(samples["exposure"])
        .fillna(0.0)
        .set_index(samples.index)
    )
    return pd.concat([samples, w.add_prefix("w_")], axis=1)


def _shifted(watch: Watch, before: int, total: int) -> Watch:
    return lambda done, _: watch(before + done, total)
