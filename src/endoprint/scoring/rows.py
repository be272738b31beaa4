"""A model's answers about some cells as rows of scores: probabilities, calls, doubts.

n cells, E exposures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from anndata import AnnData
from threadpoolctl import threadpool_limits

from endoprint.curated import EXACT_IN_FLOAT32
from endoprint.model import ExposureModel
from endoprint.scoring.columns import NO_ANSWER, NO_GENES, schema

Array = np.ndarray[Any, np.dtype[Any]]

_LOCK = Lock()
_INSIDE: list[int] = []  # threads that each worker of this process asked for
_BEFORE: list[tuple[Any, int]] = []  # what gives BLAS its own number back, and torch's


def rows(model: ExposureModel, cells: AnnData) -> pa.Table:
    """Return one row per cell, (n, ...), in their order: the columns that tell cells apart."""
    in_model, total, reason = _known(model, cells)
    is_fine = reason == ""  # what can not be trusted is not asked about
    probabilities, novelty = _asked(model, cells, is_fine)
    is_answered: Array = np.asarray(np.isfinite(probabilities).all(axis=1))
    reason[is_fine & ~is_answered] = NO_ANSWER
    probabilities[~is_answered] = np.nan
    first, second, confidence, second_confidence = _best_two(probabilities)
    is_novel = novelty > model.novelty_threshold  # false where novelty is unknown
    is_unsure = confidence < model.abstention_threshold
    names = pa.array(model.exposures, pa.string())
    told: dict[str, Any] = {
        "cell_id": cells.obs_names.to_numpy(dtype=object),
        "sample": _text(cells, "sample"),
        "unit": _text(cells, "unit"),
        **{f"p_{name}": probabilities[:, i] for i, name in enumerate(model.exposures)},
        "call": names.take(pa.array(first, mask=~is_answered)),
        "confidence": confidence,
        "second_call": names.take(pa.array(second, mask=~is_answered)),
        "second_confidence": second_confidence,
        "novelty": novelty,
        "is_novel": is_novel,
        "is_unsure": is_unsure,
        "abstain": is_novel | is_unsure | (reason != ""),
        "quarantine": reason,
        "n_counts": total,
        "n_genes": cells.obs["n_genes"].to_numpy(dtype=np.int64),
        "known_share": np.divide(in_model, total, out=np.zeros_like(total), where=total > 0),
    }
    fields = [field for field in schema(model.exposures) if field.name in told]
    columns = [
        told[field.name]
        if isinstance(told[field.name], pa.Array)
        else pa.array(told[field.name], field.type, from_pandas=True)
        for field in fields
    ]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def stamped(table: pa.Table, same: Mapping[str, str], wanted: pa.Schema) -> pa.Table:
    """Return rows with the columns that have one value for all, in the order of `wanted`."""
    columns = [
        pa.repeat(pa.scalar(same[field.name], field.type), table.num_rows)
        if field.name in same
        else table[field.name]
        for field in wanted
    ]
    return pa.Table.from_arrays(columns, schema=wanted)


@contextmanager
def with_threads(n: int) -> Iterator[None]:
    """Compute with so many threads: their number can change a sum's last bits.

    The number is the whole process's, from the first of several workers in it until the last.
    """
    torch = sys.modules.get("torch")  # never loaded only to be told
    with _LOCK:
        if not _INSIDE:
            before = torch.get_num_threads() if torch is not None else 0
            _BEFORE.append((threadpool_limits(limits=n), before))
        _INSIDE.append(n)
    if torch is not None:
        torch.set_num_threads(n)  # of this thread
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE.remove(n)
            if not _INSIDE:
                limits, before = _BEFORE.pop()
                if torch is not None and before:
                    torch.set_num_threads(before)
                limits.restore_original_limits()


def _known(model: ExposureModel, cells: AnnData) -> tuple[Array, Array, Array]:
    """Return counts in the model's genes and in all, (n,), and why a cell is quarantined."""
    # an index, not numpy.isin, which sorts the names: nine tenths of scoring's time were that;
    # and the cells' own, which is kept from part to part
    is_known = np.zeros(cells.n_vars, dtype=np.float32)
    place = cells.var_names.get_indexer(model.genes)
    is_known[place[place >= 0]] = 1
    total = cells.obs["n_counts"].to_numpy(dtype=np.float64)
    # counts are stored as float32, whose whole numbers are exact so far; above, they are copied
    is_exact = total.max(initial=0) < EXACT_IN_FLOAT32
    in_model: Array = np.asarray(
        cells.X @ (is_known if is_exact else is_known.astype(np.float64)), dtype=np.float64
    )
    reason = cells.obs["flag"].to_numpy(dtype=object).copy()
    reason[(in_model <= 0) & (reason == "")] = NO_GENES
    return in_model, total, reason


def _asked(model: ExposureModel, cells: AnnData, can_answer: Array) -> tuple[Array, Array]:
    """Return probabilities (n, E) and novelty (n,), NaN for cells that no model could judge."""
    if can_answer.all():
        return model.predict_proba(cells).to_numpy().copy(), model.novelty(cells)
    probabilities = np.full((cells.n_obs, len(model.exposures)), np.nan)
    novelty = np.full(cells.n_obs, np.nan)
    if can_answer.any():
        some = cells[can_answer].copy()
        probabilities[can_answer] = model.predict_proba(some).to_numpy()
        novelty[can_answer] = model.novelty(some)
    return probabilities, novelty


def _best_two(probabilities: Array) -> tuple[Array, Array, Array, Array]:
    """Return the columns of the first and second call and their probabilities, each (n,)."""
    order = np.argsort(-np.nan_to_num(probabilities), axis=1, kind="stable")[:, :2]
    best = np.take_along_axis(probabilities, order, axis=1)
    return order[:, 0], order[:, 1], best[:, 0], best[:, 1]


def _text(cells: AnnData, column: str) -> Array:
    if column not in cells.obs:
        return np.full(cells.n_obs, "", dtype=object)
    told: Array = cells.obs[column].astype(str).to_numpy(dtype=object)
    return told
