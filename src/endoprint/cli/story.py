"""Commands that walk the whole job list: demo and run, with or without Prefect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from endoprint import jobs
from endoprint.cli import Folder, Json, app, say


@app.command()
def demo(workspace: Folder = Path(), as_json: Json = False) -> None:
    """Walk the whole story on simulated cells, without Prefect."""
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
    import json

    told = {}
    for step in jobs.story_steps(str(workspace)):
        told[step.name] = step.job(str(workspace), **step.arguments)
    path = Path(jobs.tell(str(workspace), told=told))
    show(path, json.loads(path.read_text()), as_json)


def show(path: Path, told: dict[str, object], as_json: bool) -> None:
    """Print the last screen of a story."""
    from rich.console import Console

    if as_json:
        say(told, "", as_json)
    else:
        Console().print(jobs.last_screen(str(path.parent.parent)))


def run_flow(name: str) -> None:
    """Run `module:flow` in a child whose environment is settled before Prefect is imported."""
    from endoprint.workspace import Workspace

    here = Workspace.at(".")
    module, _, function = name.partition(":")
    code = f"from {module} import {function}; from endoprint.cli.story import show_story; "
    code += f"show_story({function}('.'))"
    command = [sys.executable, "-c", code]
    sys.exit(subprocess.run(command, env=here.environment(), check=False).returncode)


def show_story(path: str) -> None:
    """Print the last screen of the story whose `story.json` is at `path`."""
    import json

    show(Path(path), json.loads(Path(path).read_text()), as_json=False)
