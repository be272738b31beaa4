"""scGPT's transformer: genes with levels in, one hidden state per gene out.

After Cui 2024 (Nature Methods 21:1470): a gene's embedding plus its level's, post-norm layers, no
positions. Written anew from the published shapes; parameter names are upstream's, so that its
checkpoints load (`scgpt_checkpoint`). Domain-specific batch normalisation is left
out: it reads one cell's domain for a whole minibatch, and a cell's answer would depend on others.

Shapes: R rows, T tokens of a row, D width, H heads, C classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from endoprint.config import Refusal

Array = np.ndarray[Any, np.dtype[Any]]

LARGEST_LEVEL = 512.0  # upstream clamps what it reads to this


@dataclass(frozen=True)
class Shape:
    """How large an scGPT is."""

    n_tokens: int
    width: int
    layers: int
    heads: int
    ffn: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise Refusal(
                "a backbone's width must be a multiple of its heads",
                f"hidden {self.width}, heads {self.heads}",
                "change one of them",
            )

    def to_json(self) -> dict[str, int]:
        """Return plain values."""
        return asdict(self)


class Genes(nn.Module):
    """Which gene it is."""

    def __init__(self, n_tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, width)
        self.enc_norm = nn.LayerNorm(width)

    def forward(self, ids_RT: Tensor) -> Tensor:
        """Return (R, T, D)."""
        normed: Tensor = self.enc_norm(self.embedding(ids_RT))
        return normed


class Levels(nn.Module):
    """How much of it there is."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, width)
        self.linear2 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, levels_RT: Tensor) -> Tensor:
        """Return (R, T, D)."""
        clamped = levels_RT.clamp(max=LARGEST_LEVEL).unsqueeze(-1)
        wide = self.linear2(functional.relu(self.linear1(clamped)))
        dropped: Tensor = self.dropout(self.norm(wide))
        return dropped


class Attention(nn.Module):
    """Every gene of a row looks at every other; padding is not looked at."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_RTD: Tensor, mask_RT: Tensor | None) -> Tensor:
        """Return (R, T, D); `mask_RT` is True at tokens."""
        qkv = functional.linear(x_RTD, self.in_proj_weight, self.in_proj_bias)
        shape = (*x_RTD.shape[:2], 3, self.heads, -1)
        q, k, v = qkv.view(shape).permute(2, 0, 3, 1, 4)
        mixed_RHTd = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask_RT is None else mask_RT[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        projected: Tensor = self.out_proj(mixed_RHTd.transpose(1, 2).flatten(2))
        return projected


class Layer(nn.Module):
    """Attention, then a feed-forward part, each added and normalised after."""

    def __init__(self, shape: Shape, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(shape.width, shape.heads, attention_dropout)
        self.linear1 = nn.Linear(shape.width, shape.ffn)
        self.linear2 = nn.Linear(shape.ffn, shape.width)
        self.norm1 = nn.LayerNorm(shape.width)
        self.norm2 = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_RTD: Tensor, mask_RT: Tensor | None) -> Tensor:
        """Return (R, T, D)."""
        x_RTD = self.norm1(x_RTD + self.dropout(self.self_attn(x_RTD, mask_RT)))
        wide = self.dropout(functional.relu(self.linear1(x_RTD)))
        normed: Tensor = self.norm2(x_RTD + self.dropout(self.linear2(wide)))
        return normed


class Layers(nn.Module):
    """The layers, under the name upstream's weights have."""

    def __init__(self, shape: Shape, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(shape, dropout, attention_dropout) for _ in range(shape.layers)
        )


class ScgptEncoder(nn.Module):
    """scGPT up to its hidden states; what a cell was exposed to is the head's matter."""

    def __init__(self, shape: Shape, *, dropout: float, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Genes(shape.n_tokens, shape.width)
        self.value_encoder = Levels(shape.width, dropout)
        self.transformer_encoder = Layers(shape, dropout, attention_dropout)

    def forward(self, ids_RT: Tensor, levels_RT: Tensor, mask_RT: Tensor | None) -> Tensor:
        """Return the last hidden state of every token, (R, T, D); `mask_RT` is True at tokens."""
        x_RTD = self.enter(ids_RT, levels_RT)
        for layer in self.layers():
            x_RTD = layer(x_RTD, mask_RT)
        return x_RTD

    def enter(self, ids_RT: Tensor, levels_RT: Tensor) -> Tensor:
        """Return the state of every token before the first layer, (R, T, D)."""
        entering: Tensor = self.encoder(ids_RT) + self.value_encoder(levels_RT)
        return entering

    def layers(self) -> list[nn.Module]:
        """Return the layers, from the input up."""
        return list(self.transformer_encoder.layers)

    def keep_tokens(self, tokens: Array) -> None:
        """Keep some gene embeddings only, in this order: the rest of 60,697 would idle."""
        kept = self.encoder.embedding.weight.detach()[torch.from_numpy(tokens)].clone()
        self.encoder.embedding = nn.Embedding(len(tokens), self.shape.width, _weight=kept)
        self.shape = replace(self.shape, n_tokens=len(tokens))


class Classifier(nn.Module):
    """Upstream's own head on the `<cls>` state, as checkpoints fine-tuned there hold one."""

    def __init__(self, width: int, n_classes: int, n_layers: int) -> None:
        super().__init__()
        self._decoder = nn.ModuleList()
        for _ in range(n_layers - 1):
            self._decoder.extend([nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width)])
        self.out_layer = nn.Linear(width, n_classes)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return logits, (B, C)."""
        for part in self._decoder:
            x_BD = part(x_BD)
        logits_BC: Tensor = self.out_layer(x_BD)
        return logits_BC


def build(
    shape: Shape, *, seed: int, dropout: float, attention_dropout: float = 0.0
) -> ScgptEncoder:
    """Return an encoder with random weights, the same for the same seed.

    Every layer begins as the identity, so that depth cannot hurt the layer-free start (Zhang
    2019, 1901.09321): the two output projections are zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ScgptEncoder(shape, dropout=dropout, attention_dropout=attention_dropout)
        nn.init.uniform_(made.encoder.embedding.weight, -0.1, 0.1)
    for name, parameter in made.transformer_encoder.named_parameters():
        if ".out_proj." in name or ".linear2." in name:
            nn.init.zeros_(parameter)
    return made
