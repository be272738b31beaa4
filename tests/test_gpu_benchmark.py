"""The GPU's rows: walked through without one, and nothing claimed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from children import ROOT
from endoprint.encoder.checkpoints import CHECKPOINTS

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


@NO_GPU
def test_without_a_gpu_one_line_says_that_no_row_was_measured(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    assert capsys.readouterr().out == "no CUDA GPU here: no GPU row was measured\n"


@pytest.mark.slow
@NO_GPU
def test_every_row_runs_with_tiny_shapes_and_prints_no_figure(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--try"])
    gpu.main()
    out = capsys.readouterr().out.splitlines()
    assert out[-1].endswith("nothing was measured")
    assert not any("mfu" in line or "cells_per_second" in line for line in out)


def test_the_flop_of_a_step_are_those_of_the_matrices_and_of_attention(gpu):
    row = CHECKPOINTS["V2-104M"]
    bert = gpu.backbone.build(row.shape(), seed=0, dropout=0.0).bert
    matrices = sum(
        p.numel() for layer in bert.encoder.layer for p in layer.parameters() if p.ndim == 2
    )
    attention = 3 * row.layers * 2 * (2 * 4096 * row.hidden)  # q k and p v; backward is twice
    assert gpu.flop_per_token(row, 4096) == 6 * matrices + attention
