"""What an exposure is called: the canonical labels, and every other spelling met so far.

Canonical are the labels of the source atlas's single-cell arm (NOHA, bioRxiv
10.1101/2025.08.14.669814): pathway and direction, endocrine disruptors by abbreviation, and
`DMSO` for the vehicle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

CONTROL = "DMSO"

# pathway stem -> its stem in the atlas's bulk tables, where directions are `_Ag` and `_Inh`
PATHWAYS = {
    "ANDROGEN": "Andr",
    "ARYL_HYD": "AhHyd",
    "ESTROGEN": "Estr",
    "GLUCOCORT": "GC",
    "LIVER-X": "LivX",
    "RET": "Ret",
    "THYROID": "Thyr",
}
DIRECTIONS = {"AGONIST": "Ag", "ANTAGONIST": "Inh"}
DISRUPTORS = ("3-PBA", "BPA", "BPF", "DPHP", "MBzP", "MEP", "MIX", "TCP")

HORMONES = tuple(f"{pathway}_{way}" for pathway in PATHWAYS for way in DIRECTIONS)
CANONICAL = tuple(sorted((CONTROL, *HORMONES, *DISRUPTORS)))

# Words for a control that say too little to be the vehicle: a file must map them itself, because
# `CTL` is an untreated level in the atlas's bulk arm, beside DMSO.
CONTROL_WORDS = ("ctl", "ctrl", "control", "dmso", "mock", "pbs", "untreated", "vehicle", "veh")
PLACEHOLDER = re.compile(r"^MTR_\d+_3GEX$")  # stood for a whole run in the atlas's early object


def bare(label: str) -> str:
    """Return a label without separators and case, as file names and some tables spell it."""
    return re.sub(r"[_\-@\s]", "", label).upper()


# The only table of spellings: bare spelling -> canonical label.
ALIASES: dict[str, str] = {bare(label): label for label in CANONICAL} | {
    bare(f"{short}_{way}"): f"{pathway}_{direction}"
    for pathway, short in PATHWAYS.items()
    for direction, way in DIRECTIONS.items()
}


def canonical(label: str, aliases: Mapping[str, str] | None = None) -> str | None:
    """Return the canonical label of a spelling, or None where nobody declared it.

    `aliases` are a file's own spellings and win over the table; what they map to is taken as
    said, so a file may declare exposures which no hormone atlas knows.
    """
    own = aliases or {}
    if label in own:
        return own[label]
    if label in own.values():
        return label
    return ALIASES.get(bare(label))


def find_control(labels: Iterable[str]) -> str | None:
    """Return the label that reads as the control, or None where none or several do."""
    labels = sorted(set(labels))
    vehicle = [label for label in labels if canonical(label) == CONTROL]
    if len(vehicle) == 1:
        return vehicle[0]
    worded = [label for label in labels if label.lower() in CONTROL_WORDS]
    return worded[0] if len(worded) == 1 else None


def pathway_and_direction(exposure: str) -> tuple[str, str] | None:
    """Return the two words of a canonical label, or None for a control, an EDC or one's own."""
    pathway, _, direction = exposure.rpartition("_")
    known = pathway in PATHWAYS and direction in DIRECTIONS
    return (pathway, direction) if known else None
