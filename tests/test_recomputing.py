"""Gradient checkpointing: the same gradients, and less kept on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from endoprint.encoder.minibatches import assemble
from readers import LAYOUT, reader, sentences


def step(kind: str, *, recomputes: bool, frozen: int = 0):
    """Gradients of one step, and how many bytes of what was met on the way were kept for it."""
    made = reader(kind, dropout=0.3, frozen=frozen).train()
    made.recomputes = recomputes
    kept: list[int] = []
    minibatch = assemble(sentences(has_levels=kind == "scgpt"), np.arange(12), LAYOUT)
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
    ):
        made(minibatch)[0].square().sum().backward()
    return {k: p.grad for k, p in made.named_parameters() if p.grad is not None}, sum(kept)


@pytest.mark.parametrize("kind", ["geneformer", "scgpt"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_gradients_are_the_same_dropout_included_and_less_is_kept(kind, frozen):
    wanted, n_bytes = step(kind, recomputes=False, frozen=frozen)
    found, n_fewer_bytes = step(kind, recomputes=True, frozen=frozen)
    assert set(found) == set(wanted)
    for key, gradient in wanted.items():
        assert torch.allclose(found[key], gradient, atol=1e-6 * float(gradient.abs().max())), key
    assert n_fewer_bytes < n_bytes
