"""A copy of the cells with their scores in it, the way scanpy and its kin read them.

`obs`: endoprint_<column>; `obsm["endoprint_probabilities"]`: a table, one column per exposure;
`uns["endoprint"]`: where the answers come from. Nothing else of the file changes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import pandas as pd
import pyarrow.parquet as pq
from anndata.io import read_elem, write_elem

from endoprint.config import Refusal
from endoprint.scoring.summary import ScoreSummary

PREFIX = "endoprint_"
TAKEN = (
    "call", "confidence", "second_call", "second_confidence", "novelty", "is_novel", "is_unsure",
    "abstain", "quarantine", "known_share",
)  # fmt: skip


def refuse_unwritable(files: list[str], out: Path) -> None:
    """Refuse, before anything is scored, what can not be annotated."""
    rule = "--annotate copies one h5ad file with its scores in it"
    if len(files) != 1 or Path(files[0]).suffix != ".h5ad" or not h5py.is_hdf5(files[0]):
        got = f"{len(files)} files" if len(files) != 1 else Path(files[0]).name
        raise Refusal(rule, got, "score h5ad files one by one, or join scores.parquet by cell_id")
    if out.suffix != ".h5ad" or out.is_dir():
        raise Refusal(rule, f"to {out.name}", "name a file that ends in .h5ad")
    if out.exists() and out.samefile(files[0]):
        raise Refusal(rule, "the input itself, which is never changed", "name another file")


def annotate(summary: ScoreSummary, scored: Path, scores: Path, out: Path) -> Path:
    """Copy the scored file to `out` and write its scores into the copy; whole or not at all.

    `scored`: where the file lies now; the summary says where it lay when it was scored first.
    Counts are copied as bytes, never read; only the table of cells is in memory.
    """
    (known,) = summary.inputs
    taken = [*TAKEN, *(f"p_{exposure}" for exposure in summary.exposures)]
    rows = pq.read_table(scores, columns=["cell_id", *taken]).to_pandas().set_index("cell_id")
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(scored, beside)
        except OSError as error:
            rule = "--annotate writes a copy of the cells"
            raise Refusal(rule, str(error), "name a place with room for it") from None
        with h5py.File(beside, "r+") as file:
            obs = pd.DataFrame(read_elem(file["obs"]))
            rows = rows.loc[obs.index.astype(str)]  # by cell id, never by position
            rows.index = obs.index
            for name in TAKEN:
                values = rows[name]
                obs[PREFIX + name] = pd.Categorical(values) if values.dtype == object else values
            table = rows[[f"p_{exposure}" for exposure in summary.exposures]]
            write_elem(file, "obs", obs)
            for group in ("obsm", "uns"):
                if group not in file:
                    write_elem(file, group, {})
            write_elem(
                file["obsm"], PREFIX + "probabilities", table.set_axis(summary.exposures, axis=1)
            )
            told = {
                "model": summary.model_uri, "model_sha256": summary.model_sha256,
                "job_key": summary.job_key, "input_md5": known.md5,
            }  # fmt: skip
            write_elem(file["uns"], "endoprint", told)
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    return out
