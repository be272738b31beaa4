"""What MLflow's UI shows of a task and of a run: Markdown, the figure that matters first."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from endoprint.report.board import Board, counted, plain, sentence, verdict

MARKS = {"stop": "**Stop.** ", "mind": "Mind: ", "fine": ""}
COLUMNS = {
    "macro_f1": "macro-F1",
    "worst_unit_macro_f1": "worst unit",
    "auroc_macro": "AUROC",
    "ece": "ECE",
    "fit_seconds": "fit (s)",
}
BEST_FIRST = {  # as MLflow's UI keeps a view that people share (seen in 3.17)
    "searchFilter": "tags.kind = 'train'",
    "orderByKey": "metrics.`macro_f1`",
    "orderByAsc": False,
    "selectedColumns": [
        "attributes.`Created`", "metrics.`auroc_macro`", "metrics.`ece`", "metrics.`macro_f1`",
        "metrics.`worst_unit_macro_f1`",
    ],
}  # fmt: skip


def described(board: Board) -> str:
    """Return the description of a leaderboard: figure, design, then every model."""
    known = [name for name in COLUMNS if name in board.ranked]
    lines = [
        _first(board),
        "",
        sentence(board),
        "",
        *(f"- {MARKS[note.weight]}{note.text}" for note in verdict(board)),
        "",
        "| model | " + " | ".join(COLUMNS[name] for name in known) + " | against the bar |",
        "|---|" + "---:|" * len(known) + "---|",
    ]
    for name, row in board.ranked.iterrows():
        figures = " | ".join(_said(row[column]) for column in known)
        lines.append(f"| {_cell(name)} | {figures} | {board.told_apart(str(name))} |")
    return "\n".join(lines)


def headline(board: Board, *, experiment: str, run_id: str, versions: str) -> dict[str, str]:
    """Return the task's tags: its best figure, where to go from there, and the table of models.

    `experiment`: its id; `run_id`: the leaderboard's; `versions`: the registered model's name.
    """
    runs, page = f"#/experiments/{experiment}/runs", "workflowType=machine_learning"
    ways = {  # unless told, MLflow's UI shows what is of use to language models
        "leaderboard": f"{runs}/{run_id}/artifacts/leaderboard.html?{page}",
        "models, best first": f"{runs}?{page}&viewStateShareKey=models",
        "versions": f"#/models/{versions}?{page}",
    }
    links = " · ".join(f"[{name}]({way})" for name, way in ways.items())
    return {
        "mlflow.note.content": f"{_first(board)} {links}",
        "mlflow.sharedViewState.models": json.dumps(BEST_FIRST),
    }


def fitted(
    metrics: Mapping[str, float], by_unit: Mapping[str, float], *, part: str = "unit"
) -> str:
    """Return the description of a model's run: its figure, then that of every held-out unit.

    `part`: what is held out, one word: a unit, or a part that is technical only.
    """
    known = {name: metrics[name] for name in COLUMNS if plain(metrics.get(name)) is not None}
    figure = known.pop("macro_f1", None)
    said = "no macro-F1" if figure is None else f"macro-F1 {figure:.3f}"
    known.pop("worst_unit_macro_f1", None)  # the table has it
    seconds = known.pop("fit_seconds", None)
    rest = "".join(f", {COLUMNS[name]} {_said(value)}" for name, value in known.items())
    rest += "" if seconds is None else f", {_said(seconds)} s a fit"
    lines = [
        f"**{said}** on {counted(len(by_unit), f'held-out development {part}')}{rest}.",
        "",
        f"Each {part} was judged by a fit that never saw it; the test units stayed shut.",
        "",
        f"| {part} | macro-F1 |",
        "|---|---:|",
        *(f"| {_cell(name)} | {_said(value)} |" for name, value in by_unit.items()),
    ]
    return "\n".join(lines)


def _first(board: Board) -> str:
    best = plain(board.ranked["macro_f1"].iloc[0])
    figure = "no macro-F1" if best is None else f"macro-F1 {best:.3f}"
    return (
        f"**{figure}**, {board.leader}, on held-out development {board.part}s of `{board.task}`."
    )


def _cell(name: object) -> str:
    """Return a name that a table of Markdown holds: units are called `line|replicate`."""
    return str(name).replace("|", "\\|")


def _said(value: object) -> str:
    found = plain(value)
    if not isinstance(found, float) or math.isnan(found):
        return "" if found is None else str(found)
    return f"{found:.3f}" if found < 10 else f"{found:.0f}"
