"""What a version must show before it goes live: the rules and what they mean.

A workspace's `registry/policy.yaml` chooses the values; `registry/schemas/policy.json` is written
from here and explains every field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from endoprint.config import Config, Refusal, read_yaml

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class AtLeast(Config):
    """Floors over the test units; an absent one does not bind."""

    macro_f1: Share | None = Field(None, description="mean F1 over exposures, all test cells")
    worst_unit_macro_f1: Share | None = Field(None, description="macro-F1 of the worst test unit")
    worst_exposure_f1: Share | None = Field(None, description="F1 of the worst-told exposure")
    f1: dict[str, Share] = Field(
        {}, description="F1 of single exposures, by name: those that must not be missed"
    )
    balanced_accuracy: Share | None = Field(None, description="mean recall over exposures")
    auroc_macro: Share | None = Field(None, description="mean one-versus-rest AUROC")

    @property
    def floors(self) -> dict[str, float]:
        """Name of a figure -> its floor, for every floor that binds."""
        plain = self.model_dump(exclude={"f1"})
        single = {f"f1_{exposure}": floor for exposure, floor in self.f1.items()}
        return {name: floor for name, floor in {**plain, **single}.items() if floor is not None}


class AtMost(Config):
    """Ceilings; an absent one does not bind."""

    ece: Share | None = Field(
        None, description="calibration error beyond what perfect calibration would show by chance"
    )
    score_seconds_per_1000_cells: Positive | None = Field(
        None,
        description="time to score 1,000 cells on the promoting machine, median of three; "
        "exceeded beyond cost_tolerance",
    )
    peak_memory_gib: Positive | None = Field(
        None,
        description="resident memory of a process that holds nothing but the version and the test "
        "cells, while it loads and scores them; exceeded beyond cost_tolerance",
    )


class Margin(Config):
    """How a candidate is compared with another model, paired over test units."""

    metric: Literal["macro_f1", "balanced_accuracy", "auroc_macro"] = Field(
        "macro_f1", description="the figure each test unit gives one of"
    )
    by: Share = Field(
        0.01, description="minimum effect: difference from the champion that is worth a change"
    )
    equivalent_within: Share = Field(
        0.0,
        description="models shown to differ by no more than this are equivalent, and the cheaper "
        "of them wins (within cost_tolerance the one with fewer parameters); 0: no such rule",
    )
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = Field(
        0.95, description="one-sided, over all openings of the budget together"
    )


class Policy(Config):
    """What a version must show before it goes live; `registry/policy.yaml` holds the values."""

    split_hash: str | None = Field(
        None, description="the frozen test split; absent: the one the workspace holds now"
    )
    at_least: AtLeast = Field(AtLeast(), description="floors; one missed is a rejection")
    at_most: AtMost = Field(AtMost(), description="ceilings; one exceeded is a rejection")
    cost_tolerance: Share = Field(
        0.25,
        description="timings of equal models differ by that much on a shared machine: a ceiling "
        "on cost is exceeded beyond it, and within it two models cost the same",
    )
    must_beat: str | tuple[str, ...] = Field(
        (), description="baselines that anything costlier than they are must beat"
    )
    must_beat_champion: Margin = Field(Margin(), description="what replaces a champion")
    budget: Annotated[int, Field(ge=1)] = Field(
        20, description="how often the test units may be opened; spent: new units are needed"
    )
    allow_few_units: bool = Field(
        False, description="under five test units nothing can be inferred: go by the mean instead"
    )
    confounded: Literal["hold", "reject", "allow"] = Field(
        "hold",
        description="what becomes of a version whose exposures cannot be told from technical "
        "runs, or where no batch is recorded; allowed or not, the verdict says it",
    )
    unreplicated: Literal["hold", "reject"] = Field(
        "hold",
        description="what becomes of a version where no independent unit repeats an exposure: "
        "nothing can be claimed about new units, so there is no way to allow it",
    )
    approval: Literal["auto", "human"] = Field(
        "auto",
        description="human: what every gate promotes also waits for a person whom MLflow's or "
        "Prefect's server authenticates and who did not train it",
    )

    @property
    def baselines(self) -> tuple[str, ...]:
        """The names of the models in `must_beat`."""
        return (self.must_beat,) if isinstance(self.must_beat, str) else self.must_beat

    @property
    def confidence(self) -> float:
        """The confidence each single opening must reach: 1 - alpha / budget (judging rule 2)."""
        return 1.0 - (1.0 - self.must_beat_champion.confidence) / self.budget


def read_policy(path: Path) -> Policy:
    """Read a workspace's policy; every mistake in it is one line."""
    if not path.is_file():
        raise Refusal(
            "promotion follows a policy", f"no {path.name}", "write registry/policy.yaml"
        )
    return Policy.of(read_yaml(path), where=path.name)
