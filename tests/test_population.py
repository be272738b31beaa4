from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import stats

from conftest import planted_cells
from endoprint import population
from endoprint.config import Refusal
from endoprint.labels import PATHWAYS
from endoprint.model import ExposureModel
from endoprint.models.logistic import Logistic


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return planted_cells(n_units=6, n_cells=24)


def of_units(cells: AnnData, *units: str) -> AnnData:
    return cells[cells.obs["unit"].isin(units).to_numpy()].copy()


@pytest.fixture(scope="module")
def fitted(cells) -> Logistic:
    return Logistic().fit(of_units(cells, "u0", "u1", "u2"), of_units(cells, "u3"))


@pytest.fixture(scope="module")
def unseen(cells) -> AnnData:
    return of_units(cells, "u4", "u5")


@pytest.fixture(scope="module")
def table(fitted, unseen) -> pd.DataFrame:
    return population.sample_calls(fitted, unseen)


def test_every_sample_gets_one_row_and_the_right_call(table, unseen):
    assert list(table.index) == sorted(set(unseen.obs["sample"]))
    truth = unseen.obs.groupby("sample")["exposure"].first()
    assert (table["call"] == truth.loc[table.index]).all()
    assert table["n_cells"].sum() == unseen.n_obs


def test_confidence_is_the_samples_own_probability(table):
    p = table.filter(regex="^p_").rename(columns=lambda name: name.removeprefix("p_"))
    assert p.sum(axis=1).to_numpy() == pytest.approx(1.0)
    assert (p.idxmax(axis=1) == table["call"]).all()
    assert p.max(axis=1).to_numpy() == pytest.approx(table["confidence"].to_numpy())


def test_a_sample_is_weighed_as_the_model_weighs_it(fitted, unseen, table):
    for name in table.index:
        alone = unseen[(unseen.obs["sample"] == name).to_numpy()].copy()
        own = fitted.population_proba(alone)
        for exposure in fitted.exposures:
            assert table.loc[name, f"p_{exposure}"] == pytest.approx(own[exposure], abs=1e-9)


def test_stored_scores_give_the_same_calls_without_counts(fitted, unseen, table):
    stored = fitted.predict_proba(unseen).astype(np.float32)
    bare = AnnData(obs=unseen.obs[["sample", "unit"]])
    again = population.sample_calls(
        fitted, bare, probabilities=stored, novelty=fitted.novelty(unseen)
    )
    assert (again["call"] == table["call"]).all()
    assert again["confidence"].to_numpy() == pytest.approx(
        table["confidence"].to_numpy(), abs=1e-4
    )


def test_the_control_can_be_named(fitted, unseen):
    said = population.sample_calls(fitted, unseen, control="RET_AGONIST")["sentence"]
    assert said["u4|RET_AGONIST"].startswith(
        "Sample u4|RET_AGONIST (24 cells) looks like the control"
    )


class ByControl(Logistic):
    """A model that needs the sample's own vehicle, and says which cells it was given."""

    given: list[tuple[set[str], set[str]]] = []

    def population_evidence(self, cells, control=None):
        told = set() if control is None else set(control.obs["sample"])
        ByControl.given.append((set(cells.obs["sample"]), told))
        return super().population_evidence(cells, control)


def test_a_model_that_weighs_populations_itself_is_given_its_units_control(cells, unseen):
    ByControl.given = []
    model = ByControl().fit(of_units(cells, "u0", "u1", "u2"), of_units(cells, "u3"))
    population.sample_calls(model, unseen)
    told = {next(iter(sample)): control for sample, control in ByControl.given}
    assert told["u4|RET_AGONIST"] == {"u4|DMSO"}
    assert told["u5|LIVER-X_AGONIST"] == {"u5|DMSO"}
    assert told["u4|DMSO"] == set()


def test_unlabelled_cells_are_called_too(fitted, unseen, table):
    bare = unseen.copy()
    del bare.obs["exposure"]
    pd.testing.assert_frame_equal(population.sample_calls(fitted, bare), table)


def test_other_samples_do_not_matter(fitted, unseen, table):
    one = unseen[(unseen.obs["sample"] == "u4|DMSO").to_numpy()].copy()
    pd.testing.assert_frame_equal(
        population.sample_calls(fitted, one), table.loc[["u4|DMSO"]], atol=1e-6
    )


def test_a_sample_of_alien_cells_is_said_to_be_one(fitted, unseen):
    alien = unseen.copy()
    alien.X = alien.X[:, np.random.default_rng(2).permutation(alien.n_vars)]
    table = population.sample_calls(fitted, alien)
    assert (table["novel_share"] > 0.5).all()
    assert table["sentence"].str.contains("are unlike any training cell").all()


def test_no_such_column_is_refused(fitted, unseen):
    with pytest.raises(Refusal, match="samples are told apart"):
        population.sample_calls(fitted, unseen, by="dish")


# -- the sentence -------------------------------------------------------------------------------
def row(**changes: object) -> dict[str, object]:
    usual = {
        "n_cells": 312,
        "call": "RET_AGONIST",
        "confidence": 0.93,
        "second_call": "DMSO",
        "second_confidence": 0.04,
        "novel_share": 0.05,
        "is_calibration_unit_validated": True,
    }
    return {**usual, **changes}


