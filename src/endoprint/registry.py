"""Which version is live, and why: register, judge, promote, roll back; the only mover of aliases.

Versions stand under the registered model `endoprint-<task>`. `@candidate` is the newest,
`@champion` the live one, `@previous` the one before it. Every decision is in the history.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock

from endoprint import history, runs, tracking
from endoprint.config import Refusal
from endoprint.fetched import fetch
from endoprint.lineage import Lineage
from endoprint.model import ExposureModel
from endoprint.roles import acting
from endoprint.smoke import opened
from endoprint.workspace import Workspace

HEAD = "history_head"  # tag of the registered model: the hash of the newest line of its history
LONGEST_DESCRIPTION = 5000  # letters; the column is no wider (MLflow's SQL store)
CHAMPION, CANDIDATE, PREVIOUS = "champion", "candidate", "previous"
ROLLBACK = "rollback"  # why an alias moved; of a promotion it is the verdict's first reason
ABOUT = "**@champion** is live, **@candidate** the newest; aliases: `endoprint registry` only"
ADDRESS = re.compile(r"models:/(?P<name>[\w.-]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Version:
    """One registered model: who it is and, once fetched, where its checked files are."""

    name: str  # the registered model
    version: str
    run_id: str
    sha256: str  # of the saved model's files
    model: str  # its row in the table of models
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        """The address MLflow knows it by, which no later promotion changes."""
        return f"models:/{self.name}/{self.version}"

    @property
    def label(self) -> str:
        """How reasons name it."""
        return f"version {self.version} ({self.model})"

    @property
    def exposures(self) -> tuple[str, ...]:
        """What it tells apart, in the order of its answers."""
        return tuple(json.loads(self.tags["exposures"]))


# -- registering --------------------------------------------------------------------------------
def register(workspace: Workspace, run_id: str) -> Version:
    """Make the model of a finished training run a version and point `@candidate` at it.

    The version carries the run's lineage and the digest of its files as tags. A run registered
    before keeps its version, and so does a fit made again of the same lineage that came out the
    same to the byte.
    """
    store = tracking.client(workspace)
    try:
        run = store.get_run(run_id)
    except mlflow.MlflowException:
        raise Refusal(
            "a version comes from a run of this workspace", f"no run {run_id}", "train a model"
        ) from None
    tags = run.data.tags
    missing = [
        tag for tag in ("model_id", "model_sha256", "model", "split_hash") if tag not in tags
    ]
    if run.info.status != "FINISHED" or missing or tags.get("task") != workspace.params.task:
        raise Refusal(
            "a version comes from a finished run of this task, with a model and its lineage",
            f"run {run_id}: {run.info.status}, task {tags.get('task')}, "
            f"without {', '.join(missing) or 'nothing missing'}",
            "register a run of `endoprint train`",
        )
    lineage = Lineage.model_validate(runs.read_record(workspace, run_id, "lineage"))
    name = workspace.experiment
    with lock(workspace):
        said = {**lineage.tags(), "model_sha256": tags["model_sha256"]}
        known = [
            each
            for each in _versions(store, name, f"name = '{name}'")
            if each.run_id == run_id or said.items() <= each.tags.items()
        ]
        if known:
            found = next((each for each in known if each.run_id == run_id), known[0])
        else:
            _make_registered_model(store, name)
            said["lineage"] = lineage.model_dump_json()
            said |= {"trainer": tags["trainer"]} if "trainer" in tags else {}
            with tracking.ambient(workspace):
                made = store.create_model_version(
                    name,
                    source=f"models:/{tags['model_id']}",
                    run_id=run_id,
                    tags=said,
                    model_id=tags["model_id"],  # a server that asks who is there wants it told
                )
            found = _version(made)
        _tell_registered(workspace, found)
        stood = _by_alias(store, name, CANDIDATE)
        if stood is None or stood.version != found.version:
            tell(workspace, "candidate", {"version": found.version})
            store.set_registered_model_alias(name, CANDIDATE, found.version)
    return found


def _tell_registered(workspace: Workspace, version: Version) -> None:
    """Write that a version was made, unless it was told: a crash may have come between."""
    lines = history.read(workspace)
    if any(line["what"] == "register" and line["version"] == version.version for line in lines):
        return
    told = {"version": version.version, "run_id": version.run_id, "sha256": version.sha256}
    tell(workspace, "register", told)


def is_described(workspace: Workspace, version: Version) -> bool:
    """Return whether a version has its card."""
    found = tracking.client(workspace).get_model_version(version.name, version.version)
    return bool(found.description)


def describe(workspace: Workspace, version: Version, text: str) -> None:
    """Show a version's card as its description, and keep it with the run it comes from."""
    store = tracking.client(workspace)
    place = f"cards/version-{version.version}.md"
    if len(text) > LONGEST_DESCRIPTION:
        shown = text[: LONGEST_DESCRIPTION - 100].rpartition("\n")[0]
        shown += f"\n\n(The rest is in {place} of run {version.run_id}.)\n"
    else:
        shown = text
    with acting("promoter"):
        store.update_model_version(version.name, version.version, description=shown)
        store.log_text(version.run_id, text, place)


