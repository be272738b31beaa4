from __future__ import annotations

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy.special import logsumexp

from conftest import planted_cells
from endoprint import model as contract
from endoprint.config import Refusal
from endoprint.latent import Latent
from endoprint.models.bridge import Bridge, BridgeConfig
from endoprint.models.bridge.model import Kinds, energy_distance
from endoprint.models.bridge.motion import Drift, Ends, Motion

SIGMA = 1.0
MEAN = np.array([[0.0, 0.0], [1.5, 0.0], [0.0, -1.0]])  # control, and two exposures
SD = np.array([[1.0, 1.0], [0.7, 1.0], [1.0, 1.4]])
QUICK = {"first_steps": 150, "later_steps": 60, "iterations": 1, "hidden": 32, "latent_width": 6}


# -- the closed form ------------------------------------------------------------------------------
def coupling(from_sd: np.ndarray, to_sd: np.ndarray, sigma: float) -> np.ndarray:
    """Covariance of start and end in the Gaussian bridge, by axis (Bunne 2023, 2202.05722)."""
    return (np.sqrt(4 * from_sd**2 * to_sd**2 + sigma**4) - sigma**2) / 2


def flow(x: np.ndarray, t: float, exposure: int) -> np.ndarray:
    """Probability flow of the Gaussian bridge at (n, 2): mean drift plus half the log-variance's.

    x_t = (1 - t) x_0 + t x_1 + sigma sqrt(t (1 - t)) z has mean and variance by its parts.
    """
    c, end = coupling(SD[0], SD[exposure], SIGMA), SD[exposure] ** 2
    variance = (1 - t) ** 2 * SD[0] ** 2 + t**2 * end + t * (1 - t) * (2 * c + SIGMA**2)
    slope = -2 * (1 - t) * SD[0] ** 2 + 2 * t * end + (1 - 2 * t) * (2 * c + SIGMA**2)
    return MEAN[exposure] + slope / (2 * variance) * (x - t * MEAN[exposure])


def test_the_closed_form_is_what_discrete_sinkhorn_finds():
    """Entropic transport of two Gaussians on a grid, cost |x - y|^2 / 2, entropy sigma^2."""
    grid = np.linspace(-6, 6, 161)
    log_a = -0.5 * grid**2
    log_b = -0.5 * ((grid - 1.0) / 0.6) ** 2
    log_a, log_b = log_a - logsumexp(log_a), log_b - logsumexp(log_b)
    kernel = -0.5 * (grid[:, None] - grid[None]) ** 2 / SIGMA**2
    f = np.zeros(len(grid))
    for _ in range(200):
        g = log_b - logsumexp(kernel + f[:, None], axis=0)
        f = log_a - logsumexp(kernel + g[None], axis=1)
    plan = np.exp(f[:, None] + kernel + g[None])
    assert plan.sum(axis=0) == pytest.approx(np.exp(log_b), abs=1e-8)
    found = plan.ravel() @ np.outer(grid, grid - 1.0).ravel()
    assert found == pytest.approx(coupling(np.array(1.0), np.array(0.6), SIGMA), abs=1e-4)


# -- the motion, on Gaussians ---------------------------------------------------------------------
def draws(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(3), n)
    return MEAN[truth] + SD[truth] * rng.normal(size=(3 * n, 2)), truth


@pytest.fixture(scope="module")
def motion() -> Motion:
    cells, truth = draws(3000, seed=0)
    config = BridgeConfig(
        sigma=SIGMA, hidden=32, first_steps=300, later_steps=150, iterations=3, sharing=1e-3,
        pairs_per_exposure=1000, lr=5e-3,
    )  # fmt: skip
    made = Motion(sigma=SIGMA, width=2, hidden=32, n_exposures=3)
    ends = Ends(cells, truth, np.zeros(len(cells)), control=0, at_once=1000, seed=0)
    made.fit(ends.within_units(), ends.apart, config, contract.silent)
    return made.doubled()


