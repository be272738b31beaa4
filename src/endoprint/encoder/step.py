"""One step of learning, whatever is learned: gradients within memory, added up, clipped, taken."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from endoprint.config import Refusal
from endoprint.encoder.memory import Moment, Portions
from endoprint.encoder.team import Team

CHECKED_EVERY = 50  # steps; a GPU that is asked for every loss stands idle meanwhile

Gradients = Callable[[int], Tensor]  # cells read at a time -> this process's part of the loss


class Steps:
    """The steps of a run: parameters, optimiser, and how many cells fit into memory at a time."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, *, clip: float, team: Team
    ) -> None:
        self.portions = Portions()
        self._module, self._optimizer, self._clip, self._team = module, optimizer, clip, team

    def take(self, n_cells: int, gradients: Gradients) -> Tensor:
        """Take one step; return the loss, which nobody has waited for yet.

        `gradients(most)` leaves the gradients of `n_cells` cells of this process on the parameters
        while reading at most `most` of them at a time.
        """
        moment = Moment(self._module)

        def anew(most: int) -> Tensor:
            self._optimizer.zero_grad(set_to_none=True)
            return gradients(most)

        loss = self.portions.attempt(n_cells, anew, moment.restore)
        held = [p.grad for p in self._module.parameters() if p.grad is not None]
        self._team.add_up([loss, *held])
        nn.utils.clip_grad_norm_(self._module.parameters(), self._clip)
        self._optimizer.step()
        return loss


class Losses:
    """The losses of one epoch, step by step; one that is not finite ends the run."""

    def __init__(self, epoch: int, remedy: str) -> None:
        self._epoch, self._remedy = epoch, remedy  # epoch counted from 0
        self._read: list[float] = []
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Take a step's loss; on a processor it is read at once."""
        self._unread.append(loss)
        if loss.device.type == "cpu" or len(self._unread) >= CHECKED_EVERY:
            self._check()

    def mean(self) -> float:
        """Return the mean over the steps."""
        self._check()
        return float(np.mean(self._read))

    def _check(self) -> None:
        if not self._unread:
            return
        values = torch.stack(self._unread).cpu().tolist()
        self._unread = []
        for value in values:
            self._read.append(value)
            if not np.isfinite(value):
                raise Refusal(
                    "the training loss must stay finite",
                    f"{value} at epoch {self._epoch + 1}, step {len(self._read)}",
                    self._remedy,
                )
