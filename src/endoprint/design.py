"""The design: whole units to fit on, to develop on and to judge by, fixed by hash.

*Development* units are cross-fitted in folds; *test* units open only for a promotion (judging
rules 2 and 3). Everything is decided from names, never from positions: the same cells in another
order, or a few cells more, give the same assignment.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd

from endoprint.config import Config, Refusal
from endoprint.confounding import Audit, audit
from endoprint.holdout import (
    choose_test,
    choose_validation,
    name_gaps,
    rank,
    share_folds,
)

__all__ = ["Audit", "DesignConfig", "Parts", "Split", "audit", "make_split"]

Array = np.ndarray[Any, np.dtype[Any]]
Scheme = Literal["unit", "line", "batch"]
PARTS = ("train", "valid", "test", "")
NOT_UNIT_VALIDATED = "calibration not unit-validated"


class DesignConfig(Config):
    """How cells are set apart for judging."""

    scheme: Scheme = "unit"  # what is held out whole
    n_test_units: int | None = None  # null: a third of 6 or more, 1 of 3 to 5, none of 2
    test_units: list[str] = []  # names them instead of choosing by hash
    n_folds: int | None = None  # over development units; null: one each, at most 5
    valid_share: float = 0.15  # of training cells, where units are too few to spare one
    split_values: dict[str, Literal["train", "valid", "test", ""]] = {}  # split column -> part


@dataclass(frozen=True)
class Parts:
    """Which cells fit, which calibrate and which are judged: ascending positions in `obs`."""

    train: Array
    valid: Array
    held_out: Array
    is_calibration_unit_validated: bool
    flags: list[str] = field(default_factory=list)  # sentences a result must carry


@dataclass(frozen=True)
class Split:
    """A frozen split: names of whole groups (units, lines, batches or technical folds)."""

    scheme: str  # unit | line | batch | technical_fold
    seed: int
    replicated: bool  # every exposure stands in two units or more
    test: list[str]  # groups that open only for a promotion
    folds: list[list[str]]  # development groups, held out in turn
    validation: list[str]  # unit that calibrates each fold; "": a share of cells
    final_validation: str  # the same for the final fit on all development groups
    excluded: list[str]  # pooled units that may span held-out ones
    valid_share: float
    split_values: dict[str, str]  # explicit split: value of the column -> part; else empty
    notes: list[str]  # what the design did not allow, in sentences

    @property
    def n_folds(self) -> int:
        """How many development folds there are."""
        return len(self.folds)

    @property
    def development(self) -> list[str]:
        """The groups that are cross-fitted."""
        return sorted(group for fold in self.folds for group in fold)

    @property
    def is_technical(self) -> bool:
        """Whether held-out groups are technical: nothing biological is held out."""
        return self.scheme == "technical_fold"

    @property
    def hash(self) -> str:
        """Sha256 over what is held out when: figures compare only at equal hashes."""
        told = [self.scheme, self.split_values, sorted(self.test), [sorted(f) for f in self.folds]]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def write(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        said = {"hash": self.hash, **self.__dict__}
        try:
            beside.write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what `write` wrote; an edited split is refused."""
        rule, remedy = "a split is the JSON that `endoprint split` wrote", "make it again"
        try:
            said = json.loads(Path(path).read_text())
            written = said.pop("hash")
            split = cls(**said)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(rule, str(error), remedy) from None
        if split.hash != written:
            raise Refusal(rule, "one edited since (its hash differs)", remedy)
        return split

    def parts(self, obs: pd.DataFrame, fold: int | None) -> Parts:
        """Return the cells of one fold, or (None) of the final fit, judged on the test groups."""
        if fold is not None and not 0 <= fold < self.n_folds:
            raise Refusal("a fold of the split", str(fold), f"0 to {self.n_folds - 1}")
        explicit = self._explicit(obs)
        group = self._groups(obs, explicit)
        in_dev = np.isin(group, self.development)
        if explicit is None:
            in_test = np.isin(group, self.test)
        else:
            in_test, in_dev = explicit == "test", in_dev & np.isin(explicit, ["train", "valid"])
        held = in_test if fold is None else in_dev & np.isin(group, self.folds[fold])
        rest = in_dev & ~held
        chosen = self.final_validation if fold is None else self.validation[fold]
        valid, is_unit_validated = self._valid(obs, rest, explicit, chosen)
        flags = [] if is_unit_validated else [NOT_UNIT_VALIDATED]
        if self.is_technical:
            flags.insert(0, "replicated: false, held-out groups are technical")
        return Parts(
            train=np.flatnonzero(rest & ~valid),
            valid=np.flatnonzero(valid),
            held_out=np.flatnonzero(held),
            is_calibration_unit_validated=is_unit_validated,
            flags=flags,
        )

    def _valid(
        self, obs: pd.DataFrame, rest: Array, explicit: Array | None, unit: str
    ) -> tuple[Array, bool]:
        units = _column(obs, "unit")
        if explicit is not None and (rest & (explicit == "valid")).any():
            valid = rest & (explicit == "valid")
            return valid, not set(units[valid]) & set(units[rest & ~valid])
        if unit:
            return rest & (units == unit), True
        return rest & _share_of_cells(obs, rest, self.valid_share, self.seed), False

    def _groups(self, obs: pd.DataFrame, explicit: Array | None) -> Array:
        group = _column(obs, self.scheme)
        if self.scheme == "unit":
            group[_is_pooled(obs)] = "?"
        known = ["?", *self.test, *self.development, *self.excluded]
        strange = ~np.isin(group, known)
        if explicit is not None:
            strange &= np.isin(explicit, ["train", "valid"])
        if strange.any():
            raise Refusal(
                f"the split knows every {self.scheme} of the cells",
                ", ".join(sorted(set(group[strange]))[:5]),
                "make the split again",
            )
        return group

    def _explicit(self, obs: pd.DataFrame) -> Array | None:
        return _explicit_parts(obs, self.split_values) if self.split_values else None


