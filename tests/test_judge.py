from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from conftest import planted_cells
from endoprint import breakdown, controls, judge, metrics, negatives, strangers
from endoprint.config import Refusal
from endoprint.design import DesignConfig, make_split
from endoprint.model import ExposureModel, State
from endoprint.models.logistic import Logistic
from endoprint.models.signature import Signature


def split_of(cells: AnnData, **chosen):
    return make_split(cells.obs, DesignConfig(**chosen), seed=0)


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return planted_cells(n_units=8, n_cells=12)


@pytest.fixture(scope="module")
def split(cells):
    return split_of(cells, n_test_units=2, n_folds=6)


@pytest.fixture(scope="module")
def judged(cells, split) -> judge.Judgement:
    return judge.cross_fit(Logistic, cells, split)


class Spy(ExposureModel):
    """Remember what it was shown; answer that every exposure is as likely."""

    name = "spy"
    seen: list[tuple[set[str], set[str]]] = []
    asked: list[set[str]] = []

    def _learn(self, train, valid, watch, work):
        Spy.seen.append((set(train.obs["unit"]), set(valid.obs["unit"])))
        watch(0, {"told": 1.0})

    def evidence(self, cells):
        return np.zeros((cells.n_obs, len(self.exposures)))

    def predict_proba(self, cells):
        Spy.asked.append(set(cells.obs["unit"]))
        return super().predict_proba(cells)

    def embed(self, cells):
        return np.zeros((cells.n_obs, 2))

    def _state(self):
        return State()

    def _restore(self, state):
        pass


# -- nothing leaks ------------------------------------------------------------------------------
def test_nothing_fitted_sees_a_held_out_unit(cells, split):
    Spy.seen, Spy.asked = [], []
    heard = []
    judge.cross_fit(Spy, cells, split, watch=lambda epoch, told: heard.append(told))
    assert len(Spy.seen) == split.n_folds == len(heard)
    questions = Spy.asked[1::2]  # a fit asks about its validation cells first
    assert len(questions) == split.n_folds
    for (train, valid), asked in zip(Spy.seen, questions):
        assert train
        assert valid
        assert not (train | valid) & asked
        assert not (train | valid | asked) & set(split.test)
    assert set().union(*questions) == set(split.development)


def test_the_test_units_are_never_judged(judged, split):
    assert set(judged.predictions["unit"]) == set(split.development)


@pytest.mark.parametrize("build", [Logistic, Signature])
def test_a_gene_only_held_out_cells_express_reaches_nothing(build, cells, split, tmp_path):
    # planted so loudly in the held-out unit that any gene list, mean or axis would notice
    held_out = split.parts(cells.obs, 0).held_out
    loud = np.zeros((cells.n_obs, 1), dtype=np.float32)
    loud[held_out] = 500
    genes = pd.DataFrame(index=[*cells.var_names, "ENSG77777777777"])
    planted = AnnData(
        X=sparse.hstack([cells.X, sparse.csr_matrix(loud)]).tocsr(), obs=cells.obs, var=genes
    )
    made = []

    def remember():
        made.append(build())
        return made[-1]

    judge.cross_fit(remember, planted, split, folds=[0])
    made[0].save(tmp_path)
    state = json.loads((tmp_path / "model.json").read_text())["state"]
    assert "ENSG77777777777" not in json.dumps(state)
    # and what was fitted is what would have been fitted without it
    plain = build()
    parts = split.parts(cells.obs, 0)
    plain.fit(cells[parts.train].copy(), cells[parts.valid].copy())
    for key, array in plain._state().arrays.items():
        np.testing.assert_array_equal(made[0]._state().arrays[key], array)


def test_held_out_labels_change_no_answer(cells, split, judged):
    relabelled = cells.copy()
    held_out = split.parts(cells.obs, 0).held_out
    labels = relabelled.obs["exposure"].to_numpy(dtype=object).copy()
    labels[held_out] = "DMSO"
    relabelled.obs["exposure"] = labels
    again = judge.cross_fit(Logistic, relabelled, split, folds=[0])
    pd.testing.assert_frame_equal(
        again.probabilities, judged.probabilities.loc[again.predictions.index]
    )


# -- the tables ---------------------------------------------------------------------------------
def test_every_development_cell_is_answered_once(cells, split, judged):
    development = cells.obs_names[cells.obs["unit"].isin(split.development)]
    assert judged.predictions.index.is_unique
    assert set(judged.predictions.index) == set(development)
    truth = cells.obs["exposure"].loc[judged.predictions.index]
    assert (judged.predictions["truth"] == truth).all()
    assert judged.probabilities.sum(axis=1).to_numpy() == pytest.approx(1.0)


