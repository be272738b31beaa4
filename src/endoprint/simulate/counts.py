"""Draw negative-binomial counts, exactly and fast: gamma rates, Poisson counts, dense in blocks.

A block is drawn densely by NumPy (about 50 ns per cell and gene, the law itself and no shortcut:
thinning and inversion were considered and are not needed) and kept sparse. Each block owns a
random stream numbered by its place, and NumPy frees the interpreter while it draws, so threads
help and their number changes nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from scipy import sparse

Array = np.ndarray[Any, np.dtype[Any]]
Watch = Callable[[int, int], None]  # (cells done, cells in all)

BLOCK_ENTRIES = 2**18  # cells x genes of a block: 1 MiB of float32 stays in the cache


def silent(done: int, total: int) -> None:
    """Watch nothing."""


@dataclass(frozen=True)
class Means:
    """Expected counts of n cells, factored: library x share x product of effects.

    `library` (n,); each factor is a table (rows, G) of float32 and the row of each cell (n,).
    """

    library: Array
    factors: tuple[tuple[Array, Array], ...]

    def block(self, start: int, stop: int) -> Array:
        """Return the expected counts of some cells, (stop - start, G)."""
        (table, row), *others = self.factors
        mean = table[row[start:stop]]
        for table, row in others:
            mean *= table[row[start:stop]]
        mean *= self.library[start:stop, None].astype(np.float32)
        return mean


def n_threads() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2


def draw(
    means: Means,
    *,
    dispersion: float,
    seed: int,
    part: str,
    watch: Watch = silent,
    threads: int | None = None,
) -> sparse.csr_matrix:
    """Draw one count per cell and gene; variance is m + dispersion * m^2. CSR float32, (n, G)."""
    n, n_genes = len(means.library), means.factors[0][0].shape[1]
    step = max(1, BLOCK_ENTRIES // n_genes)
    shape = 1.0 / dispersion

    def block(start: int) -> tuple[Array, Array, Array]:
        rng = np.random.Generator(np.random.SFC64([seed, crc32(part.encode()), start // step]))
        rate = means.block(start, min(start + step, n))
        rate *= rng.standard_gamma(shape, size=rate.shape, dtype=np.float32)
        rate *= np.float32(dispersion)
        count = rng.poisson(rate)
        where = np.flatnonzero(count)
        return (
            count.ravel()[where].astype(np.float32),
            (where % n_genes).astype(np.int32),
            np.count_nonzero(count, axis=1),
        )

    blocks: list[tuple[Array, Array, Array]] = []
    starts = range(0, n, step)
    waiting: deque[Future[tuple[Array, Array, Array]]] = deque()
    workers = threads or n_threads()
    with ThreadPoolExecutor(workers) as crew:
        for i, start in enumerate(starts):
            waiting.append(crew.submit(block, start))
            if len(waiting) > 4 * workers or i == len(starts) - 1:
                while waiting and (i == len(starts) - 1 or len(waiting) > 2 * workers):
                    blocks.append(waiting.popleft().result())
                    watch(min(n, len(blocks) * step), n)
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([b[2] for b in blocks]))])
    data = np.concatenate([b[0] for b in blocks])
    indices = np.concatenate([b[1] for b in blocks])
    return sparse.csr_matrix((data, indices, indptr), shape=(n, n_genes))
