"""What the frozen part of an encoder makes of each cell, and what it is known by.

A token's state depends on its cell, the frozen weights and which tokens attend to each other, not
on the rows that a training step happens to read: so the states of all tokens of a cell are kept,
in order of rank, and a step takes those of its rows.

Shapes: R rows, T tokens of a row, D width, B cells, N tokens one after the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from endoprint import progress
from endoprint.bins import Binned
from endoprint.encoder.activations import Activations, Held
from endoprint.encoder.minibatches import Layout, Minibatch, Sentences, assemble, plan
from endoprint.encoder.network import Reader

Array = np.ndarray[Any, np.dtype[Any]]


class States:
    """The states of some cells where learning begins: read from disk, else computed."""

    def __init__(self, network: Reader, tokens: Sentences, held: Held) -> None:
        self._network, self._offsets, self._held = network, tokens.offsets, held

    def put(self, minibatch: Minibatch) -> Minibatch:
        """Return the minibatch with the states of its tokens; they are zero at padding."""
        shape = (*minibatch.ids_RT.shape, self._held.width)
        states_RTD = torch.zeros(shape)
        into = states_RTD.numpy()
        owner_R, positions_RT = minibatch.owner_R.numpy(), minibatch.positions_RT.numpy()
        mask = minibatch.mask_RT
        n_tokens_R = np.full(shape[0], shape[1]) if mask is None else mask.numpy().sum(axis=1)
        is_absent_R = np.zeros(shape[0], dtype=bool)
        for row, owner in enumerate(owner_R):
            cell = int(minibatch.cells_B[owner])
            if not self._held.has(cell):
                is_absent_R[row] = True
            elif self._offsets[cell + 1] > self._offsets[cell]:
                n = n_tokens_R[row]
                into[row, :n] = self._held.rows(cell, positions_RT[row, :n])
        if is_absent_R.any():
            absent = torch.from_numpy(is_absent_R)
            states_RTD[absent] = self._compute(_rows(minibatch, absent))
        return replace(minibatch, states_RTD=states_RTD)

    def _compute(self, minibatch: Minibatch) -> torch.Tensor:
        with torch.no_grad():
            device = self._network.head.weight.device
            return self._network.frozen_states(minibatch.to(device)).cpu()


def states_of(
    network: Reader,
    tokens: Sentences,
    layout: Layout,
    store: Activations,
    *,
    minibatch_tokens: int,
) -> States:
    """Return the states of cells where learning begins, kept in `store` as far as it has room."""
    width = network.head.in_features
    whole = replace(layout, share=1.0, max_rows=0)

    def compute(cells: Array) -> Array:
        lengths = np.diff(tokens.offsets)[cells]
        start = np.cumsum(lengths) - lengths
        rows_ND = np.empty((int(lengths.sum()), width), dtype=np.float32)
        for chosen in plan(lengths, cells=256, tokens=minibatch_tokens):
            minibatch = assemble(tokens, cells[chosen], whole)
            owner_R, positions_RT = minibatch.owner_R.numpy(), minibatch.positions_RT.numpy()
            found = network.frozen_states(minibatch.to(network.head.weight.device)).cpu().numpy()
            # a cell without tokens has a row all the same, of padding
            is_token = np.repeat((lengths[chosen] > 0)[owner_R][:, None], found.shape[1], axis=1)
            if minibatch.mask_RT is not None:
                is_token &= minibatch.mask_RT.numpy()
            place_RT = start[chosen][owner_R][:, None] + positions_RT
            rows_ND[place_RT[is_token]] = found[is_token]
        return rows_ND

    kind = _kind(network, "states", layout.block)
    lengths = np.diff(tokens.offsets)
    held = _hold(network, tokens, store, kind, lengths, width, compute)
    return States(network, tokens, held)


def vectors_of(
    network: Reader,
    tokens: Sentences,
    layout: Layout,
    store: Activations | None,
    *,
    minibatch_tokens: int,
) -> Array:
    """Return the pooled vector of every cell, (n, D) float32, all its rows read."""
    width, lengths = network.head.in_features, np.diff(tokens.offsets)
    whole = replace(layout, share=1.0, max_rows=0)

    def compute(cells: Array) -> Array:
        found = np.empty((len(cells), width), dtype=np.float32)
        for chosen in plan(lengths[cells], cells=256, tokens=minibatch_tokens):
            minibatch = assemble(tokens, cells[chosen], whole)
            found[chosen] = network.pool(minibatch.to(network.head.weight.device)).cpu().numpy()
        return found

    one_each = np.ones(len(lengths), dtype=np.int64)
    if store is None:
        store = Activations(Path(), gib=0.0)  # keeps nothing
    kind = _kind(network, "vectors", layout.block, layout.pooling, layout.has_specials)
    held = _hold(network, tokens, store, kind, one_each, width, compute)
    is_absent = np.array([not held.has(cell) for cell in range(len(lengths))], dtype=bool)
    vectors = np.empty((len(lengths), width), dtype=np.float32)
    with torch.inference_mode(), progress.task("read cells", int(is_absent.sum())):
        vectors[is_absent] = compute(np.flatnonzero(is_absent))
    for cell in np.flatnonzero(~is_absent):
        vectors[cell] = held.rows(int(cell), slice(None))[0]
    return vectors


def _hold(
    network: Reader,
    tokens: Sentences,
    store: Activations,
    kind: str,
    n_rows: Array,
    width: int,
    compute: Callable[[Array], Array],
) -> Held:
    network.eval()
    with torch.inference_mode(), progress.task("read frozen layers", len(n_rows)) as step:
        return store.hold(kind, _keys(tokens), n_rows, width, compute, told=step)


def _kind(network: Reader, *told: object) -> str:
    """Return what the frozen part is known by: its shape and weights, and how it is asked."""
    embeddings, layers = network.stages()
    device = network.head.weight.device.type
    said = [network.shape(), network.n_frozen, network.uses_bf16, device, *map(str, told)]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for part in (*embeddings, *layers[: network.n_frozen]):
        _digest(digest, part)
    return digest.hexdigest()[:32]


def _digest(digest: Any, part: nn.Module) -> None:
    for key, tensor in part.state_dict().items():
        digest.update(key.encode() + np.ascontiguousarray(tensor.cpu().numpy()).data)


def _keys(tokens: Sentences) -> list[str]:
    """Return what each cell is known by: its tokens, and their levels where they have some."""
    keys = []
    for start, end in zip(tokens.offsets[:-1], tokens.offsets[1:]):
        digest = hashlib.blake2b(tokens.values[start:end].tobytes(), digest_size=16)
        if isinstance(tokens, Binned):
            digest.update(tokens.levels[start:end].tobytes())
        keys.append(digest.hexdigest())
    return keys


def _rows(minibatch: Minibatch, chosen_R: torch.Tensor) -> Minibatch:
    """Return some rows of a minibatch, for reading alone."""
    mask, levels = minibatch.mask_RT, minibatch.levels_RT
    return replace(
        minibatch,
        ids_RT=minibatch.ids_RT[chosen_R],
        positions_RT=minibatch.positions_RT[chosen_R],
        mask_RT=None if mask is None else mask[chosen_R],
        levels_RT=None if levels is None else levels[chosen_R],
    )
