"""What `endoprint init` proposes for a file it has never seen, and what to check in it.

Names of columns are hints, values decide: a unit must hold several exposures, a library size must
not fall below the counts. Every guess comes back as a sentence to check.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from endoprint import sources
from endoprint.annotations import text
from endoprint.config import Refusal
from endoprint.curated import library_size, raw_counts, refuse_double_cells, sums
from endoprint.genes import HUMAN
from endoprint.labels import CONTROL, CONTROL_WORDS, PLACEHOLDER, canonical, find_control

LOOK_AT = 2000  # cells read to judge the matrix; curation checks all of them
MOST_EXPOSURES = 100
MOST_FOLDS = 50  # a column of more values is no technical fold

# Column names met in public files, most telling first.
EXPOSURE = (
    *("condition", "exposure", "treatment", "perturbation", "compound", "drug", "stim"),
    *("stimulation", "treated", "stimulated", "group_id", "group", "label", "dose", "time"),
)
LINE = ("line", "cell_line", "cellline", "ipsc_line", "genotype")
REPLICATE = ("replicate", "rep", "biological_replicate", "bio_rep", "organoid")
DONOR = ("donor", "donor_id", "individual", "patient", "patient_id", "subject", "ind", "mouse_id")
SAMPLE = ("sample_id", "sample", "sample_name", "orig.ident", "library_id")
BATCH = ("run", "batch", "run_id", "lane", "library", "seq_run", "chip", "pool", "gem_group")
TECHNICAL = ("plate", "well_plate", *BATCH, "pcr_plate", "channel")
# what of a sample's name may be its unit where the exposure is spelled otherwise in it
UNIT_PARTS = (r"(\d+)$", r"^([^_\-. ]+)[_\-. ]", r"[_\-. ]([^_\-. ]+)$")
CELL_TYPE = (
    *("cell_type", "celltype", "MacroCelltype", "Consensus_call", "cell_type_l1"),
    *("cluster_id", "annotation", "clusters", "cluster", "leiden", "louvain"),
)
LIBRARY_SIZE = re.compile(
    r"^(?!log)(?!pct).*(total.*(counts?|umis?)|library_?size|n_?counts?|n_?umis?)(_RNA)?$", re.I
)


@dataclass
class _Proposal:
    """What is gathered while looking at a file."""

    task: str
    cells: dict[str, Any] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)


def propose(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Look at a file of cells; return sections for params.yaml and sentences on what to check.

    The sections are `task` (a suggested name), `cells` and `design`; `cells.source` is where a
    workspace links to the file, below its own folder.

    Raises Refusal where there are no raw counts or nothing that could be an exposure.
    """
    path = Path(path)
    obs = sources.read_obs(path)
    refuse_double_cells(pd.Index(obs.index.astype(str)))
    proposal = _Proposal(task=_slug(path.stem), cells={"source": f"data/raw/{path.name}"})
    block = _counts(path, proposal)
    _genes(block.var, proposal)
    columns = {str(name): text(obs[name]) for name in obs.columns}
    exposure = _exposure(columns, proposal)
    has_units = _units(columns, exposure, proposal)
    _batch(columns, exposure, proposal, has_units=has_units)
    _cell_type(columns, proposal)
    _library_size(block, proposal)
    return {
        "task": proposal.task,
        "cells": proposal.cells,
        "design": {"scheme": "unit"},
    }, proposal.checks


# -- counts and genes ---------------------------------------------------------------------------
def _counts(path: Path, proposal: _Proposal) -> AnnData:
    """Find the matrix that holds raw counts; return its first cells."""
    tried: list[str] = []
    for layer in sorted(sources.layers(path), key=_likely_counts):
        block = next(sources.blocks(path, layer=layer, n_cells=LOOK_AT, obs_table=""), None)
        if block is None:
            raise Refusal("there are cells and genes", f"{path.name} without cells", "check it")
        try:
            block.X = raw_counts(block.X, where=layer or "X", remedy="")
        except Refusal as refusal:
            tried.append(f"{layer or 'X'} ({refusal.got})")
            continue
        if layer is not None:
            proposal.cells["layer"] = layer
            is_told = layer == "raw" or "count" in layer
            doubt = "" if is_told else " Is that every count, or a part such as the spliced ones?"
            proposal.checks.append(f"Raw counts are taken from {layer!r}, not from X.{doubt}")
        return block
    raise Refusal(
        "a file holds raw counts somewhere: X, a layer or raw",
        "; ".join(tried) or "no matrix",
        "export the counts before normalisation",
    )


