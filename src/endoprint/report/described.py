"""What MLflow's UI shows on a leaderboard's run: Markdown, the figure that matters first."""

from __future__ import annotations

import math

from endoprint.report.board import Board, plain, sentence, verdict

MARKS = {"stop": "**Stop.** ", "mind": "Mind: ", "fine": ""}
COLUMNS = {
    "macro_f1": "macro-F1",
    "worst_unit_macro_f1": "worst unit",
    "auroc_macro": "AUROC",
    "ece": "ECE",
    "fit_seconds": "fit, s",
}


def described(board: Board) -> str:
    """Return the description of a leaderboard: figure, design, then every model."""
    best = plain(board.ranked["macro_f1"].iloc[0])
    figure = "no macro-F1" if best is None else f"macro-F1 {best:.3f}"
    known = [name for name in COLUMNS if name in board.ranked]
    lines = [
        f"**{figure}**, {board.leader}, on held-out development {board.part}s of `{board.task}`.",
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
        lines.append(f"| {name} | {figures} | {board.told_apart(str(name))} |")
    return "\n".join(lines)


def _said(value: object) -> str:
    found = plain(value)
    if not isinstance(found, float) or math.isnan(found):
        return "" if found is None else str(found)
    return f"{found:.3f}" if found < 10 else f"{found:.0f}"
