from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from endoprint import metrics, paired
from endoprint.config import Refusal

EXPOSURES = ["DMSO", "LIVER-X_AGONIST", "RET_AGONIST"]


def judged(n: int = 600, *, sharpness: float = 2.0, n_units: int = 4, seed: int = 0):
    """Calibrated by construction: the truth is drawn from the probabilities themselves."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, sharpness, (n, len(EXPOSURES)))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    drawn = (p.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    index = pd.Index([f"c{i}" for i in range(n)])
    return (
        pd.DataFrame(p, index=index, columns=EXPOSURES),
        pd.Series(np.array(EXPOSURES)[drawn], index=index),
        pd.Series([f"u{i % n_units}" for i in range(n)], index=index),
    )


def test_figures_agree_with_scikit_learn():
    p, truth, unit = judged()
    found = metrics.summary(p, truth, unit)
    calls = metrics.call(p).to_numpy(str)
    y = truth.to_numpy(str)
    assert found["macro_f1"] == pytest.approx(f1_score(y, calls, average="macro"))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, calls))
    assert found["auroc_macro"] == pytest.approx(
        roc_auc_score(y, p.to_numpy(), multi_class="ovr", labels=EXPOSURES)
    )
    assert found["f1_RET_AGONIST"] == pytest.approx(
        f1_score(y, calls, labels=["RET_AGONIST"], average="macro")
    )


def test_the_final_names_are_all_there():
    found = metrics.summary(*judged(100))
    wanted = {"macro_f1", "balanced_accuracy", "auroc_macro", "ece", "worst_unit_macro_f1"}
    wanted |= {f"f1_{exposure}" for exposure in EXPOSURES}
    assert wanted <= set(found)
    assert all(isinstance(value, float) for value in found.values())


def test_tables_are_joined_by_cell_id_not_by_position():
    p, truth, unit = judged()
    shuffled = np.random.default_rng(1).permutation(len(p))
    again = metrics.summary(p.iloc[shuffled], truth, unit.iloc[shuffled[::-1]])
    # noise floors are simulated cell by cell, in order: the one figure that may move a little
    first = metrics.summary(p, truth, unit)
    floors = first.pop("ece_noise_floor"), again.pop("ece_noise_floor")
    assert again == pytest.approx(first)
    assert floors[0] == pytest.approx(floors[1], abs=0.01)


def test_an_exposure_nobody_met_costs_nothing():
    p, truth, unit = judged()
    kept = truth[truth != "RET_AGONIST"].index
    perfect = pd.DataFrame(0.0, index=kept, columns=EXPOSURES)
    for exposure in EXPOSURES:
        perfect.loc[truth[kept] == exposure, exposure] = 1.0
    found = metrics.summary(perfect, truth, unit)
    assert found["macro_f1"] == found["balanced_accuracy"] == found["auroc_macro"] == 1.0
    assert "f1_RET_AGONIST" not in found


def test_an_exposure_the_model_cannot_name_counts_as_missed():
    p, truth, unit = judged()
    found = metrics.summary(p[EXPOSURES[:2]], truth, unit)
    assert found["f1_RET_AGONIST"] == 0.0
    assert np.isfinite(found["log_loss"])


def test_worst_unit_is_the_smallest_of_the_units():
    p, truth, unit = judged()
    spoiled = p.copy()
    inside = (unit == "u2").to_numpy()
    spoiled.loc[inside] = p.loc[inside].to_numpy()[:, ::-1]
    table = metrics.by_unit(spoiled, truth, unit)
    assert table["macro_f1"].idxmin() == "u2"
    found = metrics.summary(spoiled, truth, unit)
    assert found["worst_unit_macro_f1"] == table["macro_f1"].min()


def test_a_cell_without_truth_is_refused():
    p, truth, unit = judged(50)
    with pytest.raises(Refusal, match="every judged cell"):
        metrics.summary(p, truth.iloc[1:], unit)
    with pytest.raises(Refusal, match="judged cells"):
        metrics.summary(p.iloc[:0], truth, unit)


def test_one_exposure_alone_has_no_auroc():
    p, truth, unit = judged(50)
    alone = truth[truth == "DMSO"].index
    assert np.isnan(metrics.summary(p.loc[alone], truth, unit)["auroc_macro"])


# -- calibration --------------------------------------------------------------------------------
def test_calibrated_outcomes_stay_within_the_noise_floor_about_19_times_in_20():
    inside = 0
    for seed in range(60):
        p, truth, unit = judged(400, seed=seed, sharpness=1.0)
        error, floor = metrics.calibration_error(p, truth, unit, seed=seed)
        inside += error <= floor
    assert inside >= 50  # balancing the weights by the truth costs a little


def test_over_confidence_leaves_the_noise_floor():
    p, truth, unit = judged(2000, sharpness=1.0)
    sharpened = p**4
    sharpened = sharpened.div(sharpened.sum(axis=1), axis=0)
    error, floor = metrics.calibration_error(sharpened, truth, unit)
    assert error > 3 * floor


def test_ece_matches_a_hand_count():
    # two confidence levels, half the mass each: .9 right half the time, .6 always
    index = pd.Index([f"c{i}" for i in range(8)])
    confidence = np.array([0.9] * 4 + [0.6] * 4)
    p = pd.DataFrame({"A": confidence, "B": 1 - confidence}, index=index)
    truth = pd.Series(["A", "A", "B", "B", "A", "A", "A", "A"], index=index)
    unit = pd.Series("u", index=index)
    # A weighs 1/6 per cell, B 1/2: the .9 bin holds A A B B, the .6 bin A A A A
    gaps = [abs((2 / 6) * 0.1 - 1.0 * 0.9), (4 / 6) * 0.4]
    error, _ = metrics.calibration_error(p, truth, unit)
    assert error == pytest.approx(sum(gaps) / 2)


def test_a_large_unit_does_not_outvote_a_small_one():
    p, truth, unit = judged(300)
    crowd = [p.loc[unit == "u0"].rename(index=lambda c, k=k: f"{c}-{k}") for k in range(20)]
    more = pd.concat([p, *crowd])
    origin = pd.Series(more.index.str.split("-").str[0], index=more.index)
    weighed = metrics.calibration_error(more, origin.map(truth), origin.map(unit))[0]
    assert weighed == pytest.approx(metrics.calibration_error(p, truth, unit)[0])


def test_reliability_lies_on_the_diagonal_when_calibrated():
    p, truth, unit = judged(6000)
    table = metrics.reliability(p, truth, unit)
    assert set(table["exposure"]) == {"call", *EXPOSURES}
    assert (table["confidence"] - table["accuracy"]).abs().max() < 0.12
    assert table.groupby("exposure")["n_cells"].sum().eq(6000).all()


def test_confusion_counts_every_cell_once():
    p, truth, unit = judged(200)
    table = metrics.confusion(p, truth)
    assert table.to_numpy().sum() == 200
    assert np.diag(table).sum() == (metrics.call(p) == truth).sum()


def test_roc_curves_span_the_square_and_give_back_the_area():
    p, truth, _ = judged(400)
    for exposure, curve in metrics.roc_curves(p, truth).groupby("exposure"):
        area = np.trapezoid(curve["true_positive_rate"], curve["false_positive_rate"])
        assert area == pytest.approx(roc_auc_score(truth == exposure, p[exposure]), abs=0.01)


# -- units decide -------------------------------------------------------------------------------
def units(values) -> pd.Series:
    return pd.Series(values, index=[f"u{i:02d}" for i in range(len(values))], dtype=float)


def test_sign_flip_equals_brute_force():
    differences = np.array([0.3, -0.1, 0.2, 0.05, 0.0, -0.02])
    patterns = np.array(list(product([1, -1], repeat=6)))
    brute = np.mean(patterns @ differences >= differences.sum() - 1e-12)
    assert paired.sign_flip(differences) == pytest.approx(brute)


def test_the_smallest_p_is_two_to_the_minus_n():
    assert paired.sign_flip(np.full(5, 0.1)) == 2**-5


def test_under_five_units_nothing_is_inferred():
    found = paired.compare_units(units([0.9] * 4), units([0.1] * 4))
    assert found.verdict == "too few units"
    assert found.low is None
    assert found.p_value is None
    assert "u03 +0.800" in found.sentence()
    assert paired.interval(units([0.9] * 4)) is None


@pytest.mark.parametrize("n", [5, 12, 19, 20, 40])
def test_a_clear_winner_is_called_better_and_the_loser_worse(n):
    rng = np.random.default_rng(0)
    a = units(0.8 + 0.02 * rng.normal(size=n))
    b = units(0.6 + 0.02 * rng.normal(size=n))
    assert paired.compare_units(a, b).verdict == "better"
    assert paired.compare_units(b, a).verdict == "worse"
    assert paired.compare_units(a, b, by=0.3).verdict == "not told apart"
    assert paired.compare_units(a, a).verdict == "not told apart"


@pytest.mark.parametrize("n", [5, 10, 20, 30])
def test_equal_models_are_rarely_called_better(n):
    n_pairs = 200
    false = 0
    for seed in range(n_pairs):
        rng = np.random.default_rng(seed)
        unit_effect = rng.normal(0, 0.1, n)
        a, b = (units(0.7 + unit_effect + rng.normal(0, 0.03, n)) for _ in range(2))
        false += paired.compare_units(a, b, seed=seed).verdict == "better"
    monte_carlo = 1.645 * np.sqrt(0.05 * 0.95 / n_pairs)
    assert false / n_pairs <= 0.05 + monte_carlo


def test_the_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        values = units(np.random.default_rng(seed).normal(0.6, 0.1, 8))
        low, high = paired.interval(values, confidence=0.9)
        covered += low <= 0.6 <= high
    assert 0.84 <= covered / 200 <= 0.96


def predictions(p, truth, unit) -> pd.DataFrame:
    return pd.DataFrame({"unit": unit, "truth": truth}).join(p.add_prefix("p_"))


def test_comparing_tables_compares_their_units():
    p, truth, unit = judged(900, n_units=6)
    noise = np.random.default_rng(0).dirichlet(np.ones(3), len(p))
    good = predictions(p, truth, unit)
    poor = predictions(pd.DataFrame(noise, index=p.index, columns=p.columns), truth, unit)
    found = metrics.compare(good, poor.sample(frac=1, random_state=0))
    assert found.verdict == "better"
    assert found.n_units == 6
    assert found.p_value == 2**-6
    assert found.sentence().startswith("better: macro_f1 differs by +")


def test_different_cells_are_not_compared():
    p, truth, unit = judged(60)
    good = predictions(p, truth, unit)
    with pytest.raises(Refusal, match="same cells"):
        metrics.compare(good, good.iloc[1:])


def test_units_only_one_model_has_are_refused():
    with pytest.raises(Refusal, match="every unit"):
        paired.compare_units(units([0.1, 0.2]), units([0.1]))


def test_holm_is_never_below_the_raw_p_and_keeps_order():
    raw = [0.01, None, 0.04, 0.03]
    assert paired.holm(raw) == pytest.approx([0.03, None, 0.06, 0.06])
