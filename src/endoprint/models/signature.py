"""Known target genes per exposure, scored: what a biologist would try first.

A cell's score for an exposure is the mean standardised expression of that exposure's published
targets, signed and weighed by their published fold change; a small balanced regression turns the
scores into evidence. Where nothing is published, or fewer than `fewest_targets` of the targets
were measured, the panel is learned from the training cells, and the provenance says so.

n cells, G panel genes, P panels, E exposures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from optuna.distributions import IntDistribution
from scipy import sparse

from endoprint import responses
from endoprint.config import Config
from endoprint.curated import log_normalised
from endoprint.labels import CONTROL
from endoprint.latent import moments
from endoprint.linear import fit_balanced
from endoprint.metrics import balanced_weight
from endoprint.model import ExposureModel, State, Watch

Array = np.ndarray[Any, np.dtype[Any]]
Panels = dict[str, dict[str, float]]  # exposure -> gene -> signed weight

STRONGEST = 3.0  # |log2 fold change| counted at most, else one HOX gene of 12 is the whole panel
RAREST = 0.05  # floor of a gene's standard deviation: a few stray counts must not shout
PENALTY = 1e-3  # per cell, on a handful of scores: only keeps separable cells finite


class SignatureConfig(Config):
    """What the signature score may be told."""

    fewest_targets: int = 2  # published targets that must be measured, else the panel is learned
    learned_genes: Annotated[int, IntDistribution(5, 400)] = 100  # size of a learned panel


class Signature(ExposureModel):
    """Score the target genes of every exposure (NOHA, bioRxiv 10.1101/2025.08.14.669814)."""

    Config = SignatureConfig
    name = "signature"

    def _learn(self, train: AnnData, valid: AnnData, watch: Watch, work: Path | None) -> None:
        genes = pd.Index(train.var_names.astype(str))
        values = log_normalised(train, list(genes))
        exposure, unit = train.obs["exposure"].astype(str), train.obs["unit"].astype(str)
        weight = balanced_weight(exposure, unit)
        mean, variance = moments(values, weight)
        spread = np.maximum(np.sqrt(variance), RAREST)
        control = train.uns.get("endoprint", {}).get("control", CONTROL)
        seen, known = set(genes[variance > 0]), published_panels()
        panels: Panels = {}
        sources: dict[str, dict[str, Any]] = {}
        for one in self.exposures:
            if one == control:
                continue
            panel = {gene: w for gene, w in known.get(one, {}).items() if gene in seen}
            source = "published targets"
            if len(panel) < max(1, self.config.fewest_targets):
                source = "learned from the training cells"
                is_one, is_other = (exposure == one).to_numpy(), (exposure == control).to_numpy()
                is_other = is_other if is_other.any() else ~is_one
                change = _changes(values, weight, unit.to_numpy(), is_one, is_other)
                panel = _strongest(change, spread, genes, self.config.learned_genes)
            panels[one] = panel
            sources[one] = {"source": source, "n_genes": len(panel), "genes": sorted(panel)}
        self.provenance |= {"panels": sources}
        self._genes = sorted({gene for panel in panels.values() for gene in panel})
        place = genes.get_indexer(pd.Index(self._genes))
        self._mean, self._spread = mean[place], spread[place]
        self._weights = _as_weights(panels, self._genes)
        self._weigh_scores(self._scores(train), exposure)

    def _weigh_scores(self, scores: Array, exposure: pd.Series) -> None:
        """Turn scores (n, P) into evidence by a balanced regression on the training cells."""
        self._middle = scores.mean(axis=0)
        self._unit_score = np.maximum(scores.std(axis=0), 1e-6)
        column = pd.Index(self.exposures).get_indexer(pd.Index(exposure))
        fitted = next(fit_balanced((scores - self._middle) / self._unit_score, column, [PENALTY]))
        self._coefficients, self._intercept = fitted.coefficients, fitted.intercept

    def _standardised(self, cells: AnnData) -> Array:
        values = log_normalised(cells, self._genes).toarray().astype(np.float64)
        standard: Array = (values - self._mean) / self._spread
        # A gene the file lacks was not measured: it counts as average, not as silent.
        standard[:, cells.var_names.get_indexer(self._genes) < 0] = 0.0
        return standard

    def _scores(self, cells: AnnData) -> Array:
        """Return the score of every panel, (n, P): the mean standard deviations from average."""
        scores: Array = self._standardised(cells) @ self._weights.T
        return scores

    def evidence(self, cells: AnnData) -> Array:
        scores = (self._scores(cells) - self._middle) / self._unit_score
        weighed: Array = scores @ self._coefficients.T + self._intercept
        return weighed

    def embed(self, cells: AnnData) -> Array:
        standard = self._standardised(cells)
        scores = (standard @ self._weights.T - self._middle) / self._unit_score
        # A cell unlike any training cell may score averagely on every panel; how far its panel
        # genes lie from average altogether gives it away.
        away = np.sqrt((standard**2).mean(axis=1))
        return np.column_stack([scores, away])

    def _state(self) -> State:
        return State(
            {"genes": self._genes},
            {
                "mean": self._mean,
                "spread": self._spread,
                "weights": self._weights,
                "middle": self._middle,
                "unit_score": self._unit_score,
                "coefficients": self._coefficients,
                "intercept": self._intercept,
            },
        )

    def _restore(self, state: State) -> None:
        self._genes = list(state.values["genes"])
        self._mean, self._spread = state.arrays["mean"], state.arrays["spread"]
        self._weights = state.arrays["weights"]
        self._middle, self._unit_score = state.arrays["middle"], state.arrays["unit_score"]
        self._coefficients = state.arrays["coefficients"]
        self._intercept = state.arrays["intercept"]


def published_panels() -> Panels:
    """Return the published targets: exposure -> gene -> log2 fold change, held to +-3.

    The mean over the cell types in which the gene moved; where it moved in neither, the bulk
    figure. Genes that answer to any stress stay in: for some exposures they are all there is.
    """
    table = responses.table(kind="measured")
    cell_types = table[["neurons_log2fc", "progenitors_log2fc"]].mean(axis=1)
    change = cell_types.fillna(table["bulk_log2fc"]).clip(-STRONGEST, STRONGEST)
    usable = table.assign(change=change)[change.notna() & (change != 0)]
    return {
        str(exposure): {str(gene): float(w) for gene, w in zip(rows["gene_id"], rows["change"])}
        for exposure, rows in usable.groupby("exposure")
    }


def _changes(
    values: sparse.csr_matrix, weight: Array, unit: Array, is_one: Array, is_other: Array
) -> Array:
    """Return how much higher log expression is in one group, averaged over units, (G,)."""
    pairs = [(is_one & (unit == name), is_other & (unit == name)) for name in sorted(set(unit))]
    pairs = [pair for pair in pairs if pair[0].any() and pair[1].any()]
    differences = []
    for pair in pairs or [(is_one, is_other)]:  # no unit met both: across units, all there is
        one, other = (moments(values[p], weight[p] / weight[p].sum())[0] for p in pair)
        differences.append(one - other)
    average: Array = np.mean(differences, axis=0)
    return average


def _strongest(change: Array, spread: Array, genes: pd.Index, n_genes: int) -> dict[str, float]:
    """Return the genes that change most for their spread, with log2 fold changes held to +-3."""
    best = np.argsort(-np.abs(change) / spread, kind="stable")[:n_genes]
    log2_change = np.clip(change / np.log(2.0), -STRONGEST, STRONGEST)
    return {str(genes[i]): float(log2_change[i]) for i in best if change[i]}


def _as_weights(panels: Panels, genes: list[str]) -> Array:
    """Return panels as rows over the genes, (P, G), each row's absolute weights summing to one."""
    weights = np.array([[panel.get(gene, 0.0) for gene in genes] for panel in panels.values()])
    rows: Array = weights / np.maximum(np.abs(weights).sum(axis=1, keepdims=True), 1e-12)
    return rows
