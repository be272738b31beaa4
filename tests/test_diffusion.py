from __future__ import annotations

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr
from torch import Tensor

from conftest import planted_cells
from endoprint.config import Refusal
from endoprint.models import diffusion
from endoprint.models.diffusion import (
    Denoiser,
    Diffusion,
    DiffusionConfig,
    Draws,
    denoising_evidence,
    sample,
    schedule,
    train_denoiser,
)

WIDTH, SPREAD = 4, 0.6
MEANS = np.array([[1.0, 0, 0, 0], [-0.5, 0.8, 0, 0], [-0.5, -0.8, 0.4, 0]])


class Ideal(Denoiser):
    """The network that a perfect training would end at, for exposures N(mean, SPREAD^2)."""

    def __init__(self) -> None:
        super().__init__(WIDTH, len(MEANS), hidden=4, blocks=1, dropout=0.0)

    def conditions(self, t: Tensor, exposure: Tensor):
        alpha, sigma = (part[:, None] for part in schedule(t))
        mean = torch.tensor(MEANS, dtype=torch.float32)[exposure]
        return sigma / (alpha**2 * SPREAD**2 + sigma**2), alpha * mean, []

    def guess(self, noised: Tensor, conditions) -> Tensor:
        factor, centre, _ = conditions
        return factor * (noised - centre)


def gaussian_cells(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % len(MEANS)
    return MEANS[truth] + SPREAD * rng.normal(size=(n, WIDTH)), truth


def bayes(place: np.ndarray) -> np.ndarray:
    return -cdist(place, MEANS, "sqeuclidean") / (2 * SPREAD**2)


def draws(n: int = 64) -> Draws:
    return Draws.of(n, WIDTH, (0.05, 0.95), seed=0)


@pytest.fixture(scope="module")
def trained() -> Denoiser:
    place, truth = gaussian_cells(1500, seed=0)
    config = DiffusionConfig(steps=500, dropout=0.0, cells_per_step=192)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Denoiser(WIDTH, len(MEANS), hidden=48, blocks=2, dropout=0.0)
        return train_denoiser(
            net,
            place,
            truth,
            np.full(len(place), 1 / len(place)),
            config,
            rng=np.random.default_rng(0),
            look=lambda step, average, loss: False,
        )


# -- Gaussian exposures, whose best answer is known ---------------------------------------------
def test_the_ideal_network_gives_the_bayes_rule():
    place, _ = gaussian_cells(200, seed=1)
    found, wanted = denoising_evidence(Ideal(), place, draws(), 3), bayes(place)
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).all()
    # error grows with the squared distance, one slope for all cells and exposures
    gained, due = (x - x.mean(axis=1, keepdims=True) for x in (found, wanted))
    slope = (gained * due).sum() / (due**2).sum()
    assert slope > 0
    assert gained == pytest.approx(slope * due, abs=1e-4)


def test_a_trained_network_comes_near_the_bayes_rule(trained):
    place, truth = gaussian_cells(300, seed=1)
    found, wanted = denoising_evidence(trained, place, draws(), 3), bayes(place)
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() >= 0.93
    best, own = (wanted.argmax(axis=1) == truth).mean(), (found.argmax(axis=1) == truth).mean()
    assert own >= best - 0.04
    for one, other in ((0, 1), (0, 2), (1, 2)):
        ranks = spearmanr(found[:, one] - found[:, other], wanted[:, one] - wanted[:, other])
        assert ranks.statistic >= 0.95


@pytest.mark.parametrize("exposure", range(3))
def test_generated_cells_have_their_exposures_mean_and_covariance(trained, exposure):
    made = sample(trained, exposure, 2000, width=WIDTH, steps=60, seed=0)
    assert made.mean(axis=0) == pytest.approx(MEANS[exposure], abs=0.12)
    assert np.cov(made.T) == pytest.approx(SPREAD**2 * np.eye(WIDTH), abs=0.1)