def make_split(obs: pd.DataFrame, config: DesignConfig, seed: int) -> Split:
    """Set whole units apart for testing and for folds, and say what the design did not allow.

    `obs` is that of curated, labelled cells. Raises Refusal where nothing can be held out.
    """
    if "exposure" not in obs:
        raise Refusal("a split is made of labelled cells", "no exposure", "curate them labelled")
    values = _split_values(obs, config)
    scheme = _scheme(obs, config)
    table = _table(obs, scheme, values)
    # an explicit test part is taken as said, pooled or not
    is_out = table["spans"] & (scheme == "unit") & (table["part"] != "test")
    excluded = sorted(set(table["group"][is_out]))
    notes = _scheme_notes(table, scheme, excluded)
    table = table[~is_out]
    if values:
        development = table[table["part"].isin(["train", "valid"])]
        test = sorted(set(table["group"][table["part"] == "test"]))
        notes += _shared(test, sorted(set(development["group"])), scheme)
    else:
        test = choose_test(table, config.n_test_units, config.test_units, scheme, seed)
        development = table[~table["group"].isin(test)]
    folds = share_folds(development, config.n_folds, scheme, seed)
    validation = [
        choose_validation(development[~development["group"].isin(fold)], seed) for fold in folds
    ]
    final = choose_validation(development, seed)
    notes += name_gaps(
        table, test, folds, [*validation, final], development, is_explicit=bool(values)
    )
    return Split(
        scheme=scheme,
        seed=seed,
        replicated=_is_replicated(obs),
        test=test,
        folds=folds,
        validation=validation,
        final_validation=final,
        excluded=excluded,
        valid_share=config.valid_share,
        split_values=values,
        notes=notes,
    )


def _table(obs: pd.DataFrame, scheme: str, values: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "group": _column(obs, scheme),
            "unit": _column(obs, "unit"),
            "line": _column(obs, "line") if "line" in obs else "",
            "exposure": _column(obs, "exposure"),
            "part": _explicit_parts(obs, values) if values else "train",
            "spans": _is_pooled(obs),
        }
    )


def _shared(test: list[str], development: list[str], scheme: str) -> list[str]:
    both = sorted(set(test) & set(development))
    if not both:
        return []
    return [
        f"The split column sets cells apart, not whole {scheme}s: {', '.join(both)} stand both in "
        "development and in test."
    ]


