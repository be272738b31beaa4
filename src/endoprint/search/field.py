"""How one budget is shared by a field of models: by successive halving.

Every rung gives each model still in it the same share; the better half goes on (Jamieson &
Talwalkar 2016, AISTATS, arXiv 1502.07943). Pure: times in, names out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def n_rungs(n_models: int) -> int:
    """Return how often a field is halved until one model has nobody to be compared with."""
    return max(1, math.ceil(math.log2(n_models))) if n_models else 0


def share(budget_seconds: float, n_models: int, n_survivors: int) -> float:
    """Return each survivor's seconds in a rung: rungs cost the same, however few are left."""
    return budget_seconds / n_rungs(n_models) / n_survivors


def survivors(figures: Mapping[str, float | None], among: Sequence[str]) -> list[str]:
    """Return the better half, in the field's order; the middle one of an odd number goes on.

    figures: macro-F1 by model, None where there is none. Of equals the earlier goes on.
    """
    ranked = sorted(among, key=lambda name: -_known(figures[name]))
    kept = set(ranked[: math.ceil(len(among) / 2)])
    return [name for name in among if name in kept]


def _known(figure: float | None) -> float:
    return -1.0 if figure is None else figure
