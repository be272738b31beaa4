"""The model `geneformer`: what it takes from a workspace, and what it says of itself."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from conftest import planted_cells
from endoprint import model as contract
from endoprint import tokens
from endoprint.config import Refusal
from endoprint.encoder.pretrain import PretrainConfig, pretrain
from endoprint.metrics import call, f1_by_exposure
from endoprint.model import Resources
from endoprint.models.geneformer import Geneformer, GeneformerConfig
from endoprint.tokens import Vocabulary

QUICK = GeneformerConfig(epochs=8, min_steps=60, minibatch_cells=16, layers=1, hidden=32, ffn=32)


@pytest.fixture(scope="module")
def parts() -> tuple[AnnData, AnnData, AnnData]:
    cells = planted_cells(n_units=4, n_cells=12)
    unit = cells.obs["unit"]
    return tuple(
        cells[unit.isin(units).to_numpy()].copy() for units in (["u0", "u1"], ["u2"], ["u3"])
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A backbone pre-trained on a pool of other units, with its vocabulary."""
    pool = planted_cells(n_units=2, n_cells=12, seed=9)
    folder = tmp_path_factory.mktemp("backbone")
    vocabulary = Vocabulary.fit(pool)
    config = PretrainConfig(layers=1, hidden=32, ffn=32, epochs=1)
    pretrain(tokens.of(pool, vocabulary), vocabulary, config, folder, units=["pool0", "pool1"])
    return folder


def fit(parts, config=QUICK, resources=None, **over) -> Geneformer:
    return Geneformer(config, resources=resources).fit(parts[0], parts[1], **over)


def macro_f1(model, cells) -> float:
    truth = cells.obs["exposure"].astype(object)
    return float(f1_by_exposure(truth, call(model.predict_proba(cells))).mean())


def test_from_scratch_it_says_so_and_its_vocabulary_is_the_training_cells(parts):
    model = fit(parts)
    said = model.provenance
    assert said["backbone"]["origin"] == "scratch"
    assert "not the published Geneformer" in said["backbone"]["label"]
    assert said["backbone"]["units"] == []
    assert said["vocabulary"]["units"] == ["u0", "u1"]
    assert said["vocabulary"]["sha256"] == Vocabulary.fit(parts[0]).sha256
    assert macro_f1(model, parts[2]) > 0.8


def test_a_pretrained_backbone_is_named_with_the_units_it_saw(parts, pretrained):
    model = fit(parts, resources=Resources(backbone=pretrained))
    said = model.provenance["backbone"]
    assert said["origin"] == "pretrained here"
    assert said["units"] == ["pool0", "pool1"]
    vocabulary = Vocabulary.read(pretrained / "vocabulary.json")
    assert said["vocabulary_sha256"] == vocabulary.sha256
    assert model.provenance["vocabulary"]["sha256"] == vocabulary.sha256
    assert macro_f1(model, parts[2]) > 0.6  # not better for it: docs/performance.md


def test_a_backbone_of_another_vocabulary_is_refused(parts, pretrained, tmp_path):
    Vocabulary.fit(parts[0]).write(tmp_path / "vocabulary.json")
    resources = Resources(vocabulary=tmp_path / "vocabulary.json", backbone=pretrained)
    with pytest.raises(Refusal, match="vocabulary of the backbone"):
        fit(parts, resources=resources)


def test_a_backbone_of_another_size_is_refused_even_unlabelled(parts, pretrained, tmp_path):
    (pretrained / "backbone.json").rename(tmp_path / "aside")
    fewer = planted_cells(n_units=2, n_cells=12, n_genes=50)
    Vocabulary.fit(fewer).write(tmp_path / "vocabulary.json")
    resources = Resources(vocabulary=tmp_path / "vocabulary.json", backbone=pretrained)
    try:
        with pytest.raises(Refusal, match="as many tokens"):
            fit(parts, resources=resources)
    finally:
        (tmp_path / "aside").rename(pretrained / "backbone.json")


def test_first_position_pooling_demands_the_whole_cell(parts):
    with pytest.raises(Refusal, match="whole cell in one row"):
        fit(parts, QUICK.model_copy(update={"pooling": "cls"}))
    fit(parts, QUICK.model_copy(update={"pooling": "cls", "block": 0, "min_steps": 5}))


@pytest.mark.parametrize("change", [{"layers": 0}, {"has_votes": False, "min_steps": 200}])
def test_without_layers_or_without_votes_it_still_learns(parts, change):
    assert macro_f1(fit(parts, QUICK.model_copy(update=change)), parts[2]) > 0.7


