from __future__ import annotations

import numpy as np
import ot
import pandas as pd
import pytest
from anndata import AnnData
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from conftest import planted_cells
from endoprint.latent import Latent
from endoprint.models.transport import (
    Transport,
    TransportConfig,
    _aligned,
    potentials,
    regularised_cost,
)


def of_units(cells: AnnData, *units: str) -> AnnData:
    return cells[cells.obs["unit"].isin(units).to_numpy()].copy()


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return planted_cells(n_units=5, n_cells=12)


@pytest.fixture(scope="module")
def parts(cells):
    return of_units(cells, "u0", "u1", "u2"), of_units(cells, "u3"), of_units(cells, "u4")


@pytest.fixture(scope="module")
def fitted(parts) -> Transport:
    return Transport().fit(*parts[:2])


def problem(n: int = 7, m: int = 7, seed: int = 0):
    rng = np.random.default_rng(seed)
    cost = cdist(rng.normal(size=(n, 2)), rng.normal(size=(m, 2)), "sqeuclidean")
    return np.full(n, 1 / n), np.full(m, 1 / m), cost


def plan_of(a, b, cost, *, epsilon: float, relaxation: float | None = None):
    log_u, log_v = potentials(a, b, cost, epsilon=epsilon, relaxation=relaxation, iterations=4_000)
    return np.exp(log_u[:, None] + log_v - cost / epsilon)


# -- against exact and published solvers --------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_little_blur_is_the_exact_assignment(seed):
    a, b, cost = problem(seed=seed)
    rows, columns = linear_sum_assignment(cost)
    plan = plan_of(a, b, cost, epsilon=5e-3 * cost.mean())
    assert (plan.argmax(axis=1)[rows] == columns).all()
    assert (plan * cost).sum() == pytest.approx(ot.emd2(a, b, cost), rel=0.02)


@pytest.mark.parametrize("epsilon", [0.2, 1.0])
def test_the_log_domain_is_the_kernel_domain(epsilon):
    a, b, cost = problem(6, 9)
    kernel = ot.sinkhorn(a, b, cost, epsilon, method="sinkhorn", stopThr=1e-12)
    assert plan_of(a, b, cost, epsilon=epsilon) == pytest.approx(kernel, abs=1e-6)


def test_the_relaxed_plan_is_pots():
    a, b, cost = problem(6, 9)
    b[0] *= 5
    b /= b.sum()
    kernel = ot.unbalanced.sinkhorn_unbalanced(
        a, b, cost, 0.5, 1.0, reg_type="kl", c=np.ones_like(cost), stopThr=1e-12
    )
    assert plan_of(a, b, cost, epsilon=0.5, relaxation=1.0) == pytest.approx(kernel, abs=1e-6)


def test_hardly_relaxed_is_balanced():
    a, b, cost = problem(6, 9)
    strict = plan_of(a, b, cost, epsilon=0.5)
    assert plan_of(a, b, cost, epsilon=0.5, relaxation=1e6) == pytest.approx(strict, abs=1e-5)


def test_relaxed_plans_stay_finite_where_kernels_vanish():
    a, b, cost = problem()
    plan = plan_of(a, b, cost + 1000.0, epsilon=0.1, relaxation=1e4)
    assert np.isfinite(plan).all()
    assert plan.sum() > 0.5


def divergence(one, other, epsilon: float) -> float:
    def cost(here, there) -> float:
        return regularised_cost(here, there, epsilon, iterations=4_000)

    return cost(one, other) - 0.5 * (cost(one, one) + cost(other, other))


def test_the_divergence_runs_from_transport_to_the_distance_of_means():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(8, 2)), rng.normal(size=(8, 2)) + [2.0, 0.0]
    a = np.full(8, 1 / 8)
    exact = ot.emd2(a, a, cdist(one, other, "sqeuclidean"))
    apart = ((one.mean(axis=0) - other.mean(axis=0)) ** 2).sum()
    assert divergence(one, other, 0.02) == pytest.approx(exact, rel=0.01)
    assert divergence(one, other, 1e4) == pytest.approx(apart, rel=0.01)
    assert divergence(one, one[::-1].copy(), 0.5) == pytest.approx(0.0, abs=1e-9)


# -- frozen potentials --------------------------------------------------------------------------
def test_parts_that_differ_by_a_constant_agree_once_aligned():
    truth = np.random.default_rng(0).normal(size=6)
    found = truth + np.array([[0.0], [3.0], [-5.0]])
    found[0, :2] = found[1, 2:4] = found[2, 4:] = np.nan
    level = _aligned(found, np.zeros(6))
    assert level - level.mean() == pytest.approx(truth - truth.mean(), abs=1e-6)


