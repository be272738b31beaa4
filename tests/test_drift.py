"""New cells are held against what a model was calibrated on, by its own units' differences."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ks_2samp

from conftest import planted_cells
from endoprint import drift
from endoprint.calibration import abstention_threshold
from endoprint.model import load
from endoprint.models.logistic import Logistic


def quantiles(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, drift.GRID)


@pytest.mark.parametrize("shift", [0.0, 0.2, 1.0, 9.0])
@pytest.mark.parametrize("decimals", [0, 8])
def test_ks_is_scipys_to_one_in_a_hundred(shift: float, decimals: int) -> None:
    rng = np.random.default_rng(0)
    old = np.round(rng.normal(3, 2, 4000), decimals)
    new = np.round(rng.normal(3 + shift, 2, 3000), decimals)
    assert drift.ks(quantiles(old), new) == pytest.approx(ks_2samp(old, new).statistic, abs=0.025)


def test_the_stability_index_is_its_formula() -> None:
    rng = np.random.default_rng(1)
    old, new = rng.normal(size=50_000), rng.normal(0.5, 1.2, 50_000)
    edges = np.quantile(old, np.linspace(0, 1, 11))[1:-1]
    a, b = (
        np.bincount(np.searchsorted(edges, each), minlength=10) / len(each) for each in (old, new)
    )
    assert drift.psi(quantiles(old), new) == pytest.approx(
        ((b - a) * np.log(b / a)).sum(), rel=0.05
    )
    assert drift.psi(quantiles(old), old) < 0.01


def test_a_quantity_that_is_all_one_value_has_not_moved() -> None:
    ones = np.ones(50)
    assert drift.ks(quantiles(ones), ones) == 0
    assert drift.psi(quantiles(ones), ones) == pytest.approx(0)
    assert drift.ks(quantiles(ones), ones - 0.1) == 1
    assert drift.psi(quantiles(ones), ones + 0.1) > 1


def frame(rng: np.random.Generator, n: int, centre: float) -> pd.DataFrame:
    return pd.DataFrame({name: rng.normal(centre, 1, n) for name in drift.QUANTITIES})


def test_units_as_far_apart_as_the_references_own_are_no_drift() -> None:
    rng = np.random.default_rng(2)
    centres = {"a": 0.0, "b": 0.6, "c": -0.6}
    known = drift.reference(
        pd.concat([frame(rng, 300, centre) for centre in centres.values()]),
        np.repeat(list(centres), 300),
    )
    usual = drift.compare(known, frame(rng, 300, 0.4))
    assert not usual["has_drifted"].any()
    far = drift.compare(known, frame(rng, 300, 2.0))
    assert far["has_drifted"].all()
    assert len(drift.sentences(far)) == len(drift.QUANTITIES)
    assert drift.sentences(usual) == []


def test_what_is_unknown_is_left_out_and_few_cells_are_held_to_a_rule_of_thumb() -> None:
    rng = np.random.default_rng(3)
    cells = frame(rng, 30, 0.0)
    cells["novelty"] = np.nan
    known = drift.reference(cells, np.repeat(["a", "b"], 15))
    assert "novelty" not in known
    assert known["n_genes"]["usual_ks"] is None
    far = drift.compare(known, frame(rng, 30, 50.0))  # by the rule of thumb
    assert far["has_drifted"].all()
    assert "rule of thumb" in drift.sentences(far)[0]


def test_one_unit_alone_does_not_set_the_bar_at_nothing() -> None:
    rng = np.random.default_rng(5)
    known = drift.reference(frame(rng, 400, 0.0), np.repeat("a", 400))
    alike = drift.compare(known, frame(rng, 400, 0.05))
    assert (alike["psi"] > 0).all()
    assert not alike["has_drifted"].any()
    assert drift.sentences(alike) == []


def test_nothing_to_compare_is_no_drift() -> None:
    rng = np.random.default_rng(6)
    known = drift.reference(frame(rng, 50, 0.0), np.repeat("a", 50))
    assert drift.compare(known, frame(rng, 0, 0.0)).empty
    assert drift.compare({}, frame(rng, 5, 0.0)).empty


# -- the confidence below which a model is silent -----------------------------------------------
def test_calls_above_the_threshold_are_right_more_often_than_not() -> None:
    rng = np.random.default_rng(4)
    confidence = rng.uniform(0.1, 1.0, 4000)
    is_right = rng.uniform(size=4000) < confidence**2  # over-confident: right half the time at .71
    found = abstention_threshold(confidence, is_right, np.ones(4000))
    assert found == pytest.approx(0.5**0.5, abs=0.05)


def test_units_weigh_equally() -> None:
    confidence = np.full(110, 0.6)
    is_right = np.repeat([True, False], [100, 10])
    per_cell = abstention_threshold(confidence, is_right, np.ones(110))
    per_unit = abstention_threshold(confidence, is_right, np.repeat([1 / 100, 3 / 10], [100, 10]))
    assert (per_cell, per_unit) == (0.0, np.inf)


@pytest.mark.parametrize(("is_right", "found"), [(True, 0.0), (False, np.inf)])
def test_a_model_always_right_is_never_silent_and_one_never_right_always(
    is_right: bool, found: float
) -> None:
    confidence = np.linspace(0.2, 0.9, 20)
    assert abstention_threshold(confidence, np.full(20, is_right), np.ones(20)) == found
    assert abstention_threshold(np.empty(0), np.empty(0, bool), np.empty(0)) == 0.0


def test_a_model_keeps_its_threshold_and_reference_on_disk(tmp_path) -> None:
    cells = planted_cells(n_units=4, fold=1.7)
    unit = cells.obs["unit"].to_numpy()
    model = Logistic().fit(cells[unit != "u3"].copy(), cells[unit == "u3"].copy())
    assert model.abstention_threshold > 0
    assert set(model.drift_reference) == set(drift.QUANTITIES)
    model.save(tmp_path)
    again = load(tmp_path)
    assert again.abstention_threshold == model.abstention_threshold
    assert again.drift_reference == model.drift_reference
    model.abstention_threshold = float("inf")
    model.save(tmp_path)
    assert load(tmp_path).abstention_threshold == float("inf")
