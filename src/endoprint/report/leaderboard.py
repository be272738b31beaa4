"""The leaderboard on a terminal and as a page: what the design allows first, figures after."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from io import StringIO
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from endoprint.breakdown import breakdown
from endoprint.paired import FEWEST_FOR_INTERVAL
from endoprint.report import curves, figures, page
from endoprint.report.board import Board, counted, plain, sentence, verdict
from endoprint.report.page import WORDS, Note

WIDTH = 100  # columns: no screen this project draws is wider
LONGEST_NOTE = 330  # letters: four lines; an audit of 15 exposures can run to fifteen
REST = " … (the rest: endoprint audit)"
COLOURS = {"stop": "bold red", "mind": "yellow", "fine": "green"}


def seconds(value: float) -> str:
    """Write a duration in seconds with the digits that matter."""
    return f"{value:.3f}" if value < 0.1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _three(value: float) -> str:
    return f"{value:.3f}"


# column of the table -> head on the terminal, head on the page, how it is written
COLUMNS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "balanced_accuracy": ("bal.\nacc.", "balanced accuracy", _three),
    "auroc_macro": ("AUROC", "AUROC", _three),
    "ece": ("ECE", "ECE", _three),
    "worst_unit_macro_f1": ("worst\n{part}", "worst {part}", _three),
    "shuffled_macro_f1": ("shuffled\nlabels", "shuffled labels", _three),
    "fit_seconds": ("fit\ns", "fit, s", seconds),
    "score_seconds_per_1000_cells": ("score\ns/1000", "s per 1,000 cells", seconds),
}


def leaderboard(board: Board) -> RenderableType:
    """Draw the leaderboard for a terminal of 100 columns."""
    parts = [
        *note_lines(verdict(board)),
        Text(),
        Text(sentence(board), style="bold"),
        Text(),
        leaderboard_table(board),
        *table_notes(board),
        *few_units(board),
    ]
    return Constrain(Group(*parts), WIDTH)


def leaderboard_table(board: Board) -> Table:
    """Draw every model's figures, best first; figures nobody has are left out."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    # Text: square brackets would be read as markup
    table.add_column("model", overflow="fold", min_width=min(_longest(board), 24))
    table.add_column(Text(f"macro-F1\n[{spread_name(board)}]"), no_wrap=True)
    known = known_columns(board)
    for column in known:
        table.add_column(COLUMNS[column][0].format(part=board.part), justify="right", no_wrap=True)
    table.add_column(Text(f"against\n{board.bar}"), justify="right", no_wrap=True)
    for name, row in board.ranked.iterrows():
        model = str(name)
        table.add_row(
            Text(model, style="bold" if model == board.leader else ""),
            _score(board, model, float(row["macro_f1"])),
            *(_cell(row[column], COLUMNS[column][2]) for column in known),
            _bar_cell(board, model),
        )
    return table


def table_notes(board: Board) -> list[RenderableType]:
    """Draw what stands under the table."""
    return [Text(line, style="dim") for line in label_lines(board)]


def label_lines(board: Board) -> list[str]:
    """Say of each model what its name does not, such as whose pre-training it starts from."""
    return [f"{name}: {board.labels[name]}" for name in board.ranked.index if name in board.labels]


def few_units(board: Board) -> list[RenderableType]:
    """Draw every unit's macro-F1 where units are too few for an interval (judging rule 1)."""
    if not 0 < len(board.by_unit) < FEWEST_FOR_INTERVAL:
        return []
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"macro-F1 by held-out {board.part}", overflow="fold")
    for unit in board.by_unit.index:  # few, while models may be many
        table.add_column(Text(str(unit)), justify="right", overflow="fold")
    for model in map(str, board.ranked.index):
        if model in board.by_unit:
            table.add_row(Text(model), *(_cell(each, _three) for each in board.by_unit[model]))
    return [Text(), table]