def _make_registered_model(store: mlflow.MlflowClient, name: str) -> None:
    try:
        store.create_registered_model(name, description=ABOUT)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


# -- finding ------------------------------------------------------------------------------------
def find(workspace: Workspace, uri: str = CHAMPION) -> Version:
    """Return the version that an address means now.

    `uri`: `models:/NAME@ALIAS` or `models:/NAME/N`; for this workspace's own also an alias or a
    number alone.
    """
    store = tracking.client(workspace)
    short = uri.removeprefix("@")
    own = f"/{short}" if short.isdigit() else f"@{short}"
    address = ADDRESS.fullmatch(uri if ":" in uri else f"models:/{workspace.experiment}{own}")
    if address is None:
        raise Refusal(
            "a model's address is models:/NAME@ALIAS or models:/NAME/VERSION",
            uri,
            f"for example models:/{workspace.experiment}@{CHAMPION}",
        )
    name, alias = address["name"], address["alias"]
    tracking.experiment(workspace, store)  # a store that does not answer is no missing version
    try:
        found = (
            store.get_model_version_by_alias(name, alias)
            if alias
            else store.get_model_version(name, address["version"])
        )
    except mlflow.MlflowException:
        known = ", ".join(each.version for each in versions(workspace, name)) or "none"
        remedy = "promote one first" if alias == CHAMPION else "name one that exists"
        raise Refusal(
            "a model's address leads to a registered version",
            f"{address[0]}, with versions: {known}",
            remedy,
        ) from None
    return _version(found)


def champion(workspace: Workspace) -> Version | None:
    """Return the live version, or None where nothing was promoted yet."""
    return _by_alias(tracking.client(workspace), workspace.experiment, CHAMPION)


def aliases(workspace: Workspace) -> dict[str, str]:
    """Return alias -> the number of the version it names now, whoever made that version."""
    try:
        found = tracking.client(workspace).get_registered_model(workspace.experiment)
    except mlflow.MlflowException:
        return {}
    return {alias: str(version) for alias, version in found.aliases.items()}


def versions(workspace: Workspace, name: str = "") -> list[Version]:
    """Return every version of a registered model, newest first."""
    name = name or workspace.experiment
    return _versions(tracking.client(workspace), name, f"name = '{name}'")


def resolve(workspace: Workspace, uri: str = CHAMPION) -> tuple[Version, Path]:
    """Return the version an address means, and a folder of its model that is safe to load."""
    found = find(workspace, uri)
    return found, fetch(workspace, found.uri, sha256=found.sha256)


def load_version(workspace: Workspace, uri: str = CHAMPION) -> tuple[Version, ExposureModel]:
    """Return the version an address means and its model, loaded after every check."""
    found, folder = resolve(workspace, uri)
    return found, opened(folder, found.label)


def _versions(store: mlflow.MlflowClient, name: str, asked: str) -> list[Version]:
    rows, page = [], None
    while True:
        found = store.search_model_versions(
            asked, order_by=["version_number DESC"], page_token=page
        )
        # versions by other hands lack the digest; they are not ours to load
        rows += [_version(each) for each in found if "model_sha256" in each.tags]
        page = found.token
        if not page:
            return rows


def _by_alias(store: mlflow.MlflowClient, name: str, alias: str) -> Version | None:
    try:
        return _version(store.get_model_version_by_alias(name, alias))
    except mlflow.MlflowException as error:
        if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise


def _version(found: Any) -> Version:  # mlflow's ModelVersion, which carries no types
    missing = [tag for tag in ("model_sha256", "model", "exposures") if tag not in found.tags]
    if missing:
        raise Refusal(
            "a version was registered by endoprint, with its digest and lineage",
            f"{found.name} version {found.version} without {', '.join(missing)}",
            "register its run with endoprint",
        )
    return Version(
        name=found.name,
        version=str(found.version),
        run_id=str(found.run_id),
        sha256=found.tags["model_sha256"],
        model=found.tags["model"],
        tags=dict(found.tags),
    )


# -- moving aliases -----------------------------------------------------------------------------
def tell(workspace: Workspace, what: str, said: Mapping[str, Any]) -> None:
    """Add a line to the history, and let the registry remember how far it reached."""
    # a crash before the tag leaves an older line's, which is still there; a lost end leaves none
    history.refuse_cut_off(workspace, _head(workspace))
    line = history.append(workspace, what, said)
    store = tracking.client(workspace)
    store.set_registered_model_tag(workspace.experiment, HEAD, line["hash"])


def verify(workspace: Workspace) -> list[str]:
    """Return what is wrong with the history, one sentence each; nothing if it can be trusted."""
    return history.verify(workspace, head=_head(workspace))


def _head(workspace: Workspace) -> str | None:
    try:
        known = tracking.client(workspace).get_registered_model(workspace.experiment)
    except mlflow.MlflowException:
        return None
    head: str | None = known.tags.get(HEAD)
    return head


