"""Several processes that train one model together: the same command under `torchrun`.

Every process plans the same minibatches and reads its own cells of each; gradients and batch
normalisation are summed over all of them, each cell weighing the same wherever it was read. So
the step is that of one process with the whole minibatch. One process alone is a team of one, for
which all of this is nothing.

Only the lead (rank 0) talks to MLflow and writes files. `rank` is always a process's number here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from endoprint.config import Refusal
from endoprint.encoder.memory import is_out_of_memory

T = TypeVar("T")
Array = np.ndarray[Any, np.dtype[Any]]


class Team:
    """Who trains together, as one of them sees it."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_lead(self) -> bool:
        """Whether this process talks for all."""
        return self.rank == 0

    def mine(self, n: int) -> Array:
        """Return which of `n` things are this process's: every `size`-th, so lengths are even."""
        return np.arange(self.rank, n, self.size)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, in place, by their sums over all processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, torch.split(flat, [each.numel() for each in tensors])):
            tensor.copy_(summed.view_as(tensor))

    def told(self, values: T) -> T:
        """Return the lead's values, which JSON knows, on every process."""
        if self.size == 1:
            return values
        text = json.dumps(values).encode() if self.is_lead else b""
        length = torch.tensor([len(text)])
        dist.broadcast(length, src=0)
        held = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_lead:
            held = torch.tensor(list(text), dtype=torch.uint8)
        dist.broadcast(held, src=0)
        found: T = json.loads(bytes(held.numpy()))
        return found

    def refuse_unless_alike(self, is_found: bool) -> None:
        """Refuse processes of which some see a checkpoint and others do not."""
        n_found = torch.tensor([float(is_found)])
        self.add_up([n_found])
        if n_found.item() not in (0.0, float(self.size)):
            raise Refusal(
                "all processes of a team see the same workspace",
                f"{int(n_found.item())} of {self.size} find the checkpoint to go on from",
                "put the workspace on a file system that all machines share",
            )

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Let memory that ran out on one process be the end of the attempt on all of them."""
        if self.size == 1:
            yield
            return
        ran_out = False
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        on_any = torch.tensor([float(ran_out)])  # on the processor: a GPU goes on meanwhile
        dist.all_reduce(on_any)
        if on_any.item():
            raise torch.OutOfMemoryError("memory ran out on a process of the team")


def here() -> Team:
    """Return the team that this process is in."""
    if dist.is_available() and dist.is_initialized():
        return Team(dist.get_rank(), dist.get_world_size())
    return Team()


def is_asked_for() -> bool:
    """Say whether `torchrun` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[Team]:
    """Join the team that `torchrun` started, if it did, while the block runs."""
    if not is_asked_for():
        yield Team()
        return
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # what is said between processes goes over the processor, sums of gradients over the GPUs
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    try:
        yield here()
    finally:
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum over all processes, which gradients pass through."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone()
        dist.all_reduce(summed)
        return summed


def _sum(tensor: Tensor) -> Tensor:
    summed: Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]
    return summed


class TeamNorm(nn.BatchNorm1d):
    """Batch normalisation over the cells of all processes; torch's own needs GPUs."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        n_cells = torch.tensor([float(len(input))], device=input.device)
        dist.all_reduce(n_cells)
        mean_D = _sum(input.sum(0)) / n_cells
        centred_BD = input - mean_D
        var_D = _sum(centred_BD.square().sum(0)) / n_cells
        with torch.no_grad():
            share = self.momentum or 0.0
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean_D, share)
            self.running_var.lerp_(var_D * (n_cells / (n_cells - 1)), share)
            self.num_batches_tracked.add_(1)
        normed_BD: Tensor = centred_BD * torch.rsqrt(var_D + self.eps)
        return normed_BD

    @classmethod
    def over(cls, norm: nn.BatchNorm1d) -> TeamNorm:
        """Return one that keeps its running figures in another's place."""
        made = cls(norm.num_features, norm.eps, norm.momentum, affine=False)
        made.running_mean, made.running_var = norm.running_mean, norm.running_var
        made.num_batches_tracked = norm.num_batches_tracked
        return made
