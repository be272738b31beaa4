"""Multinomial logistic regression on the expression of every gene: the bar for everything else.

It reads every training gene: on diffuse responses, 1,000 variable genes lose a sixth of macro-F1
(.682 against .836 on a simulated atlas). Genes are centred, and scaled by the spread that sampling
gives them (`expression`): against log counts per 10,000, unscaled, macro-F1 rose from .70 to .77
on an easy simulated atlas, from .936 to .942 on dexamethasone, and stayed .989 on interferon. With
the logarithm or without it is decided on validation cells, as the penalty is: without is better
where nothing but sampling scatters counts (.79 on that atlas) and worse in real cells (.978).

Cell types answer one exposure differently, so every group of like cells (`groups`) may have
weights of its own, held to common ones by the same penalty (regularised multi-task learning:
Evgeniou & Pontil 2004, KDD, p. 109). How many groups is decided on validation cells too: two on
that atlas (.79 to .82) and on interferon (.989 with them and without), none on dexamethasone in
one cell line.

n cells, G genes, E exposures, K groups, D latent width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Field
from scipy import sparse
from scipy.special import logsumexp

from endoprint.calibration import fit_temperature
from endoprint.config import Config
from endoprint.draws import evenly_drawn
from endoprint.elastic import fit_elastic
from endoprint.expression import Expression, Kind
from endoprint.groups import Groups
from endoprint.labels import CONTROL
from endoprint.latent import Latent
from endoprint.linear import fit_balanced, fit_grouped
from endoprint.metrics import balanced_weight
from endoprint.model import ExposureModel, State, Watch

Array = np.ndarray[Any, np.dtype[Any]]

# Tried on validation cells, from strong to weak so that each fit starts from the last. Held-out
# figures are flat between .03 and .5 on every data set measured; the ends are for others.
PENALTIES = (10.0, 1.0, 0.3, 0.1, 0.03, 0.01)
KINDS: tuple[Kind, ...] = ("log", "linear")
ELASTIC_PENALTIES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)  # absolute values bite harder
UNCHOSEN = 0.1  # where there are no validation cells to choose on
UNCHOSEN_ELASTIC = 0.003
GROUPS = (2, 4, 8)  # numbers tried in turn, while validation cells grow more likely
DENSE_LIMIT = 2**30  # bytes; a dense matrix fits several times faster, while it fits in memory


class LogisticConfig(Config):
    """What logistic regression may be told."""

    # strength of the penalty per training cell; none: chosen on validation cells
    penalty: Annotated[float | None, FloatDistribution(1e-4, 1e2, log=True)] = None
    # of the penalty, on absolute values: 0 is L2 alone; above, an elastic net that drops genes
    # (Zou & Hastie 2005). Where many genes respond a little it does worse: .34 at .5 against .46
    # macro-F1 on a simulated atlas
    l1_share: Annotated[float, FloatDistribution(0.0, 1.0, step=0.25)] = 0.0
    # whether the logarithm of counts is read; none: chosen on validation cells
    kind: Annotated[Kind | None, CategoricalDistribution(["log", "linear"])] = None
    # groups of like cells with weights of their own; none: chosen on validation cells. An elastic
    # net weighs all cells alike
    n_groups: Annotated[int | None, Field(ge=1, le=32)] = None
    max_cells: int = 30_000  # training cells used, drawn evenly over unit x exposure
    latent_genes: int = 2000  # most variable genes, for `embed` and novelty only
    latent_width: Annotated[int, IntDistribution(2, 100)] = 30  # principal components in `embed`


@dataclass(frozen=True)
class Weighing:
    """How genes are weighed in every group: evidence is `coefficients @ (x - mean) + intercept`.

    `mean` (K, G), `coefficients` (K, E, G) float32 as they will be read back, `intercept` (K, E).
    """

    expression: Expression
    groups: Groups
    mean: Array
    coefficients: Array
    intercept: Array
    penalty: float = 0.0
    has_converged: bool = True
    loss: float = 0.0

    def evidence(self, cells: AnnData) -> Array:
        """Weigh every exposure, (n, E)."""
        values = self.expression.of(cells).astype(np.float64)
        # A gene the file lacks was not measured: it counts as average, not as silent.
        is_here = cells.var_names.get_indexer(self.expression.genes) >= 0
        group = self.groups.of(cells)
        weighed = np.empty((cells.n_obs, self.intercept.shape[1]))
        for k in np.unique(group):
            wide = self.coefficients[k].astype(np.float64)
            offset = self.intercept[k] - wide[:, is_here] @ self.mean[k, is_here]
            weighed[group == k] = np.asarray(values[group == k] @ wide.T) + offset
        return weighed


class Logistic(ExposureModel):
    """Weigh every gene's expression linearly for every exposure (Cox 1958)."""

    Config = LogisticConfig
    name = "logistic"

    def _learn(self, train: AnnData, valid: AnnData, watch: Watch, work: Path | None) -> None:
        control = str(train.uns.get("endoprint", {}).get("control", CONTROL))
        train = evenly_drawn(train, self.config.max_cells, self.seed)
        self._latent = Latent.fit(
            train, n_genes=self.config.latent_genes, width=self.config.latent_width
        )
        truth = pd.Index(self.exposures).get_indexer(pd.Index(train.obs["exposure"].astype(str)))
        valid = valid[valid.obs["exposure"].astype(str).isin(self.exposures).to_numpy()]
        step = count()

        def along(kind: Kind, groups: Groups) -> Weighing:
            return self._along(train, truth, valid, kind, groups, step, watch)

        together = Groups.single(self._latent)
        kinds = (self.config.kind,) if self.config.kind else KINDS if valid.n_obs else KINDS[:1]
        best = min((along(kind, together) for kind in kinds), key=lambda tried: tried.loss)
        asked = None if self.config.l1_share else self.config.n_groups
        may_group = valid.n_obs and not self.config.l1_share
        for n in (asked,) if asked else GROUPS if may_group else ():
            groups = Groups.fit(self._latent, train, n, control=control, seed=self.seed)
            apart = along(best.expression.kind, groups) if groups else None
            if apart is None or (apart.loss >= best.loss and not asked):
                break
            best = apart
        self._weighing = best
        self.provenance |= {
            "penalty": best.penalty,
            "kind": best.expression.kind,
            "n_groups": len(best.groups.centres),
            "has_converged": best.has_converged,
        }

    def _along(
        self,
        train: AnnData,
        truth: Array,
        valid: AnnData,
        kind: Kind,
        groups: Groups,
        step: count[int],
        watch: Watch,
    ) -> Weighing:
        """Fit along the penalties until validation cells grow less likely; return the best."""
        expression = Expression.fit(train, kind)
        tried: list[Weighing] = []
        for weighing in self._fits(expression, train, truth, groups, has_valid=valid.n_obs > 0):
            if valid.n_obs:
                weighing = replace(weighing, loss=self._loss(weighing, valid))
            tried.append(weighing)
            told = {"penalty": weighing.penalty, "validation_log_loss": weighing.loss}
            told |= {"is_log": float(kind == "log"), "n_groups": float(len(weighing.mean))}
            watch(next(step), told)
            if len(tried) > 1 and weighing.loss > tried[-2].loss:
                break  # past the best: weaker penalties are slower to fit and only do worse
        return min(tried, key=lambda each: each.loss)

    def _fits(
        self,
        expression: Expression,
        train: AnnData,
        truth: Array,
        groups: Groups,
        *,
        has_valid: bool,
    ) -> Iterator[Weighing]:
        """Fit under one penalty after the other, from strong to weak."""
        share = self.config.l1_share
        penalties: tuple[float, ...] = ELASTIC_PENALTIES if share else PENALTIES
        if not has_valid:
            penalties = (UNCHOSEN_ELASTIC if share else UNCHOSEN,)
        if self.config.penalty is not None:
            penalties = (self.config.penalty,)
        read, group = expression.of(train), groups.of(train)
        n_groups = len(groups.centres)
        mean = _means(read, group, expression.mean, n_groups)
        values = _centred(read, expression.mean) if n_groups == 1 else read
        if n_groups > 1:
            fits = fit_grouped(read, mean, group, truth, penalties)
        elif share:
            fits = fit_elastic(values, truth, penalties, share)
        else:
            fits = fit_balanced(values, truth, penalties)
        for fitted in fits:
            wide = fitted.coefficients.reshape(n_groups, -1, mean.shape[1])
            intercept = np.tile(fitted.intercept, (n_groups, 1))
            if n_groups == 1 and values is read:  # not centred: as if it had been
                intercept += wide[0] @ mean[0]
            yield Weighing(
                expression, groups, mean, wide.astype(np.float32), intercept,
                fitted.penalty, fitted.has_converged,
            )  # fmt: skip

    def _loss(self, weighing: Weighing, valid: AnnData) -> float:
        """Return the log loss at its best temperature, units and exposures weighing equally."""
        truth = valid.obs["exposure"].astype(str)
        weight = balanced_weight(truth, valid.obs["unit"].astype(str))
        column = pd.Index(self.exposures).get_indexer(pd.Index(truth))
        evidence = weighing.evidence(valid)
        scaled = evidence / fit_temperature(evidence, column, weight)
        lost = logsumexp(scaled, axis=1) - scaled[np.arange(len(column)), column]
        return float(np.average(lost, weights=weight))

    def evidence(self, cells: AnnData) -> Array:
        return self._weighing.evidence(cells)

    def embed(self, cells: AnnData) -> Array:
        return self._latent.with_residual(cells)

    def _state(self) -> State:
        said = self._weighing
        return State(
            {
                "genes": said.expression.genes,
                "kind": said.expression.kind,
                "size": said.expression.size,
                "latent_genes": self._latent.genes,
            },
            {
                "coefficients": said.coefficients,
                "intercept": said.intercept,
                "group_mean": said.mean,
                "group_centres": said.groups.centres,
                "mean": said.expression.mean,
                "scale": said.expression.scale,
                **self._latent.arrays(),
            },
        )

    def _restore(self, state: State) -> None:
        values, arrays = state.values, state.arrays
        self._latent = Latent.of(list(values["latent_genes"]), arrays)
        self._weighing = Weighing(
            Expression(
                list(values["genes"]),
                values["kind"],
                values["size"],
                arrays["scale"],
                arrays["mean"],
            ),
            Groups(self._latent, arrays["group_centres"]),
            arrays["group_mean"],
            arrays["coefficients"],
            arrays["intercept"],
        )


def _means(read: sparse.csr_matrix, group: Array, overall: Array, n_groups: int) -> Array:
    """Return every group's mean expression, (K, G); of a group without cells, the overall."""
    means = np.tile(overall, (n_groups, 1))
    if n_groups > 1:
        for k in np.unique(group):
            means[k] = np.asarray(read[group == k].mean(axis=0)).ravel()
    return means


def _centred(read: sparse.csr_matrix, mean: Array) -> Array | sparse.csr_matrix:
    """Return expression dense and centred where memory allows: the same optimum, sooner met."""
    if read.shape[0] * read.shape[1] * 4 > DENSE_LIMIT:
        return read
    dense: Array = read.toarray() - mean.astype(np.float32)
    return dense
