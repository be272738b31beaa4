"""Groups of like cells, as control cells show them: neurons, progenitors, monocytes.

An exposure does not move all of them alike, so a model may answer group by group. Groups are found
on the latent (k-means: Lloyd 1982) among cells that met the vehicle only, so that no group is an
exposure; any other cell belongs to the nearest. No annotation of cell types is asked for, neither
when fitting nor when scoring. n cells, D latent width, K groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from anndata import AnnData
from sklearn.cluster import KMeans

from endoprint.latent import Latent

Array = np.ndarray[Any, np.dtype[Any]]

FEWEST_CELLS = 20  # control cells per group; fewer tell no groups apart (a guess)
STARTS = 5  # of k-means; the tightest is kept


@dataclass(frozen=True)
class Groups:
    """Where groups lie on the latent: `centres` (K, D)."""

    latent: Latent
    centres: Array

    @classmethod
    def single(cls, latent: Latent) -> Self:
        """Take all cells together."""
        return cls(latent, np.zeros((1, len(latent.components))))

    @classmethod
    def fit(
        cls, latent: Latent, cells: AnnData, n: int, *, control: str, seed: int
    ) -> Self | None:
        """Find `n` groups among the control cells; None where they are too few to tell."""
        known = cells[(cells.obs["exposure"].astype(str) == control).to_numpy()]
        if n < 2 or known.n_obs < n * FEWEST_CELLS:
            return None
        found = KMeans(n, n_init=STARTS, random_state=seed).fit(latent.transform(known))
        return cls(latent, np.asarray(found.cluster_centers_, dtype=np.float64))

    def of(self, cells: AnnData) -> Array:
        """Return the number of each cell's group, (n,), 0..K-1."""
        if len(self.centres) == 1:
            return np.zeros(cells.n_obs, dtype=np.int64)
        place = self.latent.transform(cells)
        away = (self.centres**2).sum(axis=1) - 2.0 * place @ self.centres.T
        return np.asarray(away.argmin(axis=1))
