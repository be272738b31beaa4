"""LoRA: learn a small correction to each matrix of an encoder that is otherwise left as it is.

A weight W becomes W + (alpha / rank) up @ down, with `up` zero at the start (Hu 2021,
arXiv 2106.09685), so that training begins with the encoder itself. Before anything is saved the
correction is added into W: a model fine-tuned so is an ordinary one, and answers at its cost.

What it saves is memory: two moments of the optimiser for 2 x rank numbers per row instead of for
every weight. On a processor it saves hardly any time (docs/performance.md).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from endoprint.config import Refusal
from endoprint.encoder.network import Reader

Matrices = Literal["attention", "all"]


class LowRank(nn.Module):
    """The correction to one matrix."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        if rank > min(n_out, n_in):
            raise Refusal(
                "a correction has a lower rank than its matrix",
                f"lora_rank {rank}, matrix {n_out} x {n_in}",
                "lower lora_rank",
            )
        self.down = nn.Parameter(weight.new_empty(rank, n_in))
        self.up = nn.Parameter(weight.new_zeros(n_out, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as a linear layer's
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """Return the matrix with its correction."""
        return weight + self.scale * (self.up @ self.down)


def adapt(network: Reader, *, rank: int, alpha: float, matrices: Matrices, seed: int) -> None:
    """Freeze an encoder and give the matrices of its layers corrections that learn.

    Layers frozen before get none. `matrices`: those of attention, or the feed-forward parts' too.
    """
    embeddings, layers = network.stages()
    adapted = layers[network.n_frozen :]
    if not adapted:
        raise Refusal(
            "LoRA corrects layers that are not frozen",
            f"{network.n_frozen} of {len(layers)} layers frozen",
            "lower frozen_layers, or set lora_rank to 0",
        )
    for part in (*embeddings, *layers):
        part.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in adapted:
            for module, name, weight in _matrices(layer, matrices):
                parametrize.register_parametrization(module, name, LowRank(weight, rank, alpha))


def merge(network: Reader) -> None:
    """Add every correction into its matrix; the network is an ordinary one again."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _matrices(layer: nn.Module, which: Matrices) -> list[tuple[nn.Module, str, Tensor]]:
    """Return the matrices of a layer: both backbones name attention's so that `att` is in it."""
    return [
        (module, name, weight)
        for path, module in layer.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 2 and (which == "all" or "att" in path)
    ]
