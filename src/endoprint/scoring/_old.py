"""Say of every cell of a file what it was exposed to: one row per cell, in the file's order.

Streams, so that memory does not grow with the file. Nothing is dropped: a cell that cannot be
judged keeps its row and says why. n cells, E exposures.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from anndata import AnnData

from endoprint import cells as door
from endoprint.cells import CellsConfig
from endoprint.config import Refusal
from endoprint.curated import LEAST_GENE_SHARE
from endoprint.lineage import hash_of
from endoprint.model import ExposureModel
from endoprint.registry import Version

Array = np.ndarray[Any, np.dtype[Any]]

FORMAT = 1  # of the parquet; a change of its columns or meaning is a new job
SCORES, SUMMARY = "scores.parquet", "summary.json"
KINDS = (".h5ad", ".h5", ".zarr")
CHUNK_CELLS = 4096  # cells in memory at once
NO_GENES = "no counts in the model's genes"
NO_ANSWER = "the model gave no finite answer"


@dataclass(frozen=True)
class Input:
    """One file of cells: which bytes it was when scoring began, and what was found in it."""

    file: str
    md5: str
    n_cells: int
    gene_share: float  # of the model's genes, those the file has


@dataclass(frozen=True)
class ScoreSummary:
    """What was scored, with what, and how it came out; written last, so it says all is there."""

    job_key: str  # hash of model, inputs, reading rules and format: the same key, the same rows
    model_uri: str
    model_version: str
    model_sha256: str
    model: str
    exposures: list[str]
    inputs: list[Input]
    n_cells: int
    n_abstained: int
    n_novel: int
    n_unscored: int
    n_repeated_ids: int  # cell ids that stand in more than one file: told apart by `file`
    flags: dict[str, int]  # reason -> cells
    calls: dict[str, int]  # exposure -> cells not abstained from
    scores: str  # name of the parquet beside this file
    scores_sha256: str
    seconds: float
    was_done_before: bool = False  # the same job stood finished; nothing was computed

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> ScoreSummary:
        """Read a written summary."""
        values = json.loads(path.read_text())
        return cls(**{**values, "inputs": [Input(**each) for each in values["inputs"]]})


def silent(done: int, total: int) -> None:
    """Show no progress."""


def score(
    model: ExposureModel,
    version: Version,
    path: Path,
    out_dir: Path,
    *,
    cells: CellsConfig,
    chunk_cells: int = CHUNK_CELLS,
    watch: Callable[[int, int], None] = silent,
) -> ScoreSummary:
    """Score a file, or every file of a folder, into `out_dir/scores.parquet` and `summary.json`.

    Columns: file, cell_id, sample, unit, p_<exposure> ..., call, confidence, second_call,
    second_confidence, novelty, is_novel, abstain, flag, n_counts, n_genes, known_share (of a
    cell's counts, those in the model's genes), model_version, model_sha256, input_md5, job_key.
    A cell without a count the model knows has no probabilities and no call. The same job again
    changes nothing; another job replaces the old one whole. `watch(done, total)` counts cells.
    """
    began = time.perf_counter()
    if Path(out_dir).exists() and not Path(out_dir).is_dir():
        raise Refusal("scores go into a folder", f"a file at {out_dir}", "name a folder")
    files = _files(Path(path))
    inputs = [_look_at(file, model, cells) for file in files]
    key = job_key(version.sha256, inputs, cells)
    out_dir = Path(out_dir)
    done = _finished(out_dir, key)
    if done is not None:
        return done
    out_dir.mkdir(parents=True, exist_ok=True)
    beside = out_dir / f".{SCORES}.{os.getpid()}.part"
    tally = _Tally(inputs, watch)
    try:
        schema = _schema(model.exposures)
        with pq.ParquetWriter(beside, schema, compression="zstd") as writer:
            for file, known in zip(files, inputs):
                for rows in _rows(model, file, cells, chunk_cells):
                    told = {"file": known.file, "input_md5": known.md5, "job_key": key}
                    told |= {"model_version": version.version, "model_sha256": version.sha256}
                    rows = rows.assign(**told)
                    writer.write_table(
                        pa.Table.from_pandas(rows[schema.names], schema, preserve_index=False)
                    )
                    tally.add(rows)
                tally.close(file, known)
        (out_dir / SUMMARY).unlink(missing_ok=True)  # says nothing about what now replaces it
        os.replace(beside, out_dir / SCORES)
    finally:
        beside.unlink(missing_ok=True)
    summary = ScoreSummary(
        job_key=key,
        model_uri=version.uri,
        model_version=version.version,
        model_sha256=version.sha256,
        model=model.name,
        exposures=list(model.exposures),
        inputs=inputs,
        n_cells=tally.n_cells,
        n_abstained=tally.n_abstained,
        n_novel=tally.n_novel,
        n_unscored=tally.n_unscored,
        n_repeated_ids=tally.n_repeated,
        flags=dict(sorted(tally.flags.items())),
        calls={exposure: tally.calls[exposure] for exposure in model.exposures},
        scores=SCORES,
        scores_sha256=_sha256(out_dir / SCORES),
        seconds=time.perf_counter() - began,
    )
    _write(out_dir / SUMMARY, summary)
    return summary


def job_key(model_sha256: str, inputs: list[Input], cells: CellsConfig) -> str:
    """Return what a job is known by: the same key means the same rows, byte for byte.

    Where the workspace's own cells lie is no rule of reading these.
    """
    return hash_of(
        {
            "model": model_sha256,
            "inputs": [[each.file, each.md5] for each in inputs],
            "cells": cells.model_dump(mode="json", exclude={"source", "pool"}),
            "format": FORMAT,
        }
    )


# -- what goes in -------------------------------------------------------------------------------
def _files(path: Path) -> list[Path]:
    """Return the files to score, in order of their names; hidden ones are still being written."""
    if not path.exists():
        raise Refusal("cells to score are a file or a folder", f"none at {path}", "check the path")
    if path.is_file() or path.suffix == ".zarr":
        return [path]
    found = sorted(
        each for each in path.iterdir() if each.suffix in KINDS and not each.name.startswith(".")
    )
    if not found:
        raise Refusal(
            f"a folder to score holds {', '.join(KINDS)} files", f"none in {path}", "put one there"
        )
    return found


def _look_at(file: Path, model: ExposureModel, cells: CellsConfig) -> Input:
    """Identify a file by its bytes, count its cells and see whether the model knows its genes."""
    with _naming(file):
        n_cells = len(door.read_obs(file))
        genes = next(door.chunks(file, cells, 1)).var_names
    known = float(np.isin(model.genes, genes).mean()) if model.genes else 0.0
    if known < LEAST_GENE_SHARE:
        raise Refusal(
            f"{file.name}: a file has at least {LEAST_GENE_SHARE:.0%} of the model's genes",
            f"{known:.1%} of {len(model.genes)} (the file's start {', '.join(genes[:3])})",
            "check gene_id_key and the species, or score with a model fitted on such genes",
        )
    return Input(file=file.name, md5=_md5(file), n_cells=n_cells, gene_share=known)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Let a refusal say which of several files it is about."""
    try:
        yield
    except Refusal as refusal:
        if file.name in refusal.rule:
            raise
        raise Refusal(f"{file.name}: {refusal.rule}", refusal.got, refusal.remedy) from None


