"""What is good enough to go live: a policy, figures in, a verdict with its reasons out.

Pure: nothing is read, fitted or moved here. `admit` judges what is known before the test units
are opened; `decide` judges everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field

from endoprint.config import Config, Refusal, read_yaml
from endoprint.paired import FEWEST_FOR_BOOTSTRAP, FEWEST_FOR_INTERVAL, Comparison, compare_units

Decision = Literal["promote", "hold", "reject"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]

COST_TOLERANCE = 0.25  # timings of equal models differ by that much on a shared machine (a guess)


# -- the rules ----------------------------------------------------------------------------------
class AtLeast(Config):
    """Floors over the test units; an absent one does not bind."""

    macro_f1: Share | None = Field(None, description="mean F1 over exposures, all test cells")
    worst_unit_macro_f1: Share | None = Field(None, description="macro-F1 of the worst test unit")
    worst_exposure_f1: Share | None = Field(None, description="F1 of the worst-told exposure")
    balanced_accuracy: Share | None = Field(None, description="mean recall over exposures")
    auroc_macro: Share | None = Field(None, description="mean one-versus-rest AUROC")


class AtMost(Config):
    """Ceilings; an absent one does not bind."""

    ece: Share | None = Field(
        None, description="calibration error beyond what perfect calibration would show by chance"
    )
    score_seconds_per_1000_cells: Positive | None = Field(
        None, description="time to score 1,000 cells on the promoting machine, median of three"
    )
    peak_memory_gib: Positive | None = Field(
        None, description="resident memory of the scoring process, test cells included"
    )


class Margin(Config):
    """How a candidate is compared with another model, paired over test units."""

    metric: Literal["macro_f1", "balanced_accuracy", "auroc_macro"] = Field(
        "macro_f1", description="the figure each test unit gives one of"
    )
    by: Share = Field(0.01, description="difference from the champion that is worth a change")
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
    allow_confounded: bool = Field(
        False, description="promote although exposure cannot be told from technical run"
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


# -- what is judged -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Evidence:
    """What is known of one model; figures are over the test units, absent before these open."""

    label: str  # how reasons name it: "version 3 (geneformer)"
    model: str  # its row in the table of models
    exposures: tuple[str, ...]
    split_hash: str
    seen_units: frozenset[str]  # training, validation and the backbone's
    n_parameters: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    by_unit: Mapping[str, float] = field(default_factory=dict)  # the margin's metric per unit


@dataclass(frozen=True)
class Design:
    """What the experiment allows to be claimed."""

    split_hash: str
    test_units: tuple[str, ...]  # independent ones: lines, where whole lines are held out
    is_confounded: bool | None  # exposure cannot be told from technical run; None: unknown
    is_replicated: bool
    n_openings: int  # how often these test units, or some of them, were opened before
    held_out: frozenset[str] = frozenset()  # names of the test cells' units, where not those
    doubts: tuple[str, ...] = ()  # about the record of openings, in sentences

    def leaked(self, model: Evidence) -> list[str]:
        """Return the test units that a model's fit has seen."""
        return sorted(model.seen_units & {*self.test_units, *self.held_out})


@dataclass(frozen=True)
class Check:
    """One rule applied: whether it passed, what it found, and what failing it means."""

    name: str
    passed: bool
    said: str
    if_failed: Decision = "reject"
    is_caveat: bool = False  # passed, and still part of every verdict


@dataclass(frozen=True)
class Verdict:
    """Promote, hold or reject, with every reason."""

    decision: Decision
    reasons: list[str]
    checks: list[Check]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Verdict:
        """Read what `to_json` gave."""
        checks = [Check(**check) for check in values["checks"]]
        return cls(values["decision"], list(values["reasons"]), checks)

    @classmethod
    def of(cls, admission: Sequence[Check], judged: Sequence[Check] = ()) -> Verdict:
        """Draw the verdict: one rejection rejects, else one hold holds; what decided is first."""
        checks = [*admission, *judged]
        failed = [check for check in checks if not check.passed]
        decisions = {check.if_failed for check in failed}
        decision: Decision = "hold" if decisions else "promote"
        decision = "reject" if "reject" in decisions else decision
        told = failed or judged or [check for check in checks if not check.is_caveat]
        caveats = [check.said for check in checks if check.passed and check.is_caveat]
        return cls(decision, [check.said for check in told] + caveats, checks)


