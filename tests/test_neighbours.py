from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.special import softmax

from conftest import planted_cells
from endoprint.latent import telling_axes
from endoprint.models.neighbours import (
    TRIED,
    UNCHOSEN,
    Neighbours,
    NeighboursConfig,
)


def of_units(cells: AnnData, *units: str) -> AnnData:
    return cells[cells.obs["unit"].isin(units).to_numpy()].copy()


@pytest.fixture(scope="module")
def parts():
    cells = planted_cells(n_units=5, n_cells=20, fold=3.0)
    return of_units(cells, "u0", "u1", "u2"), of_units(cells, "u3"), of_units(cells, "u4")


def by_hand(model: Neighbours, place: np.ndarray) -> np.ndarray:
    """One cell's evidence, (E,), by comparing it with every training cell in turn."""
    met = sorted(
        (float(np.sqrt(((place - other) ** 2).sum())), label)
        for other, label in zip(model._places.astype(float), model._labels, strict=True)
    )
    furthest = met[model._k][0] if model._k < len(met) else met[-1][0]
    voters = met[: model._k]
    total = sum(furthest - away for away, _ in voters)
    evidence = []
    for e in range(len(model.exposures)):
        cast = sum(furthest - away for away, label in voters if label == e) / total * model._k
        share = float((model._labels == e).mean())
        evidence.append(np.log(cast / share + model.config.smoothing))
    return np.array(evidence)


@pytest.mark.parametrize("is_discriminant", [True, False])
@pytest.mark.parametrize("neighbours", [2, 15, 500])  # 500: more than there are
def test_evidence_is_what_brute_force_finds(parts, is_discriminant, neighbours):
    train, valid, unseen = parts
    crowded = train[(train.obs["exposure"] != "RET_AGONIST") | (train.obs["unit"] == "u0")].copy()
    config = NeighboursConfig(neighbours=neighbours, is_discriminant=is_discriminant)
    model = Neighbours(config).fit(crowded, valid)
    places = model._latent.transform(unseen) @ model._axes
    wanted = np.stack([by_hand(model, place) for place in places])
    assert model.evidence(unseen) == pytest.approx(wanted, abs=1e-9)


def test_small_blocks_find_the_same(parts, monkeypatch):
    train, valid, unseen = parts
    model = Neighbours().fit(train, valid)
    together = model.evidence(unseen)
    monkeypatch.setattr("endoprint.models.neighbours.BLOCK_BYTES", 1)
    np.testing.assert_array_equal(model.evidence(unseen), together)


def test_two_exposures_are_told_apart_along_fishers_axis():
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(4, 4))
    labels = np.repeat([0, 1], [900, 300])
    places = rng.normal(size=(1200, 4)) @ spread + labels[:, None] * np.array([1.0, 0, -1, 0.5])
    first, second = places[labels == 0], places[labels == 1]
    within = (np.cov(first.T, bias=True) + np.cov(second.T, bias=True)) / 2
    within = 0.9 * within + 0.1 * np.trace(within) / 4 * np.eye(4)
    wanted = np.linalg.solve(within, second.mean(axis=0) - first.mean(axis=0))
    (found,) = telling_axes(places, labels).T
    cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
    assert abs(cosine) == pytest.approx(1.0, abs=1e-9)
    assert found @ within @ found == pytest.approx(1.0)


def test_the_metric_forgets_what_exposure_does_not_change():
    """A wide axis of cell type drowns a narrow one of exposure, unless the metric knows."""
    rng = np.random.default_rng(1)
    labels = np.arange(600) % 3
    signal = np.eye(3)[labels][:, :2] * 3 + rng.normal(size=(600, 2))
    places = np.column_stack([signal, rng.normal(size=(600, 20)) * 10])
    axes = telling_axes(places, labels)
    assert axes.shape == (22, 2)
    weight = (axes**2).sum(axis=1)
    assert weight[:2].sum() > 0.85 * weight.sum()


def test_a_crowded_exposure_gains_nothing_from_its_crowd():
    """Where exposure does nothing, ten times the control cells win no more than their share."""
    cells = planted_cells(n_units=4, n_cells=60, fold=1.0)
    train, unseen = of_units(cells, "u0", "u1", "u2"), of_units(cells, "u3")
    is_few = np.arange(train.n_obs) % 10 == 0
    crowd = train[(train.obs["exposure"] == "DMSO").to_numpy() | is_few].copy()
    config = NeighboursConfig(neighbours=60, is_discriminant=False, latent_width=5)
    evidence = Neighbours(config).fit(crowd, unseen[:0].copy()).evidence(unseen)
    assert crowd.obs["exposure"].value_counts().max() > 8 * 18
    assert softmax(evidence, axis=1).mean(axis=0) == pytest.approx(1 / 3, abs=0.08)


def test_evidence_does_not_jump_where_training_cells_change_places():
    model = Neighbours(NeighboursConfig(neighbours=3))
    model.exposures, model._k = ["DMSO", "RET_AGONIST"], 3
    model._places = np.array([[0.0], [1.1], [2.3], [3.2], [4.7], [6.0]], dtype=np.float32)
    model._labels = np.array([0, 1, 1, 0, 1, 0])
    walk = np.linspace(-1, 7, 80_001)[:, None]
    evidence = model._weighed(*model._nearest(walk, 3), 3)
    assert np.abs(np.diff(evidence, axis=0)).max() < 0.002
    assert np.ptp(evidence, axis=0).min() > 0.5


def test_copies_of_one_cell_vote_alike(parts):
    train, valid, unseen = parts
    same = train[:30].copy()
    same.X = sparse.vstack([train.X[0]] * 30).tocsr()
    same.obs["n_counts"] = float(train.X[0].sum())
    same.obs["exposure"] = ["DMSO", "RET_AGONIST", "RET_AGONIST"] * 10
    model = Neighbours(NeighboursConfig(neighbours=30)).fit(same, valid[:0].copy())
    assert model.predict_proba(unseen).to_numpy() == pytest.approx(0.5)


def test_the_number_of_neighbours_is_chosen_on_validation_cells(parts):
    train, valid, _ = parts
    told = []
    model = Neighbours().fit(train, valid, watch=lambda step, figures: told.append(figures))
    best = min(told, key=lambda figures: figures["validation_log_loss"])
    assert model.provenance["neighbours"] == best["neighbours"]
    assert [figures["neighbours"] for figures in told] == [k for k in TRIED if k <= train.n_obs]
    assert Neighbours().fit(train, valid[:0].copy()).provenance["neighbours"] == UNCHOSEN


def test_too_many_training_cells_are_drawn_evenly(parts):
    train, valid, unseen = parts
    model = Neighbours(NeighboursConfig(max_cells=90)).fit(train, valid)
    assert pd.Series(model._labels).value_counts().to_list() == [30, 30, 30]
    assert len(model.predict_proba(unseen)) == unseen.n_obs
