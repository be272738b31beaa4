"""What truly drives the counts: panel, expected share of each gene, and effect of each exposure.

A count is negative binomial around library size x expected share x unit effect x run effect.
Everything here depends on the seed and on what shapes biology (panel size, difficulty, kind of
responses), never on how many cells are drawn or how runs are laid out.

Shapes: E exposures, T cell types, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd

from endoprint.config import Refusal
from endoprint.responses import table
from endoprint.simulate.config import SimulateConfig
from endoprint.simulate.published import read_effects

Array = np.ndarray[Any, np.dtype[Any]]

CONTROL = "DMSO"
CELL_TYPES = ("Neurons", "Progenitors")  # the source's `MacroCelltype`
SHARE_OF_NEURONS = 0.6  # a guess: the source does not state frequencies

# Share of genes with |log2 fold change| > 1 (FDR < .05), neurons and progenitors, of the 20,252
# genes that NOHA's effects table names at all (bioRxiv 10.1101/2025.08.14.669814, edgeR "Shared"
# model). Each compares one run with one DMSO run, so run effects are inside: upper bounds.
GENES_TESTED = 20_252
STRONG_GENES = {
    "ANDROGEN_AGONIST": (1154, 889),
    "ANDROGEN_ANTAGONIST": (1876, 1364),
    "ARYL_HYD_AGONIST": (600, 660),
    "ARYL_HYD_ANTAGONIST": (1672, 758),
    "ESTROGEN_AGONIST": (2068, 1515),
    "ESTROGEN_ANTAGONIST": (3140, 2074),
    "GLUCOCORT_AGONIST": (895, 628),
    "GLUCOCORT_ANTAGONIST": (1177, 736),
    "LIVER-X_AGONIST": (465, 386),
    "LIVER-X_ANTAGONIST": (585, 255),
    "RET_AGONIST": (5604, 4274),
    "RET_ANTAGONIST": (252, 184),
    "THYROID_AGONIST": (309, 249),
    "THYROID_ANTAGONIST": (316, 326),
}
# Correlation of agonist's and antagonist's log fold changes, same source (non-significant = 0).
# Correlations between pathways (androgen with estrogen .71) are left out: those runs are
# neighbours, and a run is not biology.
TWIN_CORRELATION = {
    "ANDROGEN": (0.74, 0.78),
    "ARYL_HYD": (0.43, 0.43),
    "ESTROGEN": (0.75, 0.78),
    "GLUCOCORT": (0.66, 0.55),
    "LIVER-X": (0.02, 0.03),
    "RET": (0.16, 0.07),
    "THYROID": (0.35, 0.38),
}
# Neurons against progenitors of one exposure: .20 to .55, mean .38, measured on the same table.
CELL_TYPE_CORRELATION = 0.4

BACKGROUND_SD = (
    1.0  # natural log of expression between genes; highly expressed genes in the source
)
BACKGROUND_ID = "ENSG99{:09d}"  # far beyond Ensembl's assigned range: no real gene has such an id
TEXTBOOK_LOG2FC = 2.0  # a guess: none of these was measured; agonist only
TEXTBOOK_LEVEL = -2.0  # log2 of expression against the panel's median: "low", a guess

# One scale for every effect, fixed once before any model was fitted and never moved to alter a
# ranking (judging rule 7). Oracle macro-F1 of the default config, 3,000 cells, seeds 10 to 14:
# easy .943-.956, middle .798-.812, hard .599-.606. The names hold for the default size only: at
# 750 UMI instead of 1,500 the three are .86 .65 .46, at 3,000 UMI .98 .88 .72, with 500 genes
# .90 .67 .49, with 5,000 genes and 5,000 UMI 1.00 .98 .91, with NOHA's own effects table (1,500
# best expressed genes) .59 .43 .29. The oracle is always that of the atlas drawn.
SCALE = {"easy": 0.44, "middle": 0.30, "hard": 0.21}


@dataclass(frozen=True)
class Law:
    """The truth behind one atlas: enough to draw cells and to say how likely each exposure is.

    `effect` (E, T, G): natural-log fold change against control, difficulty included.
    `log_share` (E, T, G): natural log of the expected share of the library; shares sum to one.
    """

    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    exposures: tuple[str, ...]  # sorted, control included
    effect: Array
    log_share: Array
    log_level: Array  # (T, G): control's expression, natural log, not normalised
    dispersion: float
    line_sd: float
    replicate_sd: float
    run_sd: float

    @property
    def nuisance_sd(self) -> float:
        """Spread of line, replicate and run effects together, sd of the natural log per gene."""
        return float(np.sqrt(self.line_sd**2 + self.replicate_sd**2 + self.run_sd**2))


def stream(seed: int, *names: object) -> np.random.Generator:
    """Return the random stream of one named thing: adding another thing shifts none of them."""
    if seed < 0:
        raise Refusal("a seed is a whole number from 0", str(seed), "choose another")
    return np.random.default_rng([seed, *(crc32(str(name).encode()) for name in names)])


def law_of(config: SimulateConfig, seed: int) -> Law:
    """Return the biology of an atlas without drawing a cell.

    Raises `Refusal` when the panel is too small for the response genes, or a table of effects
    cannot be used.
    """
    exposures = tuple(sorted([*STRONG_GENES, CONTROL]))
    if config.effects:
        genes, effect, level = read_effects(
            Path(config.effects),
            Path(config.effects_names) if config.effects_names else None,
            n_genes=config.genes,
            exposures=exposures,
            cell_types=CELL_TYPES,
        )
    else:
        genes, effect, level = _drawn(config, exposures, seed)
    effect = effect * SCALE[config.difficulty] * np.log(2.0)
    level = level * np.log(2.0)
    return Law(
        gene_ids=tuple(genes["gene_id"]),
        symbols=tuple(genes["symbol"]),
        exposures=exposures,
        effect=effect,
        log_share=shares(level, effect),
        log_level=level,
        dispersion=config.dispersion,
        line_sd=config.line_sd,
        replicate_sd=config.replicate_sd,
        run_sd=config.run_sd,
    )


def _drawn(
    config: SimulateConfig, exposures: tuple[str, ...], seed: int
) -> tuple[pd.DataFrame, Array, Array]:
    """Put response genes and background into one panel: genes, log2 effects, log2 levels."""
    named = table(kind=config.responses)
    panel = named.drop_duplicates("gene_id").sort_values("gene_id")
    n_named, n_background = len(panel), config.genes - len(panel)
    if n_background < n_named:
        raise Refusal(
            f"a panel holds the {n_named} response genes and as many background genes",
            f"genes: {config.genes}",
            f"set genes to {2 * n_named} or more",
        )
    numbers = range(1, n_background + 1)
    background = {
        "gene_id": [BACKGROUND_ID.format(i) for i in numbers],
        "symbol": [f"SIM{i:05d}" for i in numbers],
    }
    named_effect = _named_effects(named, panel["gene_id"].tolist(), exposures)
    named_level = _named_levels(named_effect, config.responses)
    return (
        pd.concat([panel[["gene_id", "symbol"]], pd.DataFrame(background)], ignore_index=True),
        np.concatenate([named_effect, _diffuse_effects(exposures, n_background, seed)], axis=2),
        np.concatenate([named_level, _background_levels(n_background, seed)], axis=1),
    )


def shares(log_level: Array, effect: Array) -> Array:
    """Return the log share of every gene in the library, given log fold changes. (..., T, G)."""
    log_expression = log_level + effect
    total = np.logaddexp.reduce(log_expression, axis=-1, keepdims=True)
    return np.asarray(log_expression - total)


def _named_effects(named: pd.DataFrame, genes: list[str], exposures: tuple[str, ...]) -> Array:
    """Look up log2 fold changes; what was not significant does not move here. (E, T, G)."""
    effect = np.zeros((len(exposures), len(CELL_TYPES), len(genes)))
    log2fc = named[["neurons_log2fc", "progenitors_log2fc"]].to_numpy(dtype=float)
    log2fc[(named["kind"] == "textbook").to_numpy()] = TEXTBOOK_LOG2FC
    e = pd.Index(exposures).get_indexer(pd.Index(named["exposure"]))
    g = pd.Index(genes).get_indexer(pd.Index(named["gene_id"]))
    effect[e, :, g] = np.nan_to_num(log2fc)
    return effect


def _diffuse_effects(exposures: tuple[str, ...], n_genes: int, seed: int) -> Array:
    """Draw log2 fold changes of background genes: normal, with the published spread and twins.

    Neurons and progenitors share part of the response, agonist and antagonist another.
    """
    effect = np.zeros((len(exposures), len(CELL_TYPES), n_genes))
    for e, exposure in enumerate(exposures):
        if exposure == CONTROL:
            continue
        pathway = exposure.rsplit("_", 1)[0]
        common = _across_cell_types(stream(seed, "pathway", pathway), n_genes)
        own = _across_cell_types(stream(seed, "exposure", exposure), n_genes)
        for t in range(len(CELL_TYPES)):
            share = STRONG_GENES[exposure][t] / GENES_TESTED
            sd = 1.0 / NormalDist().inv_cdf(1.0 - share / 2.0)  # P(|x| > 1) = share
            twin = TWIN_CORRELATION[pathway][t]
            effect[e, t] = sd * (np.sqrt(twin) * common[t] + np.sqrt(1.0 - twin) * own[t])
    return effect


def _across_cell_types(rng: np.random.Generator, n_genes: int) -> Array:
    """Draw standard normals that correlate between the cell types. (T, G)."""
    common = rng.standard_normal(n_genes)
    own = rng.standard_normal((len(CELL_TYPES), n_genes))
    rho = CELL_TYPE_CORRELATION
    return np.asarray(np.sqrt(rho) * common + np.sqrt(1.0 - rho) * own)


def _named_levels(effect: Array, kind: str) -> Array:
    """Guess control's log2 expression of response genes against the panel's median. (T, G).

    A gene that rises a thousandfold is nearly silent in control (HOXB9), one that falls that far
    is well expressed (TFAP2B). The factors are a guess that lands within some log2 units of the
    published mean logCPM of these genes.
    """
    if kind == "textbook":
        return np.full(effect.shape[1:], TEXTBOOK_LEVEL)
    rise, fall = effect.max(axis=0).clip(min=0), -effect.min(axis=0).clip(max=0)
    return np.asarray(0.25 * fall - 0.75 * rise)


def _background_levels(n_genes: int, seed: int) -> Array:
    """Draw control's log2 expression of background genes: log-normal, alike in both types."""
    rng = stream(seed, "levels")
    between, within = np.sqrt(0.8), np.sqrt(0.2)  # a guess: most genes are alike in both types
    common = rng.standard_normal(n_genes)
    own = rng.standard_normal((len(CELL_TYPES), n_genes))
    return np.asarray(BACKGROUND_SD / np.log(2.0) * (between * common + within * own))
