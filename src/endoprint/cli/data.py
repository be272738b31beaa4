"""Commands on bytes: init, simulate, check, curate, audit, split, tokenize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from endoprint import jobs
from endoprint.cli import Folder, Json, app, say
from endoprint.config import Refusal


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="your cells: h5ad, 10x .h5 or zarr")],
    folder: Annotated[Path, typer.Argument(help="the workspace to make")],
    task: Annotated[str, typer.Option(help="what is asked of the data; default: proposed")] = "",
    as_json: Json = False,
) -> None:
    """Look at a file, propose its keys, write a workspace, and say what to check."""
    made = jobs.init(file=str(file), folder=str(folder), task=task)
    lines = [f"workspace written: {folder}", "check, in params.yaml:"]
    lines += [f"  - {sentence}" for sentence in made["check"]]
    lines += ["then:", f"  endoprint run --workspace {folder}"]
    say(made, "\n".join(lines), as_json)


@app.command()
def simulate(
    out: Annotated[Path | None, typer.Argument(help="h5ad; none: the workspace's")] = None,
    cells: Annotated[int | None, typer.Option(help="labelled cells")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    genes: Annotated[int | None, typer.Option(help="genes measured")] = None,
    confounding: Annotated[
        str, typer.Option(help="of run with exposure: none | partial | complete")
    ] = "none",
    difficulty: Annotated[str, typer.Option(help="easy | middle | hard")] = "easy",
    as_published: Annotated[
        bool, typer.Option("--as-published", help="with the source atlas's flaws")
    ] = False,
    replicates: Annotated[int | None, typer.Option(help="units per line")] = None,
    lines: Annotated[int | None, typer.Option(help="cell lines")] = None,
    pool: Annotated[Path | None, typer.Option(help="h5ad of unlabelled cells to write")] = None,
    new: Annotated[Path | None, typer.Option(help="h5ad of new, unlabelled samples")] = None,
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Simulate a neural-organoid hormone atlas whose truth is known."""
    if out is None:
        made = {"out": jobs.simulate(str(workspace))}
    else:
        chosen = {
            "cells": cells,
            "genes": genes,
            "confounding": confounding,
            "difficulty": difficulty,
            "as_published": as_published,
            "replicates": replicates,
            "lines": lines,
        }
        values = {name: value for name, value in chosen.items() if value is not None}
        made = jobs.simulate_to(
            values, seed=seed, out=str(out), pool=str(pool or ""), new=str(new or "")
        )
    say(made, "\n".join(f"{name}: {path}" for name, path in made.items()), as_json)


@app.command()
def check(workspace: Folder = Path(), as_json: Json = False) -> None:
    """Look at the workspace's source file and say whether it can be used."""
    _say_file(jobs.check(str(workspace)), as_json)


@app.command()
def curate(workspace: Folder = Path(), as_json: Json = False) -> None:
    """Curate the workspace's cells: Ensembl ids, quality thresholds, removals by reason."""
    _say_file(jobs.curate(str(workspace)), as_json)


@app.command()
def audit(
    file: Annotated[Path | None, typer.Argument(help="an h5ad; none: the workspace's")] = None,
    exposure: Annotated[str, typer.Option(help="obs column of the exposure")] = "",
    unit: Annotated[list[str] | None, typer.Option(help="obs column of the unit; repeat")] = None,
    batch: Annotated[str, typer.Option(help="obs column of the technical run")] = "",
    control: Annotated[str, typer.Option(help="the vehicle; default: found among labels")] = "",
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Say what is confounded with what, and whether exposures are replicated (JSON)."""
    if file is None:
        _say_file(jobs.audit(str(workspace)), as_json=True)
        return
    if not exposure:
        raise Refusal(
            "a file is audited by its own columns", "no --exposure", "name the one of the exposure"
        )
    found = jobs.audit_file(
        str(file), exposure=exposure, units=unit or [], batch=batch, control=control
    )
    typer.echo(json.dumps(found, indent=1))


@app.command()
def split(workspace: Folder = Path(), as_json: Json = False) -> None:
    """Divide whole units into test, development folds and validation."""
    _say_file(jobs.split(str(workspace)), as_json)


@app.command()
def tokenize(
    file: Annotated[Path | None, typer.Argument(help="an h5ad; none: the workspace's")] = None,
    out: Annotated[Path | None, typer.Argument(help="parquet to write")] = None,
    vocabulary: Annotated[str, typer.Option(help="v1 | v2 | a folder or JSON")] = "v2",
    dictionaries: Annotated[
        Path | None, typer.Option(help="folder of the official dictionaries; none: fetched")
    ] = None,
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Rank the genes of every cell into tokens (cell_id, tokens, n_tokens; input order)."""
    if file is None:
        _say_file(jobs.tokenise(str(workspace)), as_json)
        return
    if out is None:
        raise Refusal("a file is tokenised into another", "no OUT", "name the parquet to write")
    made = jobs.tokenize_file(
        str(file), out=str(out), vocabulary=vocabulary, dictionaries=str(dictionaries or "")
    )
    say(made, f"{made['n_cells']} cells: {made['tokens']}", as_json)


def _say_file(path: str, as_json: bool) -> None:
    text = Path(path).read_text()
    say(json.loads(text), f"{path}\n{text}" if len(text) < 4000 else path, as_json)
