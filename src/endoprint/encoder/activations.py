"""What frozen layers say of a cell, kept on disk: computed once for all fits that ask the same.

Entries are known by content (`kind`: whose layers, how laid out; a key per cell: its tokens), so
trials, folds and processes of a workspace share them, and a wrong one cannot be met. They lie in
files of many cells, memory-mapped, each with a checksum that is compared before it is believed: a
damaged file is deleted and its cells are read anew. The folder stays below its bound; what was
used longest ago goes first. Where the disk is full, or may not be written to, a fit goes on
without.

Shapes: n cells, N rows of all cells one after the other, D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from safetensors.numpy import save

Array = np.ndarray[Any, np.dtype[Any]]
Precision = Literal["fp32", "fp16"]
Compute = Callable[[Array], Array]  # numbers of cells -> their rows, (N, D) float32

log = logging.getLogger(__name__)

SHARD_BYTES = 32 * 2**20  # per file: few files, and little to read anew where one is damaged
PATIENCE_SECONDS = 60  # for another process that is writing; then a fit goes on without
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Shard:
    """One file: the rows of some cells."""

    path: Path
    cells: dict[str, tuple[int, int]]  # key -> first row, number of rows
    rows: Array  # (N, D), memory-mapped


class Held:
    """The rows of some cells, as far as they are kept."""

    def __init__(self, keys: list[str], n_rows: Array, width: int) -> None:
        self._keys, self._n_rows, self.width = keys, n_rows, width
        self._found: dict[str, tuple[Array, int]] = {}

    def add(self, shard: Shard) -> None:
        """Take the cells of a file."""
        for key, (start, n_rows) in shard.cells.items():
            self._found[key] = (shard.rows[start : start + n_rows], n_rows)

    def has(self, cell: int) -> bool:
        """Say whether a cell is kept; one without rows always is."""
        found = self._found.get(self._keys[cell])
        n_rows = int(self._n_rows[cell])
        return not n_rows or (found is not None and found[1] == n_rows)

    def rows(self, cell: int, chosen: Array | slice) -> Array:
        """Return some rows of a cell that is kept, float32."""
        return np.asarray(self._found[self._keys[cell]][0][chosen], dtype=np.float32)


class Activations:
    """A folder of rows per cell that never grows beyond its bound."""

    def __init__(self, folder: Path, *, gib: float, precision: Precision = "fp32") -> None:
        self.folder = folder
        self._most_bytes = int(gib * 2**30)
        self._dtype = np.dtype(np.float32 if precision == "fp32" else np.float16)
        self._in_use: set[Path] = set()  # never removed to make room for others of the same fit
        self._has_failed = False

    def hold(
        self,
        kind: str,
        keys: list[str],
        n_rows: Array,
        width: int,
        compute: Compute,
        told: Callable[[int], None] = lambda n: None,
    ) -> Held:
        """Return the rows of cells, computing and keeping those that are not here yet.

        keys (n,), n_rows (n,): rows per cell. `told` hears of cells computed. Cells for which
        there is no room are not kept: whoever reads asks `Held.has`.
        """
        kind = f"{kind}-{self._dtype.name}-{width}"
        held = Held(keys, n_rows, width)
        wanted = set(keys)
        for shard in self._shards(self.folder / kind, wanted):
            held.add(shard)
        row_bytes = width * self._dtype.itemsize
        missing = {key: i for i, key in enumerate(keys) if not held.has(i)}  # each content once
        most = min(SHARD_BYTES, self._most_bytes // 4)
        for cells in _chunks(list(missing.values()), n_rows * row_bytes, most):
            if self._has_failed or not self._has_room(int(n_rows[cells].sum()) * row_bytes):
                break
            rows = compute(np.array(cells)).astype(self._dtype)
            kept = self._keep(kind, [keys[i] for i in cells], n_rows[cells], rows)
            if kept is not None:
                held.add(kept)
            told(len(cells))
        return held

    # -- reading --------------------------------------------------------------------------------
    def _shards(self, folder: Path, wanted: set[str]) -> Iterator[Shard]:
        """Give every sound file that tells of a wanted cell; a damaged one is deleted."""
        try:
            paths = sorted(folder.glob(f"*{SUFFIX}"))
        except OSError:
            return
        for path in paths:
            try:
                shard = _read(path, wanted, self._dtype)
            except FileNotFoundError:
                continue  # another process made room
            except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
                log.warning("%s is damaged (%s): its cells are read anew", path.name, error)
                path.unlink(missing_ok=True)
                continue
            if shard is not None:
                self._in_use.add(path)
                try:
                    os.utime(path)
                except OSError:
                    log.debug("%s keeps its old time", path)  # a folder that is only read
                yield shard

    # -- writing --------------------------------------------------------------------------------
    def _has_room(self, n_bytes: int) -> bool:
        """Say whether so much fits beside what this fit uses."""
        own = sum(_size(path) for path in self._in_use)
        return own + n_bytes + 4096 <= self._most_bytes

    def _keep(self, kind: str, keys: list[str], n_rows: Array, rows: Array) -> Shard | None:
        """Write a file whole, others making room; None, said once, where it cannot be."""
        starts = np.cumsum(n_rows) - n_rows
        cells = {key: [int(a), int(n)] for key, a, n in zip(keys, starts, n_rows)}
        told = json.dumps(cells)
        content = save({"rows": rows}, {"cells": told, "crc32": _checksum(told, rows)})
        # named by its cells: processes that compute the same replace each other's file
        name = hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()
        path = self.folder / kind / f"{name}{SUFFIX}"
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock", timeout=PATIENCE_SECONDS):
                self._make_room(len(content))
                try:
                    part.write_bytes(content)
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
            self._in_use.add(path)
            return _read(path, set(keys), self._dtype)
        except (OSError, ValueError, Timeout) as error:
            self._has_failed = True
            log.warning("frozen layers are not kept: %s; the fit goes on, slower", error)
            return None

    def _make_room(self, n_bytes: int) -> None:
        """Delete what was used longest ago, and what killed processes left half written."""
        for orphan in self.folder.rglob("*.part"):
            orphan.unlink(missing_ok=True)
        files = sorted(self.folder.rglob(f"*{SUFFIX}"), key=_used)
        total = sum(_size(path) for path in files)
        for path in files:
            if total + n_bytes <= self._most_bytes:
                break
            if path not in self._in_use:
                total -= _size(path)
                path.unlink(missing_ok=True)


def _chunks(cells: list[int], n_bytes: Array, most: int) -> Iterator[list[int]]:
    """Deal cells into files of at most so many bytes, or of one cell."""
    chunk: list[int] = []
    used = 0
    for cell in cells:
        size = int(n_bytes[cell])
        if chunk and used + size > most:
            yield chunk
            chunk, used = [], 0
        chunk.append(cell)
        used += size
    if chunk:
        yield chunk


def _read(path: Path, wanted: set[str], dtype: np.dtype[Any]) -> Shard | None:
    """Return a file's rows after comparing its checksum; None if it tells of no wanted cell."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length < size:
            raise ValueError("no header")
        header = json.loads(stream.read(length))
    told, rows = header["__metadata__"], header["rows"]
    cells = {key: (int(start), int(n)) for key, (start, n) in json.loads(told["cells"]).items()}
    if wanted.isdisjoint(cells):
        return None
    shape = (int(rows["shape"][0]), int(rows["shape"][1]))
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=8 + length, shape=shape)
    if size != 8 + length + mapped.nbytes or _checksum(told["cells"], mapped) != told["crc32"]:
        raise ValueError("another checksum")
    return Shard(path, cells, mapped.view(np.ndarray))


def _checksum(told: str, rows: Array) -> str:
    """Return the CRC-32 of a file's table and rows, 2 GB/s: against damage, not against malice."""
    return f"{zlib.crc32(rows.data.cast('B'), zlib.crc32(told.encode())):08x}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
