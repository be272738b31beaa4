"""How far a search goes: trials, time, a figure that is good enough; whichever comes first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field

from endoprint.config import Config, Refusal

Objective = Literal["quality", "quality-cost"]  # macro-F1 alone | and processor seconds of a fit
UNITS_SECONDS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}


class SearchConfig(Config):
    """How far a search goes."""

    model: str | None = None  # the row that `endoprint run` tunes; none: no search
    # complete and pruned ones, over all runs of the study; holds where no budget is told
    trials: Annotated[int, Field(ge=1)] = 20
    n_folds: Annotated[int, Field(ge=1)] = 1  # development folds of a trial; more: surer, dearer


@dataclass(frozen=True)
class Limits:
    """Where a study ends; None bounds nothing. All count over every run of the study.

    `trials`: complete and pruned ones. `seconds`: of fitting, summed over trials and processes; no
    trial is begun once they are spent, the last one is finished. `target`: macro-F1 of the best
    complete trial.
    """

    trials: int | None = None
    seconds: float | None = None
    target: float | None = None

    @classmethod
    def of(cls, *, trials: int, budget: str, target: float, default: int) -> Self:
        """Read what a person told (0 and "": nothing); without budget, `default` trials bound it.

        A target alone might never be reached.
        """
        if trials < 0:
            raise Refusal("a search runs at least one trial", f"trials {trials}", "say 1 or more")
        if not 0 <= target <= 1:
            raise Refusal("a target is a macro-F1", f"{target:g}", "say a number up to 1")
        seconds = seconds_of(budget) if budget else None
        return cls(trials or (None if budget else default), seconds, target or None)


def seconds_of(text: str) -> float:
    """Return the seconds of a duration such as 2h, 90m or 1h30m."""
    found = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text.lower())
    whole = "".join(number + unit for number, unit in found)
    seconds = sum(float(number) * UNITS_SECONDS[unit] for number, unit in found)
    if whole != text.lower().replace(" ", "") or not seconds > 0:
        raise Refusal("a budget is a time", repr(text), "say it like 2h, 90m or 1h30m")
    return seconds
