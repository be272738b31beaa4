"""Entropic optimal transport: how much of a cell's mass each exposure's training cells attract.

Training cells of one unit are transported onto training cells of all others (Cuturi 2013,
arXiv 1306.0895), and the potentials of the receiving cells are kept. A new cell is then weighed by

    evidence_e(x) = log sum over reference cells j of e of exp((g_j - |x - y_j|^2) / epsilon)

With frozen potentials **this is a kernel density**: a Gaussian mixture with one component per
reference cell, of variance epsilon / 2, whose weights come from transport instead of being equal.
`has_potentials = False` (g = 0, equal weights) shows what the potentials are worth. They are
frozen because a plan solved jointly with the cells being scored would make every answer depend on
which other cells are in the file, and would force the reference's mix of exposures on them.

Potentials come from leave-unit-out *inside training* (judging rule 8), never from the cells that
the temperature is fitted on. Whole samples are weighed by the debiased Sinkhorn divergence to
every exposure's reference, which is transport proper, and which also feels a sample's composition
of cell types (`provenance["reference"]` says what the reference is made of).

Distances in the latent follow whatever varies most between cells, which is seldom the exposure, so
costs are taken along the axes that tell exposures apart (`latent.telling_axes`); along all axes of
the latent alike macro-F1 was .25 on a simulated atlas of 15 exposures. Potentials gain nothing
there: .61 with, .64 without (3,000 cells, easy, one unseen unit; docs/field.md).

n cells, R reference cells, E exposures, D latent width. Costs are squared Euclidean distances in
the latent; epsilon and the relaxation are shares of the mean cost between reference cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from zlib import crc32

import numpy as np
import ot
import pandas as pd
import torch
from anndata import AnnData
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from endoprint.calibration import fit_temperature
from endoprint.config import Config
from endoprint.latent import Latent, telling_axes
from endoprint.metrics import balanced_weight
from endoprint.model import ExposureModel, State, Watch

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 512  # cells weighed at once; bounds memory at BLOCK x R distances
# A guess at the cost worth paying: the smallest epsilons are stopped before they converge.
ITERATIONS = 200
TOLERANCE = 1e-6  # of the marginals, Euclidean norm
QUERIES = 300  # training cells transported per unit; bounds the cost of a fit
ALIGNMENTS = 50  # rounds of least squares between parts; two suffice where every unit met all
PSEUDO_UNITS = 5  # random parts of the cells, where units cannot be left out
CALIBRATION_UNITS = (
    2  # training units behind the populations' scale, where validation is too small
)


class TransportConfig(Config):
    """What optimal transport may be told."""

    # entropic blur, in mean training costs: small is nearest neighbour, large is nearest mean
    epsilon: Annotated[float, FloatDistribution(5e-3, 1.0, log=True)] = 0.05
    # how freely mass may be left behind or created, in mean training costs; none: not at all
    relaxation: Annotated[float | None, FloatDistribution(1e-2, 1e2, log=True)] = None
    has_potentials: bool = True  # false: equal weights, a plain kernel density (g = 0)
    reference_per_exposure: int = 150  # training cells kept, drawn evenly over units
    # the same for whole samples: with little blur, few cells in many dimensions are all far apart
    population_epsilon: Annotated[float, FloatDistribution(0.05, 10.0, log=True)] = 0.5
    population_cells: int = 100  # cells of a sample and of a reference that are compared
    latent_genes: int = 2000  # most variable genes
    latent_width: Annotated[int, IntDistribution(2, 500, log=True)] = 200  # principal components
    # costs count what tells exposures apart, else all axes of the latent alike
    is_telling: Annotated[bool, CategoricalDistribution([True, False])] = True


class Transport(ExposureModel):
    """Ask which exposure's training cells a cell would be carried to at least cost."""

    Config = TransportConfig
    name = "transport"

    _left_out: tuple[Array, Array, Array, Array] | None = None

    def _learn(self, train: AnnData, valid: AnnData, watch: Watch, work: Path | None) -> None:
        config, rng = self.config, np.random.default_rng(self.seed)
        self._latent = Latent.fit(train, n_genes=config.latent_genes, width=config.latent_width)
        place = self._latent.transform(train)
        exposure, unit = train.obs["exposure"].astype(str), train.obs["unit"].astype(str)
        truth = pd.Index(self.exposures).get_indexer(pd.Index(exposure))
        self._axes = telling_axes(place, truth) if config.is_telling else np.eye(place.shape[1])
        place = place @ self._axes
        part, how = _parts(truth, unit.to_numpy(), rng)
        kept = _evenly(truth, unit.to_numpy(), config.reference_per_exposure, rng)
        self._reference_place, self._reference_exposure = place[kept], truth[kept]
        weight = balanced_weight(exposure.iloc[kept], unit.iloc[kept])
        per_exposure = np.bincount(truth[kept], weights=weight)
        weight = weight / (len(self.exposures) * per_exposure[truth[kept]])
        typical = float(cdist(place[kept], place[kept], "sqeuclidean").mean())
        self._epsilon = config.epsilon * typical
        self._population_epsilon = config.population_epsilon * typical
        self._log_weight = np.log(weight)
        if config.has_potentials:
            found = self._carried(place, truth, part, kept, weight, typical, rng, watch)
            self._log_weight = _levelled(_aligned(found, np.log(weight)), truth[kept])
        # equally many for every exposure, for a divergence depends on how many cells it compares
        size = min(config.population_cells, int(np.bincount(truth[kept]).min()))
        self._population = _evenly(truth[kept], unit.to_numpy()[kept], size, rng)
        self._left_out = (place, truth, part, part[kept])  # let go once populations are calibrated
        self.provenance |= {
            "potentials": how if config.has_potentials else "none: a plain kernel density",
            "reference": _composition(train[kept]),
            "population_cells": size,
        }

    def _carried(
        self,
        place: Array,
        truth: Array,
        part: Array,
        kept: Array,
        weight: Array,
        typical: float,
        rng: np.random.Generator,
        watch: Watch,
    ) -> Array:
        """Return what each part of the training cells says of log exp(g / epsilon), (K, R).

        A part's cells are carried to reference cells of all other parts, of exposures that it met
        itself; all others are NaN. Each row is known up to a constant.
        """
        relaxation = self.config.relaxation
        names = sorted(set(part))
        found = np.full((len(names), len(kept)), np.nan)
        for row, name in enumerate(names):
            inside = np.flatnonzero(part == name)
            per_exposure = -(-QUERIES // len(set(truth[inside])))
            query = inside[_evenly(truth[inside], part[inside], per_exposure, rng)]
            to = (part[kept] != name) & np.isin(truth[kept], truth[query])
            query = query[np.isin(truth[query], truth[kept][to])]
            if not len(query):
                continue
            mass = 1.0 / np.bincount(truth[query])[truth[query]]
            _, found[row, to] = potentials(
                mass / mass.sum(),
                weight[to] / weight[to].sum(),
                cdist(place[query], place[kept[to]], "sqeuclidean"),
                epsilon=self._epsilon,
                relaxation=None if relaxation is None else relaxation * typical,
            )
            watch(row, {"parts_carried": float(row + 1)})
        return found

    def evidence(self, cells: AnnData) -> Array:
        return self._weighed(self._placed(cells))

    def _placed(self, cells: AnnData) -> Array:
        """Return where cells lie in the space that costs are taken in, (n, A)."""
        placed: Array = self._latent.transform(cells) @ self._axes
        return placed

    def _weighed(self, place: Array) -> Array:
        """Return log mass received from every exposure's reference cells, (n, E)."""
        weighed = np.empty((len(place), len(self.exposures)))
        of_exposure = [
            np.flatnonzero(self._reference_exposure == e) for e in range(len(self.exposures))
        ]
        for start in range(0, len(place), BLOCK):
            block = slice(start, start + BLOCK)
            cost = cdist(place[block], self._reference_place, "sqeuclidean")
            mass = self._log_weight - cost / self._epsilon
            for e, own in enumerate(of_exposure):
                weighed[block, e] = logsumexp(mass[:, own], axis=1)
        return weighed

    def embed(self, cells: AnnData) -> Array:
        return self._latent.with_residual(cells)

    # -- whole samples --------------------------------------------------------------------------
    def population_evidence(self, cells: AnnData, control: AnnData | None = None) -> Array:
        """Return minus the debiased Sinkhorn divergence to every exposure's reference, (E,).

        In units of their epsilon. A large sample is stood for by `population_cells` of its cells,
        chosen by a hash of their ids, so that neither order nor chance matters; `control` is not
        used.
        """
        if not cells.n_obs:
            return np.zeros(len(self.exposures))
        turn = [crc32(str(name).encode()) for name in cells.obs_names]
        chosen = np.argsort(turn, kind="stable")[: self.config.population_cells]
        # in the order of the hash, and so in the same order whatever the file's
        return self._compared(self._placed(cells[chosen]), self._population)

    def _compared(self, place: Array, population: Array) -> Array:
        """Return one sample's evidence against reference cells at these positions, (E,)."""
        epsilon = self._population_epsilon
        own = regularised_cost(place, place, epsilon)
        evidence = np.full(len(self.exposures), np.nan)
        for e in sorted(set(self._reference_exposure[population])):
            target = self._reference_place[population[self._reference_exposure[population] == e]]
            across = regularised_cost(place, target, epsilon)
            itself = regularised_cost(target, target, epsilon)
            evidence[e] = -(across - 0.5 * own - 0.5 * itself) / epsilon
        filled: Array = np.where(np.isnan(evidence), np.nanmin(evidence), evidence)
        return filled

    def _calibrate(self, valid: AnnData) -> None:
        """Fit the temperatures; where validation samples are too few, on training units left out.

        Divergences have a scale of their own: the cells' temperature would say nothing of them.
        """
        super()._calibrate(valid)
        told = list(self._left_out_samples())
        if told:
            evidence = np.stack([one for one, _ in told])
            truth = np.array([column for _, column in told])
            self.population_temperature = fit_temperature(evidence, truth, np.ones(len(told)))
        self._left_out = None

    def _calibrate_populations(self, valid: AnnData, evidence: Array, truth: Array) -> bool:
        is_fitted = super()._calibrate_populations(valid, evidence, truth)
        if is_fitted:
            self._left_out = None
        return is_fitted

    def _left_out_samples(self) -> Iterator[tuple[Array, int]]:
        """Yield evidence and truth of training samples, their own unit barred from reference."""
        if self._left_out is None:
            return
        place, truth, part, of_reference = self._left_out
        for name in sorted(set(part))[:CALIBRATION_UNITS]:
            others = self._population[of_reference[self._population] != name]
            for e in sorted(set(truth[part == name]) & set(self._reference_exposure[others])):
                sample = place[(part == name) & (truth == e)][: self.config.population_cells]
                yield self._compared(sample, others), int(e)

    # -- disk -----------------------------------------------------------------------------------
    def _state(self) -> State:
        return State(
            {
                "latent_genes": self._latent.genes,
                "epsilon": self._epsilon,
                "population_epsilon": self._population_epsilon,
            },
            {
                "reference.place": self._reference_place,
                "reference.exposure": self._reference_exposure,
                "reference.log_weight": self._log_weight,
                "population": self._population,
                "axes": self._axes,
                **self._latent.arrays(),
            },
        )

    def _restore(self, state: State) -> None:
        self._latent = Latent.of(list(state.values["latent_genes"]), state.arrays)
        self._epsilon = float(state.values["epsilon"])
        self._population_epsilon = float(state.values["population_epsilon"])
        self._reference_place = state.arrays["reference.place"]
        self._reference_exposure = state.arrays["reference.exposure"]
        self._log_weight = state.arrays["reference.log_weight"]
        self._population = state.arrays["population"]
        self._axes = state.arrays["axes"]


# -- transport on arrays ------------------------------------------------------------------------
def potentials(
    source: Array,
    target: Array,
    cost: Array,
    *,
    epsilon: float,
    relaxation: float | None = None,
    iterations: int = ITERATIONS,
) -> tuple[Array, Array]:
    """Return log scalings (n,) and (R,): the plan is exp(log_u + log_v - cost / epsilon).

    `source` (n,) and `target` (R,) are masses, `cost` (n, R). Balanced by POT in the log domain;
    relaxed (Chizat 2018, arXiv 1607.05816) by ourselves, because POT's solvers leave the log
    domain and floor what they divide by at 1e-16, which a small epsilon passes.
    """
    a, b, scaled = (torch.from_numpy(np.ascontiguousarray(x)) for x in (source, target, cost))
    if relaxation is None:
        # on tensors: four times as fast as POT on arrays
        _, log = ot.bregman.sinkhorn_log(
            a, b, scaled, epsilon, numItermax=iterations, stopThr=TOLERANCE, warn=False, log=True
        )
        return log["log_u"].numpy(), log["log_v"].numpy()
    yielding = relaxation / (relaxation + epsilon)
    kernel = -scaled / epsilon
    log_u, log_v = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(iterations):
        before = log_v
        log_v = yielding * (torch.log(b) - torch.logsumexp(kernel + log_u[:, None], 0))
        log_u = yielding * (torch.log(a) - torch.logsumexp(kernel + log_v[None, :], 1))
        if float((log_v - before).abs().max()) < TOLERANCE:
            break
    return log_u.numpy(), log_v.numpy()


def regularised_cost(
    one: Array, other: Array, epsilon: float, *, iterations: int = ITERATIONS
) -> float:
    """Return the entropic transport cost of two clouds (n, D) and (m, D), all cells alike.

    Its dual value, entropy against the product of the clouds included, so that the debiased
    divergence is never negative (Feydy 2019, arXiv 1810.08278). POT's own divergence leaves the
    entropy out and clips at zero.
    """
    a, b = (np.full(len(cloud), 1.0 / len(cloud)) for cloud in (one, other))
    log_u, log_v = potentials(
        a, b, cdist(one, other, "sqeuclidean"), epsilon=epsilon, iterations=iterations
    )
    return float(epsilon * (a @ (log_u - np.log(a)) + b @ (log_v - np.log(b))))


def _levelled(log_weight: Array, exposure: Array) -> Array:
    """Give every exposure's reference cells the same median, (R,).

    Where exposures lie far apart nothing else holds their potentials against each other. The
    median, not the sum: a few cells that nothing is carried to have enormous potentials.
    """
    levelled = log_weight.copy()
    for e in sorted(set(exposure)):
        levelled[exposure == e] -= np.median(log_weight[exposure == e])
    return levelled


def _aligned(found: Array, unknown: Array) -> Array:
    """Return the mean over rows once each row's own constant is taken off, (R,).

    found (K, R), NaN where a row says nothing; a cell of which none does keeps `unknown`.
    """
    is_told = np.isfinite(found)
    excess = np.where(is_told, found - unknown, 0.0)
    shift, level = np.zeros(len(found)), np.zeros(len(unknown))
    for _ in range(ALIGNMENTS):
        level = (excess - shift[:, None] * is_told).sum(axis=0) / np.maximum(is_told.sum(0), 1)
        shift = ((excess - level) * is_told).sum(axis=1) / np.maximum(is_told.sum(1), 1)
    aligned: Array = unknown + level
    return aligned


# -- which cells --------------------------------------------------------------------------------
def _parts(truth: Array, unit: Array, rng: np.random.Generator) -> tuple[Array, str]:
    """Return the part of each cell that is left out together, (n,), and how that is called."""
    met = pd.crosstab(truth, unit)
    if ((met > 0).sum(axis=1) >= 2).all():
        return unit, "leave-unit-out inside training"
    part = pd.Series(rng.permutation(len(truth))).groupby(truth).rank().to_numpy().astype(int)
    return part % PSEUDO_UNITS, "not unit-validated: some exposure was met by one unit only"


def _evenly(truth: Array, unit: Array, at_most: int, rng: np.random.Generator) -> Array:
    """Return positions of at most so many cells per exposure, drawn evenly over units."""
    table = pd.DataFrame({"truth": truth, "unit": unit, "chance": rng.permutation(len(truth))})
    table["turn"] = table.groupby(["truth", "unit"])["chance"].rank()
    table = table.sort_values(["turn", "chance"])
    return np.sort(table.groupby("truth").head(at_most).index.to_numpy())


def _composition(cells: AnnData) -> dict[str, dict[str, dict[str, int]]]:
    """Return how many reference cells each exposure has, by unit and by cell type if known."""
    told: dict[str, dict[str, dict[str, int]]] = {}
    for column in [name for name in ("unit", "cell_type") if name in cells.obs]:
        counted = pd.crosstab(
            cells.obs["exposure"].astype(str).to_numpy(), cells.obs[column].astype(str).to_numpy()
        )
        told[column] = {
            str(exposure): {str(name): int(n) for name, n in row.items()}
            for exposure, row in counted.iterrows()
        }
    return told