# -- before the test units open -----------------------------------------------------------------
def admit(
    candidate: Evidence,
    champion: Evidence | None,
    baselines: Mapping[str, Evidence],
    policy: Policy,
    design: Design,
) -> list[Check]:
    """Apply the rules that need no test cell; any that fails keeps the test units shut.

    Refuses two models that cannot be compared at all.
    """
    _refuse_incomparable(candidate, champion, policy, design)
    leaked, n = design.leaked(candidate), len(design.test_units)
    spent = design.n_openings >= policy.budget
    return [
        Check(
            "test units unseen",
            not leaked,
            f"{candidate.label} or its backbone was fitted on test units: {', '.join(leaked)}"
            if leaked
            else "no test unit was seen in fitting",
        ),
        Check("replicated", design.is_replicated and n > 0, _replication(design), "hold"),
        _unconfounded(policy, design),
        Check(
            "enough units",
            n >= FEWEST_FOR_INTERVAL or policy.allow_few_units,
            f"{n} independent test units"
            if n >= FEWEST_FOR_INTERVAL
            else f"too few units: {n} of {FEWEST_FOR_INTERVAL}"
            + ("; allowed by the policy (allow_few_units)" if policy.allow_few_units else ""),
            "hold",
            is_caveat=n < FEWEST_FOR_INTERVAL,
        ),
        Check(
            "openings left",
            not spent,
            f"the test units were opened {design.n_openings} of {policy.budget} times"
            + ("; the budget is spent: add new test units" if spent else ""),
            "hold",
        ),
        *(Check("openings on record", True, doubt, is_caveat=True) for doubt in design.doubts),
        *(
            _at_hand(candidate, name, baselines.get(name), design)
            for name in policy.baselines
            if name != candidate.model
        ),
    ]


def _replication(design: Design) -> str:
    if design.is_replicated and design.test_units:
        return "replicated: independent units repeat the exposures"
    if design.is_replicated:
        return "no test units: the design has too few units to set any apart"
    return "replicated: false; no independent unit repeats an exposure"


def _at_hand(candidate: Evidence, name: str, baseline: Evidence | None, design: Design) -> Check:
    found = _is_comparable(candidate, baseline, design)
    said = (
        f"the baseline {name} is fitted on the same split"
        if found
        else f"no {name} was fitted on this split and these exposures: train it, then promote"
    )
    return Check(f"{name} at hand", found, said, "hold")


def _is_comparable(candidate: Evidence, baseline: Evidence | None, design: Design) -> bool:
    return (
        baseline is not None
        and baseline.exposures == candidate.exposures
        and baseline.split_hash == candidate.split_hash
        and not design.leaked(baseline)
    )


def _unconfounded(policy: Policy, design: Design) -> Check:
    """Design not known to be sound is treated as unsound: the policy may allow it, aloud."""
    if design.is_confounded is False:
        return Check("not confounded", True, "exposure and technical run can be told apart")
    said = (
        "confounded: true; exposure cannot be told from technical run"
        if design.is_confounded
        else "confounded: unknown; no batch is recorded"
    )
    if policy.allow_confounded:
        said += "; allowed by the policy (allow_confounded)"
    return Check("not confounded", policy.allow_confounded, said, "hold", is_caveat=True)


def _refuse_incomparable(
    candidate: Evidence, champion: Evidence | None, policy: Policy, design: Design
) -> None:
    wanted = policy.split_hash or design.split_hash
    if candidate.split_hash != wanted or design.split_hash != wanted:
        raise Refusal(
            "a version is judged on the split it was fitted on",
            f"{candidate.label} with split {candidate.split_hash[:12]}, "
            f"the workspace with {design.split_hash[:12]}, the policy with {wanted[:12]}",
            "train it again on the split of today",
        )
    if champion is None:
        return
    for what, ours, theirs in (
        ("exposures", candidate.exposures, champion.exposures),
        ("split hash", candidate.split_hash, champion.split_hash),
    ):
        if ours != theirs:
            raise Refusal(
                f"two versions are compared only at equal {what}",
                f"{ours} for {candidate.label}, {theirs} for {champion.label}",
                "retire the champion first with `endoprint retire`, which the history will show",
            )


