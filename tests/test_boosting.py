from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.special import log_softmax

from conftest import planted_cells
from endoprint.metrics import recall_by_exposure
from endoprint.model import ExposureModel, Pruned
from endoprint.models.boosting import TOLD_EVERY, Boosting, BoostingConfig
from endoprint.models.logistic import Logistic, LogisticConfig


def of_units(cells: AnnData, *units: str) -> AnnData:
    return cells[cells.obs["unit"].isin(units).to_numpy()].copy()


@pytest.fixture(scope="module")
def parts():
    cells = planted_cells(n_units=5, n_cells=20)
    return of_units(cells, "u0", "u1", "u2"), of_units(cells, "u3"), of_units(cells, "u4")


@pytest.fixture(scope="module")
def fitted(parts) -> Boosting:
    return Boosting().fit(*parts[:2])


def of_opposite_answers(n_cells: int = 800, n_genes: int = 30, seed: int = 0) -> AnnData:
    """Exposure raises gene 1 where gene 0 is on and lowers it where gene 0 is off."""
    rng = np.random.default_rng(seed)
    is_exposed = np.arange(n_cells) % 2 == 1
    is_on = rng.random(n_cells) < 0.6
    mean = np.full((n_cells, n_genes), 20.0)
    mean[:, 0] = np.where(is_on, 40, 4)
    mean[:, 1] = np.where(is_on == is_exposed, 40, 4)
    counts = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))
    obs = pd.DataFrame(
        {
            "exposure": np.where(is_exposed, "RET_AGONIST", "DMSO"),
            "unit": [f"u{i // 2 % 4}" for i in range(n_cells)],
            "n_counts": np.asarray(counts.sum(axis=1), dtype=float).ravel(),
            "n_genes": np.asarray((counts > 0).sum(axis=1)).ravel(),
        },
        index=[f"c{i}" for i in range(n_cells)],
    )
    return AnnData(X=counts, obs=obs, var=pd.DataFrame(index=[f"ENSG{i}" for i in range(n_genes)]))


def balanced_accuracy(model: ExposureModel, cells: AnnData) -> float:
    calls = model.predict_proba(cells).idxmax(axis=1)
    return float(recall_by_exposure(cells.obs["exposure"], calls).mean())


def test_a_response_that_another_gene_turns_round_is_found_where_no_line_can():
    cells = of_opposite_answers()
    train, valid, unseen = (
        of_units(cells, "u0", "u1"),
        of_units(cells, "u2"),
        of_units(cells, "u3"),
    )
    # a line through (gene 0, gene 1) parts three of the four kinds of cell at best: .8
    line = Logistic(LogisticConfig(n_groups=1)).fit(train, valid)
    assert balanced_accuracy(line, unseen) < 0.85
    # a tree must be offered both genes at once
    trees = Boosting(BoostingConfig(gene_share=1.0)).fit(train, valid)
    assert balanced_accuracy(trees, unseen) > 0.97


# -- what is saved ------------------------------------------------------------------------------
def walked(text: str, values: np.ndarray, n_exposures: int) -> np.ndarray:
    """Raw scores, (n, E), read off LightGBM's text by hand, tree by tree."""
    total = np.zeros((len(values), n_exposures))
    trees = text.split("\nend of trees")[0].split("\nTree=")[1:]
    for number, tree in enumerate(trees):
        field = dict(line.split("=", 1) for line in tree.splitlines() if "=" in line)
        leaf = [float(value) for value in field["leaf_value"].split()]
        if len(leaf) == 1:
            total[:, number % n_exposures] += leaf[0]
            continue
        gene, left, right = (
            [int(value) for value in field[name].split()]
            for name in ("split_feature", "left_child", "right_child")
        )
        threshold = [float(value) for value in field["threshold"].split()]
        for row, cell in enumerate(values):
            node = 0
            while node >= 0:
                node = left[node] if cell[gene[node]] <= threshold[node] else right[node]
            total[row, number % n_exposures] += leaf[-node - 1]  # ~node
    return total


