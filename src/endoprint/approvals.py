"""A person's word on a verdict: kept in the history, from somebody a server vouches for."""

from __future__ import annotations

from endoprint import history, registry
from endoprint.config import Refusal
from endoprint.gates import Approval
from endoprint.policy import read_policy
from endoprint.registry import ROLLBACK, Version
from endoprint.workspace import Workspace


def verdict_of(workspace: Workspace, version: str) -> history.Line | None:
    """Return the newest verdict on a version, as the history tells it; None: not judged."""
    lines = [
        line
        for line in history.read(workspace)
        if line["what"] == "verdict" and line["version"] == version
    ]
    return lines[-1] if lines else None


def taken_down(workspace: Workspace, version: Version) -> history.Line | None:
    """Return the line by which people took a version down; None: it was never live, or replaced.

    The same bytes under another version's number are the same model.
    """
    lines = history.read(workspace)
    alike = {version.version} | {
        line["version"]
        for line in lines
        if line["what"] == "register" and line["sha256"] == version.sha256
    }
    left = [line for line in lines if line["what"] == "done" and line["from"] in alike]
    is_by_people = bool(left) and (left[-1]["to"] is None or left[-1]["why"] == ROLLBACK)
    return left[-1] if is_by_people else None


def approval(
    workspace: Workspace, key: str, *, since: history.Line | None = None
) -> Approval | None:
    """Return what was last said by a person about one verdict, by its key.

    `since`: a line of the history; what was said before it does not count.
    """
    said = [
        line
        for line in history.read(workspace)
        if line["what"] == "approval" and line["key"] == key
    ]
    if not said or not key or (since is not None and said[-1]["n"] < since["n"]):
        return None
    return Approval(said[-1]["approver"], said[-1]["is_given"], said[-1]["why"])


def approve(
    workspace: Workspace, version: str, *, approver: str | None, why: str, is_given: bool = True
) -> None:
    """Keep an authenticated person's word on the verdict that a version waits with.

    `approver`: whom a server authenticated; None, and whoever trained the version, are refused.
    `promote` then acts on it.
    """
    policy = read_policy(workspace.policy)
    with registry.lock(workspace):
        registry.recover(workspace)
        found = registry.find(workspace, version)
        _refuse_unvouched(found, approver)
        made = verdict_of(workspace, found.version)
        live = registry.champion(workspace)
        standing = live.version if live else None
        if (
            made is None
            or made["verdict"]["decision"] != "promote"
            or (policy.approval != "human" and taken_down(workspace, found) is None)
            or standing == found.version
            or standing != made["champion"]  # what was judged is another question by now
        ):
            raise Refusal(
                "a person approves what the gates would promote, where policy or rollback ask",
                f"{found.label}, which waits for nobody",
                "see `endoprint promote` and `approval` in registry/policy.yaml",
            )
        told = {"version": found.version, "key": made["key"], "approver": approver}
        registry.tell(workspace, "approval", {**told, "is_given": is_given, "why": why})


def _refuse_unvouched(version: Version, approver: str | None) -> None:
    if approver is None:
        raise Refusal(
            "a human approval is an authenticated person's",
            "nobody a server vouches for",
            "use a tracking server with authentication and your credentials "
            "(MLFLOW_TRACKING_URI, _USERNAME, _PASSWORD)",
        )
    trainer = version.tags.get("trainer")
    if trainer is None or trainer.casefold() == approver.casefold():
        raise Refusal(
            "whoever trained a version does not approve it",
            f"{version.label}, trained by {trainer or 'nobody known'}",
            "let another person approve it" if trainer else "train and register it again",
        )