def test_without_potentials_it_is_a_kernel_density(parts):
    train, valid, unseen = parts
    model = Transport(TransportConfig(has_potentials=False, epsilon=0.1, is_telling=False)).fit(
        train, valid
    )
    latent = Latent.fit(train, width=model.config.latent_width)
    here, there = latent.transform(unseen), latent.transform(train)
    epsilon = 0.1 * cdist(there, there, "sqeuclidean").mean()
    wanted = np.stack(
        [
            logsumexp(
                -cdist(here, there[(train.obs["exposure"] == e).to_numpy()], "sqeuclidean")
                / epsilon,
                axis=1,
            )
            for e in model.exposures
        ],
        axis=1,
    )
    found = model.evidence(unseen)
    assert found - found[:, :1] == pytest.approx(wanted - wanted[:, :1], abs=1e-8)


def test_potentials_change_the_answer(parts, fitted):
    plain = Transport(TransportConfig(has_potentials=False)).fit(*parts[:2])
    assert np.abs(plain.evidence(parts[2]) - fitted.evidence(parts[2])).max() > 0.01
    assert plain.provenance["potentials"].startswith("none")
    assert fitted.provenance["potentials"] == "leave-unit-out inside training"


def test_each_querys_answer_is_frozen(parts, fitted):
    unseen = parts[2]
    together = fitted.evidence(unseen)
    alone = np.vstack([fitted.evidence(unseen[[i]].copy()) for i in range(unseen.n_obs)])
    assert alone == pytest.approx(together, abs=1e-9)


def test_potentials_do_not_see_the_cells_that_calibrate(parts, fitted):
    train, valid, unseen = parts
    other = valid.copy()
    other.X = other.X[:, ::-1].tocsr()  # nonsense to calibrate on
    again = Transport().fit(train, other)
    assert np.array_equal(again.evidence(unseen), fitted.evidence(unseen))
    assert again.temperature != pytest.approx(fitted.temperature, rel=0.01)


def test_many_cells_of_one_exposure_do_not_make_it_likelier(cells, parts):
    train, valid, unseen = parts
    is_thin = (train.obs["exposure"] == "DMSO").to_numpy()
    keep = np.flatnonzero(~is_thin | (np.cumsum(is_thin) % 3 == 0))
    # of one exposure a third of the cells: called about as often as before
    for has_potentials in (True, False):
        config = TransportConfig(has_potentials=has_potentials)
        calls = [
            Transport(config).fit(part, valid).predict_proba(unseen).idxmax(axis=1)
            for part in (train, train[np.sort(keep)].copy())
        ]
        shares = [(said == "DMSO").mean() for said in calls]
        assert shares[1] == pytest.approx(shares[0], abs=0.12)


def test_relaxed_transport_finds_the_signal_too(parts):
    train, valid, unseen = parts
    model = Transport(TransportConfig(relaxation=1.0)).fit(train, valid)
    hit = model.predict_proba(unseen).idxmax(axis=1) == unseen.obs["exposure"]
    assert hit.mean() > 0.8


def test_one_dish_per_exposure_is_fitted_and_said_so(cells):
    lone = cells.copy()
    lone.obs["unit"] = lone.obs["exposure"].astype(str)
    model = Transport().fit(lone, lone[:0].copy())
    assert model.provenance["potentials"].startswith("not unit-validated")
    hit = model.predict_proba(cells).idxmax(axis=1) == cells.obs["exposure"]
    assert hit.mean() > 0.8


def test_an_exposure_missing_from_some_units_still_counts(cells, parts):
    train, valid, unseen = parts
    is_gone = (train.obs["unit"] == "u0") & (train.obs["exposure"] == "RET_AGONIST")
    model = Transport().fit(train[~is_gone.to_numpy()].copy(), valid)
    calls = model.predict_proba(unseen).idxmax(axis=1)
    recall = (calls == unseen.obs["exposure"]).groupby(unseen.obs["exposure"].astype(str)).mean()
    assert recall.min() > 0.7


# -- whole samples --------------------------------------------------------------------------------
def test_a_samples_answer_ignores_the_order_of_its_cells(parts):
    train, valid, unseen = parts
    model = Transport(TransportConfig(population_cells=8)).fit(train, valid)
    sample = unseen[(unseen.obs["exposure"] == "RET_AGONIST").to_numpy()]
    turned = sample[np.random.default_rng(0).permutation(sample.n_obs)].copy()
    pd.testing.assert_series_equal(
        model.population_proba(turned), model.population_proba(sample.copy())
    )


def test_a_sample_is_its_own_nearest(fitted, parts):
    train = parts[0]
    place = fitted._latent.transform(train)
    reference = fitted._reference_place[fitted._population]
    for e, exposure in enumerate(fitted.exposures):
        own = reference[fitted._reference_exposure[fitted._population] == e]
        evidence = fitted._compared(own, fitted._population)
        assert evidence[e] == pytest.approx(0.0, abs=1e-6), exposure
        assert evidence.argmax() == e
        assert (np.delete(evidence, e) < -0.01).all()
    assert len(place) == train.n_obs


def test_the_reference_says_what_it_is_made_of(fitted):
    by_unit = fitted.provenance["reference"]["unit"]
    assert by_unit["DMSO"] == {"u0": 12, "u1": 12, "u2": 12}
    assert set(fitted.provenance["reference"]["cell_type"]["DMSO"]) == {"Neurons", "Progenitors"}