def test_the_sentence_says_what_how_many_and_how_sure():
    said = population.sentence("X", row(), control="DMSO")
    assert said == (
        "Sample X (312 cells) looks exposed to RET_AGONIST (retinoic acid pathway, agonist): "
        "confidence .93"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_calibration_unit_validated": False}, "; calibration not unit-validated"),
        ({"n_cells": 1}, "(1 cell)"),
        ({"n_cells": 7}, "; too few cells to lean on"),
        ({"confidence": 0.45}, "is undecided between RET_AGONIST (.45) and DMSO (.04)"),
        ({"confidence": 0.99999}, "confidence > .99"),
        ({"call": "DMSO"}, "looks like the control (DMSO): confidence .93"),
        ({"call": "BPA"}, "looks exposed to BPA (endocrine disruptor)"),
        ({"call": "my drug"}, "looks exposed to my drug: confidence"),
        ({"novel_share": 0.8}, "80% of its cells are unlike any training cell"),
        ({"novel_share": float("nan")}, "confidence .93"),
    ],
)
def test_the_sentence_never_hides_a_doubt(changes, words):
    assert words in population.sentence("X", row(**changes), control="DMSO")


def test_a_files_own_control_is_recognised():
    assert "looks like the control (ctrl)" in population.sentence(
        "X", row(call="ctrl"), control="ctrl"
    )


def test_every_pathway_has_a_name_in_words():
    assert set(population.NAMES) == set(PATHWAYS)
    assert population.described("LIVER-X_ANTAGONIST") == "liver X pathway, antagonist"


# -- several units ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("n", "kind"),
    [
        (0, "none: units unknown"),
        (1, "none: one unit"),
        (4, "range of 4 units, no interval"),
        (5, "95 % t interval over 5 units"),
        (20, "95 % bootstrap over 20 units"),
    ],
)
def test_an_interval_is_what_the_number_of_units_allows(n, kind):
    values = np.linspace(0.4, 0.8, n)
    low, high, told = population.interval(values)
    assert told == kind
    if n < 2:
        assert np.isnan(low)
    elif n < 5:
        assert (low, high) == (0.4, 0.8)
    else:
        half = stats.sem(values) * stats.t.ppf(0.975, n - 1)
        assert (low, high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.01)


def test_units_count_the_same_however_many_cells_each_has(fitted, unseen):
    few = unseen[(unseen.obs["unit"] == "u4") | (np.arange(unseen.n_obs) % 5 == 0)].copy()
    few.obs["treatment"] = few.obs["exposure"]
    together = population.sample_calls(fitted, few, by="treatment")
    alone = population.sample_calls(fitted, few)
    for exposure in fitted.exposures:
        rows = alone.loc[[f"u4|{exposure}", f"u5|{exposure}"]].filter(regex="^p_")
        mean = np.log(rows).mean()
        wanted = np.exp(mean) / np.exp(mean).sum()
        assert together.loc[exposure, wanted.index].to_numpy(float) == pytest.approx(wanted)
        assert together.loc[exposure, "n_units"] == 2


def test_cells_added_a_few_at_a_time_come_to_the_same(fitted, unseen, table):
    said, novelty = fitted.predict_proba(unseen).to_numpy(), fitted.novelty(unseen)
    sample, unit = (unseen.obs[name].to_numpy(dtype=object) for name in ("sample", "unit"))
    pools = population.Pools(fitted)
    for start in range(0, unseen.n_obs, 7):
        part = slice(start, start + 7)
        pools.add(sample[part], unit[part], said[part], novelty[part])
    pd.testing.assert_frame_equal(pools.calls(by="sample", control="DMSO"), table)
    assert np.allclose(pools.shares().sum(axis=1), 1)


def test_cells_without_an_answer_count_and_say_nothing(fitted, unseen):
    said = fitted.predict_proba(unseen).to_numpy().copy()
    said[::3] = np.nan
    sample, unit = (unseen.obs[name].to_numpy(dtype=object) for name in ("sample", "unit"))
    pools = population.Pools(fitted)
    pools.add(sample, unit, said, np.zeros(unseen.n_obs), np.isnan(said[:, 0]))
    assert pools.calls(by="sample")["n_cells"].sum() == unseen.n_obs
    assert (pools.shares().sum(axis=1) < 1).all()
    pools = population.Pools(fitted)
    pools.add(sample, unit, said * np.nan, np.zeros(unseen.n_obs))
    assert pools.calls(by="sample").empty


# -- over-confidence ----------------------------------------------------------------------------
def test_more_of_the_same_cells_do_not_make_a_sample_surer(fitted, unseen):
    few = unseen[(unseen.obs["sample"] == "u4|DMSO").to_numpy()].copy()
    rows = np.tile(np.arange(few.n_obs), 10)
    many = AnnData(
        X=few.X[rows],
        obs=few.obs.iloc[rows].set_axis([f"again{i}" for i in range(len(rows))]),
        var=few.var,
    )
    first, second = (population.sample_calls(fitted, each) for each in (few, many))
    assert second["confidence"].iloc[0] == pytest.approx(first["confidence"].iloc[0], abs=1e-9)


def test_pooling_is_the_base_contract_unless_a_model_says_otherwise():
    assert Logistic.population_evidence is ExposureModel.population_evidence
    assert ByControl.population_evidence is not ExposureModel.population_evidence
