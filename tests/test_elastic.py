from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from conftest import planted_cells
from endoprint import elastic
from endoprint.elastic import fit_elastic
from endoprint.linear import fit_balanced
from endoprint.models.logistic import Logistic, LogisticConfig


@pytest.fixture(scope="module")
def planted():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [120, 60, 30])
    values = rng.normal(size=(210, 12))
    values[:, 0] += 2 * (truth == 1)
    values[:, 1] += 2 * (truth == 2)
    return values - values.mean(axis=0), truth


@pytest.mark.parametrize("l1_share", [0.5, 1.0])
def test_it_is_scikit_learns_elastic_net(planted, l1_share, monkeypatch):
    values, truth = planted
    monkeypatch.setattr(elastic, "TOLERANCE", 1e-7)
    *_, found = fit_elastic(values, truth, [0.1, 0.02], l1_share)
    wanted = LogisticRegression(
        solver="saga", l1_ratio=l1_share, C=1 / (0.02 * len(truth)), class_weight="balanced",
        tol=1e-8, max_iter=20_000,
    ).fit(values, truth)  # fmt: skip
    assert found.has_converged
    assert found.coefficients == pytest.approx(wanted.coef_, abs=1e-3)
    said = softmax(values @ found.coefficients.T + found.intercept, axis=1)
    assert said == pytest.approx(wanted.predict_proba(values), abs=1e-3)


def test_without_absolute_values_it_is_the_plain_fit(planted):
    values, truth = planted
    (found,) = fit_elastic(sparse.csr_matrix(values), truth, [0.1], 0.0)
    wanted = next(fit_balanced(values, truth, [0.1]))
    assert found.coefficients == pytest.approx(wanted.coefficients, abs=5e-3)


def test_the_first_gene_speaks_where_the_penalty_meets_its_pull(planted):
    values, truth = planted
    weight = 1 / (3 * np.bincount(truth)[truth])
    pull = np.abs(((1 / 3 - np.eye(3)[truth]) * weight[:, None]).T @ values)
    above, below = fit_elastic(values, truth, [1.02 * pull.max(), 0.98 * pull.max()], 1.0)
    assert not above.coefficients.any()
    assert set(zip(*np.nonzero(below.coefficients), strict=True)) == {
        np.unravel_index(pull.argmax(), pull.shape)
    }


def test_an_elastic_net_drops_genes_that_say_nothing():
    cells = planted_cells(n_units=5, n_cells=20)
    unit = cells.obs["unit"]
    train, valid, unseen = (
        cells[part.to_numpy()].copy()
        for part in (unit.isin(["u0", "u1", "u2"]), unit == "u3", unit == "u4")
    )
    model = Logistic(LogisticConfig(l1_share=0.9)).fit(train, valid)
    says = np.abs(model._weighing.coefficients[0]).sum(axis=0) > 0
    assert 16 <= says.sum() <= 90  # sixteen genes of 120 respond, and library size follows them
    calls = model.predict_proba(unseen).idxmax(axis=1)
    assert (calls == unseen.obs["exposure"]).mean() > 0.85