def test_the_ideal_network_generates_exactly():
    made = sample(Ideal(), 1, 20_000, width=WIDTH, steps=200, seed=0)
    assert made.mean(axis=0) == pytest.approx(MEANS[1], abs=0.03)
    assert np.cov(made.T) == pytest.approx(SPREAD**2 * np.eye(WIDTH), abs=0.02)


# -- noise --------------------------------------------------------------------------------------
def test_the_schedule_runs_from_the_cell_to_noise():
    alpha, sigma = schedule(torch.linspace(0, 1, 101))
    assert alpha**2 + sigma**2 == pytest.approx(1.0, abs=1e-6)
    assert alpha[0] == pytest.approx(1.0)
    assert alpha[-1] == pytest.approx(0.0, abs=1e-6)
    assert (alpha.diff() < 0).all()


def test_draws_are_stratified_and_even():
    made = draws(32)
    assert made.noise.sum(dim=0).numpy() == pytest.approx(0.0, abs=1e-5)
    slices = np.histogram(made.t.numpy(), bins=16, range=(0.05, 0.95))[0]
    assert (slices == 2).all()


# -- cells --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cells() -> AnnData:
    return planted_cells(n_units=4, n_cells=16)


@pytest.fixture(scope="module")
def fitted(cells) -> Diffusion:
    config = DiffusionConfig(hidden=32, blocks=1, steps=500, latent_width=8)
    unit = cells.obs["unit"]
    return Diffusion(config).fit(
        cells[(unit != "u3").to_numpy()].copy(), cells[(unit == "u3").to_numpy()].copy()
    )


def test_a_cells_evidence_is_the_same_to_the_last_bit_in_any_company(fitted, cells):
    together = fitted.evidence(cells)
    alone = np.vstack([fitted.evidence(cells[[i]].copy()) for i in (9, 4)])
    assert np.array_equal(alone, together[[9, 4]])


def test_generated_cells_are_called_what_they_were_made_as(fitted):
    for e, exposure in enumerate(fitted.exposures):
        made = fitted.generate(exposure, 40, seed=0)
        assert made.shape == (40, len(fitted._latent.genes))
        assert (made.X >= 0).all()
        place = (made.obsm["latent"] - fitted._centre) / fitted._spread
        evidence = denoising_evidence(fitted._net, place, fitted._draws, 3)
        assert (evidence.argmax(axis=1) == e).mean() > 0.8


def test_the_same_seed_generates_the_same_cells(fitted):
    one, again, other = (fitted.generate("DMSO", 5, seed=seed).X for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_cells_of_an_exposure_never_met_are_not_made_up(fitted):
    with pytest.raises(Refusal, match="met in training"):
        fitted.generate("THYROID_AGONIST", 5, seed=0)


def test_fitting_leaves_global_chance_alone(cells):
    config = DiffusionConfig(hidden=8, blocks=1, steps=3, latent_width=4)
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    Diffusion(config).fit(cells, cells[:0].copy())
    assert torch.equal(torch.rand(1), wanted)


def test_a_loss_that_explodes_is_refused(cells, monkeypatch):
    monkeypatch.setattr("torch.nn.functional.mse_loss", lambda a, b: (a - b).sum() * float("nan"))
    config = DiffusionConfig(hidden=8, blocks=1, steps=3, latent_width=4)
    with pytest.raises(Refusal, match="finite"):
        Diffusion(config).fit(cells, cells[:0].copy())


def test_training_stops_where_validation_cells_gain_nothing_more(cells, monkeypatch):
    monkeypatch.setattr(diffusion, "CHECK_EVERY", 40)
    told = []
    config = DiffusionConfig(hidden=16, blocks=1, steps=600, latent_width=8, learning_rate=1e-2)
    unit = cells.obs["unit"]
    model = Diffusion(config).fit(
        cells[(unit == "u0").to_numpy()].copy(),
        cells[(unit == "u3").to_numpy()].copy(),
        watch=lambda step, figures: told.append((step, figures["validation_log_loss"])),
    )
    best = min(told, key=lambda pair: pair[1])
    assert told[-1][0] < 600
    assert model.provenance["steps"] == best[0]
    assert model.provenance["validation_log_loss"] == best[1]