def _scheme(obs: pd.DataFrame, config: DesignConfig) -> str:
    has_units = bool((_column(obs, "unit") != "").any())
    if not has_units and config.scheme == "unit":
        if "technical_fold" not in obs:
            raise Refusal(
                "cells are held out by whole units, or by a technical_fold",
                "neither",
                "set unit_keys, or technical_fold to a column such as the plate",
            )
        return "technical_fold"
    if config.scheme not in obs:
        raise Refusal(
            f"scheme {config.scheme} needs the column {config.scheme}",
            "cells without",
            f"set {config.scheme}_key and curate again",
        )
    if config.scheme == "batch":
        pairs = obs[["exposure", "batch"]].astype(str).drop_duplicates()
        alone = pairs.groupby("exposure").size()
        if (alone < 2).any():
            raise Refusal(
                "a batch is held out only where batches and exposures are crossed",
                f"{', '.join(alone.index[alone < 2][:5])} in one batch only",
                "use scheme: unit",
            )
    return config.scheme


def _scheme_notes(table: pd.DataFrame, scheme: str, excluded: list[str]) -> list[str]:
    notes = []
    if scheme == "technical_fold":
        notes.append("replicated: false. Folds are technical: nothing biological is held out.")
    if excluded:
        notes.append(
            f"Pooled samples may span held-out units and take part in leave-line-out only: "
            f"{', '.join(excluded)} ({int(table['group'].isin(excluded).sum())} cells)."
        )
    if scheme in ("line", "batch") and table["spans"].any():
        notes.append(
            "Pooled samples, whose replicate is unknown, are kept: they may hold cells of the "
            "unit that calibrates."
        )
    if scheme in ("line", "batch"):
        spans = table.groupby("unit")["group"].nunique()
        spanning = sorted(str(unit) for unit in spans.index[spans > 1] if unit)
        if spanning and scheme == "line":
            raise Refusal(
                "a unit belongs to one line",
                f"{', '.join(spanning[:5])} in several",
                "put the line among unit_keys",
            )
        if spanning:
            notes.append(
                "Held-out batches share units with training: the figures are for new batches of "
                "known units."
            )
    return notes


def _split_values(obs: pd.DataFrame, config: DesignConfig) -> dict[str, str]:
    """Return what each value of an explicit split column means; empty: there is no such column."""
    if "split" not in obs:
        if config.split_values:
            raise Refusal("split_values explain a split column", "no such column", "set split_key")
        return {}
    found = sorted(set(_column(obs, "split")))
    usual = {"train": "train", "development": "train", "valid": "valid", "validation": "valid"}
    values = {**usual, "test": "test", **config.split_values}
    unknown = [value for value in found if value not in values]
    if unknown:
        raise Refusal(
            "the split column says train, valid or test",
            ", ".join(unknown[:5]),
            "map each value in design.split_values ('' leaves its cells out)",
        )
    used = {value: values[value] for value in found}
    if "train" not in used.values():
        raise Refusal("an explicit split has training cells", "none", "map a value to train")
    return used


def _explicit_parts(obs: pd.DataFrame, values: dict[str, str]) -> Array:
    said = _column(obs, "split")
    unknown = sorted(set(said) - set(values))
    if unknown:
        raise Refusal(
            "the split knows every value of the split column",
            ", ".join(unknown[:5]),
            "make the split again",
        )
    return np.array([values[value] for value in said], dtype=object)


def _share_of_cells(obs: pd.DataFrame, rest: Array, share: float, seed: int) -> Array:
    """Mark a share of each exposure's cells, lowest hash of the cell id first."""
    chosen = np.zeros(len(obs), dtype=bool)
    exposure, ids = _column(obs, "exposure"), [str(cell) for cell in obs.index]
    for name in sorted(set(exposure[rest])):
        where = np.flatnonzero(rest & (exposure == name))
        order = sorted(where, key=lambda i: rank(seed, "cell", ids[i]))
        n = min(max(round(share * len(where)), 1), len(where) - 1)
        chosen[order[:n]] = True
    return chosen


def _is_pooled(obs: pd.DataFrame) -> Array:
    if "is_pooled" in obs:
        return obs["is_pooled"].to_numpy(dtype=bool)
    return np.array(["?" in unit.split("|") for unit in _column(obs, "unit")], dtype=bool)


def _is_replicated(obs: pd.DataFrame) -> bool:
    pairs = obs[["exposure", "unit"]].astype(str).drop_duplicates()
    return bool((pairs[pairs["unit"] != ""].groupby("exposure").size() >= 2).all()) and bool(
        (pairs["unit"] != "").all()
    )


def _column(obs: pd.DataFrame, name: str) -> Array:
    if name not in obs:
        raise Refusal(f"curated cells have obs column {name}", "none", "curate them again")
    return obs[name].astype(str).to_numpy(dtype=object)
