"""The contract: every row of the table answers to these claims, and none is excused."""

from __future__ import annotations

import socket

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from conftest import planted_cells
from endoprint import model as contract
from endoprint import smoke
from endoprint.config import Refusal
from endoprint.metrics import call, f1_by_exposure
from endoprint.table import TABLE

# A row that is slow at its defaults says here how it is made small; the rest run as they stand.
SMALL: dict[str, dict[str, object]] = {
    "geneformer": {"layers": 1, "hidden": 32, "ffn": 64, "epochs": 4, "min_steps": 120},
    "scgpt": {"layers": 1, "hidden": 32, "ffn": 32, "epochs": 4, "min_steps": 120},
    "diffusion": {"hidden": 32, "blocks": 1, "steps": 500},
    "bridge": {"first_steps": 80, "later_steps": 40, "iterations": 1, "latent_width": 6},
}
# Where a row answers in minibatches, a size that cuts the cells quite differently.
OTHER_MINIBATCH: dict[str, dict[str, object]] = {
    "geneformer": {"minibatch_cells": 3, "minibatch_tokens": 256},
    "scgpt": {"minibatch_cells": 3, "minibatch_tokens": 256},
    "probe": {"minibatch_cells": 3, "minibatch_tokens": 256},
}

EXPOSURES = ["DMSO", "LIVER-X_AGONIST", "RET_AGONIST"]
ROWS = sorted(TABLE)


def blank(name: str, seed: int = 0) -> contract.ExposureModel:
    cls = contract.model_class(name)
    return cls(cls.Config.of(SMALL.get(name, {}), where=name), seed=seed)


def of_units(cells: AnnData, *units: str) -> AnnData:
    return cells[cells.obs["unit"].isin(units).to_numpy()].copy()


def macro_f1(model: contract.ExposureModel, cells: AnnData) -> float:
    calls = call(model.predict_proba(cells))
    return float(f1_by_exposure(cells.obs["exposure"].astype(object), calls).mean())


def parts(cells: AnnData) -> tuple[AnnData, AnnData, AnnData]:
    return (
        of_units(cells, "u0", "u1", "u2"),
        of_units(cells, "u3"),
        of_units(cells, "u4"),
    )


@pytest.fixture(scope="module")
def cells() -> AnnData:
    made = planted_cells(n_units=5, n_cells=16)
    made.uns["endoprint"] = {"control": "DMSO", "fingerprint": "planted"}
    return made


@pytest.fixture(scope="module")
def unseen(cells) -> AnnData:
    return parts(cells)[2]


@pytest.fixture(scope="module", params=ROWS)
def fitted(request, cells) -> contract.ExposureModel:
    """Every row, fitted once, with the network cut."""

    def refuse(self, address):
        raise AssertionError(f"a model must not reach for the network: {address}")

    train, valid, _ = parts(cells)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        return blank(request.param).fit(train, valid)


