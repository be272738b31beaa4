"""What is known about each cell: which columns hold its exposure, unit, line and batch.

The values become plain text under canonical names, joined by cell id.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd

from endoprint.config import Config, Refusal
from endoprint.labels import CANONICAL, CONTROL, canonical

Array = np.ndarray[Any, np.dtype[Any]]

UNKNOWN = "?"  # stands for a replicate nobody recorded; such a sample may span replicates
MISSING = ("", "nan", "NaN", "None", "NA", "N/A", "<NA>", UNKNOWN)
PLACEHOLDER_REASON = "placeholder exposure"


class Keys(Config):
    """Which columns of obs say what about a cell."""

    exposure_key: str = "condition"  # what the cell met
    control: str = CONTROL  # the vehicle's label, in any known spelling
    aliases: dict[str, str] = {}  # this file's spellings -> labels; whatever is named is accepted
    drop_labels: list[str] = []  # placeholders, not exposures: their cells go, counted

    unit_keys: list[str] = ["line", "replicate"]  # joined by "|"; []: no independent units
    unit_pattern: str | None = None  # regex on the joined value; its groups are the unit
    line_key: str | None = None  # cell line, for leave-line-out
    batch_key: str | None = None  # technical run; null: unknown, and said so
    sample_key: str | None = None  # what was one tube; null: unit, exposure and batch together
    cell_type_key: str | None = None
    technical_fold: str | None = None  # folds by this column where unit_keys is []
    split_key: str | None = None  # an explicit split; it overrides everything

    @property
    def control_label(self) -> str:
        """The control as curated cells spell it."""
        return canonical(self.control, self.aliases) or self.control


def annotate(obs: pd.DataFrame, keys: Keys, *, labelled: bool, flag: pd.Series) -> pd.DataFrame:
    """Return exposure, unit, line, batch, sample and cell type of each cell, as plain text.

    Placeholders are marked in `flag`. Unlabelled cells may lack any column.
    """
    index = obs.index.astype(str)
    out = pd.DataFrame(index=index)
    if labelled:
        out["exposure"] = _exposures(obs, keys, flag).to_numpy()
    out["unit"], out["is_pooled"] = _units(obs, keys, must=labelled)
    for name, key, missing in (
        ("line", keys.line_key, UNKNOWN),
        ("batch", keys.batch_key, None),
        ("cell_type", keys.cell_type_key, "unknown"),
        ("technical_fold", keys.technical_fold, None),
        ("split", keys.split_key, None),
    ):
        if key is not None and (labelled or key in obs):
            values = text(_column(obs, key, asked=_asked(name)))
            absent = values.isna() & (flag == "").to_numpy()
            if labelled and absent.any() and missing is None:
                raise Refusal(
                    f"every cell has a {name}",
                    f"{int(absent.sum())} cells without, in {key!r}",
                    f"fill them in, or set {_asked(name)} to null",
                )
            out[name] = values.fillna(missing if missing is not None else UNKNOWN).to_numpy()
    out["sample"] = _samples(obs, out, keys, must=labelled).to_numpy()
    return out


def text(values: pd.Series) -> pd.Series:
    """Return values as text, None where missing; 3.0 (a column with gaps) reads 3.

    Each by itself, so that a unit is spelled alike in whichever part of a file it stands.
    """
    if pd.api.types.is_float_dtype(values.dtype):
        code, numbers = pd.factorize(values)
        spelled = [str(int(one)) if float(one).is_integer() else str(one) for one in numbers]
        return pd.Series(np.array([*spelled, None], dtype=object)[code], values.index)
    if pd.api.types.infer_dtype(values) == "string":
        # few different words stand beside many cells; only of text is what is equal spelled alike
        code, found = pd.factorize(values.to_numpy(dtype=object))
        stripped = [word.strip() for word in found]
        named = [None if word in MISSING else word for word in stripped] + [None]
        return pd.Series(np.array(named, dtype=object)[code], values.index, dtype=object)
    words = values.astype(object).where(values.notna().to_numpy(), None)
    words = words.map(lambda value: None if value is None else str(value).strip())
    return words.where(~words.isin(MISSING), None).astype(object)


def _exposures(obs: pd.DataFrame, keys: Keys, flag: pd.Series) -> pd.Series:
    said = text(_column(obs, keys.exposure_key, asked="exposure_key"))
    is_placeholder = said.isin(keys.drop_labels).to_numpy()
    flag[is_placeholder] = PLACEHOLDER_REASON
    missing = said.isna().to_numpy()
    if missing.any():
        raise Refusal(
            "every cell has an exposure",
            f"{int(missing.sum())} cells without, in {keys.exposure_key!r}",
            "fill them in, or remove those cells",
        )
    known = {label: _label(label, keys) for label in sorted(set(said[~is_placeholder]))}
    unknown = [label for label, found in known.items() if found is None]
    if unknown:
        raise Refusal(
            "every exposure is a label of the atlas or declared in aliases",
            f"{', '.join(unknown[:8])}{' ...' if len(unknown) > 8 else ''} "
            f"in {keys.exposure_key!r}",
            f"map each in aliases (to itself, if it is its own name), or list placeholders in "
            f"drop_labels; labels of the atlas: {', '.join(CANONICAL[:3])} ...",
        )
    return said.map(lambda label: known.get(label) or "")


def _label(label: str, keys: Keys) -> str | None:
    found = canonical(label, keys.aliases)
    return label if found is None and label == keys.control else found


def _units(obs: pd.DataFrame, keys: Keys, *, must: bool) -> tuple[Array, Array]:
    """Return the unit of each cell and whether its replicate is unknown."""
    present = [key for key in keys.unit_keys if must or key in obs]
    if not present or (not must and len(present) < len(keys.unit_keys)):
        return np.full(len(obs), "", dtype=object), np.zeros(len(obs), dtype=bool)
    parts = [text(_column(obs, key, asked="unit_keys")) for key in present]
    is_pooled = np.any([part.isna().to_numpy() for part in parts], axis=0)
    is_lost = np.all([part.isna().to_numpy() for part in parts], axis=0)
    if must and is_lost.any():
        raise Refusal(
            "every cell belongs to a unit",
            f"{int(is_lost.sum())} cells without {' and '.join(present)}",
            "fill them in, or remove those cells",
        )
    joined = parts[0].fillna(UNKNOWN)
    for part in parts[1:]:
        joined = joined + "|" + part.fillna(UNKNOWN)
    if keys.unit_pattern is not None:
        joined = _extract(joined, keys.unit_pattern, must=must)
    return joined.to_numpy(dtype=object), is_pooled


def _extract(joined: pd.Series, pattern: str, *, must: bool) -> pd.Series:
    rule = "unit_pattern is a regular expression whose groups are the unit"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise Refusal(rule, f"{pattern!r}: {error}", "mend it, or set it to null") from None
    if not compiled.groups:
        raise Refusal(rule, f"{pattern!r} without a group", r"put the unit in brackets: (\d+)$")
    units = {}
    for value in sorted(set(joined)):
        if UNKNOWN in value.split("|"):
            units[value] = value
            continue
        match = compiled.search(value)
        if match is None or any(group is None for group in match.groups()):
            if not must:  # new cells may be named otherwise
                units[value] = value
                continue
            raise Refusal(rule, f"{value!r}, which {pattern!r} does not match", "mend the pattern")
        units[value] = "|".join(match.groups())
    return joined.map(units)


def _samples(obs: pd.DataFrame, out: pd.DataFrame, keys: Keys, *, must: bool) -> pd.Series:
    if keys.sample_key is not None and (must or keys.sample_key in obs):
        named = text(_column(obs, keys.sample_key, asked="sample_key")).fillna(UNKNOWN)
        return pd.Series(named.to_numpy(), index=out.index)
    parts = [out[name] for name in ("unit", "exposure", "batch") if name in out]
    parts = [part for part in parts if (part != "").any()]
    if not parts:
        return pd.Series("all cells", index=out.index)
    joined = parts[0]
    for part in parts[1:]:
        joined = joined + "|" + part
    return joined


def _column(obs: pd.DataFrame, key: str, *, asked: str) -> pd.Series:
    if key not in obs:
        raise Refusal(
            f"{asked} names a column of obs",
            f"no {key!r} among {', '.join(map(str, obs.columns)) or 'no columns'}",
            f"set {asked} to one of them",
        )
    column: pd.Series = obs[key]
    return column


def _asked(name: str) -> str:
    return name if name == "technical_fold" else f"{name}_key"
