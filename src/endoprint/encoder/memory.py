"""When memory runs out: the same step again, reading fewer cells at a time.

Cells that are not read at a time are read one portion after the other; what a portion needs is
forgotten and computed again on the way back (as GradCache does: Gao 2021, arXiv 2101.06983). The
optimiser's step stays that of the whole minibatch, batch normalisation included, so that a
machine with less memory makes the same model, in at most a third more time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from endoprint.config import Refusal

T = TypeVar("T")

log = logging.getLogger(__name__)

# torch's allocator on a processor raises no class of its own
ALLOCATOR_SAYS = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out, on a GPU, in torch or in numpy."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in ALLOCATOR_SAYS)


class Portions:
    """How many cells are read at a time: all, until memory says otherwise."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most  # cells; None: as many as a minibatch has

    def attempt(self, n_cells: int, step: Callable[[int], T], undo: Callable[[], None]) -> T:
        """Return what `step(cells at a time)` gives, halving until memory suffices.

        `undo` puts back whatever a step that failed has changed.
        """
        while True:
            most = min(self.most or n_cells, n_cells)
            try:
                return step(most)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).partition("\n")[0]
            # beyond the handler, where the error no longer holds the failed step's tensors
            undo()
            if most <= 1:
                raise Refusal(
                    "a training step must fit into memory one cell at a time",
                    said,
                    "lower block or max_length, freeze layers, or take a machine with more",
                )
            self.most = -(-most // 2)
            log.warning("memory ran out at %d cells at a time; going on with %d", most, self.most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class Moment:
    """What a step changes besides gradients: random numbers drawn, and running figures."""

    def __init__(self, module: nn.Module) -> None:
        self._random = torch.get_rng_state()
        self._on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self._kept = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self._random)
        if self._on_gpu is not None:
            torch.cuda.set_rng_state(self._on_gpu)
        for buffer, kept in self._kept:
            buffer.copy_(kept)