def _likely_counts(layer: str | None) -> tuple[bool, bool, str]:
    return layer is not None, "count" not in (layer or ""), layer or ""


def _genes(var: pd.DataFrame, proposal: _Proposal) -> None:
    names = {None: pd.Series(var.index)} | {str(key): var[key] for key in var.columns}
    for key, values in names.items():
        if values.astype(str).map(lambda name: HUMAN.match(name) is not None).mean() > 0.9:
            if key is not None:
                proposal.cells["gene_id_key"] = key
            return
    proposal.cells["allow_symbols"] = True
    proposal.checks.append(
        f"Genes are named by symbols ({', '.join(map(str, var.index[:3]))}), kept as they are: "
        "a vocabulary fitted here works on them; a published one, or published response genes, "
        "need symbol_map, a JSON of symbol: Ensembl id."
    )


# -- exposure -----------------------------------------------------------------------------------
def _exposure(columns: dict[str, pd.Series], proposal: _Proposal) -> pd.Series:
    scored = {name: _reads_as_exposure(name, values) for name, values in columns.items()}
    best = max(scored, key=lambda name: scored[name], default=None)
    if best is None or scored[best] <= 0:
        raise Refusal(
            "some column of obs says what each cell was exposed to",
            _columns_told(columns),
            "add a column such as condition, with the control's label in it, and save as h5ad",
        )
    said = columns[best]
    labels = sorted(set(said.dropna()))
    proposal.cells["exposure_key"] = best
    placeholders = [label for label in labels if PLACEHOLDER.match(label)]
    labels = [label for label in labels if label not in placeholders]
    control, aliases = _name_labels(labels)
    proposal.cells["control"] = control or labels[0]
    if aliases:
        proposal.cells["aliases"] = aliases
        told = ", ".join(k if k == v else f"{k} -> {v}" for k, v in aliases.items())
        proposal.checks.append(f"Labels of this file, and what becomes of them: {told}.")
    if placeholders:
        proposal.cells["drop_labels"] = placeholders
        proposal.checks.append(
            f"Placeholders, whose cells are removed and counted: {', '.join(placeholders)}."
        )
    _say_gaps(said, best, proposal)
    if control is None:
        proposal.checks.append(
            f"No label in {best!r} reads as a control; {labels[0]!r} stands there for now."
        )
    else:
        proposal.checks.append(f"Exposure is {best!r}, its control {control!r}.")
    others = [n for n in columns if n != best and scored[n] > 0 and _refines(columns[n], said)]
    if others:
        proposal.checks.append(f"Finer than {best!r} and possible instead: {', '.join(others)}.")
    if sum(canonical(label) is not None for label in labels) >= 3:
        proposal.task = "hormones"
    return said


def _say_gaps(values: pd.Series, key: str, proposal: _Proposal) -> None:
    """Say how many cells lack a value that curation asks of each."""
    if n := int(values.isna().sum()):
        said = (
            f"{n} cells have no {key!r}, and curation refuses that: fill them in, or remove them."
        )
        proposal.checks.append(said)


def _columns_told(columns: dict[str, pd.Series]) -> str:
    """Name the columns that might have been meant, few of them however many there are."""
    few = [name for name, values in columns.items() if 2 <= values.nunique() <= MOST_EXPOSURES]
    if not few:
        return f"{len(columns) or 'no'} columns, none of which names two exposures or more"
    return f"{', '.join(few[:8])}{' ...' if few[8:] else ''}, none of which reads so"


def _reads_as_exposure(name: str, values: pd.Series) -> float:
    labels = sorted(set(values.dropna()))
    if not 2 <= len(labels) <= MOST_EXPOSURES:
        return 0.0
    known = sum(canonical(label) is not None for label in labels) / len(labels)
    has_control = find_control(labels) is not None
    hint = _hint(name, EXPOSURE)
    return 4 * known + 3 * has_control + 2 * hint - 0.001 * len(labels)


