from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from conftest import planted_cells
from endoprint.config import Refusal
from endoprint.curated import log_normalised
from endoprint.draws import evenly_drawn
from endoprint.expression import Expression
from endoprint.groups import FEWEST_CELLS, Groups
from endoprint.latent import Latent, variable_genes
from endoprint.linear import fit_balanced, fit_grouped
from endoprint.metrics import recall_by_exposure
from endoprint.models import logistic
from endoprint.models.logistic import Logistic, LogisticConfig


def of_units(cells: AnnData, *units: str) -> AnnData:
    return cells[cells.obs["unit"].isin(units).to_numpy()].copy()


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return planted_cells(n_units=5, n_cells=20)


@pytest.fixture(scope="module")
def parts(cells):
    return of_units(cells, "u0", "u1", "u2"), of_units(cells, "u3"), of_units(cells, "u4")


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_evidence_is_scikit_learns_own_decision(parts, kind):
    train, valid, unseen = parts
    model = Logistic(LogisticConfig(penalty=0.1, kind=kind, n_groups=1)).fit(train, valid)
    read = Expression.fit(train, kind)
    plain = LogisticRegression(
        C=1 / (0.1 * train.n_obs), class_weight="balanced", tol=1e-8, max_iter=5000
    ).fit(read.of(train), train.obs["exposure"])
    wanted = plain.decision_function(read.of(unseen))
    found = softmax(model.evidence(unseen), axis=1)
    assert found == pytest.approx(softmax(wanted, axis=1), abs=0.005)


def test_sparse_and_dense_fits_agree(parts, monkeypatch):
    train, valid, unseen = parts
    config = LogisticConfig(penalty=0.1, n_groups=1)
    dense = Logistic(config).fit(train, valid).predict_proba(unseen)
    monkeypatch.setattr(logistic, "DENSE_LIMIT", 0)
    thin = Logistic(config).fit(train, valid).predict_proba(unseen)
    assert thin.to_numpy() == pytest.approx(dense.to_numpy(), abs=0.01)


def test_the_penalty_is_chosen_on_validation_cells(parts):
    train, valid, _ = parts
    told = []
    model = Logistic().fit(train, valid, watch=lambda step, figures: told.append(figures))
    best = min(told, key=lambda figures: figures["validation_log_loss"])
    assert model.provenance["penalty"] == best["penalty"]
    assert model.provenance["kind"] == ("log" if best["is_log"] else "linear")
    assert model.provenance["n_groups"] == best["n_groups"]
    for path in {(figures["is_log"], figures["n_groups"]) for figures in told}:
        tried = [f["penalty"] for f in told if (f["is_log"], f["n_groups"]) == path]
        assert tried == list(logistic.PENALTIES[: len(tried)])


def test_penalties_past_the_best_are_not_tried():
    made = planted_cells(n_units=5, n_cells=20, fold=1.5)
    told = []
    Logistic(LogisticConfig(kind="log", n_groups=1)).fit(
        of_units(made, "u0", "u1", "u2"),
        of_units(made, "u3"),
        watch=lambda step, figures: told.append(figures["validation_log_loss"]),
    )
    assert len(told) < len(logistic.PENALTIES)
    assert told[-1] > told[-2] == min(told)


def test_noise_asks_for_a_stronger_penalty_than_signal():
    def chosen(fold: float) -> float:
        made = planted_cells(n_units=5, n_cells=20, fold=fold)
        model = Logistic().fit(of_units(made, "u0", "u1", "u2"), of_units(made, "u3", "u4"))
        return float(model.provenance["penalty"])

    assert chosen(1.0) > chosen(4.0)


def test_a_penalty_out_of_range_is_refused():
    with pytest.raises(Refusal, match="penalty must lie in"):
        LogisticConfig.of({"penalty": -1.0}, where="models.logistic")
    assert "penalty" in LogisticConfig.search_space()
    assert LogisticConfig().penalty is None


def test_it_fits_without_validation_cells(parts):
    train, valid, unseen = parts
    model = Logistic().fit(train, valid[:0].copy())
    assert model.temperature == 1.0
    assert np.isfinite(model.predict_proba(unseen).to_numpy()).all()


