"""Small networks of either encoder, and cells for them to read."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from endoprint import bins
from endoprint.encoder import backbone, scgpt_backbone
from endoprint.encoder.minibatches import Layout
from endoprint.encoder.network import Network, answer
from endoprint.models.scgpt import ScgptNetwork
from endoprint.tokens import Tokens

LAYOUT = Layout(8, "rank", False, share=0.34)


def sentences(n_cells: int = 12, *, seed: int = 0, has_levels: bool = False):
    """Cells of 0 to 50 genes, the first without any."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 51, n_cells)
    lengths[0] = 0
    values = np.concatenate([4 + rng.permutation(60)[:n] for n in lengths]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = pd.Index([f"c{i}" for i in range(n_cells)])
    if has_levels:
        levels = rng.integers(1, 51, len(values)).astype(np.float32)
        return bins.Binned(values, levels, offsets, ids, np.ones(n_cells))
    return Tokens(values, offsets, ids, pd.DataFrame(), "")


def reader(kind: str = "geneformer", *, seed: int = 0, dropout: float = 0.0, frozen: int = 1):
    """A network of three layers that look at something, some of them frozen."""
    if kind == "geneformer":
        shape = backbone.shape_of(
            layers=3, hidden=16, heads=2, ffn=32, vocabulary_size=64, max_length=64
        )
        made = Network(backbone.build(shape, seed=seed, dropout=dropout).bert, 3, has_votes=True)
    else:
        shape = scgpt_backbone.Shape(n_tokens=64, width=16, layers=3, heads=2, ffn=32)
        encoder = scgpt_backbone.build(shape, seed=seed, dropout=dropout)
        made = ScgptNetwork(encoder, 3, has_votes=True)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, tensor in made.named_parameters():
            if tensor.ndim > 1:
                tensor.normal_(std=0.5 if "layer" in name else 1.0)
    made.freeze(frozen)
    return made


def logits(made, cells, *, put=None, minibatch_tokens: int = 10_000, layout: Layout = LAYOUT):
    more = {} if put is None else {"put": put}
    return answer(made, cells, layout, minibatch_tokens=minibatch_tokens, **more).logits_BE
