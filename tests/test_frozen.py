"""Frozen layers: read once, kept on disk, and never a wrong answer for it."""

from __future__ import annotations

import logging
import os
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import planted_cells
from endoprint.encoder import activations
from endoprint.encoder.activations import Activations
from endoprint.encoder.frozen import states_of
from endoprint.encoder.minibatches import Layout, assemble
from endoprint.encoder.network import as_it_is
from endoprint.encoder.recipe import Recipe
from endoprint.jobs.materials import resources
from endoprint.model import Resources
from endoprint.models.geneformer import Geneformer, GeneformerConfig
from endoprint.tokens import Tokens
from endoprint.workspace import Workspace
from readers import LAYOUT, logits, reader, sentences


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def states(made, cells, folder, *, layout: Layout = LAYOUT, **over):
    store = Activations(folder, **{"gib": 1.0} | over)
    return states_of(made, cells, layout, store, minibatch_tokens=10_000)


def n_reads(made, monkeypatch) -> list[int]:
    """Count how often frozen layers are read."""
    read: list[int] = []
    real = made.frozen_states
    monkeypatch.setattr(made, "frozen_states", lambda m: read.append(1) or real(m))
    return read


# -- the same answer ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["geneformer", "scgpt"])
@pytest.mark.parametrize("block", [0, 8])
@pytest.mark.parametrize("frozen", [1, 3])
def test_answers_with_the_cache_are_those_without(tmp_path, kind, block, frozen):
    made, layout = reader(kind, frozen=frozen), replace(LAYOUT, block=block)
    cells = sentences(has_levels=kind == "scgpt")
    wanted = logits(made, cells, layout=layout)
    found = states(made, cells, tmp_path, layout=layout)
    assert kept(tmp_path)
    for size in (10_000, 70):
        answers = logits(made, cells, put=found.put, minibatch_tokens=size, layout=layout)
        assert answers == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", ["geneformer", "scgpt"])
def test_a_training_step_that_reads_some_rows_is_the_same_step(tmp_path, kind):
    made = reader(kind, dropout=0.3)
    cells = sentences(has_levels=kind == "scgpt")
    found = states(made, cells, tmp_path)
    steps = []
    for put in (as_it_is, found.put):
        made.train()
        rng = np.random.default_rng(3)
        torch.manual_seed(0)
        made.zero_grad()
        minibatch = put(assemble(cells, np.array([5, 0, 2, 7, 9]), LAYOUT, rng))
        assert (minibatch.states_RTD is None) == (put is as_it_is)
        made(minibatch)[0].square().sum().backward()
        steps.append({k: p.grad.clone() for k, p in made.named_parameters() if p.grad is not None})
    assert set(steps[0]) == set(steps[1])
    for key, gradient in steps[0].items():
        scale = gradient.abs().max().item()
        assert torch.allclose(gradient, steps[1][key], atol=1e-5 * max(scale, 1)), key


def test_a_cells_states_ignore_its_neighbours(tmp_path):
    made, cells = reader(), sentences()
    found = states(made, cells, tmp_path / "together")
    for i in (0, 3, 11):
        alone = Tokens(
            cells[i], np.array([0, len(cells[i])]), cells.cell_ids[[i]], pd.DataFrame(), ""
        )
        single = states(made, alone, tmp_path / "alone")
        one = single.put(assemble(alone, np.array([0]), LAYOUT)).states_RTD
        other = found.put(assemble(cells, np.array([i]), LAYOUT)).states_RTD
        assert torch.allclose(one, other, atol=1e-5)


def test_half_precision_costs_little_and_takes_half_the_room(tmp_path):
    made, cells = reader(), sentences()
    exact = logits(made, cells)
    found = states(made, cells, tmp_path / "16", precision="fp16")
    whole = states(made, cells, tmp_path / "32")
    difference = np.abs(logits(made, cells, put=found.put) - exact).max()
    assert 1e-6 < difference < 2e-2 * np.abs(exact).max()
    n_16, n_32 = (sum(p.stat().st_size for p in kept(tmp_path / name)) for name in ("16", "32"))
    n_bytes = int(cells.lengths.sum()) * 16
    assert n_32 - n_16 == pytest.approx(2 * n_bytes, abs=64)
    assert whole is not found