@pytest.fixture
def saved(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    return tmp_path / "saved"


# -- the answer ---------------------------------------------------------------------------------
def test_rows_sum_to_one(fitted, unseen):
    answer = fitted.predict_proba(unseen).to_numpy()
    assert np.isfinite(answer).all()
    assert (answer >= 0).all()
    assert answer.sum(axis=1) == pytest.approx(1.0, abs=1e-6)


def test_index_is_the_cells_and_columns_the_sorted_exposures(fitted, unseen):
    answer = fitted.predict_proba(unseen)
    assert list(answer.index) == list(unseen.obs_names)
    assert list(answer.columns) == fitted.exposures == EXPOSURES


def test_a_planted_signal_is_found_in_an_unseen_unit(fitted, unseen):
    assert macro_f1(fitted, unseen) >= 0.8


@pytest.mark.parametrize("name", ROWS)
def test_shuffled_labels_give_chance(name):
    made = planted_cells(n_units=5, n_cells=24)
    rng = np.random.default_rng(0)
    made.obs["exposure"] = rng.permutation(made.obs["exposure"].to_numpy())
    train, valid, unseen = parts(made)
    answer = blank(name).fit(train, valid).predict_proba(unseen)
    hit = (call(answer) == unseen.obs["exposure"]).mean()
    chance = 1 / len(EXPOSURES)
    assert abs(hit - chance) <= 3 * np.sqrt(chance * (1 - chance) / unseen.n_obs)


def test_unlabelled_cells_are_answered(fitted, unseen):
    bare = unseen.copy()
    bare.obs = bare.obs[["unit", "n_counts", "n_genes"]]
    pd.testing.assert_frame_equal(fitted.predict_proba(bare), fitted.predict_proba(unseen))


def test_no_cells_give_no_rows(fitted, unseen):
    answer = fitted.predict_proba(unseen[:0].copy())
    assert answer.shape == (0, len(EXPOSURES))


# -- what must not matter -----------------------------------------------------------------------
def assert_same_answer(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    """Within 1e-5, and equal calls unless the top two are closer than that."""
    found = found.loc[wanted.index]
    assert np.abs(found.to_numpy() - wanted.to_numpy()).max() <= 1e-5
    top = np.sort(wanted.to_numpy(), axis=1)
    is_close = top[:, -1] - top[:, -2] <= 1e-5
    assert ((call(found) == call(wanted)) | is_close).all()


def test_a_cells_answer_ignores_order(fitted, unseen):
    shuffled = unseen[np.random.default_rng(0).permutation(unseen.n_obs)].copy()
    assert_same_answer(fitted.predict_proba(shuffled), fitted.predict_proba(unseen))


def test_a_cells_answer_ignores_its_neighbours(fitted, unseen):
    together = fitted.predict_proba(unseen)
    alone = pd.concat([fitted.predict_proba(unseen[[i]].copy()) for i in range(6)])
    assert_same_answer(alone, together.iloc[:6])
    one_exposure = unseen[(unseen.obs["exposure"] == "DMSO").to_numpy()].copy()
    assert_same_answer(fitted.predict_proba(one_exposure), together.loc[one_exposure.obs_names])


def test_a_cells_answer_ignores_much_deeper_neighbours(fitted, unseen):
    deep = unseen[:20].copy()
    deep.X = deep.X * 50
    deep.obs["n_counts"] = deep.obs["n_counts"] * 50
    deep.obs_names = [f"deep{i}" for i in range(20)]
    mixed = AnnData(
        X=sparse.vstack([deep.X, unseen.X]).tocsr(),
        obs=pd.concat([deep.obs, unseen.obs]),
        var=unseen.var,
    )
    together = fitted.predict_proba(mixed).loc[unseen.obs_names]
    assert_same_answer(together, fitted.predict_proba(unseen))


def test_the_minibatch_is_irrelevant(fitted, unseen, saved):
    other = OTHER_MINIBATCH.get(fitted.name, {})
    named_so = {name for name in type(fitted.config).model_fields if name.startswith("minibatch")}
    assert named_so == set(other), "a row with minibatches says above how to cut them otherwise"
    again = contract.load(saved)
    again.config = again.config.model_copy(update=other)
    assert_same_answer(again.predict_proba(unseen), fitted.predict_proba(unseen))


def test_gene_order_is_irrelevant(fitted, unseen):
    turned = unseen[:, np.random.default_rng(1).permutation(unseen.n_vars)].copy()
    assert_same_answer(fitted.predict_proba(turned), fitted.predict_proba(unseen))


def test_embeddings_ignore_order_and_neighbours_too(fitted, unseen):
    together = np.asarray(fitted.embed(unseen))
    assert together.shape[0] == unseen.n_obs
    alone = np.vstack([fitted.embed(unseen[[i]].copy()) for i in (5, 3)])
    assert alone == pytest.approx(together[[5, 3]], abs=1e-4)


# -- genes --------------------------------------------------------------------------------------
def test_unknown_genes_are_tolerated(fitted, unseen):
    strangers = sparse.csr_matrix(np.full((unseen.n_obs, 5), 3.0, dtype=np.float32))
    more = AnnData(
        X=sparse.hstack([strangers, unseen.X]).tocsr(),
        obs=unseen.obs,
        var=pd.DataFrame(index=[*(f"ENSG9999999999{i}" for i in range(5)), *unseen.var_names]),
    )
    # the library size is the cell's own and did not change: neither may the answer
    assert_same_answer(fitted.predict_proba(more), fitted.predict_proba(unseen))


def test_missing_genes_are_tolerated(fitted, unseen):
    fewer = unseen[:, np.arange(unseen.n_vars) % 4 != 0].copy()
    answer = fitted.predict_proba(fewer)
    assert np.isfinite(answer.to_numpy()).all()
    assert macro_f1(fitted, fewer) > 1 / 3


def test_a_cell_without_one_known_gene_gets_an_answer(fitted, unseen):
    nothing = AnnData(
        X=sparse.csr_matrix(np.full((3, 2), 4.0, dtype=np.float32)),
        obs=pd.DataFrame({"unit": "u9", "n_counts": 8.0, "n_genes": 2}, index=["x0", "x1", "x2"]),
        var=pd.DataFrame(index=["ENSG99999999990", "ENSG99999999991"]),
    )
    answer = fitted.predict_proba(nothing).to_numpy()
    assert np.isfinite(answer).all()
    assert answer.sum(axis=1) == pytest.approx(1.0, abs=1e-6)


# -- manners ------------------------------------------------------------------------------------
def fingerprint(cells: AnnData) -> tuple[object, ...]:
    return (
        cells.X.data.tobytes(),
        cells.X.indices.tobytes(),
        cells.X.indptr.tobytes(),
        cells.obs.to_json(),
        cells.var.to_json(),
        repr(sorted(cells.uns.items())),
        sorted(cells.obsm),
        sorted(cells.layers),
    )


@pytest.mark.parametrize("name", ROWS)
def test_fitting_modifies_no_input(name, cells):
    train, valid, _ = parts(cells)
    before = fingerprint(train), fingerprint(valid)
    blank(name).fit(train, valid)
    assert (fingerprint(train), fingerprint(valid)) == before


def test_answering_modifies_no_input(fitted, unseen):
    before = fingerprint(unseen)
    fitted.predict_proba(unseen)
    fitted.embed(unseen)
    fitted.novelty(unseen)
    fitted.population_proba(unseen)
    assert fingerprint(unseen) == before


def test_the_same_seed_gives_the_same_answer(fitted, cells, unseen):
    again = blank(fitted.name).fit(*parts(cells)[:2])
    pd.testing.assert_frame_equal(
        again.predict_proba(unseen), fitted.predict_proba(unseen), atol=1e-6, rtol=0
    )
    assert again.temperature == pytest.approx(fitted.temperature, rel=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_one_exposure_alone_is_refused(name, cells):
    train, valid, _ = parts(cells)
    alone = train[(train.obs["exposure"] == "DMSO").to_numpy()].copy()
    with pytest.raises(Refusal, match="two exposures"):
        blank(name).fit(alone, valid)


@pytest.mark.parametrize("name", ROWS)
def test_an_unfitted_model_is_not_saved(name, tmp_path):
    with pytest.raises(Refusal, match="fitted"):
        blank(name).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# -- disk ---------------------------------------------------------------------------------------
def test_save_then_load_is_the_identity(fitted, saved, unseen):
    again = contract.load(saved)
    assert type(again) is type(fitted)
    pd.testing.assert_frame_equal(
        again.predict_proba(unseen), fitted.predict_proba(unseen), atol=1e-7, rtol=0
    )
    np.testing.assert_allclose(again.novelty(unseen), fitted.novelty(unseen), atol=1e-5)
    assert again.novelty_threshold == fitted.novelty_threshold
    assert again.config == fitted.config
    assert again.provenance == fitted.provenance
    assert again.n_parameters() == fitted.n_parameters() > 0


def test_a_saved_model_answers_for_cells_made_up_to_try_it(saved, fitted):
    assert smoke.opened(saved, "this one").name == fitted.name


def test_a_model_loaded_and_saved_again_is_the_same_bytes(saved, tmp_path):
    contract.load(saved).save(tmp_path / "twice")
    for file in sorted(path for path in saved.rglob("*") if path.is_file()):
        twin = tmp_path / "twice" / file.relative_to(saved)
        assert twin.read_bytes() == file.read_bytes(), file.name


def test_nothing_saved_can_execute(saved):
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".npz"}
    assert not any(
        path.read_bytes().startswith(b"\x80") for path in files
    )  # a pickle's first byte


# -- calibration, provenance, novelty -----------------------------------------------------------
def test_the_temperature_is_positive(fitted):
    assert fitted.temperature > 0
    assert fitted.population_temperature > 0


def test_provenance_lists_the_units(fitted):
    assert fitted.provenance["training_units"] == ["u0", "u1", "u2"]
    assert fitted.provenance["validation_units"] == ["u3"]
    assert fitted.provenance["is_calibration_unit_validated"] is True


def test_a_whole_sample_gets_one_calibrated_answer(fitted, unseen):
    for exposure in EXPOSURES:
        sample = unseen[(unseen.obs["exposure"] == exposure).to_numpy()].copy()
        answer = fitted.population_proba(sample)
        assert list(answer.index) == EXPOSURES
        assert answer.sum() == pytest.approx(1.0)
        assert answer.idxmax() == exposure


def test_alien_cells_look_novel(fitted, unseen):
    alien = unseen.copy()
    turn = np.random.default_rng(2).permutation(alien.n_vars)
    alien.X = sparse.csr_matrix(alien.X[:, turn])  # each gene with another gene's counts
    assert np.median(fitted.novelty(alien)) > np.median(fitted.novelty(unseen))
    assert (fitted.novelty(alien) > fitted.novelty_threshold).mean() > 0.5
    assert (fitted.novelty(unseen) > fitted.novelty_threshold).mean() < 0.3


# -- what MLflow hands out ------------------------------------------------------------------------
def test_a_table_by_symbols_is_refused_rather_than_answered_from_silence() -> None:
    frame, model = _as_table()
    with pytest.raises(Refusal, match="0.0% of 120 .*by Ensembl ids, not symbols"):
        contract.Predictor(model).predict(frame.set_axis([f"SYM{i}" for i in range(120)], axis=1))
    for other in (frame.to_numpy(), frame.to_dict("list"), AnnData(frame.to_numpy())):
        with pytest.raises(Refusal):
            contract.Predictor(model).predict(other)


def test_a_cell_without_a_known_count_has_no_probabilities() -> None:
    frame, model = _as_table()
    frame.iloc[1] = 0
    frame = frame.assign(FOREIGN=7)
    told = contract.Predictor(model).predict(frame)
    assert told.iloc[1].isna().all()
    assert not told.drop(index=told.index[1]).isna().any().any()
    assert contract.Predictor(model).predict(frame.iloc[:0]).shape == (0, 3)


def _as_table() -> tuple[pd.DataFrame, contract.ExposureModel]:
    cells = planted_cells()
    model = blank("signature").fit(cells[:160].copy(), cells[160:].copy())
    return pd.DataFrame(
        cells.X[:5].toarray(), index=cells.obs_names[:5], columns=cells.var_names
    ), model
