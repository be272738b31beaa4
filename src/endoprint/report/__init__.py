"""What people read: figures, the leaderboard, the scoring report, the model card, the last screen.

Knows no tracking store and draws with matplotlib's objects, never its global state. Tables go in;
figures, HTML, markdown and terminal text come out.
"""

from endoprint.report.board import Board, design_notes, sentence, verdict
from endoprint.report.card import model_card, origins
from endoprint.report.curves import lay_out, map_of_calls, precision_recall
from endoprint.report.described import described, fitted, headline
from endoprint.report.figures import (
    call_shares,
    confusion,
    cost_quality,
    pareto,
    per_unit,
    reliability,
    roc,
)
from endoprint.report.ink import png
from endoprint.report.leaderboard import leaderboard, leaderboard_page, to_text
from endoprint.report.scores import scores_page
from endoprint.report.story import Outcome, story_screen
from endoprint.report.study import (
    described_search,
    search_front,
    search_history,
    search_importance,
    search_slices,
)

__all__ = [
    "Board",
    "Outcome",
    "call_shares",
    "confusion",
    "cost_quality",
    "described",
    "described_search",
    "design_notes",
    "fitted",
    "headline",
    "lay_out",
    "leaderboard",
    "leaderboard_page",
    "map_of_calls",
    "model_card",
    "origins",
    "pareto",
    "per_unit",
    "png",
    "precision_recall",
    "reliability",
    "roc",
    "scores_page",
    "search_front",
    "search_history",
    "search_importance",
    "search_slices",
    "sentence",
    "story_screen",
    "to_text",
    "verdict",
]
