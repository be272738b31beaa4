"""Candidate against champion on the test units: opened here only, counted, decided, recorded.

Both are scored fresh on the same cells, together with the baselines the policy names; the
verdict is `gates.decide`'s. A decision made once is not made again: the same models under the
same rules are not shown the test units twice.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from anndata import AnnData

from endoprint import gates, history, metrics, registry, runs, tracking
from endoprint.approvals import approval, taken_down, verdict_of
from endoprint.config import Refusal
from endoprint.curated import fingerprint, load
from endoprint.design import Split
from endoprint.fetched import fetch
from endoprint.footprint import peak_memory_gib
from endoprint.gates import Design, Evidence, Verdict, approved
from endoprint.lineage import hash_of, metered, pretraining_units
from endoprint.model import ExposureModel
from endoprint.policy import Policy, read_policy
from endoprint.registry import CANDIDATE, Version
from endoprint.smoke import opened
from endoprint.workspace import Workspace

TIMINGS = 3  # the median of them is what a model costs
TRUTH = ["exposure", "unit", "independent"]  # columns of the test cells that a verdict rests on


@dataclass(frozen=True)
class Promotion:
    """What was decided, about which version, and who is live now."""

    verdict: Verdict
    version: Version
    champion: Version | None  # after the decision
    was_opened: bool  # whether this decision opened the test units
    figures: Mapping[str, Any]  # by model: test metrics and the figure of every unit
    key: str = ""  # the question that was decided; "": the test units were not needed

    def to_json(self) -> dict[str, Any]:
        """Return plain values: decision, reasons, checks, version, champion, figures."""
        return {
            **self.verdict.to_json(),
            "version": self.version.version,
            "model": self.version.model,
            "uri": self.version.uri,
            "champion": self.champion.version if self.champion else None,
            "champion_model": self.champion.model if self.champion else None,
            "was_opened": self.was_opened,
            "figures": dict(self.figures),
            "key": self.key,
        }


@dataclass(frozen=True)
class Contender:
    """A loaded model and what is known of it."""

    model: ExposureModel
    evidence: Evidence
    sha256: str


def promote(
    workspace: Workspace,
    version: str = "",
    *,
    cells: AnnData | None = None,
    split: Split | None = None,
    audit: Mapping[str, Any] | None = None,
) -> Promotion:
    """Judge a version (`@candidate` unless told) by the policy; move `@champion` if due.

    Cells, split and audit are the workspace's own unless passed. The test units are opened only
    if every rule that needs no test cell is met; each opening is counted before it happens.
    """
    policy = read_policy(workspace.policy)
    tracking.sweep(workspace)  # a promoter that died may have left its run open
    with registry.lock(workspace):
        registry.recover(workspace)
        version_of, model = registry.load_version(workspace, version or CANDIDATE)
        live = registry.champion(workspace)
        if live is not None and live.version == version_of.version:
            return _standing(workspace, live, policy)
        if live is not None and live.sha256 == version_of.sha256:
            said = f"{version_of.label} is {live.label} to the byte, which is live: none to judge"
            promotion = Promotion(Verdict("hold", [said], []), version_of, live, False, {})
            _record(workspace, promotion, policy)
            return promotion
        split = split or Split.read(workspace.split)
        candidate = _contender(version_of, model)
        champion = _contender(live, _loaded(workspace, live)) if live else None
        cells = cells if cells is not None else load(workspace.cells)
        held_out = cells[split.parts(cells.obs, fold=None).held_out].copy()
        audit = audit if audit is not None else _read_audit(workspace)
        design = _design(workspace, held_out, split, audit)
        held_out.obs["independent"] = _independent(held_out, split)
        promotion = _decided(workspace, version_of, candidate, champion, policy, design, held_out)
        verdict = _agreed(workspace, promotion, policy)
        promotion = replace(promotion, verdict=verdict, champion=live)
        _record(workspace, promotion, policy)
        if verdict.decision == "promote":
            registry.flip(workspace, version_of, expected=live, why=verdict.reasons[0])
            promotion = replace(promotion, champion=version_of)
    return promotion


def _standing(workspace: Workspace, live: Version, policy: Policy) -> Promotion:
    """Return the verdict that made a version live, however often it is asked for again."""
    made = verdict_of(workspace, live.version)
    if made is None or made["verdict"]["decision"] != "promote":
        verdict = Verdict("promote", [f"{live.label} is the champion already"], [])
        return Promotion(verdict, live, live, False, {})
    verdict, said = Verdict.from_json(made["verdict"]), approval(workspace, made["key"])
    verdict = approved(verdict, policy, said) if said else verdict
    return Promotion(verdict, live, live, False, made["figures"], made["key"])


def _decided(
    workspace: Workspace,
    version: Version,
    candidate: Contender,
    champion: Contender | None,
    policy: Policy,
    design: Design,
    held_out: AnnData,
) -> Promotion:
    """Return the verdict: one reached before, one that needs no test cell, or a fresh one."""
    baselines = _baselines(workspace, candidate.evidence, policy)
    contenders = [candidate, *([champion] if champion else []), *baselines.values()]
    key = hash_of(
        {
            "models": [each.sha256 for each in contenders],
            "has_champion": champion is not None,
            # who has to agree is no part of what the units say
            "policy": policy.model_dump(mode="json", exclude={"approval"}),
            "design": [design.split_hash, design.is_confounded, design.is_replicated],
            # other counts of the same units are another question
            "cells": fingerprint(held_out),
            # and so are corrected labels of the same counts
            "truth": hash_of(held_out.obs[TRUTH].astype(str).to_dict("list")),
        }
    )
    earlier = [
        line
        for line in history.read(workspace)
        if line["what"] == "verdict" and line.get("key") == key
    ]
    if earlier and not design.doubts:  # a history in doubt vouches for no verdict
        verdict = Verdict.from_json(earlier[-1]["verdict"])
        return Promotion(verdict, version, None, False, earlier[-1]["figures"], key)
    n_openings = openings(workspace, design.split_hash, design.held_out, but=key)
    design = replace(design, n_openings=n_openings)
    against = champion.evidence if champion else None
    known = {name: found.evidence for name, found in baselines.items()}
    admission = gates.admit(candidate.evidence, against, known, policy, design)
    if not all(check.passed for check in admission):
        return Promotion(Verdict.of(admission), version, None, False, {})
    # counted first: a crash while they are open has opened them all the same
    told = {
        "key": key,
        "split_hash": design.split_hash,
        "version": version.version,
        "test_units": sorted(design.held_out),
    }
    registry.tell(workspace, "open", told)
    judged = {each.sha256: _judged(each, held_out, policy) for each in contenders}
    if policy.at_most.peak_memory_gib is not None:  # which binds the candidate alone
        judged[candidate.sha256] = _weighed(workspace, version, judged[candidate.sha256], held_out)
    verdict = gates.decide(
        judged[candidate.sha256],
        judged[champion.sha256] if champion else None,
        {name: judged[found.sha256] for name, found in baselines.items()},
        policy,
        design,
    )
    figures = {
        each.evidence.label: {
            "metrics": _plain(judged[each.sha256].metrics),
            "by_unit": _plain(judged[each.sha256].by_unit),
        }
        for each in contenders
    }
    live = registry.champion(workspace)
    said = {"champion": live.version if live else None, "verdict": verdict.to_json()}
    registry.tell(workspace, "verdict", {**told, **said, "figures": figures})
    return Promotion(verdict, version, None, True, figures, key)


def _agreed(workspace: Workspace, promotion: Promotion, policy: Policy) -> Verdict:
    """Return the verdict with the word of people: theirs now, and theirs who took it down."""
    down, version = taken_down(workspace, promotion.version), promotion.version
    how = ""
    if down is not None:
        how = "rolled back" if down["to"] else "retired"
        how = f"{version.label} was {how} on {down['at'][:10]} by {down['who']}"
        how += f" (`endoprint rollback {down['from']}` makes it live without a verdict)"
    word = approval(workspace, promotion.key, since=down)
    return approved(promotion.verdict, policy, word, taken_down=how)


def _plain(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Return figures as JSON knows them: what could not be measured is null."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


# -- who is judged ------------------------------------------------------------------------------
def _contender(version: Version, model: ExposureModel) -> Contender:
    return Contender(
        model, _known(model, version.label, version.tags.get("split_hash", "")), version.sha256
    )


def _known(model: ExposureModel, label: str, split_hash: str) -> Evidence:
    """Return what is known of a model before the test units open, from its own checked files."""
    # what a backbone or vocabulary was fitted on counts as seen (judging rule 2)
    seen = {
        *model.provenance.get("training_units", []),
        *model.provenance.get("validation_units", []),
        *pretraining_units(model.provenance),
    }
    return Evidence(
        label=label,
        model=model.name,
        exposures=tuple(model.exposures),
        split_hash=split_hash,
        seen_units=frozenset(seen - {""}),  # "": the design names no units
        n_parameters=model.n_parameters(),
    )


def _loaded(workspace: Workspace, version: Version) -> ExposureModel:
    return registry.load_version(workspace, version.uri)[1]


def _baselines(workspace: Workspace, candidate: Evidence, policy: Policy) -> dict[str, Contender]:
    """Return the newest fit of each baseline on the candidate's split, from its training run."""
    found = {}
    for name in policy.baselines:
        runs = tracking.runs_table(
            workspace, kind="train", model=name, split_hash=candidate.split_hash
        )
        runs = runs[runs["model_id"].notna()]
        if name == candidate.model or runs.empty:
            continue
        address, sha256 = f"models:/{runs['model_id'].iloc[0]}", str(runs["model_sha256"].iloc[0])
        label = f"{name} (baseline)"
        model = opened(fetch(workspace, address, sha256=sha256), label)
        found[name] = Contender(model, _known(model, label, candidate.split_hash), sha256)
    return found