def _name_labels(labels: list[str]) -> tuple[str | None, dict[str, str]]:
    """Return the control and the aliases that give every label a name."""
    control = find_control(labels)
    knows_hormones = any(canonical(label) not in (None, CONTROL) for label in labels)
    aliases = {}
    for label in labels:
        if canonical(label) is not None:
            continue
        # beside labels of the atlas, a control is comparable only under the atlas's name
        is_vehicle = knows_hormones and label == control and label.lower() in CONTROL_WORDS
        aliases[label] = CONTROL if is_vehicle else label
    if control is not None:
        control = canonical(control, aliases)
    return control, aliases


def _refines(fine: pd.Series, coarse: pd.Series) -> bool:
    """Whether each value of `fine` lies within one value of `coarse`, and there are more."""
    pairs = pd.DataFrame({"fine": fine, "coarse": coarse}).dropna().drop_duplicates()
    return bool(
        pairs["fine"].is_unique and pairs["coarse"].nunique() < len(pairs) <= MOST_EXPOSURES
    )


# -- units and batches --------------------------------------------------------------------------
def _units(columns: dict[str, pd.Series], exposure: pd.Series, proposal: _Proposal) -> bool:
    line, replicate = _named(columns, LINE), _named(columns, REPLICATE)
    if line is not None and columns[line].nunique() > 1:
        proposal.cells["line_key"] = line
    for keys in (
        [name for name in (line, replicate) if name is not None] if replicate else [],
        [name] if (name := _named(columns, DONOR)) else [],
        [line] if line else [],
    ):
        if keys and _hold_exposures([columns[key] for key in keys], exposure):
            proposal.cells["unit_keys"] = keys
            proposal.checks.append(
                f"A unit is {' x '.join(keys)}: is that an independent culture or donor?"
            )
            gaps = int(np.any([columns[key].isna() for key in keys], axis=0).sum())
            if gaps:
                proposal.checks.append(
                    f"{gaps} cells lack a part of their unit: they count as pooled samples, which "
                    "only leave-line-out (design.scheme: line) takes."
                )
            return True
    if _units_from_samples(columns, exposure, proposal):
        return True
    proposal.cells["unit_keys"] = []
    fold = next((name for name in TECHNICAL if _folds(columns.get(name), exposure)), None)
    proposal.checks.append(
        "No column reads as an independent unit (donor, line, replicate): every result will say "
        "replicated: false and no model can be promoted."
    )
    if fold is None:
        proposal.checks.append(
            "Nor does one read as a plate or run that holds every exposure: name unit_keys, or a "
            "technical_fold, or nothing can be held out and the run stops at the split."
        )
    else:
        proposal.cells["technical_fold"] = fold
        proposal.checks.append(f"Folds are by {fold!r}, which holds out nothing biological.")
    return False


def _units_from_samples(
    columns: dict[str, pd.Series], exposure: pd.Series, proposal: _Proposal
) -> bool:
    """Find units in sample names, such as donor 101 in ctrl101 and stim101."""
    sample = _named(columns, SAMPLE)
    if sample is None:
        return False
    values = columns[sample]
    pattern = _pattern(values, exposure)
    if pattern is not None:
        _say_gaps(values, sample, proposal)
        proposal.cells |= {"unit_keys": [sample], "unit_pattern": pattern, "sample_key": sample}
        found = sorted({re.search(pattern, v).group(1) for v in set(values.dropna())})  # type: ignore[union-attr]
        proposal.checks.append(
            f"Units {', '.join(found[:6])} are read from {sample!r} by {pattern!r}: is that the "
            "donor or culture?"
        )
        return True
    if _hold_exposures([values], exposure):
        proposal.cells["unit_keys"] = [sample]
        proposal.checks.append(f"A unit is {sample!r}: is that an independent culture or donor?")
        return True
    return False