def test_a_crowded_exposure_gains_nothing_from_its_crowd(parts):
    """Evidence is prior-free: ten times the control cells move no evidence towards control."""
    made = planted_cells(n_units=5, n_cells=20, fold=2.0)
    train, valid, unseen = (
        of_units(made, "u0", "u1", "u2"),
        of_units(made, "u3"),
        of_units(made, "u4"),
    )
    is_control = (train.obs["exposure"] == "DMSO").to_numpy()
    rows = np.concatenate([np.arange(train.n_obs), *[np.flatnonzero(is_control)] * 9])
    crowd = AnnData(
        X=train.X[rows],
        obs=train.obs.iloc[rows].set_axis([f"x{i}" for i in range(len(rows))]),
        var=train.var,
    )
    plain, crowded = (
        Logistic(LogisticConfig(penalty=1.0)).fit(each, valid).evidence(unseen)
        for each in (train, crowd)
    )
    lean = [log_softmax(each, axis=1)[:, 0].mean() for each in (plain, crowded)]
    assert lean[1] == pytest.approx(lean[0], abs=0.05)


def test_an_unmeasured_gene_counts_as_average_not_as_silent(parts):
    train, valid, unseen = parts
    model = Logistic(LogisticConfig(penalty=0.1, n_groups=1)).fit(train, valid)
    gone = [gene for i, gene in enumerate(unseen.var_names) if i % 3 == 0]
    fewer = unseen[:, ~unseen.var_names.isin(gone)].copy()
    read = model._weighing.expression
    by_hand = read.of(unseen).toarray().astype(float)
    by_hand[:, np.isin(read.genes, gone)] = read.mean[np.isin(read.genes, gone)]
    wide = model._weighing.coefficients[0].astype(float)
    wanted = (by_hand - read.mean) @ wide.T + model._weighing.intercept[0]
    assert model.evidence(fewer) == pytest.approx(wanted, abs=1e-9)


def test_cells_are_drawn_evenly_over_units_and_exposures():
    made = planted_cells(n_units=3, n_cells=50)
    crowded = made[np.r_[np.arange(made.n_obs), np.flatnonzero(made.obs["unit"] == "u0")]]
    drawn = evenly_drawn(crowded, 90, seed=0)
    assert drawn.n_obs == 90
    assert (drawn.obs.groupby(["unit", "exposure"]).size() == 10).all()
    assert evenly_drawn(made, 10_000, seed=0) is made


def test_two_exposures_share_the_odds(parts):
    train = of_units(planted_cells(exposures=("DMSO", "RET_AGONIST"), n_units=4), "u0", "u1")
    model = Logistic().fit(train, train)
    assert model.evidence(train).sum(axis=1) == pytest.approx(0.0, abs=1e-6)
    calls = model.predict_proba(train).idxmax(axis=1)
    assert (calls == train.obs["exposure"]).mean() > 0.95


def test_a_path_of_penalties_ends_where_a_single_fit_would():
    rng = np.random.default_rng(0)
    values, truth = rng.normal(size=(200, 5)), rng.integers(0, 3, 200)
    *_, last = fit_balanced(values, truth, [10.0, 1.0, 0.1])
    alone = next(fit_balanced(values, truth, [0.1]))
    assert last.coefficients == pytest.approx(alone.coefficients, abs=1e-2)
    assert last.has_converged


# -- groups of like cells -----------------------------------------------------------------------
def two_types(n_units: int = 5, n_cells: int = 40, seed: int = 0) -> AnnData:
    """Two types of cells, told apart by forty genes, in which one exposure does the opposite."""
    rng = np.random.default_rng(seed)
    mean = rng.gamma(1.0, 2.0, 120) + 0.5
    obs, rows = [], []
    for unit in range(n_units):
        for exposure in ("DMSO", "RET_AGONIST", "RET_ANTAGONIST"):
            for cell_type in (0, 1):
                rate = mean.copy()
                rate[40:80] *= 4.0 if cell_type else 0.25
                rises = (exposure == "RET_AGONIST") == bool(cell_type)
                rate[:20] *= 1.0 if exposure == "DMSO" else 2.5 if rises else 0.4
                rows.append(rng.poisson(np.tile(rate, (n_cells, 1))))
                obs += [{"exposure": exposure, "unit": f"u{unit}", "type": cell_type}] * n_cells
    counts = sparse.csr_matrix(np.vstack(rows).astype(np.float32))
    frame = pd.DataFrame(obs, index=[f"c{i}" for i in range(len(obs))])
    frame["n_counts"] = np.asarray(counts.sum(axis=1)).ravel()
    frame["n_genes"] = counts.getnnz(axis=1)
    return AnnData(counts, frame, pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(120)]))