def _read_audit(workspace: Workspace) -> dict[str, Any]:
    try:
        return dict(json.loads(workspace.audit.read_text()))
    except (OSError, ValueError, TypeError):
        raise Refusal(
            "promotion needs the design's audit",
            f"none at {workspace.audit.relative_to(workspace.root)}",
            "make it with `dvc repro` or `endoprint audit`",
        ) from None


def _design(
    workspace: Workspace, held_out: AnnData, split: Split, audit: Mapping[str, Any]
) -> Design:
    held = set(held_out.obs["unit"].astype(str)) - {""}
    # held-out plates or wells are no units: nothing biological is held out
    independent = [] if split.is_technical else sorted(set(_independent(held_out, split)) - {""})
    wrong = registry.verify(workspace)
    return Design(
        split_hash=split.hash,
        test_units=tuple(independent),
        is_confounded=audit["confounded"],
        is_replicated=bool(audit["replicated"]) and not split.is_technical,
        n_openings=0,  # counted once it is known which question is asked
        held_out=frozenset(held),
        doubts=(f"the count of openings is in doubt: {'; '.join(wrong)}",) if wrong else (),
    )


def _independent(held_out: AnnData, split: Split) -> list[str]:
    """Return what each cell is an observation of: its line, where the claim is about new lines."""
    return [str(name) for name in held_out.obs["line" if split.scheme == "line" else "unit"]]


