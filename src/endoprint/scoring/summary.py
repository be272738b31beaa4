"""What a scoring came to: counted from its rows, held against the input, written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from endoprint.config import Refusal
from endoprint.model import ExposureModel
from endoprint.scoring.inputs import Input, spelled
from endoprint.scoring.job import Job, Layout, Shard

SCORES, SUMMARY = "scores.parquet", "summary.json"


@dataclass(frozen=True)
class ScoreSummary:
    """What was scored, with what, and how it came out; written last, so it says all is there."""

    job_key: str  # hash of model, inputs, reading rules, columns and layout
    model_uri: str
    model_version: str
    model_sha256: str
    model: str
    exposures: list[str]
    inputs: list[Input]
    layout: Layout
    n_cells: int
    n_abstained: int
    n_novel: int
    n_unsure: int
    n_quarantined: int
    quarantined: dict[str, int]  # reason -> cells
    n_repeated_ids: int  # cell ids that stand in more than one file: told apart by `file`
    calls: dict[str, int]  # exposure -> cells not abstained from
    scores: str  # name of the parquet beside this file
    scores_sha256: str
    seconds: float
    by: str = ""  # the column whose populations the report tells of
    beside: dict[str, str] = field(default_factory=dict)  # what else stands here: name -> sha256
    was_done_before: bool = False  # the same job stood finished; nothing was computed

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> ScoreSummary:
        """Read a written summary."""
        values = json.loads(path.read_text())
        known = [Input(**each) for each in values["inputs"]]
        return cls(**{**values, "inputs": known, "layout": Layout(**values["layout"])})


class Tally:
    """Counts what is put together, and refuses rows that are not the input, cell for cell."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._n: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._ids = [hashlib.sha256() for _ in job.inputs]
        self._seen: list[list[Any]] = [[] for _ in job.inputs]  # where there are several files

    def add(self, shard: Shard, table: pa.Table) -> None:
        """Count one part."""
        ids = table["cell_id"].to_numpy()
        self._ids[shard.input].update(spelled(ids))
        if len(self._job.inputs) > 1:
            self._seen[shard.input].append(pd.util.hash_array(ids, categorize=False))
        self._n["cells"] += table.num_rows
        for name in ("abstain", "is_novel", "is_unsure"):
            self._n[name] += pc.sum(table[name]).as_py() or 0
        for name, into, kept in (
            ("quarantine", self._reasons, pc.not_equal(table["quarantine"], "")),
            ("call", self._calls, pc.invert(table["abstain"])),
        ):
            found = pc.value_counts(table[name].filter(kept)).to_pylist()
            into.update({each["values"]: each["counts"] for each in found})

    def close(self, model: ExposureModel, scores_sha256: str, seconds: float) -> ScoreSummary:
        """Return the summary; refuse ids that are not those the files list, in their order."""
        for known, digest in zip(self._job.inputs, self._ids):
            if digest.hexdigest() != known.ids_sha256:
                raise Refusal(
                    "every cell of a file is scored once, in its order",
                    f"{known.file} read apart",
                    "score it again when nothing writes to it",
                )
        version = self._job.version
        return ScoreSummary(
            job_key=self._job.key,
            model_uri=version.uri,
            model_version=version.version,
            model_sha256=version.sha256,
            model=model.name,
            exposures=list(model.exposures),
            inputs=self._job.inputs,
            layout=self._job.layout,
            n_cells=self._n["cells"],
            n_abstained=self._n["abstain"],
            n_novel=self._n["is_novel"],
            n_unsure=self._n["is_unsure"],
            n_quarantined=self._reasons.total(),
            quarantined=dict(sorted(self._reasons.items())),
            n_repeated_ids=self._n_repeated(),
            calls={exposure: self._calls[exposure] for exposure in model.exposures},
            scores=SCORES,
            scores_sha256=scores_sha256,
            seconds=seconds,
        )

    def _n_repeated(self) -> int:
        seen, n = np.empty(0, dtype=np.uint64), 0
        for parts in self._seen:
            if parts:
                own = np.concatenate(parts)
                n += int(np.isin(own, seen).sum())
                seen = np.union1d(seen, own)
        return n


def finished(out_dir: Path, key: str) -> ScoreSummary | None:
    """Return the summary of this very job, if it stands finished and its rows are as written."""
    try:
        summary = ScoreSummary.read(out_dir / SUMMARY)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # none, or one of another make: the job is done anew
    scores = out_dir / summary.scores
    is_same = summary.job_key == key and scores.is_file()
    if not is_same or sha256(scores) != summary.scores_sha256:
        return None
    return replace(summary, was_done_before=True)


def is_described(out_dir: Path, summary: ScoreSummary, by: str) -> bool:
    """Say whether what stands beside the scores is all there, and tells of these populations."""
    return summary.by == by and all(
        (out_dir / name).is_file() and sha256(out_dir / name) == digest
        for name, digest in summary.beside.items()
    )


def is_sealed(out_dir: Path, key: str) -> bool:
    """Say whether the summary of this very job was written."""
    try:
        return bool(json.loads((out_dir / SUMMARY).read_text())["job_key"] == key)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def write(path: Path, summary: ScoreSummary, *, beside: Path) -> None:
    """Write a summary whole or not at all; `beside`: a folder for the unfinished."""
    unfinished = beside / f".{path.name}.{os.getpid()}.part"
    text = json.dumps(summary.to_json(), indent=1, ensure_ascii=False) + "\n"
    unfinished.write_text(text)
    os.replace(unfinished, path)


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
