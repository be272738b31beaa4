"""The report of one scoring: what each sample looks exposed to, how sure that is, what to mind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from endoprint.config import Refusal
from endoprint.report import figures, page
from endoprint.report.board import counted, design_notes
from endoprint.report.figures import NO_CALL
from endoprint.report.page import Note

MUCH_WITHHELD = 0.2  # share of cells; training units themselves show up to 0.05 by construction
FEW_GENES = 0.5  # share of the model's genes that a file has (a guess)


def scores_page(
    calls: pd.DataFrame,
    shares: pd.DataFrame,
    meta: Mapping[str, Any],
    *,
    drift: pd.DataFrame | None = None,
    drifted: Sequence[str] = (),
    units: pd.DataFrame | None = None,
    projection: Mapping[str, Any] | None = None,
) -> str:
    """Return the report of one scoring as a self-contained HTML page.

    `calls`: as `population.sample_calls`, one row per sample. `shares`: of each sample's cells, by
    the call they show; rows miss one by the calls withheld. `meta`: as `ScoreSummary.to_json()`;
    further keys are `audit` (of the training data), `is_calibration_unit_validated`, `control`,
    `task` and `scored_at`; any may be absent. `drift`: as `drift.compare`, `drifted` its
    sentences; `units`: calls per sample and unit; `projection`: as `Projection.to_json()`.
    """
    if "sentence" not in calls:
        raise Refusal(
            "a scoring report needs a sentence per sample",
            f"columns {', '.join(map(str, calls.columns)) or 'none'}",
            "pass the table of population.sample_calls",
        )
    said = [str(line) for line in calls["sentence"]]
    by = str(meta.get("by") or "sample")
    blocks = [
        page.sentences(_stopped(said)),
        page.heading("Mind before you use this"),
        page.notes(caveats(calls, meta, drifted)),
    ]
    if len(shares):
        withheld = shares.assign(**{NO_CALL: (1 - shares.sum(axis=1)).clip(lower=0)})
        figure = figures.call_shares(withheld, control=meta.get("control"))
        blocks += [
            page.picture(
                figure,
                alt=f"share of each {by}'s cells by call",
                caption="A population's call weighs all of its cells' evidence; it is not a vote. "
                f"“{NO_CALL}”: withheld, because cells are unlike any the model was trained on, "
                "called with a confidence that was mostly wrong on validation units, or "
                "set aside.",
            ),
        ]
    words = (by, "unit", "call", "second call", "interval")
    blocks += [page.heading(f"Every {by}"), page.table(_call_table(calls, by), left=words)]
    if units is not None and len(units) > len(calls):
        left = ("population", "unit", "call")
        shown = page.table(_unit_table(units), left=left)
        blocks.append(page.folded("Every unit of every population", shown))
    if projection is not None:
        blocks += _projected(projection, by)
    if drift is not None and len(drift):
        blocks += [
            page.heading("Are these cells like those the model was calibrated on?"),
            page.paragraph(
                "KS and PSI say how far the distributions lie apart; “usual” is the farthest that "
                "any unit of the validation cells lay from all of them together.",
                kind="soft",
            ),
            page.table(drift.reset_index(), left=("quantity",)),
        ]
    blocks += [page.heading("Where these answers come from"), page.facts(provenance(meta))]
    of = f" of {meta['task']}" if meta.get("task") else ""
    n_cells = counted(int(meta.get("n_cells", calls["n_cells"].sum())), "cell")
    return page.document(f"Exposure calls{of}: {counted(len(said), by)}, {n_cells}", blocks)


def caveats(
    calls: pd.DataFrame, meta: Mapping[str, Any], drifted: Sequence[str] = ()
) -> list[Note]:
    """Say what limits these answers: the training data's design first, then the cells scored."""
    notes = [
        Note(note.weight, f"Training data: {note.text}")
        for note in design_notes(meta.get("audit") or {})
    ]
    is_validated = meta.get("is_calibration_unit_validated")
    if is_validated is None and "is_calibration_unit_validated" in calls:
        is_validated = bool(calls["is_calibration_unit_validated"].all())
    if is_validated is False:
        notes.append(
            Note(
                "mind",
                "Calibration not unit-validated: confidence was tuned on cells of training units, "
                "and may be too high for new ones.",
            )
        )
    notes += [Note("mind", f"{line}.") for line in drifted]
    notes += _withheld(meta) + _unread(meta)
    return sorted(notes, key=lambda note: ("stop", "mind", "fine").index(note.weight))


