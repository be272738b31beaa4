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

MUCH_NOVEL = 0.2  # share of cells; training units themselves show up to 0.05 by construction
FEW_GENES = 0.5  # share of the model's genes that a file has (a guess)


def scores_page(scores: pd.DataFrame, sample_calls: pd.DataFrame, meta: Mapping[str, Any]) -> str:
    """Return the report of one scoring as a self-contained HTML page.

    `scores`: one row per cell, columns sample, call, confidence, abstain (of the parquet; others
    are not read). `sample_calls`: as `population.sample_calls`, one row per sample. `meta`: as
    `scoring.ScoreSummary.to_json()`; further keys are `audit` (of the training data),
    `is_calibration_unit_validated`, `control`, `task` and `scored_at`; any may be absent.
    """
    absent = {"sample", "call"} - set(scores.columns)
    if absent or "sentence" not in sample_calls:
        raise Refusal(
            "a scoring report needs sample and call per cell, and a sentence per sample",
            f"none in column {', '.join(sorted(absent)) or 'sentence'}",
            "pass the tables of scoring and of population.sample_calls",
        )
    said = [str(line) for line in sample_calls["sentence"]]
    n_samples = counted(len(said), "sample")
    blocks = [
        page.sentences(_stopped(said)),
        page.heading("Mind before you use this"),
        page.notes(caveats(scores, sample_calls, meta)),
    ]
    if len(scores):
        shares = call_shares(scores)
        figure = figures.call_shares(
            shares.reindex(sample_calls.index.astype(str)).dropna(how="all"),
            control=meta.get("control"),
        )
        blocks += [
            page.picture(
                figure,
                alt="share of each sample's cells by call",
                caption="A sample's call weighs all of its cells' evidence; it is not a vote. "
                f"“{NO_CALL}”: cells unlike any the model was trained on, or not readable.",
            ),
        ]
    blocks += [
        page.heading("Every sample"),
        page.table(_sample_table(sample_calls), left=("sample", "unit", "call", "second call")),
        page.heading("Where these answers come from"),
        page.facts(provenance(meta)),
    ]
    of = f" of {meta['task']}" if meta.get("task") else ""
    n_cells = counted(len(scores), "cell")
    return page.document(f"Exposure calls{of}: {n_samples}, {n_cells}", blocks)


def caveats(
    scores: pd.DataFrame, sample_calls: pd.DataFrame, meta: Mapping[str, Any]
) -> list[Note]:
    """Say what limits these answers: the training data's design first, then the cells scored."""
    notes = [
        Note(note.weight, f"Training data: {note.text}")
        for note in design_notes(meta.get("audit") or {})
    ]
    is_validated = meta.get("is_calibration_unit_validated")
    if is_validated is None and "is_calibration_unit_validated" in sample_calls:
        is_validated = bool(sample_calls["is_calibration_unit_validated"].all())
    if is_validated is False:
        notes.append(
            Note(
                "mind",
                "Calibration not unit-validated: confidence was tuned on cells of training units, "
                "and may be too high for new ones.",
            )
        )
    notes += _novel(scores, meta) + _unread(meta)
    return sorted(notes, key=lambda note: ("stop", "mind", "fine").index(note.weight))


def call_shares(scores: pd.DataFrame) -> pd.DataFrame:
    """Return which share of each sample's cells was called what; samples x calls, rows sum to one.

    Cells abstained from count as "no call".
    """
    call = scores["call"].astype(object).where(scores["call"].notna(), NO_CALL).astype(str)
    if "abstain" in scores:
        call = call.mask(scores["abstain"].astype(bool), NO_CALL)
    sample = scores["sample"].astype(str).to_numpy()
    shares = pd.crosstab(sample, call.to_numpy(), normalize="index")
    known = [str(name)[2:] for name in scores.columns if str(name).startswith("p_")]
    order = known or sorted(set(shares.columns) - {NO_CALL})
    return shares.reindex(columns=[*order, NO_CALL], fill_value=0.0)


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


def _novel(scores: pd.DataFrame, meta: Mapping[str, Any]) -> list[Note]:
    """Say how many cells are like none the model was shown."""
    n_novel, n_cells = meta.get("n_novel"), len(scores)
    if "is_novel" in scores:
        n_novel = int(scores["is_novel"].sum())
    if not n_cells or n_novel is None:
        return []
    share = n_novel / n_cells
    text = (
        f"{share:.1%} of the cells ({n_novel:,} of {n_cells:,}) are unlike any cell the model was "
        "trained on; their calls are withheld."
    )
    return [Note("mind" if share > MUCH_NOVEL else "fine", text)]


def _unread(meta: Mapping[str, Any]) -> list[Note]:
    """Say which cells could not be judged, and which files lack genes."""
    notes = [
        Note("mind", f"{counted(n, 'cell')} without a call: {reason}.")
        for reason, n in (meta.get("flags") or {}).items()
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


def _sample_table(sample_calls: pd.DataFrame) -> pd.DataFrame:
    columns = {
        "unit": "unit",
        "n_cells": "cells",
        "call": "call",
        "confidence": "confidence",
        "second_call": "second call",
        "second_confidence": "its confidence",
        "agreement": "cells that agree",
        "novel_share": "novel cells",
    }
    known = {name: head for name, head in columns.items() if name in sample_calls}
    table = sample_calls[list(known)].rename(columns=known)
    for head in ("confidence", "its confidence"):
        if head in table:
            table[head] = [_sure(value) for value in table[head]]
    for head in ("cells that agree", "novel cells"):
        if head in table:
            table[head] = [_percent(value) for value in table[head]]
    table.insert(0, "sample", sample_calls.index.astype(str))
    return table


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _sure(value: float) -> str:
    """Write a probability, never a false 1.00."""
    return "> 0.99" if value > 0.99 else f"{value:.2f}"


def _stopped(said: Sequence[str]) -> list[str]:
    return [line if line.endswith((".", "!", "?")) else f"{line}." for line in said]
