"""The last screen of a story: who leads, who went live and why, where things are, what next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from endoprint.report.board import Board, counted, sentence, verdict
from endoprint.report.leaderboard import (
    WIDTH,
    few_units,
    leaderboard_table,
    note_lines,
    table_notes,
)

MOST_SAMPLES = 6  # sentences shown; the report holds them all
OUTCOMES = {
    "promote": ("green", "went live"),
    "hold": ("yellow", "was held"),
    "reject": ("red", "was rejected"),
}


@dataclass(frozen=True)
class Outcome:
    """What became of the version judged last, and what now answers."""

    decision: str  # promote | hold | reject
    version: str  # as people say it: "version 1 (geneformer)"
    reasons: Sequence[str]
    champion: str = ""  # empty: nothing is live


def story_screen(
    board: Board,
    outcome: Outcome,
    *,
    places: Mapping[str, str],
    next_commands: Sequence[tuple[str, str]],
    n_scored: int = 0,
    samples: Sequence[str] = (),
    minutes: float | None = None,
) -> RenderableType:
    """Draw the last screen, at most 100 columns wide.

    `places`: what -> where it lies. `next_commands`: (command, what it does). `samples`: one
    sentence per scored sample.
    """
    parts: list[RenderableType] = [
        _rule("What the experiment allows"),
        *note_lines(verdict(board)),
    ]
    parts += [_rule("Leaderboard"), Text(sentence(board), style="bold"), Text()]
    parts += [leaderboard_table(board), *table_notes(board), *few_units(board)]
    parts += [_rule("Registry"), *_outcome(outcome)]
    if n_scored:
        parts += [_rule(f"Scored: {counted(n_scored, 'new cell')}"), *_samples(samples)]
    parts += [_rule("Where things are"), _pairs(places.items(), style="")]
    took = f" (this took {minutes:.1f} minutes)" if minutes is not None else ""
    parts += [_rule(f"Next{took}"), _pairs(next_commands, style="bold cyan"), Text()]
    return Constrain(Group(*parts), WIDTH)


def _rule(title: str) -> RenderableType:
    return Group(Text(), Rule(Text(title, style="bold"), align="left", style="dim"))


def _outcome(outcome: Outcome) -> list[RenderableType]:
    colour, word = OUTCOMES.get(outcome.decision, ("", outcome.decision))
    lines: list[RenderableType] = [
        Text.assemble((outcome.version, "bold"), " ", (word, f"bold {colour}"), ", because:")
    ]
    grid = Table.grid(padding=(0, 1))
    for reason in outcome.reasons:
        grid.add_row("  -", Text(reason))
    lines.append(grid)
    if outcome.decision != "promote":
        live = f"{outcome.champion} stays champion." if outcome.champion else "Nothing is live."
        lines.append(Text(live))
    return lines


def _samples(samples: Sequence[str]) -> list[RenderableType]:
    grid = Table.grid(padding=(0, 1))
    for said in samples[:MOST_SAMPLES]:
        grid.add_row("  -", Text(said))
    if len(samples) > MOST_SAMPLES:
        grid.add_row("", Text(f"and {len(samples) - MOST_SAMPLES} more in the report", "dim"))
    return [grid]


def _pairs(pairs: Iterable[tuple[str, str]], *, style: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for first, second in pairs:
        grid.add_row(Text(f"  {first}", style=style), Text(second))
    return grid
