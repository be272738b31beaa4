"""Jobs that decide what is live: register, promote, approve, retire, roll back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from endoprint import progress
from endoprint.config import Refusal
from endoprint.jobs.data import write_json
from endoprint.jobs.materials import latest_fits
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    from endoprint.promotion import Promotion
    from endoprint.registry import Version


def register(workspace: str, *, run_id: str = "") -> str:
    """Make a run's model (the leader's, unless told) `@candidate`; return its version."""
    space = Workspace.open(workspace)
    from endoprint import registry

    if not run_id:
        board = space.local / "leaderboard.json"
        if not board.is_file():
            raise Refusal(
                "a candidate comes from the leaderboard",
                "none here yet",
                "run `endoprint train`, then `endoprint leaderboard`",
            )
        ranked = [each["run_id"] for each in json.loads(board.read_text())["models"]]
        if set(ranked) != set(latest_fits(space)["run_id"]):
            raise Refusal(
                "a candidate leads a leaderboard of the newest fits",
                "one from before the newest fit, cells or split",
                "run `endoprint leaderboard` first",
            )
        run_id = ranked[0]
    version = registry.register(space, run_id)
    if not registry.is_described(space, version):  # a verdict's card is not written over
        registry.describe(space, version, card_of(space, version))
    return str(version.version)


def promote(workspace: str, *, version: str = "") -> str:
    """Judge a version on the test units by the policy; return the verdict's path (JSON).

    Beside it lies `card.md`: the model's card with the verdict and every reason.
    """
    space = Workspace.open(workspace)
    from endoprint import promotion, registry

    with progress.task("promote"):
        found = promotion.promote(space, version)
    card = card_of(space, found.version, found)
    registry.describe(space, found.version, card)
    (space.local / "card.md").write_text(card)
    return write_json(space.local / "verdict.json", found.to_json())


def approve(
    workspace: str, *, version: str, why: str, declined: bool = False, vouched: str = ""
) -> str:
    """Keep a person's word on a waiting version and act on it; return the verdict's path.

    The person is whom MLflow's server authenticates, or `vouched`: whom another server did.
    """
    space = Workspace.open(workspace)
    from endoprint import approvals, identity

    approver = vouched or identity.authenticated(space.tracking_uri)
    _refuse_silence(why)
    approvals.approve(space, version, approver=approver, why=why, is_given=not declined)
    return promote(workspace, version=version)


def waits_for_approval(workspace: str, *, verdict: str) -> bool:
    """Return whether a verdict (its JSON file) waits for a person's word and nothing else."""
    checks = json.loads((Workspace.at(workspace).root / verdict).read_text())["checks"]
    return [check["name"] for check in checks if not check["passed"]] == ["approval"]


def retire(workspace: str, *, why: str) -> dict[str, str]:
    """Take the champion down without a successor: the way on when task or split changed."""
    space = Workspace.open(workspace)
    from endoprint import registry

    _refuse_silence(why)
    return {"retired": registry.retire(space, why=why).label}


def _refuse_silence(why: str) -> None:
    if not why.strip():
        raise Refusal("a person's decision is kept with its reason", "none", "say why")


def rollback(workspace: str, *, version: str = "") -> dict[str, str]:
    """Make an earlier champion live again, the last one unless told."""
    space = Workspace.open(workspace)
    from endoprint import registry

    return {"champion": registry.rollback(space, version).label}


# -- the card -----------------------------------------------------------------------------------
def card(workspace: str, *, version: str) -> str:
    """Return the card of a version as it stands in the registry, in markdown."""
    space = Workspace.open(workspace)
    from endoprint import registry, runs

    found = registry.find(space, version)
    return runs.read_text(space, found.run_id, f"cards/version-{found.version}.md")


def card_of(space: Workspace, version: Version, promotion: Promotion | None = None) -> str:
    """Write a version's card: development figures, or those of the test units if it was judged."""
    from endoprint import blueprint, report, runs

    figures = runs.final_metrics(space, version.run_id)
    by_unit = _kept(space, version.run_id, "by_unit")
    scope = "Held-out development units, cross-fitted; the test units were not opened."
    told = dict(promotion.figures).get(version.label) if promotion else None
    if told:
        figures = {**figures, **{k: v for k, v in told["metrics"].items() if v is not None}}
        by_unit = told["by_unit"]
        scope = f"Test units, scored at the promotion: {', '.join(sorted(by_unit))}."
    own = space.policy.parent / "cards/model.md"
    return report.model_card(
        own.read_text() if own.is_file() else blueprint.model_card(),
        name=f"{space.experiment} {version.label}",
        lineage=json.loads(version.tags["lineage"]),
        metrics=figures,
        by_unit=by_unit,
        verdict=promotion.verdict.to_json() if promotion else {},
        audit=_kept(space, version.run_id, "audit"),
        scope=scope,
    )


def _kept(space: Workspace, run_id: str, name: str) -> dict[str, Any]:
    """Return what a run recorded; nothing where it recorded none."""
    from endoprint import runs

    try:
        return dict(runs.read_record(space, run_id, name))
    except Refusal:
        return {}