def _pattern(values: pd.Series, exposure: pd.Series) -> str | None:
    """Return a regex for what is left of a sample's name without its exposure, or None."""
    pairs = pd.DataFrame({"sample": values, "exposure": exposure}).dropna().drop_duplicates()
    if not len(pairs):
        return None
    labels = sorted(set(pairs["exposure"]), key=len, reverse=True)
    either = "|".join(re.escape(label) for label in labels)
    for pattern in (rf"^(?:{either})[_\-. ]?(.+)$", rf"^(.+?)[_\-. ]?(?:{either})$", *UNIT_PARTS):
        matches = [re.search(pattern, sample) for sample in pairs["sample"]]
        if all(matches):
            unit = pd.Series([match.group(1) for match in matches if match], index=pairs.index)
            held = pairs["exposure"].groupby(unit).nunique()
            if len(held) >= 2 and (held >= 2).all():
                ends_in_digits = pattern.startswith("^(?:") and unit.str.fullmatch(r"\d+").all()
                return r"(\d+)$" if ends_in_digits else pattern
    return None


def _batch(
    columns: dict[str, pd.Series], exposure: pd.Series, proposal: _Proposal, *, has_units: bool
) -> None:
    batch = _named(columns, BATCH + ("plate",))
    taken = [*proposal.cells["unit_keys"], proposal.cells.get("technical_fold")]
    if batch is None or batch in taken or columns[batch].isna().any():
        proposal.checks.append(
            "No column says in which run a cell was measured (batch_key): confounding with the "
            "run cannot be excluded."
        )
        return
    proposal.cells["batch_key"] = batch
    per_batch = exposure.groupby(columns[batch]).nunique()
    if (per_batch == 1).all() and len(per_batch) > 1:
        proposal.checks.append(
            f"Every {batch!r} holds one exposure only: accuracy will include recognising the run."
        )


def _hold_exposures(parts: Sequence[pd.Series], exposure: pd.Series) -> bool:
    """Whether there are two or more units, most of which met two or more exposures."""
    unit = parts[0].fillna("?")
    for part in parts[1:]:
        unit = unit + "|" + part.fillna("?")
    held = exposure.groupby(unit.to_numpy()).nunique()
    return len(held) >= 2 and bool((held >= 2).mean() > 0.5)


def _folds(values: pd.Series | None, exposure: pd.Series) -> bool:
    if values is None or values.isna().any():
        return False
    held = exposure.groupby(values).nunique()
    return 2 <= len(held) <= MOST_FOLDS and bool((held >= 2).all())


# -- the rest -----------------------------------------------------------------------------------
def _cell_type(columns: dict[str, pd.Series], proposal: _Proposal) -> None:
    found = _named(columns, CELL_TYPE)
    if found is not None:
        proposal.cells["cell_type_key"] = found


def _library_size(block: AnnData, proposal: _Proposal) -> None:
    counted = sums(block.X)
    for name in block.obs.columns:
        if not LIBRARY_SIZE.match(str(name)):
            continue
        if not pd.api.types.is_numeric_dtype(block.obs[name].dtype):
            continue
        try:
            total = library_size(block.obs[name], at_least=counted, key=str(name))
        except Refusal:
            continue
        if np.allclose(total, counted):  # says what the matrix says itself
            return
        proposal.cells["library_size_key"] = str(name)
        proposal.checks.append(
            f"Library size is {name!r}: the file holds {counted.sum() / total.sum():.0%} of it, "
            "so its genes are a panel."
        )
        return
    if block.n_vars < 5000:
        proposal.checks.append(
            f"Only {block.n_vars} genes and no column of true library sizes: n_counts is the "
            "panel's total."
        )


def _named(columns: dict[str, pd.Series], names: Sequence[str]) -> str | None:
    """Return the column that goes by one of the names, in the order of the names."""
    plain = {_plain(column): column for column in reversed(columns)}
    return next((plain[_plain(name)] for name in names if _plain(name) in plain), None)


def _plain(name: str) -> str:
    """Return a column's name as it would be typed: `Donor ID` is donor_id."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _hint(name: str, names: Sequence[str]) -> float:
    """Return 1 for the most telling name, less for those further down, 0 for others."""
    lower = _plain(name)
    if lower in names:
        return 1 - names.index(lower) / (2 * len(names))
    return 0.25 if any(re.match(rf"{known}\b|{known}_", lower) for known in names) else 0.0


def _slug(stem: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") or "cells"