def test_a_planted_signal_is_judged_highly_and_costs_are_told(judged):
    told = judged.metrics
    assert told["macro_f1"] > 0.9
    assert told["population_macro_f1"] == 1.0
    assert told["worst_unit_macro_f1"] == judged.by_unit["macro_f1"].min()
    for cost in ("fit_seconds", "cpu_seconds", "score_seconds_per_1000_cells"):
        assert told[cost] > 0
    assert 0.01 < told["peak_memory_gib"] < 64
    assert len(judged.folds) == len(judged.by_unit) == 6


def test_folds_can_be_chosen_and_progress_is_told(cells, split):
    told = []
    found = judge.cross_fit(
        Logistic, cells, split, folds=[1], told=lambda done, total: told.append((done, total))
    )
    assert told == [(0, 1), (1, 1)]
    assert set(found.predictions["fold"]) == {1}
    with pytest.raises(Refusal, match="at least one fold"):
        judge.cross_fit(Logistic, cells, split, folds=[])


def test_whole_lines_are_judged_as_lines(cells):
    found = judge.cross_fit(Logistic, cells, split_of(cells, scheme="line"))
    assert set(found.by_unit.index) <= {"L0", "L1"}
    assert "2 held-out lines: range, no interval" in found.caveats


def test_technical_folds_are_never_called_units(cells):
    plates = cells.copy()
    plates.obs["technical_fold"] = plates.obs["unit"]
    plates.obs["unit"] = ""
    found = judge.cross_fit(Logistic, plates, split_of(plates))
    assert found.is_replicated is False
    assert any(caveat.startswith("replicated: false") for caveat in found.caveats)
    row = judge.leaderboard([found]).iloc[0]
    assert row["n_units"] == 0
    assert not row["is_interval"]
    assert negatives.shuffled_control(Logistic, plates, split_of(plates)).is_informative is False


def test_an_exposure_the_training_units_never_met_is_a_caveat(cells):
    alone = cells.copy()
    labels = alone.obs["exposure"].to_numpy(dtype=object).copy()
    only = (alone.obs["unit"] == "u0").to_numpy() & (labels == "RET_AGONIST")
    labels[only] = "THYROID_AGONIST"
    alone.obs["exposure"] = labels
    split = split_of(alone, test_units=["u7"], n_folds=7)
    fold = next(i for i, units in enumerate(split.folds) if units == ["u0"])
    found = judge.cross_fit(Logistic, alone, split, folds=[fold])
    assert "never in training: THYROID_AGONIST" in found.caveats
    assert found.metrics["f1_THYROID_AGONIST"] == 0.0


# -- negative controls --------------------------------------------------------------------------
def test_shuffling_keeps_samples_whole_and_units_complete(cells):
    shuffled = controls.shuffled(cells, seed=1)
    assert (shuffled.obs.groupby("sample")["exposure"].nunique() == 1).all()
    for _, unit in shuffled.obs.groupby("unit"):
        assert sorted(unit["exposure"]) == sorted(
            cells.obs.loc[unit.index, "exposure"]
        )  # the same exposures, as often
    assert (shuffled.obs["exposure"] != cells.obs["exposure"]).any()
    assert shuffled is not cells


def test_units_are_shuffled_independently(cells):
    shuffled = controls.shuffled(cells, seed=0).obs
    moves = {
        unit: tuple(rows.groupby(cells.obs["exposure"])["exposure"].first())
        for unit, rows in shuffled.groupby("unit")
    }
    assert len(set(moves.values())) > 1


def test_shuffled_labels_give_chance_and_the_model_is_above_them(cells, split, judged):
    control = negatives.shuffled_control(Logistic, cells, split, seed=3)
    assert control.is_informative
    assert control.macro_f1 < 0.6 < judged.metrics["macro_f1"]
    row = judge.leaderboard([judged], shuffles={"logistic": control}).loc["logistic"]
    assert row["against_shuffled"] == "better"
    assert row["shuffled_macro_f1"] == control.macro_f1


def test_a_shuffle_of_few_units_says_it_is_not_informative():
    few = planted_cells(n_units=3, n_cells=10)
    split = split_of(few, n_test_units=0, n_folds=3)
    control = negatives.shuffled_control(Logistic, few, split)
    assert not control.is_informative
    assert "not informative" in control.sentence()
    found = judge.cross_fit(Logistic, few, split)
    row = judge.leaderboard([found], shuffles={"logistic": control}).iloc[0]
    assert row["against_shuffled"] == "not informative"
    assert np.isnan(row["shuffled_macro_f1"])


def test_chance_is_what_blind_guessing_reaches():
    rng = np.random.default_rng(0)
    truth = pd.Series(rng.choice(["A", "B", "C"], 60_000, p=[0.7, 0.2, 0.1]))
    guess = pd.Series(rng.choice(["A", "B", "C"], 60_000))
    found = controls.chance_macro_f1(truth, 3)
    assert found == pytest.approx(metrics.f1_by_exposure(truth, guess).mean(), abs=0.01)


