"""What goes into a scoring: which files, which bytes, and whether a model can read them."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from endoprint import cells as door
from endoprint import sources, stored
from endoprint.cells import CellsConfig
from endoprint.config import Refusal
from endoprint.curated import LEAST_GENE_SHARE, raw_counts, refuse_double_cells
from endoprint.genes import Panel
from endoprint.model import ExposureModel

Array = np.ndarray[Any, np.dtype[Any]]

KINDS = (".h5ad", ".h5", ".zarr")
FIRST_LOOK = 256  # cells read to see whether a file holds counts at all
MOSTLY = 0.5  # impossible cells among them beyond which the file is no file of counts


@dataclass(frozen=True)
class Input:
    """One file of cells: which bytes it was when scoring began, and what was found in it."""

    file: str
    path: str
    md5: str  # of its bytes; "" before they were read
    signature: str  # size and time of change: whether the bytes are still those
    n_cells: int
    gene_share: float  # of the model's genes, those the file has
    ids_sha256: str  # of its cell ids in order: the rows must come to the same
    table_md5: str = ""  # of the obs table beside it, if there is one


class Reading:
    """An open file: any range of its cells as a model takes them, each with its `flag`."""

    def __init__(self, found: stored.Stored, config: CellsConfig) -> None:
        self.found, self._config = found, config
        self._panel: Panel | None = None

    def part(self, start: int, stop: int) -> AnnData:
        """Return cells start to stop, curated, none removed."""
        block = self.found.part(start, stop)
        told, self._panel = door.to_score(block, self._config, self._panel)
        return told


def find(where: str | Path) -> list[Path]:
    """Return the files that a path names, in order of their names: one, a folder's, or a glob's.

    Hidden ones are still being written.
    """
    path = Path(where)
    if not path.exists() and glob.has_magic(str(where)):
        found = [Path(each) for each in glob.glob(str(where), recursive=True)]
        found = sorted(each for each in found if _may_be_cells(each))
        if not found:
            raise Refusal("a pattern names files of cells", f"none for {where}", "check it")
        names = [each.name for each in found]
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise Refusal(
                "files scored together have names of their own",
                f"{double} in several folders",
                "score them one by one, or name them apart",
            )
        return found
    if not (path.is_file() or path.is_dir()):  # a pipe or a device neither ends nor reads twice
        got = f"{'neither' if path.exists() else 'none'} at {path}"
        raise Refusal("cells to score are a file or a folder", got, "check the path")
    if path.is_file() or path.suffix == ".zarr" or sources.is_zarr(path) or stored.is_mtx(path):
        return [path]
    found = sorted(
        each
        for each in path.iterdir()
        if (each.suffix in KINDS or stored.is_mtx(each)) and _may_be_cells(each)
    )
    if not found:
        raise Refusal(
            f"a folder to score holds {', '.join(KINDS)} files or 10x folders",
            f"none in {path}",
            "put one there",
        )
    return found


def _may_be_cells(path: Path) -> bool:
    """Leave out hidden files, links that lead nowhere, pipes and devices."""
    return not path.name.startswith(".") and (path.is_file() or path.is_dir())


def look_at(path: Path, model: ExposureModel, config: CellsConfig, scratch: Path) -> Input:
    """Say what a file holds, and refuse one that this model can not score; no md5 is taken yet."""
    state, table = signature(path), path.parent / config.obs_table
    with naming(path), opened(path, config, scratch) as reading:
        found = reading.found
        if not found.n_cells or not len(found.var):
            raise Refusal(
                "there are cells and genes",
                f"{found.n_cells} x {len(found.var)}",
                "check the file",
            )
        ids_sha256 = _ids(found)
        first = found.part(0, min(FIRST_LOOK, found.n_cells))
        told = reading.part(0, min(FIRST_LOOK, found.n_cells))
        flags = told.obs["flag"].to_numpy(dtype=object)
        if np.isin(flags, door.IMPOSSIBLE).mean() > MOSTLY:
            raw_counts(first.X, where="X", remedy="set layer to where raw counts are")
        genes = told.var_names
    known = float((genes.get_indexer(model.genes) >= 0).mean()) if model.genes else 0.0
    if known < LEAST_GENE_SHARE:
        raise Refusal(
            f"{path.name}: a file has at least {LEAST_GENE_SHARE:.0%} of the model's genes",
            f"{known:.1%} of {len(model.genes)} (the file's start {', '.join(genes[:3])})",
            "check gene_id_key and the species, or score with a model fitted on such genes",
        )
    return Input(
        file=path.name,
        path=str(path),
        md5="",
        signature=state,
        n_cells=found.n_cells,
        gene_share=known,
        ids_sha256=ids_sha256,
        table_md5=md5(table) if config.obs_table and table.is_file() else "",
    )


@contextmanager
def opened(
    path: Path, config: CellsConfig, scratch: Path, also: Sequence[str] = ()
) -> Iterator[Reading]:
    """Open a file for scoring; `also` names further columns of obs that someone will ask for."""
    columns = sorted({*door.columns_to_score(config), *also})
    with stored.opened(
        path, layer=config.layer, columns=columns, obs_table=config.obs_table, scratch=scratch
    ) as found:
        yield Reading(found, config)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a refusal say which of several files it is about."""
    try:
        yield
    except Refusal as refusal:
        if path.name in refusal.rule:
            raise
        raise Refusal(f"{path.name}: {refusal.rule}", refusal.got, refusal.remedy) from None


def spelled(ids: Sequence[str] | Array) -> bytes:
    """Return cell ids as the bytes they are hashed by."""
    return "".join(f"{cell}\n" for cell in ids).encode()


def md5(path: Path) -> str:
    """Return the md5 of a file's bytes; of a folder, over its files' names and bytes."""
    if path.is_file():
        return door.md5(path)
    digest = hashlib.md5(usedforsecurity=False)
    for each in _inside(path):
        digest.update(f"{each.relative_to(path).as_posix()} {door.md5(each)}\n".encode())
    return digest.hexdigest()


def signature(path: Path) -> str:
    """Return size and time of change of a file, or of all files of a folder."""
    files = [path] if path.is_file() else _inside(path)
    states = [each.stat() for each in files]
    told = [f"{each.st_size} {each.st_mtime_ns} {each.st_ino}" for each in states]
    return hashlib.md5("\n".join(told).encode(), usedforsecurity=False).hexdigest()


def refuse_changed(known: Input) -> None:
    """Refuse a file that is no longer the one looked at."""
    path = Path(known.path)
    if not path.exists() or signature(path) != known.signature:
        raise Refusal(
            "every cell of a file is scored once, in its order",
            f"{known.file} changed while it was read",
            "score it again when nothing writes to it",
        )


def _inside(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.is_file())


def _ids(found: stored.Stored) -> str:
    """Return the digest of all cell ids; refuse one that stands twice. Eight bytes per cell."""
    digest, hashes = hashlib.sha256(), []
    for ids in found.all_ids():
        digest.update(spelled(ids))
        hashes.append(pd.util.hash_array(ids, categorize=False))
    sorted_hashes = np.sort(np.concatenate(hashes))
    double = sorted_hashes[1:][sorted_hashes[1:] == sorted_hashes[:-1]]
    if len(double):  # equal ids, or two that happen to share a hash
        same = [
            cell
            for ids in found.all_ids()
            for cell in ids[np.isin(pd.util.hash_array(ids, categorize=False), double)]
        ]
        refuse_double_cells(pd.Index(same))
    return digest.hexdigest()