@pytest.mark.parametrize("exposure", [0, 1, 2])
def test_both_ends_and_their_coupling_are_the_gaussian_bridges(motion, exposure):
    cells, truth = draws(4000, seed=1)
    which = torch.full((4000,), exposure)
    wanted = coupling(SD[0], SD[exposure], SIGMA)
    for is_onward, start, goal in ((True, 0, exposure), (False, exposure, 0)):
        left = cells[truth == start]
        met = motion.wander(
            torch.from_numpy(left), which, is_onward=is_onward,
            generator=torch.Generator().manual_seed(0),
        ).numpy()  # fmt: skip
        assert met.mean(axis=0) == pytest.approx(MEAN[goal], abs=0.12)
        assert met.std(axis=0) == pytest.approx(SD[goal], abs=0.12)
        both = ((left - left.mean(axis=0)) * (met - met.mean(axis=0))).mean(axis=0)
        # apart, start and end would be uncorrelated; without noise, as one (their sds' product)
        assert both == pytest.approx(wanted, abs=0.13)


def test_the_probability_flow_is_the_closed_form(motion):
    rng = np.random.default_rng(2)
    for t in (0.25, 0.5, 0.75):
        x = MEAN[1] * t + rng.normal(size=(500, 2))
        with torch.no_grad():
            found = motion.velocity(torch.from_numpy(x)[None].repeat(3, 1, 1), t)[0].numpy()
        for exposure in range(3):
            off = found[exposure] - flow(x, t, exposure)
            assert np.sqrt((off**2).mean()) < 0.25


def test_control_cells_stay_where_they_are(motion):
    x = torch.from_numpy(draws(500, seed=3)[0][:500])
    origin, volume, _ = motion.pulled_back(x)
    assert float((origin[0] - x).abs().mean()) < 0.12
    assert float(volume[0].abs().mean()) < 0.15
    assert float((origin[1] - x).abs().mean()) > 0.5  # as another exposure, they would have moved


def test_evidence_is_the_gaussian_bayes_rule(motion):
    x = draws(300, seed=4)[0]
    origin, volume, _ = motion.pulled_back(torch.from_numpy(x))
    found = (-0.5 * (origin.numpy() ** 2).sum(axis=-1) - volume.numpy()).T
    wanted = np.stack(
        [(-0.5 * ((x - m) / s) ** 2 - np.log(s)).sum(axis=1) for m, s in zip(MEAN, SD)], axis=1
    )
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.93
    ours, rule = (
        np.exp(each - logsumexp(each, axis=1, keepdims=True)) for each in (found, wanted)
    )
    assert np.abs(ours - rule).mean() < 0.04


def test_divergence_is_the_trace_of_the_jacobian():
    torch.manual_seed(0)
    drift = Drift(width=5, hidden=7, n_exposures=3).double()
    for weight in drift.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    x, t, exposure = torch.randn(4, 5).double(), torch.rand(4).double(), torch.tensor([0, 1, 2, 1])
    told = drift.told(t, exposure)
    field, found = drift.with_divergence(x, told)
    assert torch.allclose(field, drift(x, told))
    for i in range(4):
        one = tuple(part[i] for part in told)
        jacobian = torch.autograd.functional.jacobian(lambda at, one=one: drift(at, one), x[i])
        assert float(found[i].detach()) == pytest.approx(float(torch.trace(jacobian)), abs=1e-10)


# -- draws and mixtures ---------------------------------------------------------------------------
def test_first_pairs_share_a_unit_where_it_has_controls():
    cells = np.arange(12.0)[:, None]
    truth = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    unit = np.array(["a", "a", "b", "b", "a", "a", "b", "b", "c", "c", "c", "c"])
    pairs = Ends(cells, truth, unit, control=0, at_once=16, seed=0).within_units()
    start, end = (side[:, 0].numpy().astype(int) for side in (pairs.start, pairs.end))
    assert (truth[start] == 0).all()
    assert (truth[end] == pairs.exposure.numpy()).all()
    has_controls = unit[end] != "c"
    assert (unit[start] == unit[end])[has_controls].all()


def test_ends_met_have_the_means_wanted():
    cells, truth = draws(50, seed=0)
    pairs = Ends(cells, truth, np.zeros(150), control=0, at_once=40, seed=0).apart()
    met = pairs.met(torch.randn(pairs.end.shape), pairs.end)
    for e in range(3):
        inside = pairs.exposure == e
        assert torch.allclose(met[inside].mean(0), pairs.end[inside].mean(0), atol=1e-5)


