"""Commands that walk the whole job list: demo and run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from endoprint import jobs
from endoprint.cli import Folder, Json, app, show
from endoprint.workspace import Workspace


@app.command()
def demo(workspace: Folder = Path(), as_json: Json = False) -> None:
    """Walk the whole story on simulated cells: the job list of `make demo`, without Prefect."""
    _walk(workspace, as_json)


@app.command()
def run(
    workspace: Folder = Path(),
    file: Annotated[Path | None, typer.Option(help="the cells to link into the workspace")] = None,
    as_json: Json = False,
) -> None:
    """Walk a workspace from its cells to a judged model: prepare, fit, compare, promote, score."""
    if file is not None:
        jobs.attach(str(workspace), file=str(file))
    _walk(workspace, as_json)


def _walk(workspace: Path, as_json: bool) -> None:
    began = time.time()
    told = {
        step.name: step.job(str(workspace), **step.arguments)
        for step in jobs.story_steps(str(workspace))
    }
    show_story(jobs.tell(str(workspace), told=told, began=began), as_json=as_json)


def show_story(path: str, *, as_json: bool = False) -> None:
    """Print the last screen of the story whose `story.json` is at `path`."""
    if as_json:
        typer.echo(json.dumps(json.loads(Path(path).read_text()), indent=1))
    else:
        show(jobs.last_screen(str(Path(path).parent.parent)))


def run_flow(module: str, name: str) -> int:
    """Run a flow in a child process, with the environment of the workspace here.

    Prefect reads its home and settings when it is imported: later is too late.
    """
    code = (
        f"from {module} import {name}; from endoprint.cli.story import show_story; "
        f"show_story({name}('.'))"
    )
    space = Workspace.at(".")
    environment = space.environment()
    Path(environment["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    return done.returncode