def openings(
    workspace: Workspace, split_hash: str, units: Set[str] = frozenset(), *, but: str = ""
) -> int:
    """Return how often the test units of a split, or any of `units`, were opened.

    Other folds over the same test units are another split, and no new test units. One question
    asked again, after a crash, is one opening: it has one answer. `but`: the question's own key.
    """
    opened = [
        line.get("key") or line["hash"]
        for line in history.read(workspace)
        if line["what"] == "open"
        and (line["split_hash"] == split_hash or bool(units & set(line.get("test_units", ()))))
    ]
    return len(set(opened) - {but})


# -- the test units -----------------------------------------------------------------------------
def _judged(contender: Contender, held_out: AnnData, policy: Policy) -> Evidence:
    """Score a model on the test cells and say how good and how slow it was."""
    truth, unit = held_out.obs["exposure"].astype(str), held_out.obs["independent"].astype(str)
    timings = []
    for _ in range(TIMINGS):
        with metered() as meter:
            probabilities = contender.model.predict_proba(held_out)
        timings.append(meter.cost.wall_seconds)
    seconds = statistics.median(timings)
    figures = {
        **metrics.summary(probabilities, truth, unit),
        "score_seconds_per_1000_cells": 1000 * seconds / int(held_out.n_obs),
    }
    each = metrics.by_unit(probabilities, truth, unit)[policy.must_beat_champion.metric]
    by_unit = {str(name): float(value) for name, value in each.items()}
    return replace(contender.evidence, metrics=figures, by_unit=by_unit)


def _weighed(
    workspace: Workspace, version: Version, judged: Evidence, held_out: AnnData
) -> Evidence:
    """Add the memory that a version needs by itself: here the others are loaded as well."""
    folder = fetch(workspace, version.uri, sha256=version.sha256)
    held = peak_memory_gib(folder, held_out, scratch=workspace.local / "models")
    return replace(judged, metrics={**judged.metrics, "peak_memory_gib": held})


# -- the record ---------------------------------------------------------------------------------
def _record(workspace: Workspace, promotion: Promotion, policy: Policy) -> None:
    """Keep the verdict on the version as tags, and with its figures as a run, once."""
    verdict, version = promotion.verdict, promotion.version
    told = {
        "verdict": verdict.decision,
        "reasons": "; ".join(verdict.reasons),
        "policy_hash": hash_of(policy.model_dump(mode="json")),
        "allow_few_units": str(policy.allow_few_units).lower(),
        "confounded_rule": policy.confounded,
        "approval_rule": policy.approval,
    }
    store = tracking.client(workspace)
    for key, value in told.items():
        store.set_model_version_tag(version.name, version.version, key, value)
    known = {"version": version.version, "verdict": verdict.decision, "verdict_key": promotion.key}
    if promotion.key and runs.finished(workspace, "promote", known):
        return  # a crash came after it
    with tracking.run(
        workspace,
        name=f"promote {version.label}",
        kind="promote",
        model=version.model,
        tags={**told, **known, "was_opened": promotion.was_opened},
    ) as run:
        run.record("verdict", promotion.to_json())
        reasons = "\n".join(f"- {reason}" for reason in verdict.reasons)
        run.description(f"**{verdict.decision}**: {version.label}\n\n{reasons}")
        own = promotion.figures.get(version.label, {"metrics": {}})
        run.metrics(own["metrics"])