def test_depth_alone_tells_nothing_where_depth_was_not_planted(cells, split):
    flat = cells.copy()
    rng = np.random.default_rng(0)
    flat.obs["n_counts"] = flat.obs["n_counts"].to_numpy()[rng.permutation(cells.n_obs)] + 1e4
    flat.obs["n_genes"] = flat.obs["n_genes"].to_numpy()[rng.permutation(cells.n_obs)]
    assert negatives.depth_control(flat, split).macro_f1 < 0.5


def test_depth_alone_tells_what_was_planted_in_depth(cells, split):
    deep = cells.copy()
    is_exposed = (deep.obs["exposure"] == "RET_AGONIST").to_numpy()
    deep.obs["n_counts"] = deep.obs["n_counts"] * np.where(is_exposed, 30, 1)
    control = negatives.depth_control(deep, split)
    assert control.macro_f1 > control.chance + 0.1


def test_controls_by_genes_split_targets_from_the_rest(cells, split):
    known = sorted(controls.responses.table()["gene_id"].unique())[:24]
    named = cells.copy()
    # the planted responders of RET_AGONIST (genes 16 to 23) get the names of published targets
    names = list(cells.var_names)
    names[8:24] = known[:16]
    named.var_names = names
    named.var["symbol"] = ["MT-CO1" if i >= 110 else f"G{i}" for i in range(named.n_vars)]
    found = {each.name: each for each in negatives.gene_controls(Logistic, named, split)}
    assert set(found) == {
        "targets only",
        "targets removed",
        "mitochondrial and ribosomal only",
    }
    # not quite chance without them: raised genes take up library that all others then lack
    assert found["targets only"].macro_f1 > 0.9
    for rest in ("targets removed", "mitochondrial and ribosomal only"):
        assert found[rest].macro_f1 < found["targets only"].macro_f1 - 0.1


def test_batches_that_shift_control_cells_are_told_and_others_are_not():
    probed = planted_cells(n_units=6, n_cells=40, exposures=("DMSO", "RET_AGONIST"))
    half = np.arange(probed.n_obs) % 2 == 0  # every unit in both batches
    probed.obs["batch"] = np.where(half, "b0", "b1")
    still = negatives.batch_probe(Logistic, probed, control="DMSO")
    counts = probed.X.toarray()
    counts[half, 60:90] *= 4
    probed.X = sparse.csr_matrix(counts)
    shifted = negatives.batch_probe(Logistic, probed, control="DMSO")
    assert shifted.macro_f1 > 0.9
    assert still.macro_f1 < 0.7
    assert shifted.name == "batch of control cells"


def test_a_batch_probe_says_why_it_cannot_be_asked(cells):
    assert "not separable" in negatives.batch_probe(Logistic, cells, control="DMSO")
    alone = cells.copy()
    alone.obs["batch"] = alone.obs["unit"]  # one batch a unit: never told apart
    assert "not separable" in negatives.batch_probe(Logistic, alone, control="DMSO")
    del alone.obs["batch"]
    assert "unknown" in negatives.batch_probe(Logistic, alone, control="DMSO")


# -- populations, parts, strangers --------------------------------------------------------------
def test_whole_samples_are_judged_by_the_same_figures(judged):
    for name in ("macro_f1", "balanced_accuracy", "auroc_macro", "pr_auc_macro", "ece",
                 "ece_noise_floor", "top2_balanced_accuracy", "worst_unit_macro_f1"):  # fmt: skip
        assert np.isfinite(judged.metrics[f"population_{name}"])
    told = metrics.f1_by_exposure(judged.samples["truth"], judged.samples["call"])
    assert judged.metrics["population_macro_f1"] == told.mean()
    assert 0 <= judged.metrics["false_novel_rate"] < 0.3


def test_an_answer_that_is_no_number_is_an_error_and_never_a_zero(cells, split):
    class Broken(Spy):
        def evidence(self, cells):
            weighed = np.zeros((cells.n_obs, len(self.exposures)))
            weighed[:1, 1] = np.nan
            return weighed

    with pytest.raises(Refusal, match="with numbers"):
        judge.cross_fit(Broken, cells, split, folds=[0])


