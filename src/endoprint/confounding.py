"""The audit: what the experiment's design lets anyone tell apart, and what it does not.

Exposures and batches form a bipartite graph: an exposure is *identifiable* if a path of shared
batches leads from it to the control (judging rule 4). Without one, whatever a model learns about
the exposure may as well be the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from endoprint.annotations import text
from endoprint.config import Refusal
from endoprint.labels import CONTROL, canonical, find_control

NO_BATCH = "batch unknown: confounding cannot be excluded"
ALONE = "alone"  # a group that meets one exposure only


@dataclass(frozen=True)
class Audit:
    """What stands with what in an experiment, and the sentences every result must print."""

    control: str
    n_cells: int
    exposures: list[str]
    units: list[str]
    batches: list[str]
    lines: list[str]
    confounded: bool | None  # None: batch unknown
    replicated: bool  # every exposure, the control too, in at least two units
    units_crossed: bool | None  # every unit met every exposure; None: no units
    lines_crossed: bool | None  # every line met every exposure; None: no lines
    identifiable: dict[str, bool]  # exposure -> connected to the control by shared batches
    overlap: dict[str, list[str]]  # exposure -> batches it shares with the control directly
    batches_by_exposure: dict[str, list[str]]
    units_by_exposure: dict[str, list[str]]
    lines_by_exposure: dict[str, list[str]]
    cells: dict[str, dict[str, int]]  # exposure -> unit -> cells
    what_with_what: list[str]  # which exposure can not be told from which batch
    warnings: list[str]  # plain sentences, the gravest first

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def audit(
    obs: pd.DataFrame,
    *,
    exposure: str,
    units: Sequence[str],
    batch: str | None,
    control: str | None = None,
    line: str | None = None,
) -> Audit:
    """Say what the design confounds, from columns of `obs` (raw or curated).

    `units` are joined by "|"; empty, or a column that is "" throughout, means no independent
    units. `control` defaults to the label that reads as the vehicle.
    """
    if obs.empty:
        raise Refusal("an audit needs cells", "none", "check the file")
    table = pd.DataFrame({"exposure": _whole(obs, exposure)})
    table["unit"] = _joined(obs, units)
    table["batch"] = "" if batch is None else _whole(obs, batch)
    table["line"] = "" if line is None else _whole(obs, line)
    exposures = sorted(set(table["exposure"]))
    control = _control(exposures, control)
    has = {name: bool((table[name] != "").any()) for name in ("unit", "batch", "line")}
    by = {name: _by_exposure(table, name) if has[name] else {} for name in has}
    reached = _reached(by["batch"], control) if has["batch"] else set(exposures)
    confounded = None if not has["batch"] else bool(set(exposures) - reached)
    replicated = has["unit"] and all(len(held) >= 2 for held in by["unit"].values())
    overlap = {
        name: sorted(set(held) & set(by["batch"][control]))
        for name, held in by["batch"].items()
        if name != control
    }
    crossed = {name: _crossed(table, by[name], name) for name in ("unit", "line")}
    counted = table.groupby(["exposure", "unit"], sort=True).size()
    tied = [] if not confounded else _tied(by["batch"], set(exposures) - reached)
    return Audit(
        control=control,
        n_cells=len(table),
        exposures=exposures,
        units=_values(table, "unit"),
        batches=_values(table, "batch"),
        lines=_values(table, "line"),
        confounded=confounded,
        replicated=replicated,
        units_crossed=crossed["unit"],
        lines_crossed=crossed["line"],
        identifiable={name: name in reached for name in exposures} if has["batch"] else {},
        overlap=overlap,
        batches_by_exposure=by["batch"],
        units_by_exposure=by["unit"],
        lines_by_exposure=by["line"],
        cells={name: {u: int(n) for u, n in counted[name].items()} for name in exposures},
        what_with_what=tied,
        warnings=_warnings(confounded, replicated, tied, overlap, by, crossed, has["unit"]),
    )


def _warnings(
    confounded: bool | None,
    replicated: bool,
    tied: list[str],
    overlap: dict[str, list[str]],
    by: dict[str, dict[str, list[str]]],
    crossed: dict[str, bool | None],
    has_units: bool,
) -> list[str]:
    said = []
    if not has_units:
        said.append(
            "replicated: false. There are no independent units: an exposure can not be told from "
            "the one culture that met it, and no figure says how another culture would behave."
        )
    elif not replicated:
        once = [
            f"{name} ({', '.join(held)})" for name, held in by["unit"].items() if len(held) < 2
        ]
        said.append(f"replicated: false. In one unit only: {_some(once)}.")
    if confounded is None:
        said.append(f"{NO_BATCH}.")
    elif confounded:
        said.append(
            "confounded: true. Accuracy is an upper bound that includes recognising the batch: "
            + _some(tied)
            + "."
        )
    indirect = [name for name, shared in overlap.items() if not shared and confounded is False]
    if indirect:
        said.append(
            "Compared with the control only through other exposures, sharing no batch with it: "
            + _some(indirect)
            + "."
        )
    for name, ok in crossed.items():
        if ok is False:
            every = {value for held in by[name].values() for value in held}
            lacking = [
                f"{exposure} lacks {len(every) - len(held)} of {len(every)}"
                for exposure, held in by[name].items()
                if len(held) < len(every)
            ]
            said.append(f"Not every exposure met every {name}: {_some(lacking)}.")
    return said


def _tied(batches: dict[str, list[str]], unreached: set[str]) -> list[str]:
    return [
        f"{name} stands only in batch {' and '.join(batches[name])}, without the control"
        for name in sorted(unreached)
    ]


def _reached(batches: dict[str, list[str]], control: str) -> set[str]:
    """Return the exposures in the control's connected component."""
    reached, new = set[str](), {control}
    while new:
        reached |= new
        met = {batch for name in new for batch in batches[name]}
        new = {name for name, held in batches.items() if met & set(held)} - reached
    return reached


