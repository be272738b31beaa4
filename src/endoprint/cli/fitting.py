"""Commands that fit and compare: pretrain, search, train, models, leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from endoprint import jobs
from endoprint.cli import Folder, Json, app, say, show


@app.command()
def pretrain(
    start: Annotated[
        str,
        typer.Option(help="go on from a folder, a registered backbone, or a name such as V2-104M"),
    ] = "",
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Pre-train a small Geneformer by masked learning on the pool of unlabelled cells."""
    here = str(Path(start).resolve()) if start and Path(start).is_dir() else start
    run = jobs.pretrain(str(workspace), start=here)
    if not run:  # one of a team's processes, whose lead says what there is to say
        return
    made = jobs.backbone_of(str(workspace), run)
    text = f"{made['label']}\nregistered; run {run}"
    if start:  # without, a fit finds the backbone of today's pool and values by itself
        text += f"\nto fit on it, in params.yaml:\ncheckpoint: {made['address']}"
    say({"run_id": run, "checkpoint": made["address"]}, text, as_json)


@app.command()
def backbones(workspace: Folder = Path(), as_json: Json = False) -> None:
    """List the backbones pre-trained here: address, what it is, vocabulary, units it has seen."""
    found = jobs.backbones(str(workspace))
    lines = [
        f"{each['address']}  {each['label']}\n  made {each['made']}, run {each['run_id']}"
        f"\n  weights {each['weights_sha256'][:12]}, vocabulary {each['vocabulary_sha256'][:12]}"
        f"\n  units seen: {', '.join(each['units']) or 'none told'}"
        for each in found
    ]
    text = "\n".join(lines) or "no backbone registered yet: run `endoprint pretrain`"
    say({"backbones": found}, text, as_json)


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="a row of `endoprint models`, or all")],
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="earlier runs' included; none: as params.yaml says"),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="time of fitting, earlier runs' included: 2h, 90m, 1h30m")
    ] = "",
    target: Annotated[float, typer.Option(help="stop at this macro-F1, such as 0.9")] = 0.0,
    objective: Annotated[
        str, typer.Option(help="quality, or quality-cost: macro-F1 and processor seconds")
    ] = "",
    workers: Annotated[int, typer.Option(min=1, help="processes on the one study")] = 1,
    offer: Annotated[
        bool, typer.Option("--offer", help="refit the winner, judge it, make it @candidate")
    ] = False,
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Tune a model on development units; prints the winner as a diff of params.yaml.

    It ends at whichever limit comes first, and goes on from where an earlier run was stopped.
    `all` tunes the whole field under one budget, so that tuned models are compared.
    """
    folder = str(workspace)
    if model == "all":
        jobs.refuse_more_than_a_budget(trials, target, objective, workers > 1, offer)
        run = jobs.search_all(folder, budget=budget)
        result = jobs.search_all_result(folder, run)
    else:
        run = jobs.search(
            folder, model=model, trials=trials or 0, budget=budget, target=target,
            objective=objective, workers=workers,
        )  # fmt: skip
        result = jobs.search_result(folder, model=model, objective=objective or "quality")
    if offer:
        offered = jobs.offer(folder, model=model, objective=objective)
        result = result | offered | {"text": f"{result['text']}\n{offered['said']}"}
    say({"run_id": run} | result, result["text"], as_json)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="a row of `endoprint models`")],
    tuned: Annotated[bool, typer.Option("--tuned", help="with its search's winner")] = False,
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Fit one model: judged on held-out development units, then fitted on all of them."""
    run = jobs.train(str(workspace), model=model, tuned="yes" if tuned else "")
    if not run:  # one of a team's processes, whose lead says what there is to say
        return
    figures = jobs.figures_of(str(workspace), run)
    stops = jobs.stops(str(workspace))
    part = "parts" if stops and stops[0].startswith("replicated: false") else "units"
    text = f"{model}: macro-F1 {figures['macro_f1']:.3f} on held-out development {part}; run {run}"
    say({"run_id": run, "metrics": figures, "stops": stops}, "\n".join([*stops, text]), as_json)


@app.command()
def models(as_json: Json = False) -> None:
    """List the table of models: what each is, costs, needs, and whom to cite."""
    from dataclasses import asdict

    from endoprint.table import TABLE

    rows = {name: asdict(row) for name, row in TABLE.items()}
    lines = [
        f"{name}\n  {row.line}\n  cost: {row.cost} · licence: {row.licence} · cite: {row.citation}"
        f"\n  needs: {row.needs}"
        for name, row in TABLE.items()
    ]
    say(rows, "\n".join(lines), as_json)


@app.command()
def leaderboard(
    controls: Annotated[
        str, typer.Option(help="all: negative controls of every model, not the first two's alone")
    ] = "",
    by: Annotated[
        str, typer.Option(help="line or batch: refit the field with whole ones held out")
    ] = "",
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Compare the latest fit of every model on the same held-out development units."""
    if by:
        path = Path(jobs.leaderboard_by(str(workspace), by=by))
    else:
        path = Path(jobs.leaderboard(str(workspace), controls=controls))
    if as_json:
        typer.echo(path.read_text())
    else:
        show(jobs.leaderboard_screen(str(workspace), by=by))


@app.command()
def novelty(
    model: Annotated[str, typer.Argument(help="a fitted model")] = "logistic",
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Leave every exposure out of a model in turn, and say whether a stranger is noticed."""
    run = jobs.strangers(str(workspace), model=model)
    found = jobs.strangers_of(str(workspace), run)
    lines = [
        f"{row['exposure']}: novelty AUROC {row['novelty_auroc']:.3f}; from control, when known, "
        f"{row['separability_auroc']:.3f}; found {row['found_rate']:.0%}, "
        f"false alarms {row['false_novel_rate']:.0%}"
        for row in found
    ]
    say({"run_id": run, "exposures": found}, "\n".join([*lines, f"run {run}"]), as_json)
