"""Negative controls: what a model must not be able to do, and what must not suffice.

Cells in, cells (or a deliberately blind model) out; `judge` fits and judges them like anything
else (judging rule 5). n cells, E exposures.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from endoprint import responses
from endoprint.config import Refusal
from endoprint.linear import fit_balanced
from endoprint.model import ExposureModel, State, Watch

Array = np.ndarray[Any, np.dtype[Any]]

PENALTY = 1e-3  # per cell, on two inputs: only keeps separable cells finite


@dataclass(frozen=True)
class Control:
    """One negative control: what a blinded model reached, beside what blind guessing would."""

    name: str
    macro_f1: float
    chance: float
    by_unit: pd.Series
    is_informative: bool  # under five units a shuffle may leave the labels as they were

    def sentence(self) -> str:
        """Say it in one line."""
        said = f"{self.name}: macro-F1 {self.macro_f1:.3f}, blind guessing {self.chance:.3f}"
        return said if self.is_informative else f"{said}; not informative (under 5 units)"


def shuffled(cells: AnnData, *, seed: int) -> AnnData:
    """Return the cells with exposures permuted among each unit's samples, independently.

    Cells of one sample keep one exposure: what the culture and its run leave in them stays, only
    its meaning goes. Where samples are not told apart, a unit's cells of one exposure are one.
    """
    rng = np.random.default_rng(seed)
    names = ["unit", "sample", "exposure"] if "sample" in cells.obs else ["unit", "exposure"]
    keys = cells.obs[names].astype(str).reset_index(drop=True)
    group = keys.groupby(names, sort=True).ngroup().to_numpy()
    groups = keys.drop_duplicates().sort_values(names).reset_index(drop=True)
    permuted = groups["exposure"].to_numpy(dtype=object).copy()
    for unit in sorted(set(groups["unit"])):
        inside = np.flatnonzero((groups["unit"] == unit).to_numpy())
        permuted[inside] = permuted[rng.permutation(inside)]
    out = cells.copy()
    out.obs["exposure"] = permuted[group]
    return out


def chance_macro_f1(truth: pd.Series, n_exposures: int) -> float:
    """Return the macro-F1 that guessing among the exposures without looking would expect."""
    share = truth.value_counts(normalize=True).to_numpy(dtype=np.float64)
    guess = 1.0 / n_exposures
    return float(np.mean(2 * share * guess / (share + guess)))


def target_genes(cells: AnnData) -> Set[str]:
    """Return the published response genes of any exposure that these cells measured."""
    return set(responses.table(kind="measured")["gene_id"]) & set(cells.var_names)


def only_genes(cells: AnnData, genes: Set[str]) -> AnnData:
    """Return the cells with these genes alone; their library sizes stay true."""
    return _of_genes(cells, np.isin(cells.var_names, sorted(genes)))


def without_genes(cells: AnnData, genes: Set[str]) -> AnnData:
    """Return the cells without these genes; their library sizes stay true."""
    return _of_genes(cells, ~np.isin(cells.var_names, sorted(genes)))


def mitochondrial_and_ribosomal(cells: AnnData) -> Set[str]:
    """Return genes of mitochondria and ribosomes, by symbol: they tell stress, never a pathway."""
    if "symbol" not in cells.var:
        return set()
    symbol = cells.var["symbol"].astype(str)
    return set(cells.var_names[symbol.str.match(r"^(MT-|RP[LS]\d)").to_numpy()])


def _of_genes(cells: AnnData, is_kept: Array) -> AnnData:
    if not is_kept.any():
        raise Refusal("a control by genes needs some of them", "none measured", "leave it out")
    return cells[:, is_kept].copy()


class DepthOnly(ExposureModel):
    """See only how many counts and genes a cell has: whatever this tells apart is not biology."""

    name = "depth only"

    def _learn(self, train: AnnData, valid: AnnData, watch: Watch, work: Path | None) -> None:
        seen = _depth(train)
        self._middle, self._spread = seen.mean(axis=0), np.maximum(seen.std(axis=0), 1e-6)
        column = pd.Index(self.exposures).get_indexer(pd.Index(train.obs["exposure"].astype(str)))
        fitted = next(fit_balanced(self.embed(train), column, [PENALTY]))
        self._coefficients, self._intercept = fitted.coefficients, fitted.intercept

    def evidence(self, cells: AnnData) -> Array:
        weighed: Array = self.embed(cells) @ self._coefficients.T + self._intercept
        return weighed

    def embed(self, cells: AnnData) -> Array:
        standard: Array = (_depth(cells) - self._middle) / self._spread
        return standard

    def _state(self) -> State:
        return State(
            arrays={
                "middle": self._middle,
                "spread": self._spread,
                "coefficients": self._coefficients,
                "intercept": self._intercept,
            }
        )

    def _restore(self, state: State) -> None:
        self._middle, self._spread = state.arrays["middle"], state.arrays["spread"]
        self._coefficients = state.arrays["coefficients"]
        self._intercept = state.arrays["intercept"]


def _depth(cells: AnnData) -> Array:
    """Return log counts and log genes of every cell, (n, 2)."""
    values: Array = np.log1p(cells.obs[["n_counts", "n_genes"]].to_numpy(dtype=np.float64))
    return values