def test_evidence_is_what_a_reader_of_the_text_would_add_up(fitted, parts):
    some = parts[2][:15].copy()
    state = fitted._state()
    values = fitted._latent.expression.of(some).toarray().astype(float)
    wanted = walked(state.values["trees"], values, len(fitted.exposures))
    assert fitted.evidence(some) == pytest.approx(wanted, abs=1e-9)


def test_the_text_says_what_the_booster_said(fitted, parts):
    train, valid, unseen = parts
    booster = fitted._boosted(train, valid, lambda step, figures: None)
    values = fitted._latent.expression.of(unseen).toarray()
    wanted = booster.predict(values, raw_score=True, num_iteration=booster.best_iteration)
    np.testing.assert_array_equal(fitted.evidence(unseen), wanted)


def test_numbers_fitted_are_leaves_and_splits(fitted):
    trees = fitted._trees.dump_model()["tree_info"]
    n_of_latent = sum(array.size for array in fitted._state().arrays.values())
    wanted = sum(tree["num_leaves"] + 2 * (tree["num_leaves"] - 1) for tree in trees)
    assert fitted.n_parameters() - n_of_latent == wanted > 0


# -- how it is fitted ---------------------------------------------------------------------------
def test_boosting_stops_where_validation_cells_grow_less_likely():
    cells = planted_cells(n_units=4, n_cells=20, fold=1.0)
    told = []
    model = Boosting(BoostingConfig(patience=10)).fit(
        of_units(cells, "u0", "u1", "u2"),
        of_units(cells, "u3"),
        watch=lambda step, figures: told.append((step, figures["validation_log_loss"])),
    )
    assert model.provenance["rounds"] < 50
    assert model._trees.num_trees() == 3 * model.provenance["rounds"]
    assert [step for step, _ in told] == list(range(0, len(told) * TOLD_EVERY, TOLD_EVERY))


def test_a_watcher_may_end_the_fit(parts):
    def watch(step: int, figures: dict[str, float]) -> None:
        raise Pruned

    with pytest.raises(Pruned):
        Boosting().fit(*parts[:2], watch=watch)


def test_it_fits_without_validation_cells(parts):
    train, valid, unseen = parts
    config = BoostingConfig(rounds_unstopped=12)
    model = Boosting(config).fit(train, valid[:0].copy())
    assert model.provenance["rounds"] == 12
    assert balanced_accuracy(model, unseen) > 0.8


def test_any_number_of_threads_gives_the_same_trees(parts):
    train, valid, unseen = parts
    one, two = (
        Boosting(BoostingConfig(rounds=10, n_threads=n_threads)).fit(train, valid).evidence(unseen)
        for n_threads in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


def test_a_crowded_exposure_gains_nothing_from_its_crowd():
    """Evidence is prior-free: ten times the control cells move no evidence towards control."""
    cells = planted_cells(n_units=5, n_cells=40, fold=1.0)
    train, unseen = of_units(cells, "u0", "u1", "u2"), of_units(cells, "u4")
    is_few = np.arange(train.n_obs) % 5 == 0
    crowd = train[(train.obs["exposure"] == "DMSO").to_numpy() | is_few].copy()
    config = BoostingConfig(rounds_unstopped=10)
    evidence = Boosting(config).fit(crowd, unseen[:0].copy()).evidence(unseen)
    assert log_softmax(evidence, axis=1).mean(axis=0) == pytest.approx(np.log(1 / 3), abs=0.25)


def test_an_unmeasured_gene_counts_as_average_not_as_silent(fitted, parts):
    unseen = parts[2]
    genes = np.array(fitted._latent.genes)
    gone = np.arange(len(genes)) % 3 == 0
    fewer = unseen[:, ~unseen.var_names.isin(genes[gone])].copy()
    values = fitted._latent.expression.of(unseen).toarray().astype(float)
    values[:, gone] = fitted._latent.centre[gone]
    wanted = fitted._trees.predict(values, raw_score=True)
    np.testing.assert_array_equal(fitted.evidence(fewer), wanted)
