"""The bridge: how cells would wander from control to each exposure, at least effort.

A diffusion Schrodinger bridge joins control cells to the cells of every exposure in the latent:
of all random motions with the right cells at both ends, the one closest to Brownian motion of
scale sigma over one unit of pseudo-time. It is found by iterative Markovian fitting (Shi 2023,
arXiv 2303.16852): pair cells of both ends, learn the drift of the Brownian bridges between them,
forward and backward, let cells wander by what was learned, take start and end as the next pairs.

Evidence is a likelihood, through one estimator for every exposure, control included: the bridge's
probability flow pulls a cell back to control, where a Gaussian mixture weighs it, and the flow's
divergence pays for the change of volume (Song 2021, arXiv 2011.13456). The network has two hidden
layers, whose divergence is an exact bilinear form, so nothing is estimated by random probes.

n cells, D latent width, E exposures, H hidden units; pseudo-time t is 0 at control, 1 at exposure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from optuna.distributions import IntDistribution
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture

from endoprint.calibration import fit_temperature
from endoprint.config import Refusal
from endoprint.labels import CONTROL
from endoprint.latent import Latent, telling_axes, way_back
from endoprint.model import ExposureModel, State, Watch
from endoprint.models.bridge.motion import Ends, Motion, MotionConfig

Array = np.ndarray[Any, np.dtype[Any]]

MOST_KINDS = 6  # components tried for control cells; BIC chooses
BLOCK = 128  # cells weighed at once; bounds memory
MOST_COMPARED = 300  # cells per population in an energy distance, drawn by a fixed seed


class BridgeConfig(MotionConfig):
    """What the bridge may be told."""

    latent_genes: int = 2000  # most variable genes
    latent_width: Annotated[int, IntDistribution(2, 500, log=True)] = 200  # principal components
    # components beside the axes that tell exposures apart: what else a carried cell varies in
    further_axes: Annotated[int, IntDistribution(0, 50)] = 10
    # a whole sample: the mean of its cells, or its distance from its unit's own controls, carried
    population: Literal["cells", "carried"] = "cells"


@dataclass(frozen=True)
class Kinds:
    """A Gaussian mixture with one covariance: where control cells are found."""

    log_weight: Array  # (K,)
    mean: Array  # (K, D)
    whiten: Array  # (D, D), Cholesky factor of the precision

    @classmethod
    def fit(cls, cells: Array, *, seed: int) -> Kinds:
        """Choose by BIC among mixtures of a few components; cells (n, D)."""
        tried = [
            GaussianMixture(k, covariance_type="tied", reg_covar=0.01, random_state=seed).fit(
                cells
            )
            for k in range(1, 1 + min(MOST_KINDS, max(1, len(cells) // 20)))
        ]
        best = min(tried, key=lambda mixture: float(mixture.bic(cells)))
        return cls(np.log(best.weights_), best.means_, best.precisions_cholesky_)

    def log_density(self, cells: Array) -> Array:
        """Return log p (...,) of cells (..., D), up to the constant all exposures share."""
        away = (cells[..., None, :] - self.mean) @ self.whiten
        log_p: Array = logsumexp(self.log_weight - 0.5 * (away**2).sum(axis=-1), axis=-1)
        return log_p


class Bridge(ExposureModel):
    """Carry control cells to every exposure, and ask where a cell would have come from."""

    Config = BridgeConfig
    name = "bridge"

    def _learn(self, train: AnnData, valid: AnnData, watch: Watch, work: Path | None) -> None:
        control = str(train.uns.get("endoprint", {}).get("control", CONTROL))
        if control not in self.exposures:
            raise Refusal(
                "a bridge starts from control cells",
                f"no {control} among {', '.join(self.exposures)}",
                "name the control, or fit another model",
            )
        self._control = control
        self._latent = Latent.fit(
            train, n_genes=self.config.latent_genes, width=self.config.latent_width
        )
        places = self._latent.transform(train)
        truth = pd.Index(self.exposures).get_indexer(pd.Index(train.obs["exposure"].astype(str)))
        self._axes = telling_axes(places, truth, n_further=self.config.further_axes)
        self._back = way_back(places, self._axes)
        place = places @ self._axes
        means = np.stack([place[truth == e].mean(axis=0) for e in range(len(self.exposures))])
        within = np.sqrt(((place - means[truth]) ** 2).mean(axis=0))
        self._centre = means[self.exposures.index(control)]
        self._scale = np.maximum(within, 1e-6 * max(float(within.max()), 1e-6))
        cells = (place - self._centre) / self._scale
        column = self.exposures.index(control)
        ends = Ends(
            cells,
            truth,
            train.obs["unit"].astype(str).to_numpy(),
            control=column,
            at_once=self.config.pairs_per_exposure,
            seed=self.seed,
        )
        self._motion = self._blank(cells.shape[1])
        self._motion.fit(ends.within_units(), ends.apart, self.config, watch)
        self._exact = self._motion.doubled()
        # Pulled back to control, cells of every exposure lie where controls lie: E times the cells
        origins = self._exact.origins(torch.from_numpy(cells), torch.from_numpy(truth))
        self._kinds = Kinds.fit(origins.numpy(), seed=self.seed)
        self.provenance |= {"control": control, "n_kinds_of_control": len(self._kinds.mean)}

    def _blank(self, width: int) -> Motion:
        return Motion(
            sigma=self.config.sigma,
            width=width,
            hidden=self.config.hidden,
            n_exposures=len(self.exposures),
            seed=self.seed,
        )

    # -- answers ----------------------------------------------------------------------------------
    def evidence(self, cells: AnnData) -> Array:
        found: Array = self._pulled_back(cells)[0]
        return found

    def path_energy(self, cells: AnnData) -> Array:
        """Return what pulling each cell back to control costs, (n, E): reported, never scored.

        Half the integral of the squared backward drift over sigma^2, along the flow. It favours
        exposures of small effect, so it is no evidence.
        """
        return self._pulled_back(cells)[1]

    def _pulled_back(self, cells: AnnData) -> tuple[Array, Array]:
        place = self._standard(cells)
        evidence = np.empty((len(place), len(self.exposures)))
        energy = np.empty_like(evidence)
        for at in range(0, len(place), BLOCK):
            block = torch.from_numpy(place[at : at + BLOCK])
            origin, volume, effort = (part.numpy() for part in self._exact.pulled_back(block))
            evidence[at : at + BLOCK] = (self._kinds.log_density(origin) - volume).T
            energy[at : at + BLOCK] = effort.T
        return evidence, energy

    def embed(self, cells: AnnData) -> Array:
        return self._latent.with_residual(cells)

    def carry(
        self, control: AnnData, exposure: str, seed: int, *, as_genes: bool = False
    ) -> pd.DataFrame:
        """Carry control cells to an exposure by the random motion: one draw per cell.

        Rows are the cells given. Columns are axes of the latent, or with `as_genes` its genes in
        log1p counts per 10,000: the cell's own values moved along the axes, floored at zero, so
        that what the axes do not see stays as it was.
        """
        if exposure not in self.exposures:
            raise Refusal(
                "cells are carried to an exposure of the fit",
                exposure,
                f"one of {', '.join(self.exposures)}",
            )
        place = self._standard(control)
        moved = (self._carried(place, exposure, seed) - place) * self._scale @ self._back
        here = self._latent.transform(control)
        if not as_genes:
            axes = [f"axis_{i}" for i in range(here.shape[1])]
            return pd.DataFrame(here + moved, index=control.obs_names, columns=axes)
        read = self._latent.expression
        values = read.of(control).toarray() + moved @ self._latent.components
        return pd.DataFrame(
            read.log1p_per_10k(values), index=control.obs_names, columns=read.genes
        )

    def _carried(self, place: Array, exposure: str, seed: int) -> Array:
        """Carry standardised places (n, D) to an exposure."""
        which = torch.full((len(place),), self.exposures.index(exposure))
        moved: Array = self._exact.wander(
            torch.from_numpy(place),
            which,
            is_onward=True,
            generator=torch.Generator().manual_seed(seed),
        ).numpy()
        return moved

    # -- whole samples ----------------------------------------------------------------------------
    def population_evidence(self, cells: AnnData, control: AnnData | None = None) -> Array:
        """Return the evidence of one sample, (E,).

        The mean of its cells, or as `population: carried` and given the unit's own control cells,
        minus the energy distance (Szekely 2013) between the sample and those cells carried to
        each exposure: what is the unit's own is in both, and cancels.
        """
        if self.config.population == "cells" or control is None or not control.n_obs:
            return super().population_evidence(cells)
        sample, own = _some(self._standard(cells)), _some(self._standard(control))
        return -np.array(
            [
                energy_distance(sample, self._carried(own, exposure, self.seed))
                for exposure in self.exposures
            ]
        )

    def _calibrate(self, valid: AnnData) -> None:
        """Fit the cells' temperature, and that of carried populations on their own scale."""
        super()._calibrate(valid)
        if self.config.population == "cells":
            return
        label, unit = (valid.obs[key].astype(str).to_numpy() for key in ("exposure", "unit"))
        answers, truth = [], []
        for name in sorted(set(unit)):
            own = valid[(unit == name) & (label == self._control)]
            for e, exposure in enumerate(self.exposures):
                sample = valid[(unit == name) & (label == exposure)]
                if sample.n_obs and own.n_obs:
                    answers.append(self.population_evidence(sample, own))
                    truth.append(e)
        if answers:
            self.population_temperature = fit_temperature(
                np.stack(answers), np.array(truth), np.ones(len(truth))
            )

    def _standard(self, cells: AnnData) -> Array:
        place = self._latent.transform(cells) @ self._axes
        standard: Array = (place - self._centre) / self._scale
        return standard

    # -- disk -------------------------------------------------------------------------------------
    def _state(self) -> State:
        motion = {
            f"{side}.{key}": value.numpy()
            for side, drift in (("onward", self._motion.onward), ("back", self._motion.back))
            for key, value in drift.state_dict().items()
        }
        own = {
            "centre": self._centre,
            "scale": self._scale,
            "axes": self._axes,
            "back": self._back,
            "kinds.log_weight": self._kinds.log_weight,
            "kinds.mean": self._kinds.mean,
            "kinds.whiten": self._kinds.whiten,
        }
        return State(
            {"latent_genes": self._latent.genes, "control": self._control},
            {**motion, **own, **self._latent.arrays()},
        )

    def _restore(self, state: State) -> None:
        arrays = state.arrays
        self._control = state.values["control"]
        self._latent = Latent.of(list(state.values["latent_genes"]), arrays)
        self._centre, self._scale = arrays["centre"], arrays["scale"]
        self._axes, self._back = arrays["axes"], arrays["back"]
        self._kinds = Kinds(*(arrays[f"kinds.{key}"] for key in ("log_weight", "mean", "whiten")))
        self._motion = self._blank(len(self._centre))
        for side, drift in (("onward", self._motion.onward), ("back", self._motion.back)):
            drift.load_state_dict(
                {key: torch.from_numpy(arrays[f"{side}.{key}"]) for key in drift.state_dict()}
            )
        self._exact = self._motion.doubled()


def energy_distance(one: Array, other: Array) -> float:
    """Return the energy distance of two clouds of cells (n, D), (m, D) (Szekely 2013)."""
    apart = cdist(one, other).mean()
    return float(2 * apart - cdist(one, one).mean() - cdist(other, other).mean())


def _some(cells: Array) -> Array:
    """Return at most so many cells, always the same ones: distances depend on the size."""
    if len(cells) <= MOST_COMPARED:
        return cells
    chosen = np.random.default_rng(0).choice(len(cells), MOST_COMPARED, replace=False)
    fewer: Array = cells[np.sort(chosen)]
    return fewer