# -- everything ---------------------------------------------------------------------------------
def decide(
    candidate: Evidence,
    champion: Evidence | None,
    baselines: Mapping[str, Evidence],
    policy: Policy,
    design: Design,
) -> Verdict:
    """Judge a candidate on the test units, against floors, ceilings, baselines and the champion.

    `baselines` holds those of the policy's that could be had, by name. Differences are paired
    over test units, at the confidence one opening of the budget must reach (judging rules 1, 2).
    """
    admission = admit(candidate, champion, baselines, policy, design)
    judged = [
        Check("champion", True, "there is no champion to beat")
        if champion is None
        else _paired("champion", candidate, champion, policy, by=policy.must_beat_champion.by)
    ]
    judged += [
        _against_baseline(candidate, name, baselines[name], policy)
        for name in policy.baselines
        if name != candidate.model and _is_comparable(candidate, baselines.get(name), design)
    ]
    judged += _floors(candidate, policy.at_least) + _ceilings(candidate, policy.at_most)
    return Verdict.of(admission, judged)


def _floors(candidate: Evidence, floors: AtLeast) -> list[Check]:
    told = [value for name, value in candidate.metrics.items() if name.startswith("f1_")]
    figures = {**candidate.metrics, "worst_exposure_f1": min(told, default=math.nan)}
    return [
        _bound(name, figures.get(name, math.nan), floor, is_floor=True)
        for name, floor in floors.model_dump().items()
        if floor is not None
    ]


def _ceilings(candidate: Evidence, ceilings: AtMost) -> list[Check]:
    figures = dict(candidate.metrics)
    if "ece" in figures:  # what chance alone would show is no fault of the model's
        floor = figures.get("ece_noise_floor", 0.0)
        figures["ece"] = max(0.0, figures["ece"] - floor)
    return [
        _bound(name, figures.get(name, math.nan), ceiling, is_floor=False)
        for name, ceiling in ceilings.model_dump().items()
        if ceiling is not None
    ]


def _bound(name: str, value: float, limit: float, *, is_floor: bool) -> Check:
    if math.isnan(value):
        return Check(name, False, f"{name} could not be measured", "hold")
    passed = value >= limit if is_floor else value <= limit
    shown = f"{name} above its noise floor" if name == "ece" else name
    words = ("is below", "is at least") if is_floor else ("is above", "is at most")
    return Check(name, passed, f"{shown} {value:.3f} {words[passed]} {limit:g}")


def _against_baseline(candidate: Evidence, name: str, baseline: Evidence, policy: Policy) -> Check:
    rule = f"beats {name}"
    if not is_costlier(candidate, baseline):
        return Check(rule, True, f"{candidate.label} costs no more than {name}, nor need beat it")
    return _paired(rule, candidate, baseline, policy, by=0.0)


def is_costlier(one: Evidence, other: Evidence) -> bool:
    """Return whether one model costs more to score with; within the tolerance, size decides."""
    name = "score_seconds_per_1000_cells"
    ours, theirs = one.metrics.get(name, math.nan), other.metrics.get(name, math.nan)
    if ours > theirs * (1 + COST_TOLERANCE):
        return True
    if theirs > ours * (1 + COST_TOLERANCE):
        return False
    return one.n_parameters > other.n_parameters


def _paired(
    rule: str, candidate: Evidence, other: Evidence, policy: Policy, *, by: float
) -> Check:
    found = compare_units(
        pd.Series(candidate.by_unit, dtype=float),
        pd.Series(other.by_unit, dtype=float),
        metric=policy.must_beat_champion.metric,
        by=by,
        confidence=policy.confidence,
    )
    said = f"{candidate.label} against {other.label}: {found.sentence()}"
    if found.verdict == "too few units":  # admitted all the same: by the mean, which is said
        passed = found.difference > by
        said += f"; by the mean alone, {'above' if passed else 'not above'} {by:g}"
        return Check(rule, passed, said, "reject" if found.difference < 0 else "hold")
    passed = found.verdict == "better"
    if not passed and _cannot_reach(found):
        said += f"; {found.n_units} units cannot reach this confidence: add units"
    return Check(rule, passed, said, "reject" if found.verdict == "worse" else "hold")


def _cannot_reach(found: Comparison) -> bool:
    """Say if even unanimous units would not do: the smallest sign-flip p is 2^-n."""
    return found.n_units < FEWEST_FOR_BOOTSTRAP and 2.0**-found.n_units > 1 - found.confidence
