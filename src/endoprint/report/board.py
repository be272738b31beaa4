"""Who leads, and what the design allows to be said of it.

Knows no tracking store: a `Board` is plain tables, written to JSON and read back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import pandas as pd

from endoprint.config import Refusal
from endoprint.paired import FEWEST_FOR_INTERVAL, Comparison, compare_units, holm, interval
from endoprint.report.page import Note

UNITS = ("unit", "line")  # schemes that hold out what is biologically independent


@dataclass(frozen=True)
class Board:
    """Every model of one task, judged on the same units.

    `table`: index model names; columns the metric names every run logs (`macro_f1`,
    `balanced_accuracy`, `auroc_macro`, `ece`, `worst_unit_macro_f1`, `fit_seconds`, ...) and
    `shuffled_macro_f1`, the same model fitted on shuffled labels; any may be absent or NaN.
    `by_unit`: macro-F1, index held-out units, columns models.
    `audit`: the design's, as in data/design/audit.json. `bar`: the model that others must beat.
    `scheme`: what is held out whole, as `Split.scheme`; unless told, what the audit has.
    `labels`: what a model's name does not say, such as whose pre-training it starts from.
    `flags`: further caveats, one sentence each, shown with the design's.
    """

    task: str
    table: pd.DataFrame
    by_unit: pd.DataFrame
    audit: Mapping[str, Any] = field(default_factory=dict)
    bar: str = "logistic"
    n_exposures: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    scheme: str = ""

    def __post_init__(self) -> None:
        if "macro_f1" not in self.table or not len(self.table):
            raise Refusal(
                "a leaderboard ranks models by macro_f1",
                "no judged model" if not len(self.table) else "no such column",
                "run `endoprint train MODEL` first",
            )

    @property
    def ranked(self) -> pd.DataFrame:
        """The table, best first; what could not be judged stands last."""
        table = self.table.assign(macro_f1=self.table["macro_f1"].astype(float))  # null from JSON
        return table.sort_values("macro_f1", ascending=False, kind="stable")

    @property
    def part(self) -> str:
        """What is held out: a unit, a line, or a part that is technical only."""
        scheme = self.scheme or ("unit" if self.audit.get("units", True) else "technical_fold")
        return scheme if scheme in UNITS else "part"

    @property
    def has_units(self) -> bool:
        """Whether what is held out is biologically independent."""
        return self.part in UNITS

    @property
    def n_units(self) -> int:
        """How many independent units were judged on: none where the design has none."""
        return len(self.by_unit) if self.has_units else 0

    @property
    def leader(self) -> str:
        """The model of highest macro-F1."""
        return str(self.ranked.index[0])

    def against_bar(self, model: str) -> Comparison | None:
        """Compare a model with the bar, unit by unit; None where either has no units, or is it."""
        both = {model, self.bar} <= set(map(str, self.by_unit.columns))
        if model == self.bar or not both:
            return None
        pair = self.by_unit[[model, self.bar]].astype(float).dropna()
        return compare_units(pair[model], pair[self.bar]) if len(pair) else None

    def told_apart(self, model: str) -> str:
        """Say what units say of a model against the bar: technical parts say nothing."""
        found = self.against_bar(model)
        if found is None:
            return "the bar" if model == self.bar else "not compared"
        if not self.has_units:
            return "no units to tell by"
        if found.verdict == "too few units":
            return f"too few {self.part}s to tell"
        p_value = self.corrected_p.get(model)
        if found.verdict == "better" and p_value is not None and p_value > 1 - found.confidence:
            return "not told apart"
        return found.verdict

    @property
    def corrected_p(self) -> dict[str, float | None]:
        """One-sided p value of each model beating the bar, corrected for their number."""
        others = [str(name) for name in self.ranked.index if str(name) != self.bar]
        found = [self.against_bar(name) for name in others]
        return dict(zip(others, holm([pair.p_value if pair else None for pair in found])))

    def spread(self, model: str) -> tuple[float, float] | None:
        """Return the interval over units where there are enough of them, else their range."""
        if model not in self.by_unit:
            return None
        scores = self.by_unit[model].astype(float).dropna()
        if not len(scores):
            return None
        found = interval(scores) if self.has_units else None
        return found or (float(scores.min()), float(scores.max()))

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold; what is not known is null."""
        return {
            "task": self.task,
            "bar": self.bar,
            "n_exposures": self.n_exposures,
            "n_units": self.n_units,
            "replicated": self.audit.get("replicated", self.has_units),
            "scheme": self.scheme,
            "confounded": self.audit.get("confounded"),
            "verdict": [{"weight": note.weight, "text": note.text} for note in verdict(self)],
            "sentence": sentence(self),
            "models": [
                {
                    "model": str(name),
                    **{str(key): plain(value) for key, value in row.items()},
                    "by_unit": _units_of(self.by_unit, str(name)),
                    "compared": _said(self, str(name)),
                    "label": self.labels.get(str(name)),
                }
                for name, row in self.ranked.iterrows()
            ],
            "audit": dict(self.audit),
            "flags": list(self.flags),
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned."""
        apart = ("model", "by_unit", "compared", "label")
        models = values["models"]
        rows = {
            row["model"]: {key: value for key, value in row.items() if key not in apart}
            for row in models
        }
        return cls(
            task=values["task"],
            table=pd.DataFrame.from_dict(rows, orient="index"),
            by_unit=pd.DataFrame(
                {row["model"]: pd.Series(row["by_unit"], dtype=float) for row in models}
            ),
            audit=values["audit"],
            bar=values["bar"],
            n_exposures=values["n_exposures"],
            labels={row["model"]: row["label"] for row in models if row["label"]},
            flags=tuple(values["flags"]),
            scheme=values["scheme"],
        )


# -- what the design allows ---------------------------------------------------------------------
NOT_REPLICATED = (
    "replicated: false. What is held out is technical, no independent unit: nothing here speaks "
    "for another culture or donor."
)
STOPS = ("replicated: false", "confounded: true")  # how the gravest sentences begin


def verdict(board: Board) -> list[Note]:
    """Say what the design allows, worst first: this stands above every figure."""
    said = list(board.audit.get("warnings", []))
    if not board.has_units and not any(line.startswith(STOPS[0]) for line in said):
        said.insert(0, NOT_REPLICATED)
    notes = design_notes({**board.audit, "warnings": said})
    if board.has_units:
        notes.append(_number_of_units(board.n_units, board.part))
    told = "\n".join(note.text for note in notes)
    # a judgement repeats the two things that the design and the number of units say already
    fresh = [
        flag
        for flag in board.flags
        if "no interval" not in flag and not (flag.startswith(STOPS[0]) and STOPS[0] in told)
    ]
    order = {"stop": 0, "mind": 1, "fine": 2}
    return sorted(notes + [Note("mind", flag) for flag in fresh], key=lambda n: order[n.weight])


def design_notes(audit: Mapping[str, Any]) -> list[Note]:
    """Say what an experiment allows to be claimed, from its audit; an empty one says so."""
    if not audit:
        return [Note("mind", "The design was not audited: confounding cannot be excluded.")]
    notes = [
        Note("stop" if line.startswith(STOPS) else "mind", line)
        for line in audit.get("warnings", [])
    ]
    if audit.get("replicated") and audit.get("confounded") is False:
        notes.append(Note("fine", "replicated: true. confounded: false."))
    return notes


def _number_of_units(n: int, part: str) -> Note:
    if n < FEWEST_FOR_INTERVAL:
        return Note(
            "mind",
            f"n = {counted(n, part)}: no interval; every {part} and the range are shown.",
        )
    return Note(
        "fine",
        f"n = {n} {part}s. Intervals over them are approximate: folds share training cells.",
    )


# -- the sentence that matters ------------------------------------------------------------------
def sentence(board: Board) -> str:
    """Say who leads, by how much over the bar, and whether units bear it out."""
    leader = board.leader
    score = float(board.ranked["macro_f1"].iloc[0])
    if math.isnan(score):
        return "No model could be judged: not one has a macro-F1."
    units = (
        counted(board.n_units, f"unseen {board.part}")
        if board.n_units
        else "held-out technical parts"
    )
    spread = board.spread(leader)
    between = f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread and spread[0] < spread[1] else ""
    said = f"{leader} leads: macro-F1 {score:.2f} on {units}{between}"
    said += _over_bar(board, leader)
    shuffled = plain(board.table["shuffled_macro_f1"][leader]) if _has_shuffled(board) else None
    if shuffled is not None and score <= shuffled:
        said += f" It is no better than after fitting on shuffled labels ({shuffled:.2f})."
    return said


def _has_shuffled(board: Board) -> bool:
    return "shuffled_macro_f1" in board.table


def _over_bar(board: Board, leader: str) -> str:
    others = [str(name) for name in board.ranked.index if str(name) != leader]
    if leader == board.bar:
        if not others:
            return "; nothing else was fitted."
        return (
            f", and it is the bar: {_listed(others)} {'do' if others[1:] else 'does'} no better."
        )
    found = board.against_bar(leader)
    if found is None:
        return f"; the bar, {board.bar}, was not judged."
    n_ahead = sum(value > 0 for value in found.units.values())
    ahead = (
        f", in {n_ahead} of {counted(found.n_units, board.part)} ahead of the bar, {board.bar}, "
        f"by {found.difference:.3f} on average"
    )
    told = board.told_apart(leader)
    if told == "worse":
        return f", and yet worse than the bar, {board.bar}, unit by unit."
    return f"{ahead}: {told}."


def counted(n: int, noun: str) -> str:
    """Return "1 unit", "2 units", "1,000 cells"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


# -- plain values -------------------------------------------------------------------------------
def plain(value: Any) -> Any:
    """Return a value JSON can hold: NumPy numbers as Python's, what is not finite as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return None if value is pd.NaT or value is pd.NA else str(value)


def _units_of(by_unit: pd.DataFrame, model: str) -> dict[str, Any]:
    if model not in by_unit:
        return {}
    return {str(unit): plain(value) for unit, value in by_unit[model].items()}


def _said(board: Board, model: str) -> dict[str, Any] | None:
    found = board.against_bar(model)
    if found is None:
        return None
    values: dict[str, Any] = {"difference": found.difference, "verdict": board.told_apart(model)}
    if board.has_units:
        values |= {"low": found.low, "high": found.high}
        values |= {"p_value": found.p_value, "corrected_p_value": board.corrected_p[model]}
        values["sentence"] = found.sentence()
    return values


def _listed(names: list[str], *, limit: int = 4) -> str:
    if len(names) > limit:
        return f"{', '.join(names[:limit])} and {len(names) - limit} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