def _md5(path: Path) -> str:
    """Return the md5 of a file's bytes; of a zarr folder, over its files' names and bytes."""
    if path.is_file():
        return door.md5(path)
    digest = hashlib.md5(usedforsecurity=False)
    for each in sorted(path.rglob("*")):
        if each.is_file():
            digest.update(f"{each.relative_to(path).as_posix()} {door.md5(each)}\n".encode())
    return digest.hexdigest()


# -- what comes out -----------------------------------------------------------------------------
def _rows(
    model: ExposureModel, file: Path, config: CellsConfig, chunk_cells: int
) -> Iterator[pd.DataFrame]:
    """Return the rows of a file, chunk by chunk, in its order."""
    with _naming(file):
        for chunk in door.chunks(file, config, chunk_cells):
            yield _judged(model, chunk)


def _judged(model: ExposureModel, chunk: AnnData) -> pd.DataFrame:
    """Return one row per cell of a chunk, (n, ...): probabilities, calls, doubts."""
    counts = chunk.X
    in_model = counts @ np.isin(chunk.var_names, model.genes).astype(np.float64)
    total = chunk.obs["n_counts"].to_numpy(dtype=np.float64)
    flag = chunk.obs["flag"].to_numpy(dtype=object).copy()
    flag[(in_model <= 0) & (flag == "")] = NO_GENES
    can_answer = in_model > 0
    probabilities = np.full((chunk.n_obs, len(model.exposures)), np.nan)
    novelty = np.full(chunk.n_obs, np.nan)
    if can_answer.any():
        some = chunk[can_answer].copy()
        probabilities[can_answer] = model.predict_proba(some).to_numpy()
        novelty[can_answer] = model.novelty(some)
    is_answered: Array = np.asarray(np.isfinite(probabilities).all(axis=1))
    flag[can_answer & ~is_answered & (flag == "")] = NO_ANSWER
    probabilities[~is_answered] = np.nan
    is_novel = novelty > model.novelty_threshold  # false where novelty is unknown
    order = np.argsort(-np.nan_to_num(probabilities), axis=1, kind="stable")
    names = np.asarray(model.exposures, dtype=object)
    every = np.arange(chunk.n_obs)
    rows: dict[str, Any] = {
        "cell_id": chunk.obs_names.astype(str),
        "sample": _text(chunk.obs, "sample"),
        "unit": _text(chunk.obs, "unit"),
        **{f"p_{name}": probabilities[:, i] for i, name in enumerate(model.exposures)},
        "call": _where(is_answered, names[order[:, 0]]),
        "confidence": probabilities[every, order[:, 0]],
        "second_call": _where(is_answered, names[order[:, 1]]),
        "second_confidence": probabilities[every, order[:, 1]],
        "novelty": novelty,
        "is_novel": is_novel,
        "abstain": is_novel | (flag != ""),
        "flag": flag,
        "n_counts": total,
        "n_genes": chunk.obs["n_genes"].to_numpy(dtype=np.int64),
        "known_share": np.divide(in_model, total, out=np.zeros_like(total), where=total > 0),
    }
    return pd.DataFrame(rows)