def test_agonist_for_antagonist_is_right_by_pathway_and_wrong_by_direction():
    index = [f"c{i}" for i in range(6)]
    truth = ["RET_AGONIST"] * 2 + ["RET_ANTAGONIST"] * 2 + ["DMSO"] * 2
    called = ["RET_ANTAGONIST"] * 2 + ["RET_ANTAGONIST"] * 2 + ["DMSO"] * 2
    names = ["DMSO", "RET_AGONIST", "RET_ANTAGONIST"]
    said = pd.DataFrame(
        [[0.8 if name == call else 0.1 for name in names] for call in called],
        index=index, columns=[f"p_{name}" for name in names],
    )  # fmt: skip
    said["truth"], said["unit"] = truth, ["u0", "u1"] * 3
    said["cell_type"] = "Neurons"
    found = breakdown.breakdown(said).set_index(["by", "group"])
    assert found.loc[("pathway", "RET"), "f1"] == 1.0
    assert found.loc[("direction", "AGONIST"), "f1"] == 0.0
    assert found.loc[("exposure", "RET_AGONIST"), "recall"] == 0.0
    assert found.loc[("exposure", "RET_ANTAGONIST"), "f1"] == pytest.approx(2 / 3)
    assert found.loc[("cell_type", "Neurons"), "f1"] == pytest.approx((0 + 2 / 3 + 1) / 3)
    assert found.loc[("pathway", "RET"), "auroc"] == 1.0
    assert (found["worst_unit"] <= found["f1"] + 1e-9).all()


def test_a_part_of_the_breakdown_equals_judging_that_part_alone(judged):
    found = breakdown.breakdown(judged.predictions).set_index(["by", "group"])
    neurons = judged.predictions[judged.predictions["cell_type"] == "Neurons"]
    alone = metrics.summary(metrics.probabilities_of(neurons), neurons["truth"], neurons["unit"])
    row = found.loc[("cell_type", "Neurons")]
    assert row["f1"] == pytest.approx(alone["macro_f1"])
    assert row["auroc"] == pytest.approx(alone["auroc_macro"])
    for exposure in judged.probabilities:
        assert found.loc[("exposure", exposure), "f1"] == pytest.approx(
            judged.metrics[f"f1_{exposure}"]
        )


def test_an_exposure_nobody_named_lies_farther_than_those_that_were(cells, split):
    told = []
    found = strangers.left_out(
        Logistic, cells, split, control="DMSO", told=lambda done, total: told.append((done, total))
    )
    assert list(found.index) == ["LIVER-X_AGONIST", "RET_AGONIST"]
    assert (found["novelty_auroc"] > 0.6).all()
    assert (found["separability_auroc"] > 0.9).all()
    assert (found["false_novel_rate"] < 0.4).all()
    assert told[-1] == (3, 3)


def test_without_a_signal_no_stranger_is_noticed():
    flat = planted_cells(n_units=6, n_cells=30, fold=1.0)
    found = strangers.left_out(Logistic, flat, split_of(flat, n_test_units=0), control="DMSO")
    assert found["novelty_auroc"].between(0.3, 0.7).all()
    two = planted_cells(n_units=4, exposures=("DMSO", "RET_AGONIST"))
    with pytest.raises(Refusal, match="leaves two"):
        strangers.left_out(Logistic, two, split_of(two), control="DMSO")


# -- the leaderboard ----------------------------------------------------------------------------
def test_the_leaderboard_ranks_compares_and_warns(cells, split, judged):
    spy = judge.cross_fit(Spy, cells, split)
    board = judge.leaderboard([spy, judged], audit={"confounded": True})
    assert list(board.index) == ["logistic", "spy"]
    assert np.isnan(board.loc["logistic", "against_bar"])
    assert board.loc["spy", "against_bar"] < -0.3
    assert board.loc["spy", "against_bar_said"].startswith("worse")
    assert board["caveats"].str.startswith("confounded").all()
    row = board.loc["logistic"]
    assert row["is_interval"]
    assert row["low"] <= row["macro_f1"] + 0.02
    assert row["n_units"] == 6


def test_models_judged_on_other_cells_are_not_ranked_together(cells, split, judged):
    other = judge.cross_fit(Spy, cells, split, folds=[0])
    with pytest.raises(Refusal, match="same held-out cells"):
        judge.leaderboard([judged, other])
    with pytest.raises(Refusal, match="none"):
        judge.leaderboard([])


def test_judging_twice_gives_the_same_figures(cells, split, judged):
    again = judge.cross_fit(Logistic, cells, split)
    pd.testing.assert_frame_equal(again.predictions, judged.predictions)
    pd.testing.assert_frame_equal(again.by_unit, judged.by_unit)


def test_judging_leaves_the_cells_as_they_were(cells, split):
    before = cells.obs.to_json(), cells.X.data.tobytes(), list(cells.var_names)
    judge.cross_fit(Signature, cells, split, folds=[0])
    negatives.shuffled_control(Signature, cells, split, folds=[0])
    assert (cells.obs.to_json(), cells.X.data.tobytes(), list(cells.var_names)) == before