def spread_name(board: Board) -> str:
    """Say what the brackets behind a macro-F1 hold."""
    is_interval = any(
        len(board.by_unit[name].dropna()) >= FEWEST_FOR_INTERVAL for name in board.by_unit
    )
    if board.has_units and is_interval:
        return "≈95 % interval"
    return "range of units" if board.has_units else "range of parts"


def known_columns(board: Board) -> list[str]:
    """Return those of `COLUMNS` that at least one model has a figure for."""
    return [name for name in COLUMNS if name in board.table and board.table[name].notna().any()]


def note_lines(notes: list[Note]) -> list[RenderableType]:
    """Draw each note with its weight in a word, and in colour for who sees it."""
    lines: list[RenderableType] = []
    for note in notes:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=4)
        grid.add_column()
        said = textwrap.shorten(note.text, LONGEST_NOTE, placeholder=REST)
        grid.add_row(Text(WORDS[note.weight], style=COLOURS[note.weight]), Text(said))
        lines.append(grid)
    return lines


def to_text(renderable: RenderableType, *, width: int = WIDTH) -> str:
    """Return what a terminal would show, without colours."""
    stream = StringIO()
    Console(file=stream, width=width, color_system=None, _environ={}).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _longest(board: Board) -> int:
    return max(len(str(name)) for name in board.table.index)


def _cell(value: Any, write: Callable[[float], str]) -> str:
    number = float("nan") if value is None else float(value)
    return write(number) if math.isfinite(number) else "–"


