"""Fewer cells where there are too many: drawn evenly, so that no unit or exposure is lost."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData


def evenly_drawn(cells: AnnData, at_most: int, seed: int) -> AnnData:
    """Return at most so many cells, drawn evenly over unit x exposure, in their order."""
    if cells.n_obs <= at_most:
        return cells
    rng = np.random.default_rng(seed)
    group = (cells.obs["unit"].astype(str) + "\0" + cells.obs["exposure"].astype(str)).to_numpy()
    turn = pd.Series(rng.permutation(cells.n_obs)).groupby(group).rank().to_numpy()
    return cells[np.sort(np.argsort(turn, kind="stable")[:at_most])]
