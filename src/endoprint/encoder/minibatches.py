"""Minibatches of cells: which cells go together, and how their tokens are laid out in rows.

Attention over a whole cell costs the square of its length, and cutting a cell to its top genes
loses diffuse effects. So a cell's tokens are dealt like cards into `ceil(length / block)` rows,
every row a thinned copy of the whole cell, and attend within their row; each token keeps the
position of its true rank, and all of them reach the pooling. With `block` at or above a cell's
length the cell is one row, which is full attention, exactly.

No row depends on another cell, and padding is masked: a cell's answer ignores its neighbours.
While training, a random share of each cell's rows may be read per step: every row being a thinned
copy of the whole cell, the pooled vector stays unbiased and the step costs that share.

Shapes: B cells, N their tokens one after the other, R rows, T tokens of the widest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from endoprint.bins import Binned
from endoprint.encoder.packed import Packing
from endoprint.encoder.pooling import Pooling, level_weights, token_weights
from endoprint.tokens import Tokens

Array = np.ndarray[Any, np.dtype[Any]]
Sentences = Tokens | Binned  # genes by rank (Geneformer), or with levels (scGPT)

POOL = 16  # minibatches whose cells are sorted by length together: enough to leave little padding


@dataclass(frozen=True)
class Layout:
    """How a cell's tokens are laid out in rows and weighed."""

    block: int  # tokens that attend to each other; 0: the whole cell
    pooling: Pooling
    has_specials: bool  # tokens begin with `<cls>` and end with `<eos>`
    share: float = 1.0  # of a cell's rows read per training step, at least one
    max_rows: int = 0  # of a cell read per training step; 0: no limit


@dataclass(frozen=True)
class Minibatch:
    """Rows of tokens, and the cell each row belongs to."""

    cells_B: Array  # which cells, as numbers into the token lists
    ids_RT: Tensor
    positions_RT: Tensor  # rank of the token in its own cell
    weights_RT: Tensor  # share of the token in its cell's vector; 0 at padding
    mask_RT: Tensor | None  # True at tokens; None where no row is short
    owner_R: Tensor  # which of the B cells a row belongs to
    ids_N: Tensor  # all tokens of all cells, whatever the rows hold
    rank_weights_N: Tensor  # their rank weights, whatever the pooling
    starts_B: Tensor  # where each cell starts among them
    levels_RT: Tensor | None = None  # float32, where genes have levels; 0 at padding
    states_RTD: Tensor | None = None  # where learning begins, if they are known already
    packing: Packing | None = None  # where the tokens are, on a GPU, if some rows are short

    def to(self, device: torch.device) -> Minibatch:
        """Return the same minibatch on a device; a GPU fetches it while it computes."""

        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return Minibatch(
            cells_B=self.cells_B,
            ids_RT=move(self.ids_RT),
            positions_RT=move(self.positions_RT),
            weights_RT=move(self.weights_RT),
            mask_RT=None if self.mask_RT is None else move(self.mask_RT),
            owner_R=move(self.owner_R),
            ids_N=move(self.ids_N),
            rank_weights_N=move(self.rank_weights_N),
            starts_B=move(self.starts_B),
            levels_RT=None if self.levels_RT is None else move(self.levels_RT),
            states_RTD=None if self.states_RTD is None else move(self.states_RTD),
            packing=self._packed(device),
        )

    def _packed(self, device: torch.device) -> Packing | None:
        if self.packing is not None:
            return self.packing.to(device)
        # found here, on the processor: asking a GPU where its tokens are would wait for it
        if device.type != "cuda" or self.mask_RT is None:
            return None
        return Packing.of(self.mask_RT).to(device)

    def take(self, chosen: Array) -> Minibatch:
        """Return some of its cells, by their places in it (rising), before it went to a device."""
        owner_R, starts_B = self.owner_R.numpy(), self.starts_B.numpy()
        lengths_B = np.diff(np.append(starts_B, len(self.ids_N)))
        rows = np.isin(owner_R, chosen)
        tokens = np.isin(np.repeat(np.arange(len(starts_B)), lengths_B), chosen)
        n_columns = self.ids_RT.shape[1]
        mask_RT = None if self.mask_RT is None else self.mask_RT[rows]
        if mask_RT is not None:  # padding that was another cell's goes
            n_columns = int(mask_RT.sum(1).max())
            mask_RT = None if mask_RT[:, :n_columns].all() else mask_RT[:, :n_columns]

        def cut(tensor: Tensor) -> Tensor:
            return tensor[rows, :n_columns]

        return Minibatch(
            cells_B=self.cells_B[chosen],
            ids_RT=cut(self.ids_RT),
            positions_RT=cut(self.positions_RT),
            weights_RT=cut(self.weights_RT),
            mask_RT=mask_RT,
            owner_R=torch.from_numpy(np.searchsorted(chosen, owner_R[rows])),
            ids_N=self.ids_N[tokens],
            rank_weights_N=self.rank_weights_N[tokens],
            starts_B=torch.from_numpy(np.cumsum(lengths_B[chosen]) - lengths_B[chosen]),
            levels_RT=None if self.levels_RT is None else cut(self.levels_RT),
            states_RTD=None if self.states_RTD is None else cut(self.states_RTD),
        )

    def portions(self, most: int) -> list[Minibatch]:
        """Return it in portions of at most so many cells; itself, where that is all."""
        n_cells = len(self.cells_B)
        if most >= n_cells:
            return [self]
        return [
            self.take(np.arange(start, min(start + most, n_cells)))
            for start in range(0, n_cells, most)
        ]


