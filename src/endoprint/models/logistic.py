"""Multinomial logistic regression on the expression of every gene: the bar for everything else.

It reads every training gene: on diffuse responses, 1,000 variable genes lose a sixth of macro-F1
(.682 against .836 on a simulated atlas). Genes are centred, and scaled by the spread that sampling
gives them (`expression`): against log counts per 10,000, unscaled, macro-F1 rose from .70 to .77
on an easy simulated atlas, from .936 to .942 on dexamethasone, and stayed .989 on interferon. With
the logarithm or without it is decided on validation cells, as the penalty is: without is better
where nothing but sampling scatters counts (.79 on that atlas) and worse in real cells (.978).

n cells, G genes, E exposures, D latent width.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy import sparse
from scipy.special import logsumexp

from endoprint.calibration import fit_temperature
from endoprint.config import Config
from endoprint.draws import evenly_drawn
from endoprint.elastic import fit_elastic
from endoprint.expression import Expression, Kind
from endoprint.latent import Latent
from endoprint.linear import Fitted, fit_balanced
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
DENSE_LIMIT = 2**30  # bytes; a dense matrix fits several times faster, while it fits in memory


class LogisticConfig(Config):
    """What logistic regression may be told."""

    # strength of the penalty per training cell; none: chosen on validation cells
    penalty: Annotated[float | None, FloatDistribution(1e-4, 1e2, log=True)] = None
    # of the penalty, on absolute values: 0 is L2 alone; above, an elastic net that drops genes
    # (Zou & Hastie 2005). Where many genes respond a little it does worse: .34 at .5 against .46
    # macro-F1 on a simulated atlas
    l1_share: Annotated[float, FloatDistribution(0.0, 1.0)] = 0.0
    # whether the logarithm of counts is read; none: chosen on validation cells
    kind: Annotated[Kind | None, CategoricalDistribution(["log", "linear"])] = None
    max_cells: int = 30_000  # training cells used, drawn evenly over unit x exposure
    latent_genes: int = 2000  # most variable genes, for `embed` and novelty only
    latent_width: Annotated[int, IntDistribution(2, 100)] = 30  # principal components in `embed`


class Logistic(ExposureModel):
    """Weigh every gene's expression linearly for every exposure (Cox 1958)."""

    Config = LogisticConfig
    name = "logistic"

    def _learn(self, train: AnnData, valid: AnnData, watch: Watch, work: Path | None) -> None:
        train = evenly_drawn(train, self.config.max_cells, self.seed)
        truth = pd.Index(self.exposures).get_indexer(pd.Index(train.obs["exposure"].astype(str)))
        valid = valid[valid.obs["exposure"].astype(str).isin(self.exposures).to_numpy()]
        kinds = (self.config.kind,) if self.config.kind else KINDS if valid.n_obs else KINDS[:1]
        step = count()
        tried = [self._along(train, truth, valid, kind, step, watch) for kind in kinds]
        loss, self._expression, best = min(tried, key=lambda each: each[0])
        self._take(best)
        self.provenance |= {
            "penalty": best.penalty,
            "kind": self._expression.kind,
            "has_converged": best.has_converged,
        }
        self._latent = Latent.fit(
            train, n_genes=self.config.latent_genes, width=self.config.latent_width
        )

    def _along(
        self,
        train: AnnData,
        truth: Array,
        valid: AnnData,
        kind: Kind,
        step: count[int],
        watch: Watch,
    ) -> tuple[float, Expression, Fitted]:
        """Fit along the penalties until validation cells grow less likely; return the best."""
        self._expression = Expression.fit(train, kind)
        values = _centred(self._expression.of(train), self._expression.mean)
        share = self.config.l1_share
        penalties: tuple[float, ...] = ELASTIC_PENALTIES if share else PENALTIES
        if not valid.n_obs:
            penalties = (UNCHOSEN_ELASTIC if share else UNCHOSEN,)
        if self.config.penalty is not None:
            penalties = (self.config.penalty,)
        fits = fit_elastic(values, truth, penalties, share) if share else None
        tried: list[tuple[float, Fitted]] = []
        for fitted in fits or fit_balanced(values, truth, penalties):
            if not isinstance(values, np.ndarray):  # not centred: as if it had been
                shift = fitted.coefficients @ self._expression.mean
                fitted = fitted._replace(intercept=fitted.intercept + shift)
            self._take(fitted)
            loss = self._loss(valid) if valid.n_obs else 0.0
            tried.append((loss, fitted))
            told = {"penalty": fitted.penalty, "validation_log_loss": loss}
            watch(next(step), told | {"is_log": float(kind == "log")})
            if len(tried) > 1 and loss > tried[-2][0]:
                break  # past the best: weaker penalties are slower to fit and only do worse
        loss, best = min(tried, key=lambda pair: pair[0])
        return loss, self._expression, best

    def _take(self, fitted: Fitted) -> None:
        self._coefficients = fitted.coefficients.astype(np.float32)  # as they will be read back
        self._intercept = fitted.intercept

    def _loss(self, valid: AnnData) -> float:
        """Return the log loss at its best temperature, units and exposures weighing equally."""
        truth = valid.obs["exposure"].astype(str)
        weight = balanced_weight(truth, valid.obs["unit"].astype(str))
        column = pd.Index(self.exposures).get_indexer(pd.Index(truth))
        evidence = self.evidence(valid)
        scaled = evidence / fit_temperature(evidence, column, weight)
        lost = logsumexp(scaled, axis=1) - scaled[np.arange(len(column)), column]
        return float(np.average(lost, weights=weight))

    def evidence(self, cells: AnnData) -> Array:
        values = self._expression.of(cells).astype(np.float64)
        wide = self._coefficients.astype(np.float64)
        # A gene the file lacks was not measured: it counts as average, not as silent.
        is_here = cells.var_names.get_indexer(self._expression.genes) >= 0
        offset = self._intercept - wide[:, is_here] @ self._expression.mean[is_here]
        weighed: Array = np.asarray(values @ wide.T) + offset
        return weighed

    def embed(self, cells: AnnData) -> Array:
        return self._latent.with_residual(cells)

    def _state(self) -> State:
        read = self._expression
        return State(
            {
                "genes": read.genes,
                "kind": read.kind,
                "size": read.size,
                "latent_genes": self._latent.genes,
            },
            {
                "coefficients": self._coefficients,
                "intercept": self._intercept,
                "mean": read.mean,
                "scale": read.scale,
                **self._latent.arrays(),
            },
        )

    def _restore(self, state: State) -> None:
        values, arrays = state.values, state.arrays
        self._expression = Expression(
            list(values["genes"]), values["kind"], values["size"], arrays["scale"], arrays["mean"]
        )
        self._coefficients = arrays["coefficients"]
        self._intercept = arrays["intercept"]
        self._latent = Latent.of(list(state.values["latent_genes"]), state.arrays)


def _centred(values: sparse.csr_matrix, mean: Array) -> Array | sparse.csr_matrix:
    """Return values dense and centred where memory allows: the same optimum, sooner met."""
    if values.shape[0] * values.shape[1] * 4 > DENSE_LIMIT:
        return values
    dense: Array = values.toarray() - mean.astype(np.float32)
    return dense
