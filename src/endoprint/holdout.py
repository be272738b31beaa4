"""Which units are held out: chosen by hash, so that every exposure stays on both sides.

All functions take a table of cells (`group`, `unit`, `line`, `exposure`); a group is what is held
out whole, and only which group met which exposure is used, never how many cells or their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pandas as pd

from endoprint.config import Refusal

MOST_FOLDS = 5  # more folds cost fits and tell little more; a habit, not a law
UNITS_TO_SPARE_ONE = 3  # judging rule 3: fewer, and cells validate instead of a unit


def rank(seed: int, *names: str) -> str:
    """Return a hash that orders names the same way on every machine."""
    return hashlib.sha256("\0".join([str(seed), *names]).encode()).hexdigest()


def met(table: pd.DataFrame, by: str = "group") -> dict[str, frozenset[str]]:
    """Return which exposures each group holds."""
    pairs = table[[by, "exposure"]].drop_duplicates()
    return {str(name): frozenset(part) for name, part in pairs.groupby(by)["exposure"]}


def choose_test(
    table: pd.DataFrame, n_wanted: int | None, named: list[str], scheme: str, seed: int
) -> list[str]:
    """Return the groups no one sees before a promotion: one of each line first, by hash.

    A group is left in development if an exposure would otherwise have none there.
    """
    holds = met(table)
    if named:
        unknown = [name for name in named if name not in holds]
        if unknown:
            raise Refusal(
                f"test_units name {scheme}s of the cells",
                ", ".join(unknown),
                f"some of {', '.join(sorted(holds)[:8])}",
            )
        return sorted(set(named))
    n = len(holds)
    if n_wanted is None:
        n_wanted = 0 if scheme == "technical_fold" else n // 3 if n >= 6 else int(n >= 3)
    if n_wanted > n - 2 and n_wanted > 0:
        raise Refusal(
            f"at least two {scheme}s stay for development",
            f"n_test_units {n_wanted} of {n}",
            "lower n_test_units",
        )
    line = _line(table)
    chosen: list[str] = []
    while len(chosen) < n_wanted:
        rest = [group for group in holds if group not in chosen]
        covered = [line[group] for group in chosen]
        safe = [g for g in rest if _stays_covered(g, rest, holds)]
        if not safe:
            break
        chosen.append(
            min(
                safe,
                key=lambda g: (covered.count(line[g]), -len(holds[g]), rank(seed, "test", g)),
            )
        )
    return sorted(chosen)


def share_folds(
    development: pd.DataFrame, n_wanted: int | None, scheme: str, seed: int
) -> list[list[str]]:
    """Share development groups into folds: even in size, each exposure and line spread out."""
    holds = met(development)
    if len(holds) < 2:
        raise Refusal(
            f"at least two {scheme}s are there to develop on",
            ", ".join(holds) or "none",
            "hold out fewer, or use another scheme (line takes pooled samples, judging rule 3)",
        )
    n_folds = min(len(holds), MOST_FOLDS) if n_wanted is None else n_wanted
    if not 2 <= n_folds <= len(holds):
        raise Refusal(
            "n_folds lies between 2 and the number of development groups",
            f"{n_folds} for {len(holds)}",
            "set it to null",
        )
    line = _line(development)
    n_with = pd.Series([e for held in holds.values() for e in held]).value_counts()
    rarest = {group: min(int(n_with[e]) for e in held) for group, held in holds.items()}
    order = sorted(holds, key=lambda g: (rarest[g], line[g], rank(seed, "fold", g)))
    most = -(-len(holds) // n_folds)
    folds: list[list[str]] = [[] for _ in range(n_folds)]

    def crowding(group: str, fold: list[str]) -> tuple[float, int, int]:
        shared = sum(
            sum(e in holds[other] for other in fold) / int(n_with[e]) for e in sorted(holds[group])
        )
        return round(shared, 9), len(fold), sum(line[other] == line[group] for other in fold)

    for group in order:
        roomy = [fold for fold in folds if len(fold) < most]
        min(roomy, key=lambda fold: crowding(group, fold)).append(group)
    for fold in folds:
        left = set().union(*(holds[g] for g in holds if g not in fold))
        if len(left) < 2:
            raise Refusal(
                "every fold leaves two exposures or more to train on",
                f"{', '.join(sorted(left)) or 'none'} without {', '.join(fold)}",
                f"{scheme} and exposure are confounded: hold out something else",
            )
    return sorted(sorted(fold) for fold in folds)


def choose_validation(training: pd.DataFrame, seed: int) -> str:
    """Return the unit that calibrates: by hash, one that met every exposure first; "": none."""
    whole = training[~training["spans"]]
    holds = met(whole, "unit")
    if len(holds) < UNITS_TO_SPARE_ONE:
        return ""
    safe = [unit for unit in holds if _stays_covered(unit, list(holds), holds)]
    if not safe:
        return ""
    return min(safe, key=lambda unit: (-len(holds[unit]), rank(seed, "valid", unit)))


def name_gaps(
    table: pd.DataFrame,
    test: list[str],
    folds: list[list[str]],
    validation: list[str],
    development: pd.DataFrame,
    *,
    is_explicit: bool,
) -> list[str]:
    """Say, in sentences, which exposure is missing from which part."""
    exposures = set(table["exposure"])
    holds = met(development)
    notes = []
    tested = table[table["part"] == "test"] if is_explicit else table[table["group"].isin(test)]
    if test:
        notes += _gap(exposures - set(tested["exposure"]), f"the test part ({', '.join(test)})")
        notes += _gap(exposures - set(development["exposure"]), "development")
    else:
        notes.append(
            f"No test part is set apart: every figure is cross-fitted over {len(holds)} groups."
        )
    for number, fold in enumerate(folds):
        held = set().union(*(holds[group] for group in fold))
        left = set().union(*(holds[group] for group in holds if group not in fold))
        notes += _gap(held - left, f"the training part of fold {number}, which is judged on it")
        notes += _gap(set(development["exposure"]) - held, f"held-out part of fold {number}")
    if not all(validation):
        notes.append(
            "Some fits can not spare a whole unit: a share of their cells validates instead "
            "(calibration not unit-validated)."
        )
    by_unit = met(table, "unit")
    for unit in sorted(set(validation) - {""}):
        notes += _gap(set(development["exposure"]) - by_unit[unit], f"validation unit {unit}")
    return notes


def _gap(missing: set[str], part: str) -> list[str]:
    return [f"Missing from {part}: {', '.join(sorted(missing))}."] if missing else []


def _stays_covered(group: str, among: Iterable[str], holds: dict[str, frozenset[str]]) -> bool:
    left = set().union(*(holds[other] for other in among if other != group))
    return holds[group] <= left


def _line(table: pd.DataFrame) -> dict[str, str]:
    """Return one line per group; of several, the first by name."""
    first = table[["group", "line"]].drop_duplicates().groupby("group")["line"].min()
    return {str(group): str(line) for group, line in first.items()}