@contextmanager
def lock(workspace: Workspace) -> Iterator[None]:
    """Keep every other process of this machine from moving this workspace's aliases.

    Inside, MLflow's server is asked as a promoter, where the environment knows one.
    """
    workspace.local.mkdir(parents=True, exist_ok=True)
    with acting("promoter"), FileLock(workspace.local / "registry.lock"):
        yield


def flip(workspace: Workspace, to: Version, *, expected: Version | None, why: str) -> None:
    """Make a version the champion: intent written, `@previous` set, `@champion` set, done written.

    Setting `@champion` is the one moment of change; a crash before it leaves the old champion.
    `expected` is the champion the decision was made against; another one by now is refused.
    Called under `lock`.
    """
    store = tracking.client(workspace)
    now = _by_alias(store, to.name, CHAMPION)
    if (now and now.version) != (expected and expected.version):
        raise Refusal(
            "a decision holds against the champion it was made against",
            f"{now.label if now else 'no champion'} by now",
            "promote again",
        )
    if now is not None and now.version == to.version:
        raise Refusal("a decision changes who is live", f"{to.label}, which is", "nothing is due")
    told = {"from": now.version if now else None, "to": to.version, "why": why}
    tell(workspace, "intent", told)
    if now is not None:
        store.set_registered_model_alias(to.name, PREVIOUS, now.version)
    store.set_registered_model_alias(to.name, CHAMPION, to.version)
    tell(workspace, "done", told)


def go_live(workspace: Workspace, to: Version, *, against: Version | None, why: str) -> None:
    """Carry out a decision that stands: of several against one champion, the first alone does."""
    with lock(workspace):
        recover(workspace)
        flip(workspace, to, expected=against, why=why)


def settle(workspace: Workspace) -> str | None:
    """Close what a crash left open, before anything is asked or done; see `recover`."""
    with lock(workspace):
        return recover(workspace)


def recover(workspace: Workspace) -> str | None:
    """Close a flip that a crash left open; return what became of it. Called under `lock`."""
    lines = [line for line in history.read(workspace) if line["what"] in OPENS | CLOSES]
    if not lines or lines[-1]["what"] in CLOSES:
        return None
    history.refuse_cut_off(workspace, _head(workspace))  # no alias moves by half a history
    left = {key: lines[-1][key] for key in ("from", "to", "why")}
    live = champion(workspace)
    outcome = "done" if (live.version if live else None) == left["to"] else "abandoned"
    if outcome == "abandoned":  # @previous may have been set for what did not come
        store, before = tracking.client(workspace), told_aliases(workspace)[PREVIOUS]
        if before is not None:
            store.set_registered_model_alias(workspace.experiment, PREVIOUS, before)
        elif PREVIOUS in aliases(workspace):
            store.delete_registered_model_alias(workspace.experiment, PREVIOUS)
    tell(workspace, outcome, {**left, "recovered": True})
    return outcome


def told_aliases(workspace: Workspace) -> dict[str, str | None]:
    """Return alias -> the version it names by the history; None where it names none."""
    lines = history.read(workspace)
    flips = [line for line in lines if line["what"] == "done"]
    replaced = [line["from"] for line in flips if line["from"] is not None]
    named = [line["version"] for line in lines if line["what"] == "candidate"]
    # older histories told of the candidate by registering it
    named = named or [line["version"] for line in lines if line["what"] == "register"]
    return {
        CHAMPION: flips[-1]["to"] if flips else None,
        PREVIOUS: replaced[-1] if replaced else None,
        CANDIDATE: named[-1] if named else None,
    }


OPENS, CLOSES = {"intent"}, {"done", "abandoned"}


def rollback(workspace: Workspace, version: str = "") -> Version:
    """Make an earlier champion live again (`@previous` unless told), once it loads and answers."""
    with lock(workspace):
        recover(workspace)
        history.refuse_cut_off(workspace, _head(workspace))  # it says who was live
        now = champion(workspace)
        target, _ = load_version(workspace, version or PREVIOUS)  # loads it and lets it answer
        were = {line["to"] for line in history.read(workspace) if line["what"] == "done"}
        if target.version not in were or (now and now.version == target.version):
            raise Refusal(
                "a rollback leads to an earlier champion",
                f"{target.label}, {'live already' if target.version in were else 'never live'}",
                f"one of: {', '.join(sorted(filter(None, were), key=int)) or 'none'}",
            )
        flip(workspace, target, expected=now, why=ROLLBACK)
    return target


def retire(workspace: Workspace, *, why: str) -> Version:
    """Take the champion down without a successor: the way on when the task or split changed."""
    with lock(workspace):
        recover(workspace)
        now = champion(workspace)
        if now is None:
            raise Refusal("a champion is retired", "no champion", "nothing is to be done")
        store = tracking.client(workspace)
        told = {"from": now.version, "to": None, "why": why}
        tell(workspace, "intent", told)
        store.set_registered_model_alias(now.name, PREVIOUS, now.version)
        store.delete_registered_model_alias(now.name, CHAMPION)
        tell(workspace, "done", told)
    return now
