"""What units say about two models: paired differences, tested as far as their number allows.

Units decide, not cells (judging rule 1): a comparison has as many observations as there are
independent units. Everything here takes one figure per unit; `metrics.compare` takes tables of
predictions. U units throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from endoprint.config import Refusal

Array = np.ndarray[Any, np.dtype[Any]]

FEWEST_FOR_INTERVAL = 5  # units; below, every unit is shown and nothing is inferred
FEWEST_FOR_BOOTSTRAP = 20  # units; below, the exact sign-flip test
N_RESAMPLES = 4000
SHIFT = 1e-12  # sums of equal differences differ in the last bits


@dataclass(frozen=True)
class Comparison:
    """What units say about one model against another, as far as their number allows."""

    metric: str
    by: float  # the margin asked for
    difference: float  # mean over units of (first - second)
    units: dict[str, float]  # every unit's own difference
    low: float | None  # one-sided bound at `confidence`; none under five units
    high: float | None
    p_value: float | None  # one-sided, for a difference above `by`
    confidence: float
    method: str
    verdict: str  # better | worse | not told apart | too few units

    @property
    def n_units(self) -> int:
        """The number of independent observations."""
        return len(self.units)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest difference of a unit."""
        return min(self.units.values()), max(self.units.values())

    def sentence(self) -> str:
        """Say the outcome in one line, with every unit where there are too few to infer."""
        margin = f" by more than {abs(self.by):g}" if self.by else ""
        asked = "no worse" if self.by < 0 else "better"  # a negative margin asks for equivalence
        words = {
            "better": f"{asked}{margin}",
            "worse": "worse",
            "not told apart": f"not shown to be {asked}{margin}" if self.by else "not told apart",
            "too few units": "too few units to say",
        }
        head = f"{words[self.verdict]}: {self.metric} differs by {self.difference:+.3f}"
        if self.low is None or self.high is None:
            each = ", ".join(f"{unit} {value:+.3f}" for unit, value in self.units.items())
            low, high = self.range
            return f"{head} over {_units(self.n_units)} ({each}; range {low:+.3f} to {high:+.3f})"
        return (
            f"{head} over {_units(self.n_units)} (bounds at {self.confidence:.0%} each: "
            f"{self.low:+.3f} to {self.high:+.3f}; p = {self.p_value:.3f}; {self.method})"
        )


def compare_units(
    first: pd.Series,
    second: pd.Series,
    *,
    metric: str = "macro_f1",
    by: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two models by one figure per unit each, joined by unit (judging rule 1).

    Under 5 units nothing is inferred. From 5 to 19: the exact sign-flip test and a t interval.
    From 20: a bootstrap over units, percentiles expanded for small n (Hesterberg 2015, arXiv
    1411.5279, section 5.3). "Better" asks for both a p value of at most 1 - confidence and a
    lower bound above the margin.
    """
    first, second = first.rename(index=str), second.rename(index=str)
    shared = _shared_units(first, second)
    differences = (first.loc[shared] - second.loc[shared]).to_numpy(dtype=np.float64)
    n, alpha = len(differences), 1.0 - confidence
    mean = float(differences.mean())
    low = high = p_value = p_opposite = None
    if n < FEWEST_FOR_INTERVAL:
        method = "every unit shown"
    elif n < FEWEST_FOR_BOOTSTRAP:
        method = "exact sign-flip test, t interval"
        p_value, p_opposite = sign_flip(differences - by), sign_flip(-differences)
        half = float(stats.t.ppf(confidence, n - 1) * differences.std(ddof=1) / np.sqrt(n))
        low, high = mean - half, mean + half
    else:
        method = "paired bootstrap over units"
        rng = np.random.default_rng(seed)
        means = differences[rng.integers(0, n, (N_RESAMPLES, n))].mean(axis=1)
        reach = float(stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf(alpha, n - 1)))
        low, high = (float(value) for value in np.quantile(means, [reach, 1 - reach]))
        p_value = float((1 + (means <= by).sum()) / (1 + N_RESAMPLES))
        p_opposite = float((1 + (means >= 0).sum()) / (1 + N_RESAMPLES))
    verdict = "not told apart"
    if low is None or high is None or p_value is None or p_opposite is None:
        verdict = "too few units"
    elif p_value <= alpha and low > by:
        verdict = "better"
    elif p_opposite <= alpha and high < 0:
        verdict = "worse"
    each = {unit: float(value) for unit, value in zip(shared, differences)}
    return Comparison(metric, by, mean, each, low, high, p_value, confidence, method, verdict)


def sign_flip(differences: Array) -> float:
    """Return the exact one-sided p value that the mean is above zero, (U,) paired differences.

    Every one of the 2^U sign patterns is counted (Fisher 1935); the smallest possible p is 2^-U.
    """
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(sums >= differences.sum() - SHIFT))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected for how many were looked at (Holm 1979); None stays None."""
    known = [(p, i) for i, p in enumerate(p_values) if p is not None]
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(sorted(known)):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[i] = largest
    return corrected


def interval(
    scores: pd.Series, *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Return the two-sided interval of a mean over units, (U,), or None under five units."""
    values = scores.dropna()
    nothing = pd.Series(0.0, index=values.index)
    if len(values) < FEWEST_FOR_INTERVAL:
        return None
    one_sided = 1.0 - (1.0 - confidence) / 2
    found = compare_units(values, nothing, confidence=one_sided, seed=seed)
    return (found.low, found.high) if found.low is not None and found.high is not None else None


def _shared_units(first: pd.Series, second: pd.Series) -> list[str]:
    """Return the units both have a figure for; one that only one model has is refused."""
    have, want = ({str(unit) for unit in scores.dropna().index} for scores in (first, second))
    if have != want or not have:
        alone = sorted(have ^ want) or ["no unit at all"]
        raise Refusal(
            "a paired comparison needs both models' figure in every unit",
            f"{alone[0]} and {len(alone) - 1} more on one side only",
            "judge both on one split",
        )
    return sorted(have)


def _units(n: int) -> str:
    return "1 unit" if n == 1 else f"{n} units"
