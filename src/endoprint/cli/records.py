"""Commands on the registry's record: `endoprint registry history | verify | who | plan ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from endoprint import jobs
from endoprint.cli import Folder, Json, app, say

FOUND = 3  # exit status where a question was answered, and the answer is not as it should be
Version = Annotated[str, typer.Argument(help="a version's number, or an alias such as champion")]

records = typer.Typer(
    name="registry",
    help="What was decided, by whom, from which data; and whether the record is whole.",
    no_args_is_help=True,
)
app.add_typer(records)


@records.command()
def history(
    export: Annotated[bool, typer.Option(help="also write it to registry/history/")] = False,
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Show every line of the history: when, who, what."""
    found = jobs.history(str(workspace), export=export)
    lines = [f"{line['at']}  {line['who']}  {line['said']}" for line in found["lines"]]
    lines += [f"exported to {found['exported']}"] if found["exported"] else []
    say(found, "\n".join(lines) or "nothing was decided yet", as_json)


@records.command()
def verify(workspace: Folder = Path(), as_json: Json = False) -> None:
    """Check the chain of the history, its end and its export; exit status 3 if any is broken."""
    found = jobs.verify(str(workspace))
    whole = f"whole: {found['n_lines']} lines, each follows the one before it"
    say(found, "\n".join(found["wrong"]) or whole, as_json)
    if found["wrong"]:
        raise typer.Exit(FOUND)


@records.command()
def who(
    at: Annotated[str, typer.Option(help="2026-11-22T14:30, in UTC unless it says its zone")] = "",
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Say which version was live at a time (now, unless told), since when, and who made it so."""
    found = jobs.who(str(workspace), at=at)
    say(found, found["sentence"], as_json)


@records.command()
def plan(workspace: Folder = Path(), as_json: Json = False) -> None:
    """Show what stands in the registry otherwise than the history says; exit status 3 if any."""
    found = jobs.plan(str(workspace))
    text = "\n".join(move["sentence"] for move in found["moves"])
    say(found, text or "the registry stands as the history says", as_json)
    if found["moves"]:
        raise typer.Exit(FOUND)


@records.command()
def card(version: Version = "champion", workspace: Folder = Path(), as_json: Json = False) -> None:
    """Show a version's card."""
    text = jobs.card(str(workspace), version=version)
    say({"card": text}, text, as_json)


@records.command()
def approve(
    version: Version,
    why: Annotated[str, typer.Option(help="kept in the history")],
    decline: Annotated[bool, typer.Option("--decline", help="say no instead")] = False,
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Approve a version that waits for a person: one MLflow's server knows, not its trainer."""
    import json

    path = jobs.approve(str(workspace), version=version, why=why, declined=decline)
    verdict = json.loads(Path(path).read_text())
    lines = [f"{verdict['decision']}: version {verdict['version']}"]
    lines += [f"  - {reason}" for reason in verdict["reasons"]]
    say(verdict, "\n".join(lines), as_json)


@records.command()
def lineage(
    version: Version = "champion", workspace: Folder = Path(), as_json: Json = False
) -> None:
    """Say which data, units, code, values and base model made a version."""
    found = jobs.lineage(str(workspace), version=version)
    say(found["lineage"], "\n".join(found["lines"]), as_json)


@records.command()
def seen(
    unit: Annotated[str, typer.Option(help="a unit's name")] = "",
    md5: Annotated[str, typer.Option(help="md5 of a file")] = "",
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Say which models saw a unit, or were made from a file."""
    found = jobs.seen(str(workspace), unit=unit, md5=md5)
    lines = [row["sentence"] for row in found["models"]]
    say(found, "\n".join(lines) or "no model of this workspace", as_json)


@records.command()
def reproduce(
    version: Version,
    tolerance: Annotated[
        float, typer.Option(min=0, help="largest difference of a probability")
    ] = 1e-4,
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Make a version again from its commit and data, and compare; exit status 3 if it differs."""
    found = jobs.reproduce(str(workspace), version=version, tolerance=tolerance)
    say(found, "\n".join(found["lines"]), as_json)
    if not found["is_reproduced"]:
        raise typer.Exit(FOUND)
