"""How right scores were, once labels come: joined by cell id, judged by unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from endoprint import cells as door
from endoprint import metrics
from endoprint.cells import CellsConfig
from endoprint.config import Refusal
from endoprint.labels import canonical
from endoprint.scoring.columns import COLUMNS, P
from endoprint.scoring.summary import SCORES

CELL, FILE = "cell_id", "file"


def evaluate(scores: Path, labels: Path, *, cells: CellsConfig) -> dict[str, Any]:
    """Hold scores against labels that came later; return figures and what could not be joined.

    `scores`: the parquet or its folder. `labels`: CSV, parquet or h5ad with `cell_id` (an h5ad's
    own index) and the exposure (`cells.exposure_key`, or `exposure`); with `file` as well where
    ids stand in several files.
    """
    rows = _scores(scores)
    told = _labels(labels, cells)
    keys = [FILE, CELL] if FILE in told else [CELL]
    _refuse_doubles(told, keys, "labels")
    _refuse_doubles(rows[rows[CELL].isin(set(told[CELL]))], keys, "scores")
    joined = rows.merge(told, on=keys, how="inner", validate="one_to_one")
    known = [str(name)[2:] for name in rows.columns if str(name).startswith("p_")]
    is_known = joined["truth"].isin(known)
    strange = sorted(set(joined["truth"][~is_known]))
    judged = joined[is_known & joined["call"].notna()]
    if judged.empty:
        raise Refusal(
            "labels are exposures of cells that were scored",
            f"{len(joined)} of {len(told)} cells joined, of {len(rows)} scored; "
            f"unknown exposures: {', '.join(strange[:4]) or 'none'}",
            "check the cell ids and the spelling of the exposures",
        )
    return {
        "n_scored": len(rows),
        "n_labels": len(told),
        "n_joined": len(joined),
        "n_labels_without_score": len(told) - len(joined),
        "n_quarantined": int(joined["call"].isna().sum()),
        "unknown_exposures": {each: int((joined["truth"] == each).sum()) for each in strange},
        "n_judged": len(judged),
        "job_key": str(rows["job_key"].iloc[0]),
        "model_sha256": str(rows["model_sha256"].iloc[0]),
        **_figures(judged),
        "by_unit": {str(unit): _figures(part) for unit, part in judged.groupby("unit")},
    }


def _figures(judged: pd.DataFrame) -> dict[str, float | int | None]:
    truth = judged["truth"].astype(str)
    is_right = (truth == judged["call"]).to_numpy()
    shown = ~judged["abstain"].to_numpy(dtype=bool)
    return {
        "n_cells": len(judged),
        "macro_f1": float(metrics.f1_by_exposure(truth, judged["call"]).mean()),
        "accuracy": float(is_right.mean()),
        "share_shown": float(shown.mean()),
        "accuracy_of_shown": float(is_right[shown].mean()) if shown.any() else None,
        "mean_confidence": float(judged["confidence"].mean()),
    }


def _scores(path: Path) -> pd.DataFrame:
    rule, remedy = "scores are the parquet that `endoprint score` wrote", "name it, or its folder"
    path = path / SCORES if path.is_dir() else path
    try:
        rows = pd.DataFrame(pq.read_table(path).to_pandas())
    except (OSError, pa.ArrowInvalid) as error:
        raise Refusal(rule, str(error).split("\n")[0][:160], remedy) from None
    missing = [column.name for column in COLUMNS if column.name not in (P, *rows.columns)]
    if missing or not len(rows):
        raise Refusal(rule, f"{len(rows)} rows without {', '.join(missing) or 'cells'}", remedy)
    return rows


def _labels(path: Path, cells: CellsConfig) -> pd.DataFrame:
    rule = "labels are CSV, parquet or h5ad with cell_id and exposure"
    try:
        if path.suffix in (".h5ad", ".h5", ".zarr"):
            table = door.read_obs(path).rename_axis(None)
            table[CELL] = table.index.astype(str)
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            separator = "\t" if path.suffix in (".tsv", ".txt") else ","
            table = pd.read_csv(path, dtype=str, sep=separator)
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise Refusal(rule, str(error).split("\n")[0][:160], "check the path") from None
    found = [name for name in ("exposure", cells.exposure_key, "truth") if name in table]
    if CELL not in table or not found:
        raise Refusal(
            rule, f"columns {', '.join(map(str, table.columns[:6])) or 'none'} in {path.name}",
            f"name them {CELL} and exposure (or {cells.exposure_key})",
        )  # fmt: skip
    kept = table[[*([FILE] if FILE in table else []), CELL]].astype(str)
    said = table[found[0]].astype(object)
    named = {each: canonical(str(each), cells.aliases) or str(each) for each in said.unique()}
    kept["truth"] = said.map(named)
    return kept[said.notna()]


def _refuse_doubles(table: pd.DataFrame, keys: list[str], what: str) -> None:
    double = table.duplicated(keys)
    if double.any():
        raise Refusal(
            "labels join scores by cell id, one to one",
            f"{int(double.sum())} twice in the {what}, such as {table[CELL][double].iloc[0]!r}",
            "give the labels a column `file` as well, or name cells apart",
        )