# -- shared -------------------------------------------------------------------------------------
def test_a_second_fit_computes_nothing(tmp_path, monkeypatch):
    cells = sentences()
    states(reader(), cells, tmp_path)
    again = reader()
    read = n_reads(again, monkeypatch)
    found = states(again, cells, tmp_path)
    logits(again, cells, put=found.put)
    assert not read


def test_other_folds_share_the_cells_they_have_in_common(tmp_path, monkeypatch):
    made, cells = reader(), sentences(30)
    some = Tokens(
        cells.values[: cells.offsets[20]], cells.offsets[:21], cells.cell_ids[:20],
        pd.DataFrame(), "",
    )  # fmt: skip
    states(made, some, tmp_path)
    computed = []
    real = Activations._keep

    def keep(self, kind, keys, n_rows, rows):
        computed.extend(keys)
        return real(self, kind, keys, n_rows, rows)

    monkeypatch.setattr(Activations, "_keep", keep)
    states(made, cells, tmp_path)
    assert len(computed) == 10


@pytest.mark.parametrize("change", ["weights", "depth", "block", "levels"])
def test_what_is_not_the_same_is_not_shared(tmp_path, change):
    kind = "scgpt" if change == "levels" else "geneformer"
    cells, layout = sentences(has_levels=kind == "scgpt"), LAYOUT
    states(reader(kind), cells, tmp_path)
    n = len(kept(tmp_path))
    made = reader(kind, seed=1 if change == "weights" else 0, frozen=1 + (change == "depth"))
    if change == "block":
        layout = replace(LAYOUT, block=5)
    if change == "levels":
        cells = replace(cells, levels=cells.levels + 1)
    found = states(made, cells, tmp_path, layout=layout)
    assert len(kept(tmp_path)) > n
    wanted = logits(made, cells, layout=layout)
    assert logits(made, cells, put=found.put, layout=layout) == pytest.approx(wanted, abs=1e-5)


def fill(folder: str) -> list[float]:
    made, cells = reader(), sentences(40)
    found = states(made, cells, Path(folder))
    return logits(made, cells, put=found.put).ravel().tolist()


@pytest.mark.slow
def test_two_processes_may_fill_one_folder_at_once(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        one, other = pool.map(fill, [str(tmp_path)] * 2)
    assert one == pytest.approx(other, abs=1e-5)
    assert not list(tmp_path.rglob("*.part"))
    fill(str(tmp_path / "alone"))
    assert size(tmp_path) == 2 * size(tmp_path / "alone")  # nothing is kept twice


# -- bounded ------------------------------------------------------------------------------------
def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in kept(folder))


def test_the_folder_stays_below_its_bound_and_the_oldest_goes_first(tmp_path):
    first, second, third = (sentences(40, seed=seed) for seed in range(3))
    made = reader()
    gib = 2.2 * int(max(each.lengths.sum() for each in (first, second, third))) * 64 / 2**30
    states(made, first, tmp_path, gib=gib)
    of_first = kept(tmp_path)
    for path in of_first:
        os.utime(path, (1, 1))
    states(made, second, tmp_path, gib=gib)
    of_second = set(kept(tmp_path)) - set(of_first)
    assert all(path.exists() for path in of_first)
    states(made, third, tmp_path, gib=gib)
    assert size(tmp_path) <= gib * 2**30
    assert not all(path.exists() for path in of_first)
    assert all(path.exists() for path in of_second)


@pytest.mark.parametrize("gib", [8_000 / 2**30, 500 / 2**30])
def test_cells_beyond_the_bound_are_computed_and_just_as_right(tmp_path, gib):
    made, cells = reader(), sentences(12)
    found = states(made, cells, tmp_path, gib=gib)
    assert size(tmp_path) <= gib * 2**30
    assert logits(made, cells, put=found.put) == pytest.approx(logits(made, cells), abs=1e-5)