def test_the_saved_model_needs_nothing_beside_it(parts, pretrained, tmp_path):
    model = fit(parts, resources=Resources(backbone=pretrained))
    model.save(tmp_path / "model")
    again = contract.load(tmp_path / "model")
    assert again.resources == Resources()
    found, wanted = again.evidence(parts[2]), model.evidence(parts[2])
    assert np.array_equal(found, wanted)
    assert again.embed(parts[2]).shape == (parts[2].n_obs, 32)


def test_progress_is_told_each_epoch_and_a_watcher_may_stop_it(parts, tmp_path):
    told = []

    def watch(epoch, metrics):
        told.append((epoch, metrics))
        if epoch == 2:
            raise contract.Pruned

    with pytest.raises(contract.Pruned):
        fit(parts, watch=watch, work=tmp_path)
    assert [epoch for epoch, _ in told] == [1, 2]
    assert {"train_loss", "valid_loss", "valid_macro_f1"} <= set(told[0][1])
    again = []
    fit(parts, watch=lambda epoch, metrics: again.append((epoch, metrics)), work=tmp_path)
    assert again[:2] == told  # not learned again, but told again
    assert len(again) > 2


def test_validation_cells_of_an_unknown_exposure_are_left_out(parts):
    train, valid, _ = parts
    strange = valid.copy()
    strange.obs["exposure"] = "THYROID_AGONIST"
    model = Geneformer(QUICK.model_copy(update={"min_steps": 5})).fit(train, strange)
    assert model.provenance["best_epoch"] == 0  # nothing to choose by: the last epoch stays


def test_a_model_says_how_its_steps_were_computed(parts):
    train, valid, _ = parts
    for precision in ("fp32", "bf16"):
        chosen = QUICK.model_copy(update={"min_steps": 1, "epochs": 1, "precision": precision})
        assert Geneformer(chosen).fit(train, valid).provenance["steps_in"] == precision


def test_every_token_counts(parts):
    """A gene at the very end of a cell's ranks still moves its answer."""
    model = fit(parts)
    cells = parts[2][:8].copy()
    last = [int(row.indices[row.data.argmin()]) for row in cells.X]
    fewer = cells.copy().X.tolil()
    for i, gene in enumerate(last):
        fewer[i, gene] = 0
    without = cells.copy()
    without.X = fewer.tocsr()
    moved = np.abs(model.evidence(without) - model.evidence(cells)).max(axis=1)
    assert (moved > 0).all()


def test_a_cell_shorter_than_a_block_is_read_whole_beside_a_long_one(parts):
    model = fit(parts)
    cells = parts[2][:6].copy()
    counts = cells.X.tolil()
    for i in range(4):  # five genes are left of four cells, one of the first
        counts[i, cells.X[i].indices[5 if i else 1 :]] = 0
    cells.X = counts.tocsr()
    cells.X.eliminate_zeros()
    in_blocks = model.evidence(cells)
    assert np.isfinite(in_blocks).all()
    model.config = model.config.model_copy(update={"block": 0})
    np.testing.assert_allclose(model.evidence(cells)[:4], in_blocks[:4], atol=1e-5)
    np.testing.assert_allclose(model.evidence(cells[:1]), in_blocks[:1], atol=1e-5)


def test_its_search_space_is_small_and_holds_its_defaults():
    space = GeneformerConfig.search_space()
    assert set(space) == {"lr", "votes_lr", "vector_dropout"}
    for name, distribution in space.items():
        assert distribution._contains(distribution.to_internal_repr(getattr(QUICK, name)))


@pytest.mark.slow
def test_a_real_donor_never_seen_is_called_as_well_as_by_logistic_regression(shared):
    """Interferon in blood cells (Kang 2018): learned from one donor, asked of another."""
    made = ad.read_h5ad(shared / "data/real/kang_ifnb_muscat_example.h5ad")
    counts = sparse.csr_matrix(made.X, dtype=np.float32)
    obs = pd.DataFrame(
        {
            "exposure": made.obs["group_id"].astype(str),
            "unit": made.obs["sample_id"].astype(str).str[-3:],
            "n_counts": np.asarray(counts.sum(axis=1)).ravel().astype(float),
            "n_genes": np.diff(counts.indptr),
        }
    )
    genes = pd.DataFrame(index=made.var["ensembl_id"].astype(str).to_numpy())
    cells = AnnData(X=counts, obs=obs, var=genes)
    seen, unseen = (cells[(obs["unit"] == donor).to_numpy()].copy() for donor in ("107", "101"))
    is_valid = np.random.default_rng(0).random(seen.n_obs) < 0.2
    train, valid = seen[~is_valid].copy(), seen[is_valid].copy()
    found, bar = (
        macro_f1(contract.model_class(name)().fit(train, valid), unseen)
        for name in ("geneformer", "logistic")
    )
    assert bar > 0.95
    assert found >= bar - 0.02  # .984 and .986 against .987, two seeds
