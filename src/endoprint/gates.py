"""What is good enough to go live: a policy, figures in, a verdict with its reasons out.

Pure: nothing is read, fitted or moved here. `admit` judges what is known before the test units
are opened; `decide` judges everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pandas as pd

from endoprint.config import Refusal
from endoprint.paired import FEWEST_FOR_BOOTSTRAP, FEWEST_FOR_INTERVAL, Comparison, compare_units
from endoprint.policy import AtLeast, Policy

Decision = Literal["promote", "hold", "reject"]


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
        Check(
            "replicated",
            design.is_replicated and n > 0,
            _replication(design),
            "hold" if design.is_replicated else policy.unreplicated,
        ),
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
        *(Check("openings on record", False, doubt, "hold") for doubt in design.doubts),
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
    if policy.confounded == "allow":
        said += "; allowed by the policy (confounded: allow)"
        return Check("not confounded", True, said, is_caveat=True)
    return Check("not confounded", False, said, policy.confounded)


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
        else _against_champion(candidate, champion, policy)
    ]
    judged += [
        _against_baseline(candidate, name, baselines[name], policy)
        for name in policy.baselines
        if name != candidate.model and _is_comparable(candidate, baselines.get(name), design)
    ]
    judged += _floors(candidate, policy.at_least) + _ceilings(candidate, policy)
    return Verdict.of(admission, judged)


def _floors(candidate: Evidence, at_least: AtLeast) -> list[Check]:
    told = [value for name, value in candidate.metrics.items() if name.startswith("f1_")]
    figures = {**candidate.metrics, "worst_exposure_f1": min(told, default=math.nan)}
    return [
        _bound(name, figures.get(name, math.nan), floor, is_floor=True)
        for name, floor in at_least.floors.items()
    ]


def _ceilings(candidate: Evidence, policy: Policy) -> list[Check]:
    figures = dict(candidate.metrics)
    if "ece" in figures:  # what chance alone would show is no fault of the model's
        floor = figures.get("ece_noise_floor", 0.0)
        figures["ece"] = max(0.0, figures["ece"] - floor)
    return [
        _bound(
            name,
            figures.get(name, math.nan),
            ceiling,
            is_floor=False,
            tolerance=0.0 if name == "ece" else policy.cost_tolerance,
        )
        for name, ceiling in policy.at_most.model_dump().items()
        if ceiling is not None
    ]


def _bound(
    name: str, value: float, limit: float, *, is_floor: bool, tolerance: float = 0.0
) -> Check:
    if not math.isfinite(value):
        return Check(name, False, f"{name} could not be measured", "hold")
    passed = value >= limit if is_floor else value <= limit * (1 + tolerance)
    shown = f"{name} above its noise floor" if name == "ece" else name
    words = ("is below", "is at least") if is_floor else ("is above", "is at most")
    said = f"{shown} {value:.3f} {words[passed]} {limit:g}"
    if tolerance:
        said += f" and {tolerance:.0%} of tolerance"
    return Check(name, passed, said)


def _against_baseline(candidate: Evidence, name: str, baseline: Evidence, policy: Policy) -> Check:
    rule = f"beats {name}"
    if not is_costlier(candidate, baseline, policy.cost_tolerance):
        return Check(rule, True, f"{candidate.label} costs no more than {name}, nor need beat it")
    return _paired(rule, candidate, baseline, policy, by=0.0)


def _against_champion(candidate: Evidence, champion: Evidence, policy: Policy) -> Check:
    """Ask for the minimum effect; between equivalent models the cheaper wins."""
    margin, tolerance = policy.must_beat_champion, policy.cost_tolerance
    better = _paired("champion", candidate, champion, policy, by=margin.by)
    within = margin.equivalent_within
    if not within:
        return better
    no_worse = _paired("champion", candidate, champion, policy, by=-within)
    if is_costlier(champion, candidate, tolerance) and not better.passed and no_worse.passed:
        return replace(no_worse, said=f"{no_worse.said}; it is the cheaper of the two")
    matched = _paired("champion", champion, candidate, policy, by=-within)
    is_dearer = is_costlier(candidate, champion, tolerance)
    if is_dearer and better.passed and no_worse.passed and matched.passed:
        said = f"{matched.said}; {champion.label} is the cheaper of the two and stays"
        return Check("champion", False, said, "hold")
    return better


def is_costlier(one: Evidence, other: Evidence, tolerance: float) -> bool:
    """Return whether one model costs more to score with; within the tolerance, size decides."""
    name = "score_seconds_per_1000_cells"
    ours, theirs = one.metrics.get(name, math.nan), other.metrics.get(name, math.nan)
    if ours > theirs * (1 + tolerance):
        return True
    if theirs > ours * (1 + tolerance):
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


# -- a person's word ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Approval:
    """What an authenticated person, who did not train the version, said about a verdict."""

    who: str
    is_given: bool
    why: str


def approved(
    verdict: Verdict, policy: Policy, approval: Approval | None, *, taken_down: str = ""
) -> Verdict:
    """Return a verdict that also needs a person's word, where the policy asks for one.

    `taken_down`: how people took the version down, whom no stored verdict overrules; they are
    asked again, whatever the policy. Nobody is asked about what the gates hold or reject.
    """
    if verdict.decision != "promote" or (policy.approval == "auto" and not taken_down):
        return verdict
    if approval is None:
        said = "every gate is passed: a person approves it with `endoprint registry approve`"
        said = f"{taken_down}; {said}" if taken_down else said
        check = Check("approval", False, said, "hold")
        return Verdict("hold", [check.said, *verdict.reasons], [*verdict.checks, check])
    verb = "approved" if approval.is_given else "declined"
    check = Check("approval", approval.is_given, f"{verb} by {approval.who}: {approval.why}")
    decision: Decision = "promote" if approval.is_given else "reject"
    return Verdict(decision, [check.said, *verdict.reasons], [*verdict.checks, check])
