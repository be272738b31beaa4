"""Commands on what is live: promote, retire, rollback, ui, gc."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from endoprint import jobs
from endoprint.cli import Folder, Json, app, say


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="a registered version; none: the leader")] = "",
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Judge a version on test units by registry/policy.yaml; promote it if that allows."""
    chosen = version or jobs.register(str(workspace))
    verdict = json.loads(Path(jobs.promote(str(workspace), version=chosen)).read_text())
    lines = [f"{verdict['decision']}: version {verdict['version']}"]
    lines += [f"  - {reason}" for reason in verdict["reasons"]]
    say(verdict, "\n".join(lines), as_json)


@app.command()
def retire(
    why: Annotated[str, typer.Option(help="kept in the history")],
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Take the champion down without a successor: the way on when task or split changed."""
    done = jobs.retire(str(workspace), why=why)
    say(done, f"retired: {done['retired']}; nothing is live until the next promotion", as_json)


@app.command()
def rollback(
    version: Annotated[str, typer.Argument(help="an earlier champion; none: the last")] = "",
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Make an earlier champion live again."""
    done = jobs.rollback(str(workspace), version=version)
    say(done, f"live again: {done['champion']}", as_json)


@app.command()
def ui(
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="on 127.0.0.1; the next free one, if busy")
    ] = 5000,
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Open MLflow's UI on the workspace's store, on this machine only, until Ctrl-C."""
    from endoprint.workspace import Workspace

    space = Workspace.open(workspace)  # a mistake is said before MLflow is imported
    from endoprint import tracking
    from endoprint.services.plan import runs_page
    from endoprint.services.processes import free_port

    port = free_port(port)
    space.local.mkdir(parents=True, exist_ok=True)
    experiment = tracking.experiment(space, tracking.client(space))
    address = runs_page(f"http://127.0.0.1:{port}", experiment)
    say({"address": address}, f"MLflow on {address}  (Ctrl-C stops it)", as_json)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    hosts = ",".join(f"{name}:{port}" for name in ("127.0.0.1", "localhost"))
    command += ["--port", str(port), "--workers", "1", "--allowed-hosts", hosts]
    # by the environment: a database's password on a command line can be read by everybody
    environment = {
        **space.environment(),
        "MLFLOW_BACKEND_STORE_URI": space.tracking_uri,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": space.artifacts,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # as `up`: four processes never used
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    # in this process's place: whoever stops the command stops the server, nothing is orphaned
    os.execve(sys.executable, command, environment)


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="do it; else only say")] = False,
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Say (or delete) what nobody needs: failed runs, scratch, parts of scorings given up."""
    found = jobs.gc(str(workspace), delete=delete)
    verb = "deleted" if delete else "would delete"
    text = "\n".join(f"{verb} {what}" for what in found["items"]) or "nothing to delete"
    say(found, text, as_json)
