"""Tokens without padding say what padded rows say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from endoprint.encoder import packed as packed_layers
from endoprint.encoder.minibatches import Layout, assemble
from endoprint.encoder.packed import Packing
from test_encoder import network, random_tokens


def a_minibatch(block: int, *, seed: int = 4):
    cells = random_tokens(np.random.default_rng(seed), 9, 50)  # an empty one among them
    assert cells.lengths.min() == 0
    made = assemble(cells, np.arange(9), Layout(block, "rank", False))
    assert made.mask_RT is not None
    return made


def gradients(net, minibatch):
    net.zero_grad()
    net.pool(minibatch).square().sum().backward()
    return {name: p.grad for name, p in net.bert.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("block", [0, 7])
@pytest.mark.parametrize("recomputes", [False, True])
def test_packed_rows_say_what_padded_rows_say_and_learn_the_same(block, recomputes, monkeypatch):
    padded = a_minibatch(block)
    packed = replace(padded, packing=Packing.of(padded.mask_RT))
    net = network()
    net.recomputes = recomputes
    asked = []

    def through(layer, x, packing):
        asked.append(len(x))
        return packed_layers.through(layer, x, packing)

    # on a processor it never does by itself
    monkeypatch.setattr(net, "through_packed", lambda packing: partial(through, packing=packing))
    assert torch.allclose(net.pool(packed), net.pool(padded), atol=1e-5)
    assert set(asked) == {int(padded.mask_RT.sum())}, "no padding is computed"
    ours, theirs = gradients(net, packed), gradients(net, padded)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=1e-4), name


def test_a_processor_is_never_given_packed_rows():
    padded = a_minibatch(7)
    assert padded.to(torch.device("cpu")).packing is None
    assert network().through_packed(Packing.of(padded.mask_RT)) is None  # fp32


def test_packing_and_unpacking_moves_no_token():
    made = a_minibatch(7)
    packing = Packing.of(made.mask_RT)
    x = torch.randn(*made.ids_RT.shape, 4)
    again = packing.unpack(packing.pack(x))
    assert torch.equal(again[made.mask_RT], x[made.mask_RT])
    assert not again[~made.mask_RT].any()
    assert packing.starts_R.tolist()[-1] == int(made.mask_RT.sum())


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA GPU: torch's variable-length attention has no kernel for a processor",
)
def test_on_a_gpu_packed_rows_say_what_padded_rows_say_in_bf16():
    device = torch.device("cuda")
    net = network(uses_bf16=True).to(device)
    minibatch = a_minibatch(0).to(device)
    assert minibatch.packing is not None
    assert net.through_packed(minibatch.packing) is not None
    found = net.pool(minibatch)
    assert torch.allclose(found, net.pool(replace(minibatch, packing=None)), atol=3e-2)
