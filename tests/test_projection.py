"""Weights of known exposures are recovered where truth is known, and doubt is where it belongs."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.optimize import nnls

from conftest import planted_cells
from endoprint import cells as door
from endoprint import profiles, projection
from endoprint.config import Refusal
from endoprint.simulate import Atlas, SimulateConfig, simulate

CONTROL = "DMSO"


def curated(atlas: Atlas) -> tuple[AnnData, AnnData]:
    config = door.CellsConfig(
        source="none", exposure_key="condition", control=CONTROL,
        unit_keys=["line", "replicate"], line_key="line", batch_key="run",
        cell_type_key="cell_type", sample_key="sample_id", gene_id_key="gene_ids",
    )  # fmt: skip
    labelled, _ = door.curate(atlas.cells, config)
    new, _ = door.curate(atlas.new, config, labelled=False)
    return labelled, new


def is_control(new: AnnData, truth: pd.DataFrame) -> np.ndarray:
    return new.obs["sample"].map(truth["exposure"]).eq(CONTROL).to_numpy()


def grouped(truth: pd.DataFrame, groups: list[str]) -> pd.DataFrame:
    weights = truth.filter(regex="^w_").rename(columns=lambda name: name.removeprefix("w_"))
    return pd.DataFrame({g: weights[g.split(" + ")].sum(axis=1) for g in groups})


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    config = SimulateConfig(cells=3600, new_cells=3600, pool_cells=0)
    return simulate(config, seed=41)


@pytest.fixture(scope="module")
def made(atlas) -> projection.Projection:
    labelled, new = curated(atlas)
    return projection.projected(
        labelled, new, control=CONTROL, is_control=is_control(new, atlas.truth), n_draws=60
    )


# -- against the simulator's truth --------------------------------------------------------------
def test_the_weights_of_unknown_mixtures_are_recovered(atlas, made):
    edcs = atlas.truth.index[atlas.truth["unmodelled_share"] > 0]
    truth = grouped(atlas.truth, list(made.weights.columns)).loc[edcs]
    error = (made.weights.loc[edcs] - truth).abs()
    assert error.to_numpy().mean() <= 0.10
    # a mean over mostly absent exposures forgives much: those present must be found too
    present = (truth > 0).to_numpy()
    assert error.to_numpy()[present].mean() <= 0.15 < truth.to_numpy()[present].mean()


def test_a_known_exposure_is_itself_at_full_strength(atlas, made):
    pure = atlas.truth[
        (atlas.truth["unmodelled_share"] == 0) & (atlas.truth["exposure"] != CONTROL)
    ]
    own = [
        made.weights.loc[sample, next(g for g in made.weights if exposure in g.split(" + "))]
        for sample, exposure in pure["exposure"].items()
    ]
    assert np.mean(own) == pytest.approx(1.0, abs=0.15)


def test_what_no_reference_does_stays_a_residual(atlas, made):
    is_edc = atlas.truth.loc[made.samples.index, "unmodelled_share"] > 0
    is_pure = ~is_edc & ~made.samples["is_null"]
    mixed, pure = (made.samples.loc[each, "residual_share"].mean() for each in (is_edc, is_pure))
    assert mixed == pytest.approx(0.3, abs=0.15)  # the simulator's unmodelled share
    assert pure < mixed - 0.1


def test_control_against_control_is_the_null_and_near_nothing(made):
    assert made.samples["is_null"].sum() == 4  # two control samples in each of two units
    assert made.null is not None
    assert made.null.mean() < 0.15
    assert not made.samples.loc[made.samples["is_null"], "sentence"].str.contains("resemb").any()


def test_most_true_weights_lie_in_their_interval(atlas, made):
    truth = grouped(atlas.truth, list(made.weights.columns)).loc[made.weights.index]
    inside = (made.low <= truth + 1e-9) & (truth <= made.high + 1e-9)
    assert inside.to_numpy().mean() > 0.8


def test_exposures_that_look_alike_are_told_as_one(atlas, made):
    # the law correlates these twins above .7, and liver X's not at all
    assert "ESTROGEN_AGONIST + ESTROGEN_ANTAGONIST" in made.weights
    assert {"LIVER-X_AGONIST", "LIVER-X_ANTAGONIST"} <= set(made.weights)


# -- against other ways to compute it -----------------------------------------------------------
def test_without_noise_it_is_plain_least_squares_over_positive_weights():
    rng = np.random.default_rng(0)
    change = rng.normal(size=(1, 3, 400)).repeat(4, axis=0)  # four units that agree to the bit
    seen = 0.6 * change[0, 0] + 0.3 * change[0, 2] - 0.2 * change[0, 1]
    precision = rng.random(400) + 0.1
    once, met = np.ones(4), profiles.met_by(change)
    gram, noise = profiles.between_units(profiles.products_of(change, precision), once, met)
    assert noise == pytest.approx(0.0, abs=1e-9)
    towards = projection._towards(change, seen, precision, once, met)
    found = projection._solved(projection._definite(gram, noise, 400), towards, np.zeros(3))
    root = np.sqrt(precision)
    oracle, _ = nnls((change[0] * root).T, seen * root)
    np.testing.assert_allclose(found, oracle, atol=1e-9)


def test_products_between_units_hold_no_noise():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(2, 5000))
    change = truth + 2.0 * rng.normal(size=(6, 2, 5000))
    flat = np.ones(5000)
    gram, noise = profiles.between_units(
        profiles.products_of(change, flat), np.ones(6), profiles.met_by(change)
    )
    np.testing.assert_allclose(gram, truth @ truth.T, atol=0.15 * 5000)
    assert noise == pytest.approx(4 * 5000 / 6, rel=0.1)


# -- what must not matter, and what must be refused ----------------------------------------------
@pytest.fixture(scope="module")
def few() -> AnnData:
    return planted_cells(n_units=4, n_cells=30)


def of(cells: AnnData, *units: str) -> AnnData:
    return cells[cells.obs["unit"].isin(units).to_numpy()].copy()


def control_of(cells: AnnData) -> np.ndarray:
    return (cells.obs["exposure"] == CONTROL).to_numpy()


def test_the_samples_own_unit_is_never_its_reference(few):
    # u3's own profile is planted wrong: were it used, its weights would follow it
    known = profiles.references(few, control=CONTROL)
    wrong = known.change.copy()
    wrong[known.units.index("u3")] *= -5
    spoiled = profiles.References(**{**known.__dict__, "change": wrong})
    new = of(few, "u3")
    told = [
        projection.project(each, new, is_control=control_of(new), n_draws=5).weights
        for each in (known, spoiled)
    ]
    pd.testing.assert_frame_equal(told[0], told[1])


def test_neither_order_nor_other_samples_matter(few):
    labelled, new = of(few, "u0", "u1", "u2"), of(few, "u3")
    first = projection.projected(
        labelled, new, control=CONTROL, is_control=control_of(new), n_draws=5
    )
    turned = new[::-1].copy()
    again = projection.projected(
        labelled, turned, control=CONTROL, is_control=control_of(turned), n_draws=5
    )
    pd.testing.assert_frame_equal(first.weights, again.weights)
    assert first.weights.loc["u3|RET_AGONIST", "RET_AGONIST"] == pytest.approx(1.0, abs=0.2)


def test_the_same_seed_gives_the_same_intervals(few):
    labelled, new = of(few, "u0", "u1", "u2"), of(few, "u3")
    low = [
        projection.projected(
            labelled, new, control=CONTROL, is_control=control_of(new), n_draws=9, seed=3
        ).low
        for _ in range(2)
    ]
    pd.testing.assert_frame_equal(low[0], low[1])


def test_one_control_sample_means_no_null_and_the_result_says_so(few):
    labelled, new = of(few, "u0", "u1", "u2"), of(few, "u3")
    made = projection.projected(
        labelled, new, control=CONTROL, is_control=control_of(new), n_draws=5
    )
    assert made.null is None
    assert made.samples["sentence"].str.contains("no null").all()
    assert made.to_json()["null"] == "no null"
    json.dumps(made.to_json(), allow_nan=False)


def test_a_unit_without_control_is_left_out_with_the_reason(few):
    labelled, new = of(few, "u0", "u1", "u2"), of(few, "u3")
    made = projection.projected(
        labelled, new, control=CONTROL, is_control=np.zeros(new.n_obs, dtype=bool), n_draws=5
    )
    assert not len(made.weights)
    assert "0 control cells of unit u3" in made.left_out["u3|RET_AGONIST"]
    json.dumps(made.to_json())


def test_cells_without_types_are_held_against_references_without_them(few):
    labelled, new = of(few, "u0", "u1", "u2"), of(few, "u3")
    del new.obs["cell_type"]
    made = projection.projected(
        labelled, new, control=CONTROL, is_control=control_of(new), n_draws=5
    )
    assert made.weights.loc["u3|RET_AGONIST", "RET_AGONIST"] == pytest.approx(1.0, abs=0.25)


def test_genes_the_file_lacks_are_left_out_of_both_sides(few):
    labelled, new = of(few, "u0", "u1", "u2"), of(few, "u3")
    half = new[:, :60].copy()
    made = projection.projected(
        labelled, half, control=CONTROL, is_control=control_of(half), n_draws=5
    )
    assert made.weights.loc["u3|RET_AGONIST", "RET_AGONIST"] == pytest.approx(1.0, abs=0.3)


def test_impossible_projections_are_refused(few):
    alien = of(few, "u3")
    alien.var_names = [f"X{i}" for i in range(alien.n_vars)]
    known = profiles.references(of(few, "u0", "u1"), control=CONTROL)
    with pytest.raises(Refusal, match="genes of the references"):
        projection.project(known, alien, is_control=control_of(alien))
    with pytest.raises(Refusal, match="with their control"):
        profiles.references(few, control="water")
    bare = AnnData(X=sparse.csr_matrix((3, 120)), obs=pd.DataFrame(index=list("abc")), var=few.var)
    with pytest.raises(Refusal, match="no such column"):
        projection.project(known, bare, is_control=np.zeros(3))
    tiny = few[few.obs.groupby(["unit", "exposure"]).cumcount().to_numpy() < 3].copy()
    with pytest.raises(Refusal, match="no unit with both"):
        profiles.references(tiny, control=CONTROL)