def _score(board: Board, model: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    spread = board.spread(model)
    return f"{value:.3f}" + (f" [{spread[0]:.2f}–{spread[1]:.2f}]" if spread else "")


def _bar_cell(board: Board, model: str) -> str:
    if model == board.bar:
        return "the bar"
    found = board.against_bar(model)
    if found is None:
        return "–"
    n_ahead = sum(value > 0 for value in found.units.values())
    return f"{found.difference:+.3f} ({n_ahead}/{found.n_units})"


# -- the page -----------------------------------------------------------------------------------
def leaderboard_page(
    board: Board,
    *,
    predictions: Mapping[str, pd.DataFrame] | None = None,
    control: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    vectors: pd.DataFrame | None = None,
) -> str:
    """Return the leaderboard as one self-contained HTML page.

    `predictions`: model -> cross-fitted predictions (index cell id; `unit`, `truth`,
    `p_<exposure>`); the leader's and the bar's are drawn. `provenance`: what the figures rest on.
    `vectors`: index cell id, where cells lie in a latent; the leader's calls are mapped on them.
    """
    blocks = [
        page.notes(verdict(board)),
        page.paragraph(sentence(board), kind="lead"),
        page.table(_page_table(board), left=("model", f"over {board.part}s"), first=True),
        *(page.paragraph(line) for line in label_lines(board)),
        page.paragraph(_legend(board), kind="soft"),
        *_comparison_figures(board),
    ]
    drawn = predictions or {}
    for model in dict.fromkeys([board.leader, board.bar]):
        if model in drawn and len(drawn[model]):
            blocks += _model_figures(board, model, drawn[model], control)
            if vectors is not None and model == board.leader:
                blocks.append(_map(model, drawn[model], vectors, control))
            blocks.append(_breakdown_table(drawn[model]))
    f1 = _f1_table(board)
    if f1 is not None:
        blocks += [page.heading("F1 of every exposure"), page.table(f1, left=("exposure",))]
    if provenance:
        blocks += [page.heading("What this rests on"), page.facts(provenance)]
    return page.document(f"Leaderboard: {board.task}", blocks)


def _page_table(board: Board) -> pd.DataFrame:
    rows = []
    known = [(column, COLUMNS[column]) for column in known_columns(board)]
    for name, row in board.ranked.iterrows():
        model = str(name)
        rows.append(
            {
                "model": model,
                f"macro-F1 [{spread_name(board)}]": _score(board, model, float(row["macro_f1"])),
                **{
                    head.format(part=board.part): _cell(row[column], write)
                    for column, (_, head, write) in known
                },
                f"against {board.bar}": _bar_cell(board, model),
                f"over {board.part}s": board.told_apart(model),
            }
        )
    return pd.DataFrame(rows)


def _legend(board: Board) -> str:
    n = f"{board.n_exposures} " if board.n_exposures else ""
    return (
        f"Macro-F1: the mean F1 over {n}exposures, all judged cells together; 1 is perfect; in "
        f"brackets, over the {board.part}s' own. ECE: how far stated confidence is from the share "
        "of right calls. Shuffled labels: the same model fitted after exposures were permuted "
        f"among a unit's samples; what is left is not biology. Against {board.bar}: the mean "
        f"difference over {board.part}s, and in how many it is positive."
    )


def _comparison_figures(board: Board) -> list[str]:
    blocks = []
    if len(board.by_unit) and board.by_unit.notna().to_numpy().any():
        order = [name for name in board.ranked.index if name in board.by_unit]
        figure = figures.per_unit(
            board.by_unit[order],
            chance=_chance(board),
            part=board.part,
        )
        blocks += [
            page.heading(f"Every held-out {board.part}"),
            page.picture(figure, alt=f"macro-F1 of every model on every held-out {board.part}"),
        ]
    cost = next(
        (
            name
            for name in ("score_seconds_per_1000_cells", "fit_seconds")
            if name in known_columns(board)
        ),
        None,
    )
    if cost and len(board.table) > 1:
        figure = figures.cost_quality(board.table, cost=cost)
        alt = f"macro-F1 of every model against its {cost.replace('_', ' ')}"
        blocks += [page.heading("Cost beside quality"), page.picture(figure, alt=alt)]
    return blocks


def _chance(board: Board) -> float | None:
    """Return what blind guessing would reach, as the judge says or as equal exposures make it."""
    if "chance" in board.table:
        return plain(board.ranked["chance"].iloc[0])  # type: ignore[no-any-return]
    return 1 / board.n_exposures if board.n_exposures else None


def _model_figures(
    board: Board, model: str, predictions: pd.DataFrame, control: str | None
) -> list[str]:
    n = counted(len(predictions), "cell")
    said = f"{n}, each judged by a fit that never saw its {board.part}"
    return [
        page.heading(model),
        page.picture(
            figures.confusion(predictions), alt=f"confusion matrix of {model}", caption=said
        ),
        page.picture(
            figures.roc(predictions, control=control),
            alt=f"ROC curves of {model}, every exposure against the rest",
        ),
        page.picture(
            curves.precision_recall(predictions, control=control),
            alt=f"precision against recall of {model}, every exposure against the rest",
        ),
        page.picture(
            figures.reliability(predictions), alt=f"confidence against correctness of {model}"
        ),
    ]


def _map(model: str, predictions: pd.DataFrame, vectors: pd.DataFrame, control: str | None) -> str:
    return page.picture(
        curves.map_of_calls(predictions, curves.lay_out(vectors), control=control),
        alt=f"map of cells by what {model} called them",
        caption="UMAP of the first principal components. A picture: it was laid "
        "out on the very cells shown, and no model saw it.",
    )


def _breakdown_table(predictions: pd.DataFrame) -> str:
    """Return a model's figures by exposure, pathway, direction, cell type and unit, folded."""
    table = breakdown(predictions).rename(
        columns={"n_cells": "cells", "n_units": "units", "pr_auc": "PR-AUC", "auroc": "AUROC"}
    )
    table = table.rename(columns={"f1": "F1", "worst_unit": "worst unit's F1"})
    return page.folded(
        "By exposure, pathway, direction, cell type and unit",
        page.table(table, left=("by", "group")),
    )


def _f1_table(board: Board) -> pd.DataFrame | None:
    names = [name for name in board.table.columns if str(name).startswith("f1_")]
    if not names:
        return None
    f1 = board.ranked[names].astype(float).T
    f1.insert(0, "exposure", [str(name).removeprefix("f1_") for name in names])
    return f1
