"""Commands that score: score, score-inbox, evaluate-scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from endoprint import jobs
from endoprint.cli import Folder, Json, app, say

MODEL_HELP = "models:/NAME@champion (default) or /VERSION"


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="cells: h5ad, zarr, 10x; a folder, a 'pattern*'")],
    out_dir: Annotated[Path, typer.Argument(help="folder for scores.parquet and report.html")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "",
    by: Annotated[str, typer.Option(help="column of obs whose populations are called")] = "sample",
    control: Annotated[
        str, typer.Option(help="populations that met the vehicle only, a,b: projects the others")
    ] = "",
    annotate: Annotated[str, typer.Option(help="h5ad to write: the cells and their scores")] = "",
    workers: Annotated[int, typer.Option(min=1, help="processes on this job")] = 1,
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Say of every cell what it was exposed to; killed, the same command does what is left."""
    # typed paths are from here, whichever workspace is meant
    written = jobs.score(
        str(workspace),
        file=str(file.absolute()),
        out=str(out_dir.absolute()),
        model=model,
        by=by,
        control=control,
        annotate=str(Path(annotate).absolute()) if annotate else "",
        workers=workers,
    )
    path = Path(written)
    summary = json.loads(path.read_text())
    samples = json.loads(path.with_name("samples.json").read_text())
    lines = jobs.stops(str(workspace))  # what the training data forbid stands before any call
    lines += [sample["sentence"] for sample in samples.values()]
    reasons = summary["quarantined"].items()
    lines += [f"{n} cells set aside, with a row each: {reason}" for reason, n in reasons]
    say(summary, "\n".join([*lines, f"{summary['n_cells']} cells scored: {out_dir}"]), as_json)


@app.command("score-inbox")
def score_inbox(
    inbox: Annotated[Path, typer.Argument(help="folder into which files of cells fall")],
    out_dir: Annotated[Path, typer.Argument(help="each file's scores go into a folder below")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "",
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Score each new file of a folder once, in order; files still being copied wait."""
    done = jobs.score_inbox(
        str(workspace), inbox=str(inbox.absolute()), out=str(out_dir.absolute()), model=model
    )
    lines = [f"scored {name}" for name in done["scored"]]
    for state in ("waiting", "refused"):
        lines += [f"{state} {name}: {why}" for name, why in done[state].items()]
    say(done, "\n".join(lines) or "nothing new", as_json)


@app.command("evaluate-scores")
def evaluate_scores(
    scores: Annotated[Path, typer.Argument(help="scores.parquet, or its folder")],
    labels: Annotated[Path, typer.Argument(help="CSV, parquet or h5ad: cell_id and exposure")],
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Join labels that came late by cell id, and say how right the scores were."""
    found = jobs.evaluate_scores(
        str(workspace), scores=str(scores.absolute()), labels=str(labels.absolute())
    )
    shown = found["accuracy_of_shown"]
    lines = [
        f"{found['n_judged']} of {found['n_scored']} scored cells judged, "
        f"{len(found['by_unit'])} units",
        f"macro-F1 {found['macro_f1']:.3f}, accuracy {found['accuracy']:.3f}",
        f"calls shown: {found['share_shown']:.0%} of cells"
        + (f", accuracy {shown:.3f}" if shown is not None else ""),
    ]
    lines += [
        f"  unit {unit or '?'}: macro-F1 {row['macro_f1']:.3f}, {row['n_cells']} cells"
        for unit, row in found["by_unit"].items()
    ]
    if found["n_labels_without_score"]:
        lines.append(f"{found['n_labels_without_score']} labels of cells that were not scored")
    for name, n in found["unknown_exposures"].items():
        lines.append(f"{n} cells of {name}, which the model does not know: not judged")
    say(found, "\n".join(lines), as_json)
