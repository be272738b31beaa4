"""Value binning: upstream's bins, and no chance in them that a neighbour could change."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from conftest import planted_cells
from endoprint import bins
from endoprint.config import Refusal


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "golden/scgpt_tiny/binning.npz"))


def cells_of(counts: np.ndarray, n_counts: np.ndarray | None = None) -> AnnData:
    total = counts.sum(axis=1) if n_counts is None else n_counts
    return AnnData(
        X=sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {"n_counts": total.astype(float)}, index=[f"c{i}" for i in range(len(counts))]
        ),
        var=pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])]),
    )


def binned(cells: AnnData, **over) -> bins.Binned:
    return bins.of(cells, np.arange(cells.n_vars), n_genes=cells.n_vars, **over)


def by_gene(made: bins.Binned, cell: int) -> dict[int, float]:
    here = slice(made.offsets[cell] + 1, made.offsets[cell + 1])
    return dict(zip((made.values[here] - bins.FIRST_GENE).tolist(), made.levels[here].tolist()))


# -- equal to upstream --------------------------------------------------------------------------
def test_edges_are_upstreams(golden):
    for row, wanted in zip(golden["expression"], golden["bin_edges"]):
        assert bins.edges(row[row > 0], 51) == pytest.approx(wanted, abs=1e-6)


def test_bins_are_upstreams(golden):
    for i, row in enumerate(golden["expression"]):
        is_on = row > 0
        found, wanted = bins.bins(row[is_on]), golden["binned"][i][is_on]
        near, drawn = golden["near_edge"][i][is_on], golden["draw_dependent"][i][is_on]
        assert (found == wanted)[~near & ~drawn].all()
        assert np.abs(found - wanted)[near & ~drawn].max(initial=0) <= 1
        assert (found >= golden["binned_min"][i][is_on])[~near].all()
        assert (found <= golden["binned_max"][i][is_on])[~near].all()


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.999999])
def test_tied_counts_stay_within_upstreams_bounds(golden, draw):
    lowest, highest = golden["tied_binned_min"], golden["tied_binned_max"]
    for i, row in enumerate(golden["tied_counts"]):
        is_on = row > 0
        found = bins.bounds(row[is_on], bins.edges(row[is_on], 51))
        assert (found[0] == lowest[i][is_on]).all()
        assert (found[1] == highest[i][is_on]).all()
        one = bins.bins(row[is_on], draw=draw)
        assert (one >= found[0]).all()
        assert (one <= found[1]).all()


def test_drawn_ties_are_as_even_as_upstreams():
    values = np.array([1.0] * 30 + [2.0] * 10)
    lowest, highest = (bound[0] for bound in bins.bounds(values, bins.edges(values, 51)))
    assert highest - lowest > 10
    draws = (np.arange(2000) + 0.5) / 2000
    fallen = [bins.bins(values, draw=np.full(len(values), draw))[0] for draw in draws]
    counted = np.bincount(fallen)[lowest:]
    assert len(counted) == highest - lowest + 1
    assert counted.max() - counted.min() <= 1


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0.125, 9.0, width=32), min_size=1, max_size=90), st.integers(3, 60))
def test_edges_are_numpys_quantiles_and_bins_rise_with_the_value(values, n_bins):
    values = np.array(values, dtype=np.float32)
    found = bins.edges(values, n_bins)
    wanted = np.quantile(values.astype(float), np.linspace(0, 1, n_bins - 1))
    assert found == pytest.approx(wanted, abs=1e-9)
    assert found[0] == values.min()
    assert found[-1] == values.max()
    made = bins.bins(values, n_bins=n_bins)
    assert made.min() >= 1
    assert made.max() <= n_bins - 1
    assert (np.diff(made[np.argsort(values, kind="stable")]) >= 0).all()


# -- whole cells ----------------------------------------------------------------------------------
def test_a_cell_begins_with_cls_and_goes_down_from_its_highest_gene():
    made = binned(planted_cells(n_units=1, n_cells=4))
    for cell in range(len(made)):
        here = slice(made.offsets[cell], made.offsets[cell + 1])
        assert (made.values[here][0], made.levels[here][0]) == (bins.CLS, 0)
        assert (np.diff(made.levels[here][1:]) <= 0).all()
        assert made.levels[here][1:].min() >= 1


def test_silent_genes_and_unknown_ones_are_no_tokens_and_an_empty_cell_is_kept():
    counts = np.array([[3, 0, 1, 7], [0, 0, 0, 5]])
    made = bins.of(cells_of(counts), np.array([0, 1, 2, -1]), n_genes=3)
    assert made.lengths.tolist() == [3, 1]
    assert set(by_gene(made, 0)) == {0, 2}
    assert made.share.tolist() == [4 / 11, 0.0]


def test_columns_of_one_gene_are_summed():
    split, whole = np.array([[1, 2, 9, 4]]), np.array([[3, 0, 9, 4]])
    found = bins.of(cells_of(split), np.array([0, 0, 1, 2]), n_genes=3)
    wanted = bins.of(cells_of(whole), np.array([0, -1, 1, 2]), n_genes=3)
    assert by_gene(found, 0) == by_gene(wanted, 0)


@pytest.mark.parametrize("ties", ["middle", "drawn"])
@pytest.mark.parametrize("max_length", [0, 20])
def test_neither_neighbours_nor_order_nor_gene_order_matter(ties, max_length):
    cells = planted_cells(n_units=1, n_cells=6)
    over = {"ties": ties, "max_length": max_length, "seed": 3}
    together = binned(cells, **over)
    turn = np.random.default_rng(0).permutation(cells.n_vars)
    turned = bins.of(cells[:, turn].copy(), turn, n_genes=cells.n_vars, **over)
    for i in range(cells.n_obs):
        alone = binned(cells[[i]].copy(), **over)
        assert by_gene(alone, 0) == by_gene(together, i) == by_gene(turned, i)


def test_drawn_ties_differ_between_cells_genes_and_seeds():
    counts = np.ones((40, 60))
    counts[np.arange(40), np.arange(40)] = 2  # no two cells alike
    cells = cells_of(counts)
    one, other = binned(cells, ties="drawn"), binned(cells, ties="drawn", seed=1)
    level = [by_gene(one, i)[59] for i in range(40)]
    assert len(set(level)) > 10
    assert len(set(by_gene(one, 0).values())) > 10
    assert by_gene(one, 0) != by_gene(other, 0)
    middle = by_gene(binned(cells), 0)
    assert {middle[gene] for gene in range(1, 60)} == {middle[59]}


def test_of_a_long_cell_a_random_subset_stays_with_the_levels_of_the_whole():
    cells = planted_cells(n_units=1, n_cells=20)
    whole, cut = binned(cells), binned(cells, max_length=31)
    assert cut.lengths.max() == 31
    dropped = np.zeros(cells.n_vars)
    for i in range(cells.n_obs):
        few, every = by_gene(cut, i), by_gene(whole, i)
        assert few.items() <= every.items()
        assert len(few) == min(len(every), 30)
        for gene in set(every) - set(few):
            dropped[gene] += 1
    assert dropped.max() < cells.n_obs  # not the same genes of every cell
    # not the lowest ones only, as where tokens are cut by rank
    assert min(by_gene(cut, 0).values()) < np.median(list(by_gene(whole, 0).values()))


def test_a_library_size_beyond_the_panel_does_not_change_the_bins():
    counts = np.array([[5, 1, 2, 9, 30]])
    own, larger = binned(cells_of(counts)), binned(cells_of(counts, np.array([900])))
    assert by_gene(own, 0) == by_gene(larger, 0)


def test_no_room_for_genes_is_refused():
    with pytest.raises(Refusal, match="room for genes"):
        binned(planted_cells(n_units=1, n_cells=1), max_length=1)


def test_no_cells_are_no_tokens():
    made = binned(planted_cells(n_units=1, n_cells=1)[:0].copy())
    assert len(made) == 0
    assert made.offsets.tolist() == [0]