def _where(is_known: Array, values: Array) -> Array:
    """Return values, (n,), with None where nothing is known."""
    told = values.astype(object)
    told[~is_known] = None
    return told


def _text(obs: pd.DataFrame, column: str) -> Array:
    if column not in obs:
        return np.full(len(obs), "", dtype=object)
    return obs[column].astype(str).to_numpy(dtype=object)


def _schema(exposures: list[str]) -> pa.Schema:
    text, number, truth = pa.string(), pa.float64(), pa.bool_()
    columns = [("file", text), ("cell_id", text), ("sample", text), ("unit", text)]
    columns += [(f"p_{name}", number) for name in exposures]
    columns += [("call", text), ("confidence", number)]
    columns += [("second_call", text), ("second_confidence", number)]
    columns += [("novelty", number), ("is_novel", truth), ("abstain", truth), ("flag", text)]
    columns += [("n_counts", number), ("n_genes", pa.int64()), ("known_share", number)]
    columns += [(name, text) for name in ("model_version", "model_sha256", "input_md5", "job_key")]
    return pa.schema(columns)


class _Tally:
    """Counts what is written and refuses a result that is not the input, cell for cell."""

    def __init__(self, inputs: list[Input], watch: Callable[[int, int], None]) -> None:
        self.total = sum(each.n_cells for each in inputs)
        self.watch = watch
        self.n_cells = self.n_abstained = self.n_novel = self.n_unscored = self.n_repeated = 0
        self.flags: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._seen: set[int] = set()  # hashes of ids of the files before, where there are several
        self._is_alone = len(inputs) == 1
        self._of_file = hashlib.sha256()

    def add(self, rows: pd.DataFrame) -> None:
        self.n_cells += len(rows)
        self.n_abstained += int(rows["abstain"].sum())
        self.n_novel += int(rows["is_novel"].sum())
        self.n_unscored += int(rows["call"].isna().sum())
        self.flags.update(rows["flag"][rows["flag"] != ""])
        self.calls.update(rows["call"][~rows["abstain"]])
        self._of_file.update(_spelled(rows["cell_id"]))
        if not self._is_alone:
            ids = {hash(cell) for cell in rows["cell_id"]}
            self.n_repeated += len(ids & self._seen)
            self._seen |= ids
        self.watch(self.n_cells, self.total)

    def close(self, file: Path, known: Input) -> None:
        """Refuse a file whose written ids are not those it lists, or that changed meanwhile."""
        listed = door.read_obs(file).index.astype(str)
        changed = _md5(file) != known.md5
        if changed or self._of_file.digest() != hashlib.sha256(_spelled(listed)).digest():
            raise Refusal(
                "every cell of a file is scored once, in its order",
                f"{file.name} changed while it was read" if changed else f"{file.name} read apart",
                "score it again when nothing writes to it",
            )
        self._of_file = hashlib.sha256()


def _spelled(ids: Iterable[str]) -> bytes:
    return "".join(f"{cell}\n" for cell in ids).encode()


# -- disk ---------------------------------------------------------------------------------------
def _finished(out_dir: Path, key: str) -> ScoreSummary | None:
    """Return the summary of this very job, if it stands finished and its rows are as written."""
    try:
        summary = ScoreSummary.read(out_dir / SUMMARY)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # none, or one of another make: the job is done anew
    scores = out_dir / SCORES
    is_same = summary.job_key == key and scores.is_file()
    if not is_same or _sha256(scores) != summary.scores_sha256:
        return None
    return replace(summary, was_done_before=True)


def _write(path: Path, summary: ScoreSummary) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    text = json.dumps(summary.to_json(), indent=1, ensure_ascii=False) + "\n"
    beside.write_text(text)
    os.replace(beside, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