def _crossed(table: pd.DataFrame, by: dict[str, list[str]], name: str) -> bool | None:
    if not by:
        return None
    n_groups = len(_values(table, name))
    return all(len(held) == n_groups for held in by.values())


def _by_exposure(table: pd.DataFrame, name: str) -> dict[str, list[str]]:
    pairs = table[["exposure", name]].drop_duplicates()
    return {str(exposure): sorted(part) for exposure, part in pairs.groupby("exposure")[name]}


def _values(table: pd.DataFrame, name: str) -> list[str]:
    return sorted(set(table[name]) - {""})


def _control(exposures: list[str], control: str | None) -> str:
    if control is None:
        found = find_control(exposures)
        if found is None:
            raise Refusal(
                "an audit needs to know the control",
                f"none or several that read as one among {_some(exposures)}",
                "name it with --control",
            )
        return found
    if control in exposures:
        return control
    same = [name for name in exposures if canonical(name) == (canonical(control) or control)]
    if len(same) == 1:
        return same[0]
    raise Refusal(
        "the control is among the exposures",
        f"no {control!r} among {_some(exposures)}",
        f"name the vehicle's label ({CONTROL} in the atlas)",
    )


def _joined(obs: pd.DataFrame, units: Sequence[str]) -> pd.Series:
    parts = [_whole(obs, key) for key in units]
    if not parts:
        return pd.Series("", index=obs.index)
    joined = parts[0]
    for part in parts[1:]:
        joined = joined + "|" + part
    return joined


def _whole(obs: pd.DataFrame, key: str) -> pd.Series:
    if key not in obs:
        raise Refusal(
            "an audit names columns of obs",
            f"no {key!r} among {', '.join(map(str, obs.columns)) or 'no columns'}",
            "check the spelling",
        )
    if (obs[key].astype(str) == "").all():
        return pd.Series("", index=obs.index)
    return text(obs[key]).fillna("?")


def _some(names: Sequence[str], n: int = 12) -> str:
    told = "; ".join(names[:n])
    return told if len(names) <= n else f"{told}; and {len(names) - n} more"
