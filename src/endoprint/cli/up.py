"""Commands on what runs by itself: up, status, recover, pull."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from endoprint import jobs
from endoprint.cli import Folder, Json, app, say, show

if TYPE_CHECKING:
    from rich.console import RenderableType


@app.command()
def up(
    mlflow_port: Annotated[
        int, typer.Option(min=1, max=65535, help="the next free one, if busy")
    ] = 5000,
    prefect_port: Annotated[
        int, typer.Option(min=1, max=65535, help="the next free one, if busy")
    ] = 4200,
    host: Annotated[
        str, typer.Option(help="what to listen on; another than this machine needs passwords")
    ] = "127.0.0.1",
    allowed_hosts: Annotated[
        str, typer.Option(help="names the servers answer to beside localhost; with commas")
    ] = "",
    workspace: Folder = Path(),
) -> None:
    """Start what daily use needs (MLflow, Prefect, a worker, schedules) until Ctrl-C."""
    from endoprint.services.plan import Plan
    from endoprint.services.up import Stopped, running
    from endoprint.workspace import Workspace

    space = Workspace.open(workspace)
    plan = Plan.of(space, host=host, ports=(mlflow_port, prefect_port), allowed=allowed_hosts)
    try:
        with running(plan, _event) as services:
            services.begin()
            show(_screen(jobs.status(str(workspace))))
            typer.echo(f"All of it answered after {services.seconds:.0f} s. Ctrl-C stops it.")
            services.keep()
    except Stopped:
        typer.echo("endoprint: all stopped; `endoprint up` goes on from here", err=True)


@app.command()
def status(workspace: Folder = Path(), as_json: Json = False) -> None:
    """Say what is running in a workspace, what is next, and what was last."""
    found = jobs.status(str(workspace))
    if as_json:
        say(found, "", as_json)
    else:
        show(_screen(found))


@app.command()
def recover(workspace: Folder = Path(), as_json: Json = False) -> None:
    """Clear up after a crash: close the runs of dead processes and a promotion cut short."""
    done = jobs.recover(str(workspace))
    text = "\n".join(f"run {run_id} closed: its process died" for run_id in done["closed"])
    say(done, text or "nothing was left open", as_json)


@app.command()
def pull(workspace: Folder = Path(), as_json: Json = False) -> None:
    """Bring data that another machine made, from the remote in ENDOPRINT_DVC_REMOTE."""
    place = jobs.pull(str(workspace))
    say({"remote": place}, f"data as in dvc.lock, from {place}", as_json)


def _event(line: str) -> None:
    typer.echo(f"{datetime.now():%H:%M:%S} {line}")


def _screen(found: dict[str, Any]) -> RenderableType:
    """Draw what is running: the same screen for `up` and `status`."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not found["is_running"]:
        left = [each for each in found["services"] if each["is_alive"]]
        lines = ["nothing is running here; `endoprint up` starts it"]
        lines += [f"left behind: {each['name']} (process {each['pid']})" for each in left]
        return Text("\n".join(lines))
    services = Table(
        "service", "address", "state", title="running", title_justify="left", box=None
    )
    for each in found["services"]:
        what = each["url"] or "runs what is scheduled"
        services.add_row(each["name"], what, "up" if each["is_alive"] else "being started again")
    parts: list[RenderableType] = [services]
    if found.get("prefect_is_silent"):
        parts.append(Text("Prefect does not answer; see .endoprint/logs/prefect.txt"))
    for title in ("running", "next", "last"):
        if found[title]:
            table = Table("deployment", "state", "at", "", title=_TITLES[title],
                          title_justify="left", box=None)  # fmt: skip
            for row in found[title]:
                table.add_row(row["deployment"], row["state"], _when(row["at"]), row["message"])
            parts += [Text(), table]
    return Group(*parts)


_TITLES = {"running": "runs now", "next": "what is next", "last": "what was last"}


def _when(stamp: str) -> str:
    if not stamp:
        return ""
    return f"{datetime.fromisoformat(stamp.replace('Z', '+00:00')).astimezone():%a %d %b %H:%M}"