# -- damaged, full, forbidden -------------------------------------------------------------------
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "header", "table"])
def test_a_damaged_file_is_found_out_and_its_cells_are_read_anew(tmp_path, harm, caplog):
    made, cells = reader(), sentences()
    wanted = logits(made, cells)
    states(made, cells, tmp_path)
    path = kept(tmp_path)[0]
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[-5] ^= 64
    elif harm == "truncate":
        del content[-40:]
    elif harm == "empty":
        content.clear()
    elif harm == "header":
        content[:8] = b"\xff" * 8
    else:  # a cell's first row is told wrong
        at = content.index(b"[0, ") + 1
        content[at : at + 1] = b"1"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = states(made, cells, tmp_path)
    assert "damaged" in caplog.text
    assert logits(made, cells, put=found.put) == pytest.approx(wanted, abs=1e-5)
    caplog.clear()
    states(made, cells, tmp_path)
    assert not caplog.text


def test_a_full_disk_is_said_once_and_the_fit_goes_on(tmp_path, monkeypatch, caplog):
    """Writing fails as it does on a full disk: the system lets no file grow beyond some bytes."""
    monkeypatch.setattr(activations, "SHARD_BYTES", 4_000)
    made, cells = reader(), sentences(20)
    wanted = logits(made, cells)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with caplog.at_level(logging.WARNING):
            found = states(made, cells, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sum("not kept" in record.message for record in caplog.records) == 1
    assert not kept(tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    assert logits(made, cells, put=found.put) == pytest.approx(wanted, abs=1e-5)


def test_a_folder_that_cannot_be_made_is_said_once_and_the_fit_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    made, cells = reader(), sentences()
    with caplog.at_level(logging.WARNING):
        found = states(made, cells, tmp_path / "file" / "under")
    assert sum("not kept" in record.message for record in caplog.records) == 1
    assert logits(made, cells, put=found.put) == pytest.approx(logits(made, cells), abs=1e-5)


def test_what_a_killed_process_left_half_written_is_swept(tmp_path):
    made = reader()
    states(made, sentences(seed=0), tmp_path)
    orphan = kept(tmp_path)[0].with_suffix(".part")
    orphan.write_bytes(b"half")
    states(made, sentences(seed=1), tmp_path)
    assert not orphan.exists()


# -- the models ---------------------------------------------------------------------------------
def test_a_model_fitted_with_the_cache_is_the_model_fitted_without(tmp_path):
    cells = planted_cells(n_units=3, n_cells=10)
    train, valid = (cells[(cells.obs["unit"] == unit).to_numpy()].copy() for unit in ("u0", "u1"))
    config = GeneformerConfig(
        epochs=2, min_steps=10, minibatch_cells=8, layers=2, hidden=16, ffn=16,
        frozen_layers=1, dropout=0.1,
    )  # fmt: skip
    without = Geneformer(config).fit(train, valid)
    with_cache = Geneformer(config, resources=Resources(activations=tmp_path)).fit(train, valid)
    assert kept(tmp_path)
    wanted, found = without.evidence(valid), with_cache.evidence(valid)
    assert found == pytest.approx(wanted, abs=2e-3)  # differences of 1e-7 grow over ten steps


def test_nothing_is_kept_where_nothing_is_frozen_or_nothing_may_be(tmp_path):
    cells = planted_cells(n_units=2, n_cells=6)
    train, valid = (cells[(cells.obs["unit"] == unit).to_numpy()].copy() for unit in ("u0", "u1"))
    small = {"epochs": 1, "min_steps": 1, "layers": 1, "hidden": 16, "ffn": 16}
    for change in ({}, {"frozen_layers": 1, "cache_gib": 0}):
        config = GeneformerConfig(**small, **change)
        Geneformer(config, resources=Resources(activations=tmp_path)).fit(train, valid)
        assert not list(tmp_path.iterdir())
    assert Recipe().cache_gib > 0


def test_a_workspace_keeps_what_frozen_layers_say_for_all_its_fits(tmp_path):
    (tmp_path / "params.yaml").write_text("task: tiny\n")
    space = Workspace.at(tmp_path)
    assert resources(space, Geneformer).activations == space.local / "activations"
