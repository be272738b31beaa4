"""The door: read cells, check them, and curate them into the one form every room expects.

Every refusal is one line (rule, got, remedy); the caller's cells are never modified.
Shapes: n cells, G columns of the file, K genes kept.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from endoprint import sources
from endoprint.annotations import Keys, annotate
from endoprint.config import Refusal
from endoprint.curated import (
    IMPOSSIBLE,
    check,
    fingerprint,
    from_frame,
    library_size,
    load,
    log_normalised,
    matrix,
    md5,
    possible_counts,
    raw_counts,
    refuse_double_cells,
    sums,
    write,
)
from endoprint.genes import Panel, name_genes, read_symbol_map

__all__ = [
    "IMPOSSIBLE",
    "CellsConfig",
    "CurationReport",
    "check",
    "columns_to_score",
    "curate",
    "fingerprint",
    "from_frame",
    "load",
    "log_normalised",
    "matrix",
    "md5",
    "read",
    "read_obs",
    "to_score",
    "write",
]

Array = np.ndarray[Any, np.dtype[Any]]


class CellsConfig(Keys):
    """Where the cells are, what their columns mean, and which cells are too poor to keep."""

    source: str = ""  # h5ad, 10x .h5 or zarr, or the folder of `runs`; relative to the workspace
    pool: str = ""  # unlabelled cells of other units, for vocabulary and pre-training; "": none
    runs: dict[str, str] = {}  # run -> its 10x file below `source`; the run joins the cell id
    obs_table: str = ""  # CSV beside the cells, first column cell id; "": none

    layer: str | None = None  # where raw counts are: null for X, "raw", or a layer
    gene_id_key: str | None = None  # column of var with Ensembl ids; null: var_names
    symbol_map: str | None = None  # JSON of symbol: Ensembl id, for genes named by symbols
    allow_symbols: bool = False  # keep symbols as gene ids where nothing maps them
    min_gene_coverage: float = 0.5  # share of genes that must be recognised; a guess

    library_size_key: str | None = None  # column of true total counts; null: sum over all genes

    # Quality: the source atlas's cut-offs are unknown, so nothing but empty cells goes by default.
    min_counts: float = 1  # library size, counts per cell
    min_genes: int = 1  # detected genes per cell
    max_mitochondrial_share: float = 1.0  # of the library size; 1: no limit
    min_cells_per_gene: int = 0  # among the cells kept; 0: every gene stays

    def located(self, root: Path) -> Self:
        """Return this config with its paths absolute: below `root`, `${VARIABLES}` filled in."""
        return self.model_copy(
            update={
                name: _locate(value, root, name)
                for name in ("source", "pool", "symbol_map")
                if (value := getattr(self, name))
            }
        )


def _locate(value: str, root: Path, name: str) -> str:
    filled = os.path.expandvars(value)
    if "$" in filled:
        raise Refusal(
            f"cells.{name} may name environment variables that are set",
            f"{value!r}",
            "export the variable, or write the path",
        )
    return str(root / Path(filled).expanduser())


@dataclass
class CurationReport:
    """What curation kept, and what it removed for which reason."""

    n_cells_read: int
    n_cells: int = 0
    n_genes_read: int = 0
    n_genes: int = 0
    removed_cells: dict[str, int] = field(default_factory=dict)
    removed_genes: dict[str, int] = field(default_factory=dict)
    gene_ids: str = "ensembl"  # or "symbols"
    gene_coverage: float = 1.0  # share of the file's gene columns recognised
    count_coverage: float = 1.0  # share of the file's counts in those genes
    library_size: str = ""  # where n_counts came from
    exposures: dict[str, int] = field(default_factory=dict)  # cells of each
    units: dict[str, int] = field(default_factory=dict)  # cells of each
    notes: list[str] = field(default_factory=list)  # sentences that a reader should see

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def read(path: str | Path, config: CellsConfig) -> AnnData:
    """Read an h5ad, 10x .h5 or zarr, or the runs the config names, as it is."""
    return sources.read_source(
        Path(path), layer=config.layer, runs=config.runs, obs_table=config.obs_table
    )


def read_obs(path: str | Path) -> pd.DataFrame:
    """Read only what is known about each cell, not its counts."""
    return sources.read_obs(Path(path))


def curate(
    adata: AnnData, config: CellsConfig, *, labelled: bool = True
) -> tuple[AnnData, CurationReport]:
    """Return checked cells in the one form every room expects, and what was removed and why.

    `labelled=False` needs no exposure, and of the keys only those the file has: for the pool of
    unlabelled cells. Raises Refusal where the cells can not be what the config says.
    """
    panel, report = _name(adata, config)
    values, _ = sources.chosen(adata, config.layer)
    where = "X" if config.layer is None else f"layer {config.layer!r}"
    counts = raw_counts(values, where=where, remedy=_where_counts_may_be(adata, config.layer))
    cells, flag = _convert(counts, adata.obs, config, panel, report, labelled=labelled)
    is_kept = (flag == "").to_numpy()
    report.removed_cells = {
        **{str(reason): int(n) for reason, n in adata.uns.get(sources.REMOVED, {}).items()},
        **dict(Counter(flag[~is_kept])),
    }
    report.n_cells_read += sum(adata.uns.get(sources.REMOVED, {}).values())
    if not is_kept.any():
        told = ", ".join(f"{n} {reason}" for reason, n in report.removed_cells.items())
        raise Refusal("at least one cell passes the door", told, "check the cells and thresholds")
    lost = set(cells.obs["exposure"]) - set(cells.obs["exposure"][is_kept]) if labelled else set()
    report.notes += [f"{gone} lost all its cells at the door." for gone in sorted(lost) if gone]
    cells = _drop_rare_genes(cells[is_kept].copy(), config, report)
    if labelled:
        _refuse_no_question(cells.obs, config)
        report.exposures = _tally(cells.obs["exposure"])
    report.units = _tally(cells.obs["unit"])
    report.n_cells, report.n_genes = cells.shape
    cells.uns["endoprint"] = _identity(cells, config, report, labelled=labelled)
    return cells, report


def columns_to_score(config: CellsConfig) -> list[str]:
    """Return the columns of obs that cells to be scored are read with, where they have them."""
    keys = [config.line_key, config.batch_key, config.cell_type_key, config.technical_fold]
    keys += [config.split_key, config.sample_key, config.library_size_key, *config.unit_keys]
    return sorted({key for key in keys if key is not None})


def to_score(
    block: AnnData, config: CellsConfig, panel: Panel | None = None
) -> tuple[AnnData, Panel]:
    """Return cells to be scored, each of them, in the same order, and the genes' names.

    `block.X` is the matrix that `config.layer` names. No exposure is needed and no cell removed:
    `obs["flag"]` says why curation would have removed it, else is empty; impossible counts flag
    their cell, whose counts are then none. `panel`: of an earlier block of the same file.
    """
    # the block is chosen and joined already
    within = config.model_copy(update={"layer": None, "runs": {}, "obs_table": ""})
    panel, report = _name(block, within, panel)
    remedy = _where_counts_may_be(block, None)
    counts, impossible = possible_counts(block.X, where="X", remedy=remedy)
    cells, flag = _convert(counts, block.obs, within, panel, report, labelled=False)
    cells.obs["flag"] = np.where(impossible != "", impossible, flag.to_numpy(dtype=object))
    cells.uns["endoprint"] = {"gene_ids": report.gene_ids, "library_size": report.library_size}
    return cells, panel


# -- steps --------------------------------------------------------------------------------------
def _name(
    adata: AnnData, config: CellsConfig, panel: Panel | None = None
) -> tuple[Panel, CurationReport]:
    """Check the shape, the cell ids and the genes."""
    if not adata.n_obs or not adata.n_vars:
        raise Refusal(
            "there are cells and genes", f"{adata.n_obs} x {adata.n_vars}", "check the file"
        )
    refuse_double_cells(pd.Index(adata.obs_names.astype(str)))
    if panel is None:
        _, var = sources.chosen(adata, config.layer)
        symbol_map = read_symbol_map(Path(config.symbol_map)) if config.symbol_map else None
        panel = name_genes(
            var,
            gene_id_key=config.gene_id_key,
            symbol_map=symbol_map,
            allow_symbols=config.allow_symbols,
            min_coverage=config.min_gene_coverage,
        )
    report = CurationReport(n_cells_read=adata.n_obs, n_genes_read=len(panel.target))
    report.removed_genes = dict(panel.removed)
    report.gene_ids, report.gene_coverage = panel.kind, panel.coverage
    return panel, report


def _convert(
    everything: sparse.csr_matrix,
    known: pd.DataFrame,
    config: CellsConfig,
    panel: Panel,
    report: CurationReport,
    *,
    labelled: bool,
) -> tuple[AnnData, pd.Series]:
    """Return all cells curated, and for each the reason to remove it ("" where none)."""
    total = sums(everything if panel.is_gene.all() else everything[:, panel.is_gene])
    counts = panel.collect(everything)
    in_genes = total if counts is everything else sums(counts)
    report.count_coverage = float(in_genes.sum() / max(total.sum(), 1))
    flag = pd.Series("", index=known.index.astype(str), dtype=object)
    obs = annotate(known, config, labelled=labelled, flag=flag)
    report.library_size = "sum over all genes"
    if config.library_size_key is not None:
        report.library_size = config.library_size_key
        total = _true_total(known, config.library_size_key, total)
    obs["n_counts"] = total
    obs["n_genes"] = np.diff(counts.indptr).astype(np.int64)
    _flag_poor(flag, obs, counts, in_genes, panel, config)
    var = pd.DataFrame(index=panel.index)
    if any(panel.symbols):
        var["symbol"] = panel.symbols
    return AnnData(X=counts, obs=obs, var=var), flag


def _true_total(obs: pd.DataFrame, key: str, at_least: Array) -> Array:
    if key not in obs:
        raise Refusal(
            "library_size_key names a column of obs",
            f"no {key!r} among {', '.join(map(str, obs.columns)) or 'no columns'}",
            "add the column, or set it to null where the file holds all genes",
        )
    return library_size(obs[key], at_least=at_least, key=key)


def _flag_poor(
    flag: pd.Series,
    obs: pd.DataFrame,
    counts: sparse.csr_matrix,
    in_genes: Array,
    panel: Panel,
    config: CellsConfig,
) -> None:
    """Write the first reason to remove each cell into `flag`."""
    total = obs["n_counts"].to_numpy()
    reasons = {
        "no counts": total <= 0,
        "no counts in recognised genes": in_genes <= 0,
        f"fewer than {config.min_counts:g} counts": total < config.min_counts,
        f"fewer than {config.min_genes} genes": obs["n_genes"].to_numpy() < config.min_genes,
    }
    if config.max_mitochondrial_share < 1:
        if not panel.is_mitochondrial.any():
            raise Refusal(
                "max_mitochondrial_share needs mitochondrial genes in the file",
                f"none among {len(panel.genes)}",
                "set it to 1",
            )
        share = counts @ panel.is_mitochondrial.astype(np.float64) / np.maximum(total, 1)
        limit = f"more than {config.max_mitochondrial_share:.0%} mitochondrial"
        reasons[limit] = share > config.max_mitochondrial_share
    for reason, is_poor in reasons.items():
        flag[is_poor & (flag == "").to_numpy()] = reason


def _drop_rare_genes(cells: AnnData, config: CellsConfig, report: CurationReport) -> AnnData:
    if config.min_cells_per_gene <= 0:
        return cells
    n_cells = np.bincount(cells.X.indices, minlength=cells.n_vars)
    is_rare = n_cells < config.min_cells_per_gene
    if is_rare.all():
        raise Refusal(
            f"a gene stands in at least {config.min_cells_per_gene} cells (min_cells_per_gene)",
            "none that does",
            "lower it",
        )
    if is_rare.any():
        reason = f"in fewer than {config.min_cells_per_gene} cells"
        report.removed_genes[reason] = int(is_rare.sum())
    kept = cells[:, ~is_rare].copy()
    is_empty = np.diff(kept.X.indptr) == 0
    if is_empty.any():
        report.removed_cells["no counts in genes kept"] = int(is_empty.sum())
        kept = kept[~is_empty].copy()
    return kept


def _refuse_no_question(obs: pd.DataFrame, config: CellsConfig) -> None:
    """Telling exposures apart needs two of them, the control, and units to judge on."""
    exposures = sorted(set(obs["exposure"]))
    if len(exposures) < 2:
        raise Refusal(
            "at least two exposures are told apart",
            f"only {exposures[0]}",
            f"check exposure_key ({config.exposure_key!r})",
        )
    control = config.control_label
    if control not in exposures:
        raise Refusal(
            "the control is among the exposures",
            f"no {control!r} among {', '.join(exposures)}",
            "set control to the vehicle's label",
        )
    units = sorted(set(obs["unit"]))
    if config.unit_keys and len(units) < 2:
        raise Refusal(
            "at least two units stand in the cells",
            f"only {units[0]!r} from {', '.join(config.unit_keys)}",
            "check unit_keys; with no independent units set unit_keys: [] and a technical_fold",
        )


def _where_counts_may_be(adata: AnnData, layer: str | None) -> str:
    others = [name for name in adata.layers if name != layer]
    if adata.raw is not None and layer != "raw":
        others.append("raw")
    told = f" (there are: {', '.join(others)})" if others else ""
    return f"set layer to where raw counts are{told}, or export them again"


def _identity(
    cells: AnnData, config: CellsConfig, report: CurationReport, *, labelled: bool
) -> dict[str, Any]:
    """Return the plain values every later room may ask curated cells for."""
    return {
        "control": config.control_label,
        "is_labelled": labelled,
        "fingerprint": fingerprint(cells),
        "gene_ids": report.gene_ids,
        "gene_coverage": report.gene_coverage,
        "count_coverage": report.count_coverage,
        "library_size": report.library_size,
        "n_removed_by_reason": {k.replace("/", " "): v for k, v in report.removed_cells.items()},
    }


def _tally(values: pd.Series) -> dict[str, int]:
    return {str(value): int(n) for value, n in sorted(Counter(values).items())}
