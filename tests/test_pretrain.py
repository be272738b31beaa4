"""Masked learning: it learns company, not only frequency, and says what it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from conftest import planted_cells
from endoprint import tokens
from endoprint.config import Refusal
from endoprint.encoder import backbone
from endoprint.encoder.minibatches import Layout, assemble
from endoprint.encoder.pretrain import CHOSEN, Masker, PretrainConfig, Pretraining, pretrain
from endoprint.tokens import Vocabulary


def programmes(*, is_planted: bool = True, n_cells: int = 600, seed: int = 0) -> AnnData:
    """Cells in four states; each state has ten genes of its own, among forty.

    Without the plant every gene is as common, but no two keep company.
    """
    rng = np.random.default_rng(seed)
    state = rng.integers(0, 4, n_cells)
    is_on = np.kron(np.eye(4), np.ones(10))[state] > 0
    if not is_planted:
        is_on = np.apply_along_axis(rng.permutation, 0, is_on)
    counts = np.where(is_on, rng.integers(1, 30, is_on.shape), 0)
    counts[counts.sum(axis=1) == 0, 0] = 1
    made = planted_cells(n_units=1, n_cells=n_cells // 3 + 1, n_genes=40)[:n_cells].copy()
    made.X = sparse.csr_matrix(counts.astype(np.float32))
    made.obs["n_counts"] = counts.sum(axis=1).astype(float)
    return made


QUICK = PretrainConfig(layers=1, hidden=32, ffn=64, epochs=12, lr=5e-3, block=0, max_rows=0)


def learn(folder, cells=None, config=QUICK, **over):
    cells = programmes() if cells is None else cells
    vocabulary = over.pop("vocabulary", None) or Vocabulary.fit(cells, max_length=64)
    return pretrain(
        tokens.of(cells, vocabulary), vocabulary, config, folder, units=["p1", "p0"], **over
    )


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    return folder, learn(folder)


def test_it_learns_which_genes_keep_company(learned, tmp_path):
    _, label = learned
    bar = label["loss_of_frequencies"]
    assert bar == pytest.approx(np.log(40), abs=0.1)
    # ten genes keep company, and those in sight are not the hidden one: about log(10 * 15 %)
    assert label["loss_after"] < bar - 0.8
    alone = learn(tmp_path, programmes(is_planted=False))
    assert alone["loss_after"] > alone["loss_of_frequencies"] - 0.3


def test_it_starts_at_the_frequencies_of_genes(learned):
    _, label = learned
    assert label["loss_before"] == pytest.approx(label["loss_of_frequencies"], abs=0.05)


def test_the_folder_is_a_backbone_that_says_what_it_is(learned):
    folder, label = learned
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "vocabulary.json", "backbone.json"
    }  # fmt: skip
    assert label == json.loads((folder / "backbone.json").read_text())
    assert "not the published Geneformer" in label["label"]
    assert "600 unlabelled cells" in label["label"]
    assert label["units"] == ["p0", "p1"]
    assert label["vocabulary_sha256"] == Vocabulary.read(folder / "vocabulary.json").sha256
    origin = backbone.origin_of(folder)
    assert origin.origin == "pretrained here"
    assert origin.sha256 == label["sha256"]
    assert backbone.read(folder).config.num_hidden_layers == 1


def test_the_same_seed_gives_the_same_backbone(tmp_path):
    config = QUICK.model_copy(update={"epochs": 1})
    first, again, other = (
        learn(tmp_path / name, config=config, seed=seed)["sha256"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other


def test_a_killed_pre_training_ends_with_the_very_same_weights(tmp_path, monkeypatch):
    class Killed(Exception): ...

    def kill(epoch, metrics):
        if epoch == 2:
            raise Killed

    config = QUICK.model_copy(update={"epochs": 3})
    told = []
    with pytest.raises(Killed):
        learn(tmp_path / "b", config=config, work=tmp_path / "work", watch=kill)
    assert not (tmp_path / "b").exists()
    learned = []
    one_epoch = Pretraining.one_epoch

    def counted(run, epoch, rate):
        learned.append(epoch)
        return one_epoch(run, epoch, rate)

    monkeypatch.setattr(Pretraining, "one_epoch", counted)
    resumed = learn(
        tmp_path / "b", config=config, work=tmp_path / "work", watch=lambda e, m: told.append(e)
    )
    assert learned == [2]  # counted from 0: only the last
    assert told == [1, 2, 3]
    straight = learn(tmp_path / "straight", config=config)
    assert resumed == straight


def test_it_goes_on_from_a_folder_and_keeps_its_history(learned, tmp_path):
    folder, label = learned
    config = QUICK.model_copy(update={"epochs": 1, "lr": 1e-4, "layers": 5})
    vocabulary = Vocabulary.read(folder / "vocabulary.json")
    cells = programmes(seed=7)
    again = pretrain(
        tokens.of(cells, vocabulary), vocabulary, config, tmp_path, units=["q"], start=folder
    )
    assert again["loss_before"] < again["loss_of_frequencies"] - 0.8  # it began where it was
    assert again["units"] == ["p0", "p1", "q"]
    assert "continued from" in again["label"]
    assert backbone.read(tmp_path).config.num_hidden_layers == 1


def test_another_vocabulary_is_refused(learned, tmp_path):
    folder, _ = learned
    cells = programmes(seed=3)
    cells.X = cells.X.multiply(2).tocsr()
    other = Vocabulary.fit(cells[:100].copy(), max_length=64)
    with pytest.raises(Refusal, match="vocabulary of the backbone"):
        learn(tmp_path, cells, vocabulary=other, start=folder)


def test_genes_are_hidden_as_published_and_specials_never():
    cells = programmes(n_cells=400)
    vocabulary = Vocabulary.fit(cells, max_length=64)
    made = tokens.of(cells, vocabulary)
    whole = assemble(made, np.arange(400), Layout(0, "mean", True))
    hidden = Masker(vocabulary)(whole, np.random.default_rng(0))
    before, after = whole.ids_RT.numpy(), hidden.minibatch.ids_RT.numpy()
    chosen = hidden.chosen_RT.numpy()
    is_gene = before >= len(vocabulary.specials)
    assert not (chosen & ~is_gene).any()
    assert (before[~chosen] == after[~chosen]).all()
    assert (before[chosen] == hidden.truth_M.numpy()).all()
    n = chosen.sum()
    assert n / is_gene.sum() == pytest.approx(CHOSEN, abs=4 * np.sqrt(0.15 * 0.85 / is_gene.sum()))
    masked = (after[chosen] == vocabulary.mask_id).mean()
    kept = (after[chosen] == before[chosen]).mean()
    assert masked == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / n))
    assert kept == pytest.approx(0.1 + 0.1 / 40, abs=4 * np.sqrt(0.09 / n))


def test_memory_that_runs_out_changes_no_step_of_pre_training(tmp_path, monkeypatch):
    config = QUICK.model_copy(update={"epochs": 2, "dropout": 0.0})
    plenty = learn(tmp_path / "plenty", config=config)
    summed, asked = Pretraining._summed, []

    def small(run, masked):
        asked.append(len(masked.minibatch.cells_B))
        if torch.is_grad_enabled() and asked[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return summed(run, masked)

    monkeypatch.setattr(Pretraining, "_summed", small)
    made = learn(tmp_path / "made", config=config)
    assert 7 in asked  # 28, 14, 7
    assert made["loss_after"] == pytest.approx(plenty["loss_after"], abs=1e-4)
    assert made["loss_before"] == plenty["loss_before"]


def test_hidden_genes_stay_with_their_cells_in_every_portion():
    cells = programmes(n_cells=23)
    vocabulary = Vocabulary.fit(cells, max_length=64)
    made = tokens.of(cells, vocabulary)
    whole = assemble(made, np.arange(23), Layout(8, "mean", True))
    hidden = Masker(vocabulary)(whole, np.random.default_rng(0))
    portions = hidden.portions(5)
    assert [len(each.minibatch.cells_B) for each in portions] == [5, 5, 5, 5, 3]
    for each in portions:
        ids, chosen = each.minibatch.ids_RT, each.chosen_RT
        rank = each.minibatch.positions_RT[chosen]
        cell = each.minibatch.cells_B[each.minibatch.owner_R[chosen.nonzero()[:, 0]]]
        wanted = [made[c][r] for c, r in zip(cell, rank)]
        assert each.truth_M.tolist() == wanted
        assert ids.shape == chosen.shape
    assert sum(len(each.truth_M) for each in portions) == len(hidden.truth_M)


def test_a_loss_that_is_not_finite_leaves_nothing_behind(learned, tmp_path):
    folder, _ = learned
    spoilt = tmp_path / "spoilt"
    model = backbone.read(folder)
    with torch.no_grad():
        model.cls.predictions.bias.fill_(float("nan"))
    backbone.write(spoilt, model)
    vocabulary = Vocabulary.read(folder / "vocabulary.json")
    with pytest.raises(Refusal, match="finite"):
        learn(tmp_path / "out", vocabulary=vocabulary, start=spoilt)
    assert not (tmp_path / "out").exists()


def test_too_few_cells_are_refused(tmp_path):
    with pytest.raises(Refusal, match="masked learning needs cells"):
        learn(tmp_path, programmes()[:1].copy())
