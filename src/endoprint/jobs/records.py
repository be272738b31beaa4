"""Jobs that answer from the record: history, verify, who, plan, lineage, seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from endoprint.config import Refusal
from endoprint.workspace import Workspace

ROLES = {  # part of the lineage -> what a model did with its units
    "training": "fitted on it",
    "validation": "calibrated on it",
    "pretraining": "its encoder or vocabulary was fitted on it",
}


# -- the history --------------------------------------------------------------------------------
def history(workspace: str, *, export: bool = False) -> dict[str, Any]:
    """Return every line of the history, each with a sentence; write it for git, if asked."""
    space = _settled(workspace)
    from endoprint import audited
    from endoprint import history as record

    lines = [{**line, "said": _sentence(line)} for line in record.read(space)]
    place = audited.export(space) if export else None
    return {"lines": lines, "exported": str(place.relative_to(space.root)) if place else None}


def verify(workspace: str) -> dict[str, Any]:
    """Return what is wrong with the history, one sentence each."""
    space = Workspace.open(workspace)
    from endoprint import audited
    from endoprint import history as record

    return {"wrong": audited.verify(space), "n_lines": len(record.read(space))}


def who(workspace: str, *, at: str = "") -> dict[str, Any]:
    """Return which version was live at a time (now, unless told) and who made it so."""
    space = _settled(workspace)
    from endoprint import audited

    moment = at or datetime.now(UTC).isoformat(timespec="milliseconds")  # as the history
    reign = audited.reign_at(space, moment)
    if reign.version is None:
        said = f"at {moment} nothing was live"
        said += f", since {reign.since} ({reign.who}: {reign.why})" if reign.since else ""
    else:
        said = f"at {moment} version {reign.version} was live, since {reign.since}"
        said += f" until {reign.until}" if reign.until else " and is now"
        said += f"; made so by {reign.who}: {reign.why}"
    return {**reign.to_json(), "at": moment, "sentence": said}


def plan(workspace: str) -> dict[str, Any]:
    """Return what stands in the registry otherwise than the history says."""
    space = _settled(workspace)
    from endoprint import audited

    moves = [
        {"what": move.what, "told": move.told, "found": move.found, "sentence": move.sentence()}
        for move in audited.plan(space)
    ]
    return {"moves": moves}


def _settled(workspace: str) -> Workspace:
    """Open a workspace once what a crash left open in its registry is closed."""
    space = Workspace.open(workspace)
    from endoprint import registry

    registry.settle(space)
    return space


def _sentence(line: Mapping[str, Any]) -> str:
    told = {
        "register": "version {version} registered from run {run_id}",
        "candidate": "version {version} is the candidate",
        "open": "test units opened for version {version}",
        "intent": "about to move @champion from {from} to {to}: {why}",
        "done": "@champion moved from {from} to {to}: {why}",
        "abandoned": "@champion stays {from}: moving it to {to} was cut short",
    }
    if line["what"] == "verdict":
        verdict = line["verdict"]
        return f"version {line['version']}: {verdict['decision']}; {verdict['reasons'][0]}"
    if line["what"] == "approval":
        verb = "approves" if line["is_given"] else "declines"
        return f"{line['approver']} {verb} version {line['version']}: {line['why']}"
    # a retired champion has no successor
    plain = {key: "none" if value is None else value for key, value in line.items()}
    return told[line["what"]].format_map(plain) if line["what"] in told else str(line["what"])


# -- where models come from ---------------------------------------------------------------------
def lineage(workspace: str, *, version: str) -> dict[str, Any]:
    """Return what made a version: data by md5, units, code, values, base model, software."""
    space = _settled(workspace)
    from endoprint import registry, report

    found = registry.find(space, version)
    told = json.loads(found.tags["lineage"])
    lines = [f"{found.label}, run {found.run_id}, sha256 {found.sha256}"]
    lines += [f"  {key}: {value}" for key, value in report.origins(told).items()]
    return {"version": found.version, "lineage": told, "lines": lines}


def seen(workspace: str, *, unit: str = "", md5: str = "") -> dict[str, Any]:
    """Return the models that saw a unit, or were made from a file of this md5.

    Every finished training run of the task counts, registered or not.
    """
    if bool(unit) == bool(md5):
        raise Refusal(
            "one question at a time", "a unit and an md5" if unit else "neither unit nor md5",
            "name a unit or an md5",
        )  # fmt: skip
    space = _settled(workspace)
    from endoprint import history as record
    from endoprint import registry, runs, tracking

    versions = {each.run_id: each.version for each in registry.versions(space)}
    opened = {
        line["version"]
        for line in record.read(space)
        if line["what"] == "open" and unit in line.get("test_units", ())
    }
    models = []
    for run_id, row in tracking.runs_table(space).iterrows():
        told = runs.read_record(space, str(run_id), "lineage")
        version = versions.get(str(run_id))
        if unit:
            units = told["units"]
            how = [said for part, said in ROLES.items() if unit in units.get(part, [])]
            how += ["judged on it"] if version in opened else []
        else:
            how = [f"made from {path}" for path, sum_ in told["inputs"].items() if sum_ == md5]
        if how:
            named = f"version {version} ({row['model']})" if version else f"{row['model']}"
            models.append(
                {
                    "run_id": str(run_id),
                    "model": str(row["model"]),
                    "version": version,
                    "how": how,
                    "sentence": f"{named}, run {run_id}: {', '.join(how)}",
                }
            )
    return {"unit": unit or None, "md5": md5 or None, "models": models}
