"""The policy decides by units, says why, and never opens what may stay shut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from endoprint import gates
from endoprint.config import Refusal
from endoprint.gates import Approval, Design, Evidence, Verdict, admit, approved, decide
from endoprint.policy import Policy, read_policy

ROOT = Path(__file__).parents[1]
EIGHT = tuple(f"u{i}" for i in range(8))
FIGURES = {
    "macro_f1": 0.7, "worst_unit_macro_f1": 0.5, "f1_DMSO": 0.8, "f1_RET_AGONIST": 0.4,
    "ece": 0.06, "ece_noise_floor": 0.04, "score_seconds_per_1000_cells": 10.0,
    "peak_memory_gib": 2.0,
}  # fmt: skip


def evidence(
    scores: float | list[float] = 0.7,
    *,
    label: str = "version 2 (big)",
    model: str = "big",
    units: tuple[str, ...] = EIGHT,
    n_parameters: int = 1000,
    **figures: float,
) -> Evidence:
    values = [scores] * len(units) if isinstance(scores, float) else scores
    return Evidence(
        label=label,
        model=model,
        exposures=("DMSO", "RET_AGONIST"),
        split_hash="s" * 64,
        seen_units=frozenset({"t0", "t1"}),
        n_parameters=n_parameters,
        metrics={**FIGURES, **figures},
        by_unit=dict(zip(units, values)),
    )


def design(units: tuple[str, ...] = EIGHT, **changed: object) -> Design:
    sound = Design(
        split_hash="s" * 64,
        test_units=units,
        is_confounded=False,
        is_replicated=True,
        n_openings=0,
    )
    return replace(sound, **changed)


def policy(**values: object) -> Policy:
    return Policy.of({"budget": 1, **values}, where="policy")


CHAMPION = evidence(0.6, label="version 1 (small)", model="small")
TWO = ("u0", "u1")


# -- the verdict --------------------------------------------------------------------------------
def test_the_first_version_that_keeps_the_floors_is_promoted() -> None:
    found = decide(evidence(), None, {}, policy(at_least={"macro_f1": 0.6}), design())
    assert found.decision == "promote"
    assert "macro_f1 0.700 is at least 0.6" in found.reasons


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"at_least": {"macro_f1": 0.71}}, "macro_f1 0.700 is below 0.71"),
        ({"at_least": {"worst_unit_macro_f1": 0.6}}, "worst_unit_macro_f1 0.500 is below 0.6"),
        ({"at_least": {"worst_exposure_f1": 0.5}}, "worst_exposure_f1 0.400 is below 0.5"),
        ({"at_most": {"ece": 0.01}}, "ece above its noise floor 0.020 is above 0.01"),
        (
            {"at_most": {"score_seconds_per_1000_cells": 9}, "cost_tolerance": 0.1},
            "score_seconds_per_1000_cells 10.000 is above 9 and 10% of tolerance",
        ),
        (
            {"at_most": {"peak_memory_gib": 1.5}, "cost_tolerance": 0.25},
            "peak_memory_gib 2.000 is above 1.5 and 25% of tolerance",
        ),
        ({"at_least": {"f1": {"RET_AGONIST": 0.41}}}, "f1_RET_AGONIST 0.400 is below 0.41"),
    ],
)
def test_a_floor_missed_or_ceiling_exceeded_is_a_rejection(
    rules: dict[str, object], said: str
) -> None:
    found = decide(evidence(), None, {}, policy(**rules), design())
    assert (found.decision, found.reasons) == ("reject", [said])


@pytest.mark.parametrize("name", ["score_seconds_per_1000_cells", "peak_memory_gib"])
def test_a_ceiling_on_cost_is_exceeded_beyond_a_quarter_more(name: str) -> None:
    rules = policy(at_most={name: 4.0})
    assert decide(evidence(**{name: 5.0}), None, {}, rules, design()).decision == "promote"
    assert decide(evidence(**{name: 5.01}), None, {}, rules, design()).decision == "reject"


def test_a_floor_for_an_exposure_that_no_test_unit_met_holds() -> None:
    found = decide(evidence(), None, {}, policy(at_least={"f1": {"EDC": 0.1}}), design())
    assert (found.decision, found.reasons) == ("hold", ["f1_EDC could not be measured"])


def test_calibration_error_within_its_noise_floor_is_no_fault() -> None:
    rules = policy(at_most={"ece": 0.001})
    assert decide(evidence(ece=0.04), None, {}, rules, design()).decision == "promote"


def test_a_figure_that_could_not_be_measured_holds() -> None:
    found = decide(
        evidence(auroc_macro=float("nan")), None, {}, policy(at_least={"auroc_macro": 0.5}),
        design(),
    )  # fmt: skip
    assert (found.decision, found.reasons) == ("hold", ["auroc_macro could not be measured"])


def test_a_candidate_better_in_every_unit_replaces_the_champion() -> None:
    found = decide(evidence(), CHAMPION, {}, policy(), design())
    assert found.decision == "promote"


def test_an_equal_candidate_leaves_the_champion_where_it_is() -> None:
    equal = replace(CHAMPION, label="version 2 (twin)")
    found = decide(equal, CHAMPION, {}, policy(), design())
    assert found.decision == "hold"
    assert "not shown to be better" in found.reasons[0]


def test_a_worse_candidate_is_rejected() -> None:
    found = decide(CHAMPION, evidence(), {}, policy(), design())
    assert found.decision == "reject"


def test_few_units_hold_even_where_they_agree() -> None:
    candidate, champion = evidence(units=TWO), evidence(0.5, units=TWO, label="v1", model="small")
    found = decide(candidate, champion, {}, policy(), design(TWO))
    assert found.decision == "hold"
    assert found.reasons[0] == "too few units: 2 of 5"


def test_few_units_go_by_the_mean_where_the_policy_allows_and_the_verdict_says_so() -> None:
    rules = policy(allow_few_units=True, must_beat_champion={"by": 0.05})
    small = evidence(0.5, units=TWO, label="v1", model="small")
    found = decide(evidence([0.6, 0.56], units=TWO), small, {}, rules, design(TWO))
    assert found.decision == "promote"
    assert "too few units: 2 of 5; allowed by the policy (allow_few_units)" in found.reasons
    assert any("u0 +0.100, u1 +0.060" in reason for reason in found.reasons)
    near = decide(evidence([0.6, 0.48], units=TWO), small, {}, rules, design(TWO))
    assert near.decision == "hold"
    worse = decide(evidence([0.4, 0.5], units=TWO), small, {}, rules, design(TWO))
    assert worse.decision == "reject"


def test_a_doubt_about_the_record_of_openings_holds() -> None:
    found = decide(evidence(), None, {}, policy(), design(doubts=("line 3 was changed",)))
    assert (found.decision, found.reasons) == ("hold", ["line 3 was changed"])


def test_a_budget_of_openings_makes_every_opening_stricter() -> None:
    """Eight unanimous units reach p = 2^-8: enough for .05 / 10, not for .05 / 20."""
    assert decide(evidence(), CHAMPION, {}, policy(budget=10), design()).decision == "promote"
    found = decide(evidence(), CHAMPION, {}, policy(budget=20), design())
    assert found.decision == "hold"
    assert "8 units cannot reach this confidence" in found.reasons[0]


def test_a_spent_budget_holds() -> None:
    found = decide(evidence(), None, {}, policy(budget=3), design(n_openings=3))
    assert found.decision == "hold"
    assert "add new test units" in found.reasons[0]


# -- baselines ----------------------------------------------------------------------------------
def baseline(score: float, **figures: float) -> Evidence:
    cheap = {"score_seconds_per_1000_cells": 1.0, **figures}
    return evidence(score, label="logistic (baseline)", model="logistic", n_parameters=10, **cheap)


def test_what_costs_more_than_a_baseline_must_beat_it() -> None:
    rules = policy(must_beat="logistic")
    lost = decide(evidence(0.6), None, {"logistic": baseline(0.8)}, rules, design())
    assert lost.decision == "reject"
    assert "version 2 (big) against logistic (baseline): worse" in lost.reasons[0]
    won = decide(evidence(0.8), None, {"logistic": baseline(0.6)}, rules, design())
    assert won.decision == "promote"


def test_a_baseline_does_not_bind_what_costs_no_more() -> None:
    rules = policy(must_beat="logistic")
    dear = baseline(0.8, score_seconds_per_1000_cells=20.0)
    assert decide(evidence(0.6), None, {"logistic": dear}, rules, design()).decision == "promote"


def test_within_the_noise_of_timing_size_says_which_costs_more() -> None:
    slow = {"score_seconds_per_1000_cells": 1.1}
    small, large = evidence(n_parameters=5, **slow), evidence(n_parameters=50, **slow)
    assert not gates.is_costlier(small, baseline(0.5), 0.25)
    assert gates.is_costlier(large, baseline(0.5), 0.25)
    assert gates.is_costlier(small, baseline(0.5), 0.05)


def test_a_baseline_may_be_champion() -> None:
    own = evidence(label="version 3 (logistic)", model="logistic")
    assert decide(own, None, {}, policy(must_beat=["logistic"]), design()).decision == "promote"


def test_without_the_baseline_nothing_is_decided_and_the_test_units_stay_shut() -> None:
    rules = policy(must_beat="logistic")
    checks = admit(evidence(), None, {}, rules, design())
    assert [check.name for check in checks if not check.passed] == ["logistic at hand"]
    other = replace(baseline(0.1), split_hash="t" * 64)
    assert decide(evidence(), None, {"logistic": other}, rules, design()).decision == "hold"


# -- equivalent models --------------------------------------------------------------------------
NEAR = [0.60, 0.61, 0.60, 0.59, 0.60, 0.61, 0.59, 0.60]
WITHIN = {"by": 0.01, "equivalent_within": 0.05}


def cheap(scores: float | list[float], **figures: float) -> Evidence:
    return evidence(scores, score_seconds_per_1000_cells=1.0, **figures)


def test_of_two_equivalent_models_the_cheaper_goes_live() -> None:
    rules = policy(must_beat_champion=WITHIN)
    found = decide(cheap(NEAR), CHAMPION, {}, rules, design())
    assert found.decision == "promote"
    assert "no worse by more than 0.05" in found.reasons[0]
    assert "the cheaper of the two" in found.reasons[0]
    same_cost = decide(evidence(NEAR), CHAMPION, {}, rules, design())
    assert same_cost.decision == "hold"
    off = policy(must_beat_champion={"by": 0.01})
    assert decide(cheap(NEAR), CHAMPION, {}, off, design()).decision == "hold"


def test_between_equivalent_models_of_equal_cost_parameters_decide() -> None:
    rules = policy(must_beat_champion=WITHIN)
    smaller = evidence(NEAR, n_parameters=900)
    assert decide(smaller, CHAMPION, {}, rules, design()).decision == "promote"
    larger = evidence(NEAR, n_parameters=1100)
    assert decide(larger, CHAMPION, {}, rules, design()).decision == "hold"


def test_a_dearer_model_whose_whole_gain_is_within_the_margin_does_not_replace() -> None:
    gain = [value + 0.02 for value in [0.60] * 8]
    dear = {"score_seconds_per_1000_cells": 100.0}
    rules = policy(must_beat_champion=WITHIN)
    found = decide(evidence(gain, **dear), CHAMPION, {}, rules, design())
    assert found.decision == "hold"
    assert found.reasons[0].endswith("version 1 (small) is the cheaper of the two and stays")
    more = evidence([value + 0.05 for value in gain], **dear)
    assert decide(more, CHAMPION, {}, rules, design()).decision == "promote"


def test_a_cheaper_model_worse_by_more_than_the_margin_stays_out() -> None:
    rules = policy(must_beat_champion=WITHIN)
    assert decide(cheap(0.5), CHAMPION, {}, rules, design()).decision == "reject"


def test_equivalence_among_few_units_goes_by_the_mean_where_allowed() -> None:
    rules = policy(allow_few_units=True, must_beat_champion=WITHIN)
    small = evidence(0.6, units=TWO, label="v1", model="small")
    near = cheap([0.58, 0.6], units=TWO)
    assert decide(near, small, {}, rules, design(TWO)).decision == "promote"
    assert decide(cheap([0.5, 0.5], units=TWO), small, {}, rules, design(TWO)).decision == "reject"


# -- a person's word ----------------------------------------------------------------------------
def test_where_the_policy_asks_for_a_person_a_promotion_waits_and_nothing_else_does() -> None:
    rules = policy(approval="human")
    passed = decide(evidence(), CHAMPION, {}, rules, design())
    waiting = approved(passed, rules, None)
    assert waiting.decision == "hold"
    assert (
        waiting.reasons[0]
        == "every gate is passed: a person approves it with `endoprint registry approve`"
    )
    assert waiting.reasons[1:] == passed.reasons
    given = approved(passed, rules, Approval("ann", True, "figures read"))
    assert (given.decision, given.reasons[0]) == ("promote", "approved by ann: figures read")
    declined = approved(passed, rules, Approval("ann", False, "one donor looks odd"))
    assert declined.decision == "reject"
    worse = decide(CHAMPION, evidence(), {}, rules, design())
    assert approved(worse, rules, Approval("ann", True, "please")) == worse
    assert approved(passed, policy(), None) == passed


def test_what_people_took_down_waits_for_a_person_whatever_the_policy() -> None:
    passed = decide(evidence(), CHAMPION, {}, policy(), design())
    held = approved(passed, policy(), None, taken_down="it was rolled back")
    assert held.decision == "hold"
    assert held.reasons[0].startswith("it was rolled back; every gate is passed")
    said = Approval("ann", True, "figures read")
    assert approved(passed, policy(), said, taken_down="it was").decision == "promote"


# -- what the design allows ---------------------------------------------------------------------
def test_an_unreplicated_design_is_held_whatever_the_figures_say() -> None:
    loose = policy(allow_few_units=True, confounded="allow")
    found = decide(evidence(), None, {}, loose, design(is_replicated=False))
    assert found.decision == "hold"
    assert found.reasons[0].startswith("replicated: false")


def test_the_policy_may_reject_what_its_design_cannot_carry() -> None:
    hard = policy(confounded="reject", unreplicated="reject")
    for flaw in ({"is_confounded": True}, {"is_confounded": None}, {"is_replicated": False}):
        assert decide(evidence(), None, {}, hard, design(**flaw)).decision == "reject"


def test_a_design_without_test_units_is_held() -> None:
    found = decide(evidence(units=()), None, {}, policy(allow_few_units=True), design(()))
    assert found.decision == "hold"
    assert found.reasons[0].startswith("no test units")


@pytest.mark.parametrize("is_confounded", [True, None])
def test_a_confounded_design_is_held_unless_allowed_and_always_said(
    is_confounded: bool | None,
) -> None:
    held = decide(evidence(), None, {}, policy(), design(is_confounded=is_confounded))
    assert held.decision == "hold"
    assert held.reasons[0].startswith("confounded:")
    allowed = decide(
        evidence(), None, {}, policy(confounded="allow"), design(is_confounded=is_confounded)
    )
    assert allowed.decision == "promote"
    assert any(reason.startswith("confounded:") for reason in allowed.reasons)


def test_a_model_that_saw_a_test_unit_is_rejected_without_opening_them() -> None:
    leaky = replace(evidence(), seen_units=frozenset({"t0", "u3"}))
    checks = admit(leaky, None, {}, policy(), design())
    found = Verdict.of(checks)
    assert found.decision == "reject"
    assert found.reasons[0].endswith("fitted on test units: u3")


@pytest.mark.parametrize("field", ["exposures", "split_hash"])
def test_versions_of_other_exposures_or_splits_are_not_compared(field: str) -> None:
    other = replace(CHAMPION, **{field: ("DMSO",) if field == "exposures" else "t" * 64})
    with pytest.raises(Refusal, match="compared only at equal"):
        decide(evidence(), other, {}, policy(), design())


def test_a_version_of_another_split_than_todays_is_refused() -> None:
    with pytest.raises(Refusal, match="the split it was fitted on"):
        decide(evidence(), None, {}, policy(), design(split_hash="t" * 64))
    with pytest.raises(Refusal, match="the split it was fitted on"):
        decide(evidence(), None, {}, policy(split_hash="f" * 64), design())


# -- the machinery ------------------------------------------------------------------------------
@pytest.mark.parametrize("n_units", [8, 24])
def test_equal_models_are_seldom_told_apart(n_units: int) -> None:
    """Over 200 null pairs false promotions stay within 5 % plus three Monte-Carlo errors."""
    rng = np.random.default_rng(0)
    units = tuple(f"u{i:02d}" for i in range(n_units))
    rules = policy(must_beat_champion={"by": 0.0})
    promoted = 0
    for _ in range(200):
        level = rng.normal(0.6, 0.1, n_units)
        ours, theirs = (level + rng.normal(0, 0.05, n_units) for _ in range(2))
        candidate = evidence(list(ours), units=units)
        champion = evidence(list(theirs), units=units, label="v1", model="small")
        promoted += decide(candidate, champion, {}, rules, design(units)).decision == "promote"
    assert promoted / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


@pytest.mark.parametrize("n_units", [8, 24])
def test_a_cheaper_model_worse_by_the_whole_margin_seldom_passes_as_equivalent(
    n_units: int,
) -> None:
    """The other null: 200 pairs that differ by exactly what equivalence must exclude."""
    rng = np.random.default_rng(1)
    units = tuple(f"u{i:02d}" for i in range(n_units))
    rules = policy(must_beat_champion={"by": 0.0, "equivalent_within": 0.05})
    promoted = 0
    for _ in range(200):
        level = rng.normal(0.6, 0.1, n_units)
        ours, theirs = (level + rng.normal(0, 0.05, n_units) for _ in range(2))
        candidate = cheap(list(ours - 0.05), units=units)
        champion = evidence(list(theirs), units=units, label="v1", model="small")
        promoted += decide(candidate, champion, {}, rules, design(units)).decision == "promote"
    assert promoted / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_a_verdict_survives_json() -> None:
    found = decide(evidence(), CHAMPION, {}, policy(at_least={"macro_f1": 0.9}), design())
    assert Verdict.from_json(json.loads(json.dumps(found.to_json()))) == found


# -- the file -----------------------------------------------------------------------------------
def test_the_demos_policy_is_read_and_says_that_few_units_are_allowed() -> None:
    rules = read_policy(ROOT / "registry/policy.yaml")
    assert rules.allow_few_units
    assert rules.baselines == ("logistic",)


def test_the_written_schema_is_that_of_the_policy_and_explains_every_field() -> None:
    written = json.loads((ROOT / "registry/schemas/policy.json").read_text())
    assert written == Policy.model_json_schema(), "write it again with json.dumps(indent=1)"
    parts = [written, *written["$defs"].values()]
    for part in parts:
        for name, said in part["properties"].items():
            assert said.get("description"), name


@pytest.mark.parametrize(
    "text",
    [
        "must_bea: logistic\n",
        "at_least: {macro_f2: 0.5}\n",
        "at_least: {macro_f1: 1.5}\n",
        "must_beat_champion: {confidence: 1.0}\n",
        "budget: 0\n",
        "allow_few_units: perhaps\n",
        "- a\n",
        "",
        "a: [\n",
    ],
)
def test_a_mistake_in_the_policy_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(Refusal) as refusal:
        read_policy(path)
    assert "\n" not in str(refusal.value)


def test_a_workspace_without_a_policy_promotes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="promotion follows a policy"):
        read_policy(tmp_path / "policy.yaml")