def test_two_kinds_of_control_cells_are_found():
    rng = np.random.default_rng(0)
    cells = np.concatenate([rng.normal(-4, 1, (200, 3)), rng.normal(4, 1, (200, 3))])
    kinds = Kinds.fit(cells, seed=0)
    assert sorted(kinds.mean[:, 0].round()) == [-4, 4]
    between, inside = kinds.log_density(np.array([[0.0, 0, 0], [4.0, 4, 4]]))
    assert inside > between + 10


def test_energy_distance_is_zero_for_one_cloud_only():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(200, 3))
    assert energy_distance(one, one) == pytest.approx(0.0, abs=1e-12)
    assert energy_distance(one, one + 1) > energy_distance(one, one + 0.3) > 0


# -- the model ------------------------------------------------------------------------------------
def of_units(cells: AnnData, *units: str) -> AnnData:
    return cells[cells.obs["unit"].isin(units).to_numpy()].copy()


def of_exposure(cells: AnnData, exposure: str) -> AnnData:
    return cells[(cells.obs["exposure"] == exposure).to_numpy()].copy()


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return planted_cells(n_units=4, n_cells=30)


@pytest.fixture(scope="module")
def fitted(cells) -> Bridge:
    config = BridgeConfig(**QUICK, population="carried")
    return Bridge(config).fit(of_units(cells, "u0", "u1"), of_units(cells, "u2"))


def test_carried_controls_are_called_as_the_exposure(cells, fitted):
    own = of_exposure(of_units(cells, "u3"), "DMSO")
    for exposure in fitted.exposures:
        places = fitted.carry(own, exposure, seed=1)
        assert list(places.index) == list(own.obs_names)
        goal = fitted._latent.transform(of_exposure(cells, exposure)).mean(axis=0)
        away = {
            other: np.linalg.norm(
                places.mean().to_numpy()
                - fitted._latent.transform(of_exposure(cells, other)).mean(axis=0)
            )
            for other in fitted.exposures
        }
        assert np.isfinite(goal).all()
        assert min(away, key=away.get) == exposure


def test_carrying_is_repeatable_and_reaches_the_genes_that_respond(cells, fitted):
    own = of_exposure(of_units(cells, "u3"), "DMSO")
    once, again, other = (
        fitted.carry(own, "RET_AGONIST", seed=seed, as_genes=True) for seed in (1, 1, 2)
    )
    assert once.equals(again)
    assert not once.equals(other)
    assert (once.to_numpy() >= 0).all()
    stayed = fitted.carry(own, "DMSO", seed=1, as_genes=True)
    raised = (once.mean() - stayed.mean()).sort_values(ascending=False).index[:5]
    planted = {f"ENSG{i:011d}" for i in range(17, 25)}  # the third exposure's eight genes
    assert len(planted & set(raised)) >= 4


def test_an_exposure_never_fitted_is_refused(cells, fitted):
    with pytest.raises(Refusal, match="an exposure of the fit; got ESTROGEN_AGONIST"):
        fitted.carry(cells[:3], "ESTROGEN_AGONIST", seed=0)


def test_a_bridge_without_controls_is_refused(cells):
    without = cells[(cells.obs["exposure"] != "DMSO").to_numpy()].copy()
    with pytest.raises(Refusal, match="starts from control cells; got no DMSO"):
        Bridge(BridgeConfig(**QUICK)).fit(without, without)


def test_a_sample_is_told_by_its_units_own_controls_carried(cells, fitted):
    unseen = of_units(cells, "u3")
    own = of_exposure(unseen, "DMSO")
    for exposure in fitted.exposures:
        answer = fitted.population_proba(of_exposure(unseen, exposure), own)
        assert answer.idxmax() == exposure
    sample = of_exposure(unseen, "RET_AGONIST")
    np.testing.assert_allclose(
        fitted.population_evidence(sample),
        contract.ExposureModel.population_evidence(fitted, sample),
    )


def test_path_energy_is_reported_beside_evidence(cells, fitted):
    energy = fitted.path_energy(cells[:7].copy())
    assert energy.shape == (7, 3)
    assert (energy > 0).all()


def test_it_fits_without_validation_cells_in_one_dimension(cells):
    config = BridgeConfig(**{**QUICK, "latent_width": 2, "iterations": 0, "first_steps": 5})
    model = Bridge(config).fit(cells, cells[:0].copy())
    assert model.temperature == 1.0
    assert np.isfinite(model.predict_proba(cells).to_numpy()).all()
    assert isinstance(model._latent, Latent)