def test_an_exposure_that_does_the_opposite_in_another_type_of_cell_is_told():
    made = two_types()
    train, valid, unseen = (of_units(made, *u) for u in (("u0", "u1", "u2"), ("u3",), ("u4",)))

    def right(model: Logistic) -> float:
        calls = model.predict_proba(unseen).idxmax(axis=1)
        return float((calls == unseen.obs["exposure"]).mean())

    apart = Logistic().fit(train, valid)
    assert apart.provenance["n_groups"] > 1
    group = apart._weighing.groups.of(unseen)
    assert pd.crosstab(group, unseen.obs["type"]).min(axis=1).max() == 0  # and no type was named
    assert right(apart) > 0.95
    assert right(Logistic(LogisticConfig(n_groups=1)).fit(train, valid)) < right(apart) - 0.1


@pytest.mark.parametrize("exposures", [("DMSO", "RET_AGONIST"), ("DMSO", "LIVER-X", "RET")])
def test_weights_of_groups_are_scikit_learns_on_inputs_that_stand_twice(exposures):
    made = planted_cells(exposures=exposures, n_units=3, n_cells=30, n_genes=60, fold=2.0)
    read = Expression.fit(made, "log").of(made)
    truth = pd.Index(sorted(exposures)).get_indexer(pd.Index(made.obs["exposure"]))
    group = np.random.default_rng(0).integers(0, 2, made.n_obs)
    mean = np.stack([np.asarray(read[group == k].mean(axis=0)).ravel() for k in (0, 1)])
    centred = read.toarray() - mean[group]
    twice = np.hstack([centred, *(centred * (group == k)[:, None] for k in (0, 1))])
    for ours, theirs in zip(
        fit_grouped(read, mean, group, truth, [1.0, 0.1]),
        fit_balanced(twice, truth, [1.0, 0.1]),
        strict=True,
    ):
        common, *own = np.split(theirs.coefficients, 3, axis=1)
        assert ours.has_converged
        assert ours.coefficients == pytest.approx(np.stack([common + o for o in own]), abs=3e-3)
        assert ours.intercept - ours.intercept.mean() == pytest.approx(
            theirs.intercept - theirs.intercept.mean(), abs=3e-3
        )


def test_groups_are_found_among_control_cells_and_where_these_are_enough():
    made = two_types()
    latent = Latent.fit(made, width=5)
    found = Groups.fit(latent, made, 2, control="DMSO", seed=0)
    assert found is not None
    exposed = made.copy()
    is_exposed = (exposed.obs["exposure"] != "DMSO").to_numpy()
    exposed.X = sparse.diags_array((~is_exposed).astype(np.float32)) @ exposed.X
    again = Groups.fit(latent, exposed, 2, control="DMSO", seed=0)
    np.testing.assert_array_equal(again.centres, found.centres)
    few = made[: 2 * FEWEST_CELLS - 1].copy()
    assert Groups.fit(latent, few, 2, control="DMSO", seed=0) is None
    assert Groups.fit(latent, made, 2, control="no such", seed=0) is None
    assert not Groups.single(latent).of(made).any()


def test_an_elastic_net_weighs_all_cells_alike(parts):
    train, valid, _ = parts
    model = Logistic(LogisticConfig(n_groups=2, l1_share=0.5)).fit(train, valid)
    assert model.provenance["n_groups"] == 1


# -- how genes are read -------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["log", "linear"])
def test_expression_is_what_its_definition_says(cells, kind):
    read = Expression.fit(cells, kind)
    n_counts = cells.obs["n_counts"].to_numpy()[:, None]
    counts = cells[:, read.genes].X.toarray() / n_counts * np.median(n_counts)
    mean = counts.mean(axis=0)
    spread = np.sqrt(mean + 0.3 * mean**2 + 0.01)
    wanted = np.log1p(counts) * (1 + mean) / spread if kind == "log" else counts / spread
    assert read.of(cells).toarray() == pytest.approx(wanted, rel=1e-4)
    assert read.mean == pytest.approx(wanted.mean(axis=0), rel=1e-4)