def balanced(truth: Array, rng: np.random.Generator) -> Array:
    """Draw as many cells as there are, every exposure equally often (one more or less).

    truth (n,): which exposure each cell met. A cell of a rare exposure comes again only after all
    others of it came; of a common one, some stay out.
    """
    present = np.unique(truth)
    n_each = np.full(len(present), len(truth) // len(present))
    n_each[rng.permutation(len(present))[: len(truth) % len(present)]] += 1
    drawn = []
    for exposure, n in zip(present, n_each):
        cells = np.flatnonzero(truth == exposure)
        rounds = [rng.permutation(cells) for _ in range(-(-n // len(cells)))]
        drawn.append(np.concatenate(rounds)[:n] if rounds else cells[:0])
    return np.concatenate(drawn)


def plan(
    lengths: Array,
    *,
    cells: int,
    tokens: int,
    least: int = 1,
    rng: np.random.Generator | None = None,
) -> list[Array]:
    """Deal cells into minibatches of at most `cells` cells and `tokens` tokens, like with like.

    Without `rng` the cells are sorted by length; with it they are shuffled, sorted within pools
    and the minibatches shuffled again. Every cell is in exactly one minibatch. `least` cells stay
    together even where they exceed a limit, if there are so many.
    """
    n = len(lengths)
    if rng is None:
        pools = [np.argsort(lengths, kind="stable")]
    else:
        shuffled = rng.permutation(n)
        pools = [shuffled[i : i + POOL * cells] for i in range(0, n, POOL * cells)]
        pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
    dealt: list[Array] = []
    for pool in pools:
        start, used = 0, 0
        for i, cell in enumerate(pool):
            is_full = i - start >= cells or used + lengths[cell] > tokens
            if i - start >= least and is_full and len(pool) - i >= least:
                dealt.append(pool[start:i])
                start, used = i, 0
            used += int(lengths[cell])
        if start < len(pool):
            dealt.append(pool[start:])
    if rng is not None:
        dealt = [dealt[i] for i in rng.permutation(len(dealt))]
    return dealt


def assemble(
    tokens: Sentences, cells_B: Array, layout: Layout, rng: np.random.Generator | None = None
) -> Minibatch:
    """Lay out the tokens of some cells; with `rng`, only the rows that a training step reads."""
    starts_B = tokens.offsets[cells_B]
    lengths_B = (tokens.offsets[cells_B + 1] - starts_B).astype(np.int64)
    block = layout.block or int(lengths_B.max(initial=1))
    dealt_B = np.maximum(-(-lengths_B // block), 1)  # rows a cell's tokens are dealt into
    kept_B, first_B = dealt_B, np.zeros_like(dealt_B)
    if rng is not None:
        kept_B = np.maximum(np.rint(dealt_B * layout.share).astype(np.int64), 1)
        kept_B = np.minimum(kept_B, layout.max_rows or kept_B)
        first_B = rng.integers(dealt_B)

    cell_N = np.repeat(np.arange(len(cells_B)), lengths_B)
    begin_B = np.cumsum(lengths_B) - lengths_B
    rank_N = np.arange(len(cell_N)) - begin_B[cell_N]
    place_N = starts_B[cell_N] + rank_N
    ids_N = tokens.values[place_N].astype(np.int64)
    levels_N = tokens.levels[place_N] if isinstance(tokens, Binned) else None

    def weigh(pooling: Pooling) -> Array:
        if levels_N is not None:
            return level_weights(pooling, levels_N, rank_N, cell_N, len(cells_B))
        has_specials = layout.has_specials
        return token_weights(pooling, rank_N, lengths_B[cell_N], has_specials=has_specials)

    rank_weights_N = weigh("rank")
    weights_N = rank_weights_N if layout.pooling == "rank" else weigh(layout.pooling)
    turn_N = (rank_N - first_B[cell_N]) % dealt_B[cell_N]  # which of its cell's rows
    is_kept_N = turn_N < kept_B[cell_N]
    if not is_kept_N.all():
        weights_N = np.where(is_kept_N, weights_N, np.float32(0.0))
        total_B = np.bincount(cell_N, weights_N, minlength=len(cells_B))
        weights_N = weights_N / np.maximum(total_B, 1e-12)[cell_N]

    before_B = np.cumsum(kept_B) - kept_B
    cell, rank, turn = cell_N[is_kept_N], rank_N[is_kept_N], turn_N[is_kept_N]
    row, column = before_B[cell] + turn, rank // dealt_B[cell]
    shape = (int(kept_B.sum()), int(column.max(initial=0)) + 1)
    ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weights, is_token = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
    ids[row, column] = ids_N[is_kept_N]
    positions[row, column] = rank
    weights[row, column] = weights_N[is_kept_N]
    is_token[row, column] = True
    levels = None
    if levels_N is not None:
        levels = np.zeros(shape, dtype=np.float32)
        levels[row, column] = levels_N[is_kept_N]
    is_token[before_B[lengths_B == 0], 0] = True  # attention over nothing would be NaN
    return Minibatch(
        cells_B=cells_B,
        ids_RT=torch.from_numpy(ids),
        positions_RT=torch.from_numpy(positions),
        weights_RT=torch.from_numpy(weights),
        mask_RT=None if is_token.all() else torch.from_numpy(is_token),
        owner_R=torch.from_numpy(np.repeat(np.arange(len(cells_B)), kept_B)),
        ids_N=torch.from_numpy(ids_N),
        rank_weights_N=torch.from_numpy(rank_weights_N),
        starts_B=torch.from_numpy(begin_B),
        levels_RT=None if levels is None else torch.from_numpy(levels),
    )
