"""The model card: what a version is for, how good it is and on what, and what it is not for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from endoprint.config import Refusal
from endoprint.report.board import counted, design_notes
from endoprint.table import TABLE

FIGURES = {  # metric -> what a reader calls it
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
    "auroc_macro": "AUROC, macro",
    "ece": "calibration error (ECE)",
    "ece_noise_floor": "its noise floor",
    "worst_unit_macro_f1": "macro-F1 of the worst unit",
    "shuffled_macro_f1": "macro-F1 after fitting on shuffled labels",
    "fit_seconds": "seconds to fit",
    "score_seconds_per_1000_cells": "seconds to score 1,000 cells",
    "peak_memory_gib": "peak memory, GiB",
}
DECISIONS = {
    "promote": "Promoted: it went live when this was written.",
    "hold": "Held: not live.",
    "reject": "Rejected: not to be used.",
}


def model_card(
    template: str,
    *,
    name: str,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, float],
    by_unit: Mapping[str, float],
    verdict: Mapping[str, Any],
    audit: Mapping[str, Any],
    scope: str,
) -> str:
    """Return the card of one version, in markdown.

    `template`: the text of registry/cards/model.md, `$name` where a value goes. `name`: model and
    version as people say them. `lineage`: as `lineage.Lineage` dumps. `by_unit`: unit -> macro-F1.
    `verdict`: decision and reasons. `scope`: on which cells the figures are, in one sentence.
    """
    row = TABLE.get(str(lineage.get("model")))
    exposures = [str(exposure) for exposure in lineage.get("exposures", [])]
    f1 = {key[3:]: value for key, value in metrics.items() if key.startswith("f1_")}
    decision = str(verdict.get("decision", ""))
    values = {
        "name": quoted(name),
        "line": quoted(_sentence(row.line)) if row else "",
        "verdict": f"**{DECISIONS.get(decision, 'Not judged yet.')}**",
        "design": bullets([note.text for note in design_notes(audit)]),
        "n_exposures": str(len(exposures)),
        "exposures": ", ".join(quoted(exposure) for exposure in exposures),
        "base": _base(lineage.get("base_model")),
        "scope": quoted(scope),
        "metrics": _figures(metrics),
        "by_unit": _pairs(by_unit) or "no independent unit was held out.",
        "f1": _pairs(f1) or "not computed.",
        "reasons": bullets([str(reason) for reason in verdict.get("reasons", [])]),
        "lineage": bullets([f"{key}: {value}" for key, value in origins(lineage).items()]),
        "licence": quoted(row.licence) if row else "see its source",
        "citation": quoted(row.citation) if row else "see its source",
    }
    try:
        return Template(template).substitute(values)
    except (KeyError, ValueError) as error:
        raise Refusal(
            "a model card's template names only values a card has",
            f"{type(error).__name__}: {error}",
            f"use {', '.join(f'${key}' for key in values)}; write $$ for a dollar",
        ) from None


def quoted(text: str) -> str:
    """Return text that markdown shows as it is: nothing in it becomes a heading, link or HTML."""
    line = " ".join(str(text).split())
    for letter in "\\`*[]<>|#":
        line = line.replace(letter, f"\\{letter}")
    return line


def bullets(lines: Sequence[str]) -> str:
    """Return lines as a list; nothing to list is said."""
    return "\n".join(f"- {quoted(line)}" for line in lines) or "- nothing recorded"


def _base(base: Mapping[str, Any] | None) -> str:
    if not base:
        return "It starts from no pre-trained encoder."
    digest = f" (sha256 {base['sha256']})" if base.get("sha256") else ""
    return f"It starts from a pre-trained encoder: {quoted(str(base['label']))}{digest}."


def _figures(metrics: Mapping[str, float]) -> str:
    rows = [
        f"| {said} | {_number(metrics[name])} |"
        for name, said in FIGURES.items()
        if metrics.get(name) is not None
    ]
    return "\n".join(["| figure | value |", "|---|---:|", *rows])


def _pairs(values: Mapping[str, float]) -> str:
    said = ", ".join(f"{quoted(name)} {_number(value)}" for name, value in values.items())
    return f"{said}." if said else ""


def _number(value: float | None) -> str:
    return "not known" if value is None or not math.isfinite(value) else f"{value:.3f}"


def origins(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Return the lineage in a reader's words; long tables of versions stay in the run."""
    dirty = " with uncommitted changes" if lineage.get("is_dirty") else ""
    units = {
        f"{part} units": f"{counted(len(names), 'unit')} ({', '.join(map(str, names)) or 'none'})"
        for part, names in (lineage.get("units") or {}).items()
    }
    files = {f"md5 of {path}": str(md5) for path, md5 in (lineage.get("inputs") or {}).items()}
    said = {
        "task": lineage.get("task"),
        "code": f"{lineage['git_sha']}{dirty}" if lineage.get("git_sha") else None,
        "split": lineage.get("split_hash"),
        "values (params.yaml)": lineage.get("params_hash"),
        "seed": lineage.get("seed"),
        **units,
        **files,
        "files changed since dvc.lock": ", ".join(lineage.get("changed_inputs") or []) or None,
        "machine": _machine(lineage.get("hardware")),
    }
    return {key: str(value) for key, value in said.items() if value is not None}


def _machine(hardware: Mapping[str, Any] | None) -> str | None:
    if not hardware:
        return None
    gpu = f", {hardware['gpu']}" if hardware.get("gpu") else ", no GPU"
    return f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB{gpu}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