def provenance(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what someone needs to repeat the scoring: names of facts and their values."""
    inputs: Sequence[Mapping[str, Any]] = meta.get("inputs") or []
    files = {
        f"input {each['file']}": f"md5 {each['md5']}, {counted(each['n_cells'], 'cell')}, "
        f"{each['gene_share']:.0%} of the model's genes"
        for each in inputs
    }
    return {
        "model": meta.get("model"),
        "version": meta.get("model_version"),
        "address": meta.get("model_uri"),
        "model sha256": meta.get("model_sha256"),
        **files,
        "scores": meta.get("scores"),
        "scores sha256": meta.get("scores_sha256"),
        "scored": meta.get("scored_at"),
    }


def _withheld(meta: Mapping[str, Any]) -> list[Note]:
    """Say how many cells are like none the model was shown, and how many calls are too unsure."""
    notes, n_cells = [], meta.get("n_cells")
    for key, why in (
        ("n_novel", "are unlike any cell the model was trained on; their calls are withheld"),
        ("n_unsure", "are called with a confidence that was mostly wrong on validation units; "
         "their calls are withheld"),
    ):  # fmt: skip
        if n_cells and meta.get(key) is not None:
            share = meta[key] / n_cells
            text = f"{share:.1%} of the cells ({meta[key]:,} of {n_cells:,}) {why}."
            notes.append(Note("mind" if share > MUCH_WITHHELD else "fine", text))
    return notes


def _unread(meta: Mapping[str, Any]) -> list[Note]:
    """Say which cells could not be judged, and which files lack genes."""
    notes = [
        Note("mind", f"{counted(n, 'cell')} without a call: {reason}.")
        for reason, n in (meta.get("quarantined") or {}).items()
    ]
    for each in meta.get("inputs") or []:
        if each["gene_share"] < FEW_GENES:
            notes.append(
                Note(
                    "mind",
                    f"{each['file']} holds {each['gene_share']:.0%} of the model's genes: what "
                    "the others would say is missing.",
                )
            )
    if meta.get("n_repeated_ids"):
        n = counted(meta["n_repeated_ids"], "cell id")
        notes.append(Note("mind", f"{n} in more than one file: told apart by the column `file`."))
    return notes


def _call_table(calls: pd.DataFrame, by: str) -> pd.DataFrame:
    columns = {
        "unit": "unit",
        "n_cells": "cells",
        "call": "call",
        "confidence": "confidence",
        "low": "from",
        "high": "to",
        "interval": "interval",
        "second_call": "second call",
        "second_confidence": "its confidence",
        "agreement": "cells that agree",
        "novel_share": "novel cells",
    }
    known = {name: head for name, head in columns.items() if name in calls}
    if "n_units" in calls and not (calls["n_units"] > 1).any():  # nothing to be uncertain over
        known = {name: head for name, head in known.items() if name not in ("low", "high")}
    table = calls[list(known)].rename(columns=known)
    for head in ("confidence", "its confidence", "from", "to"):
        if head in table:
            table[head] = [_sure(value) for value in table[head]]
    for head in ("cells that agree", "novel cells"):
        if head in table:
            table[head] = [_percent(value) for value in table[head]]
    table.insert(0, by, calls.index.astype(str))
    return table


def _unit_table(units: pd.DataFrame) -> pd.DataFrame:
    table = units[["population", "unit", "n_cells", "call", "confidence"]].copy()
    table["confidence"] = [_sure(value) for value in table["confidence"]]
    return table.rename(columns={"n_cells": "cells"})


def _projected(projection: Mapping[str, Any], by: str) -> list[str]:
    """Show on which known exposures each population projects, sentences first."""
    samples = projection["samples"]
    blocks = [page.heading("What they resemble: projection on the known exposures")]
    blocks.append(page.sentences(_stopped([str(row["sentence"]) for row in samples.values()])))
    rows = [
        {
            by: name, "exposure": group, "weight": said["weight"], "from": said["low"],
            "to": said["high"], "unexplained": row["residual_share"],
        }
        for name, row in samples.items()
        for group, said in row["weights"].items()
        if said["weight"] > 0
    ]  # fmt: skip
    if rows:
        blocks.append(page.table(pd.DataFrame(rows), left=(by, "exposure")))
    null = projection.get("null")
    told = ", ".join(f"{group} {value:.2f}" for group, value in null.items()) if isinstance(
        null, Mapping
    ) else str(null)  # fmt: skip
    blocks.append(
        page.paragraph(f"What control samples show against each other: {told}.", kind="soft")
    )
    left_out = projection.get("left_out") or {}
    if left_out:
        lines = [f"{name}: {why}" for name, why in left_out.items()]
        blocks.append(page.folded("Not projected", page.sentences(lines)))
    return blocks


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _sure(value: float) -> str:
    """Write a probability, never a false 1.00."""
    if math.isnan(value):
        return "–"
    return "> 0.99" if value > 0.99 else f"{value:.2f}"


def _stopped(said: Sequence[str]) -> list[str]:
    return [line if line.endswith((".", "!", "?")) else f"{line}." for line in said]