def test_scaled_by_sampling_every_gene_of_like_cells_scatters_alike():
    rng = np.random.default_rng(0)
    mean = np.array([0.05, 0.5, 5.0, 50.0])
    rate = mean * rng.gamma(1 / 0.3, 0.3, (4000, 4))  # NB with the dispersion assumed
    counts = np.column_stack([rng.poisson(rate), np.full(4000, 5000.0)])
    obs = pd.DataFrame({"n_counts": 5000.0}, index=[f"c{i}" for i in range(4000)])
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(5)])
    cells = AnnData(X=sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)
    for kind, spread in (("linear", 0.15), ("log", 0.45)):
        found = Expression.fit(cells, kind).of(cells).toarray()[:, :4].std(axis=0)
        assert found == pytest.approx(1.0, abs=spread)


# -- the latent ---------------------------------------------------------------------------------
def test_the_latent_is_the_singular_value_decomposition(cells):
    latent = Latent.fit(cells, n_genes=1000, width=5)
    values = latent.expression.of(cells).toarray().astype(float)
    centred = values - values.mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    found = latent.transform(cells)
    assert np.linalg.norm(found, axis=0) == pytest.approx(singular[:5])
    assert np.abs(np.sum(latent.components * axes[:5], axis=1)) == pytest.approx(1.0)


def test_a_place_is_shown_as_the_expression_it_stands_for(cells):
    latent = Latent.fit(cells, n_genes=1000, width=200)  # as many axes as genes: nothing is lost
    shown = latent.image(latent.transform(cells))
    assert shown == pytest.approx(log_normalised(cells, latent.genes).toarray(), abs=1e-3)


@pytest.mark.parametrize("n_kept", [40, 300])
def test_few_cells_and_many_give_the_same_kind_of_axes(cells, n_kept):
    latent = Latent.fit(cells[:n_kept].copy(), n_genes=1000, width=6)
    assert latent.components @ latent.components.T == pytest.approx(np.eye(6), abs=1e-8)
    twice = Latent.fit(cells[:n_kept].copy(), n_genes=1000, width=6)
    np.testing.assert_array_equal(twice.components, latent.components)


def test_the_distance_from_the_plane_completes_the_distance(cells):
    latent = Latent.fit(cells, n_genes=1000, width=4)
    place = latent.with_residual(cells)
    values = latent.expression.of(cells).toarray().astype(float) - latent.centre
    assert (place**2).sum(axis=1) == pytest.approx((values**2).sum(axis=1))


def test_variable_genes_are_those_that_vary_more_than_their_like():
    rng = np.random.default_rng(0)
    values = rng.poisson(3.0, (400, 60)).astype(np.float32)
    values[:200, 7] += 9
    values[:, 11] = 0
    chosen = variable_genes(sparse.csr_matrix(np.log1p(values)), 10)
    assert 7 in chosen
    assert 11 not in chosen
    assert list(chosen) == sorted(chosen)


# -- the real cells -----------------------------------------------------------------------------
def test_interferon_is_told_on_a_donor_never_seen(shared):
    from anndata import read_h5ad

    raw = read_h5ad(shared / "data/real/kang_ifnb_muscat_example.h5ad")
    obs = pd.DataFrame(
        {
            "exposure": raw.obs["group_id"].astype(str),
            "unit": raw.obs["sample_id"].astype(str).str[-3:],
            "n_counts": np.asarray(raw.X.sum(axis=1)).ravel().astype(float),
        },
        index=raw.obs_names,
    )
    obs["n_genes"] = np.asarray((raw.X > 0).sum(axis=1)).ravel()
    var = pd.DataFrame(index=raw.var["ensembl_id"].astype(str))
    cells = AnnData(X=sparse.csr_matrix(raw.X, dtype=np.float32), obs=obs, var=var)
    for donor, other in (("101", "107"), ("107", "101")):
        rest = of_units(cells, other)
        is_valid = np.arange(rest.n_obs) % 7 == 0
        model = Logistic().fit(rest[~is_valid].copy(), rest[is_valid].copy())
        unseen = of_units(cells, donor)
        calls = model.predict_proba(unseen).idxmax(axis=1)
        assert recall_by_exposure(unseen.obs["exposure"], calls).mean() > 0.98
