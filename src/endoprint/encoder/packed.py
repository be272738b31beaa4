"""Attention over rows of unequal length without padding: tokens one after the other.

On a GPU torch's variable-length attention (flash attention, `torch.nn.attention.varlen`) takes
the tokens of all rows as one list, with where each row starts, so that neither attention nor the
layers around it compute padding. It has no kernel for a processor: there each row attends by
itself, which is what the path is checked by, not what it is used for.

Shapes: R rows, T tokens of the widest, M tokens that are no padding, H heads, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Packing:
    """Where the tokens of padded rows stand, and where each row starts among them."""

    place_M: Tensor  # int64, into the rows one after the other, padding counted
    starts_R: Tensor  # int32, (R + 1,)
    longest: int  # tokens of the widest row
    shape: tuple[int, int]  # R, T

    @classmethod
    def of(cls, mask_RT: Tensor) -> Packing:
        """Pack rows; `mask_RT`, on the processor, is True at tokens, which every row has."""
        mask = mask_RT.numpy()
        n_tokens = mask.sum(axis=1)
        starts = np.concatenate([[0], np.cumsum(n_tokens)]).astype(np.int32)
        return cls(
            torch.from_numpy(np.flatnonzero(mask)),
            torch.from_numpy(starts),
            int(n_tokens.max()),
            (mask.shape[0], mask.shape[1]),
        )

    def to(self, device: torch.device) -> Packing:
        """Return it on a device."""

        def move(tensor: Tensor) -> Tensor:
            held = tensor.pin_memory() if device.type == "cuda" else tensor
            return held.to(device, non_blocking=True)

        return Packing(move(self.place_M), move(self.starts_R), self.longest, self.shape)

    def pack(self, x_RTD: Tensor) -> Tensor:
        """Return the states of tokens alone, (M, D)."""
        return x_RTD.flatten(0, 1).index_select(0, self.place_M)

    def unpack(self, x_MD: Tensor) -> Tensor:
        """Return them in their rows again, zero at padding, (R, T, D)."""
        n_rows, n_columns = self.shape
        rows = x_MD.new_zeros(n_rows * n_columns, x_MD.shape[1])
        return rows.index_copy(0, self.place_M, x_MD).view(n_rows, n_columns, -1)


def attend(q_MHD: Tensor, k_MHD: Tensor, v_MHD: Tensor, packing: Packing) -> Tensor:
    """Let every token attend to its own row, (M, H, D)."""
    if q_MHD.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        starts, longest = packing.starts_R, packing.longest
        found = varlen_attn(q_MHD, k_MHD, v_MHD, starts, starts, longest, longest)
        assert isinstance(found, Tensor)
        return found
    ends = packing.starts_R.tolist()
    rows = []
    for start, end in zip(ends, ends[1:]):
        q, k, v = (each[start:end].transpose(0, 1)[None] for each in (q_MHD, k_MHD, v_MHD))
        attended = functional.scaled_dot_product_attention(q, k, v)
        rows.append(attended[0].transpose(0, 1))
    return torch.cat(rows)


def through(layer: Any, x_MD: Tensor, packing: Packing) -> Tensor:
    """Return the states of tokens after one of BERT's layers, (M, D).

    `layer`: transformers' BertLayer, whose other parts take tokens one by one.
    """
    own = layer.attention.self
    shape = (len(x_MD), own.num_attention_heads, own.attention_head_size)
    q, k, v = (part(x_MD).view(shape) for part in (own.query, own.key, own.value))
    attended_MD = attend(q, k, v, packing).reshape(len(x_MD), -1)
    joined_MD = layer.attention.output(attended_MD, x_MD)
    passed: Tensor = layer.output(layer.intermediate(joined_MD), joined_MD)
    return passed
