"""A head alone: logistic regression, exactly, on vectors that are computed once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from conftest import planted_cells
from endoprint import model as contract
from endoprint.config import Config, Refusal
from endoprint.encoder.network import Reader
from endoprint.model import Resources
from endoprint.models.geneformer import Geneformer, GeneformerConfig
from endoprint.models.scgpt import Scgpt, ScgptConfig
from endoprint.table import TABLE, Row

SMALL = {"layers": 1, "hidden": 24, "ffn": 16, "head_only": True, "has_votes": False}
KINDS = [(Geneformer, GeneformerConfig), (Scgpt, ScgptConfig)]


@pytest.fixture(scope="module")
def parts():
    cells = planted_cells(n_units=3, n_cells=16, fold=3.0)
    unit = cells.obs["unit"]
    return tuple(cells[(unit == name).to_numpy()].copy() for name in ("u0", "u1", "u2"))


@pytest.mark.parametrize(("cls", "config"), KINDS)
def test_a_head_alone_is_logistic_regression_on_the_same_vectors(parts, cls, config):
    train, valid, unseen = parts
    penalty = 0.01
    model = cls(config(**SMALL, head_penalty=penalty)).fit(train, valid)
    bar = LogisticRegression(
        class_weight="balanced", C=1 / (penalty * train.n_obs), tol=1e-8, max_iter=5000
    ).fit(model.embed(train), train.obs["exposure"].astype(str))
    wanted = bar.decision_function(model.embed(unseen))
    found = model.evidence(unseen)
    assert list(bar.classes_) == model.exposures
    centred = found - found.mean(axis=1, keepdims=True)
    wanted = wanted - wanted.mean(axis=1, keepdims=True)
    # our solver stops at a gradient of 1e-4, the oracle's at 1e-8: half a percent between them
    assert np.abs(centred - wanted).max() <= 5e-3 * np.abs(wanted).max()
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() >= 0.98


@pytest.mark.parametrize(("cls", "config"), KINDS)
def test_the_encoder_stays_as_it_was_and_only_the_head_is_new(parts, cls, config):
    model = cls(config(**SMALL))
    begun, _ = model._begin(parts[0])
    before = {key: tensor.clone() for key, tensor in begun.state_dict().items()}
    model.fit(parts[0], parts[1])
    body = model._network.get_submodule(model._network.name)
    assert all(torch.equal(tensor, before[key]) for key, tensor in body.state_dict().items())
    assert model._network.head.weight.abs().max() > 0
    vectors = model.embed(parts[0])
    assert vectors.mean(axis=0) == pytest.approx(0, abs=1e-3)


def test_every_cell_is_read_once_and_never_again_where_it_is_kept(parts, tmp_path, monkeypatch):
    read = []
    real = Reader.pool
    monkeypatch.setattr(
        Reader, "pool", lambda self, made: read.extend(made.cells_B) or real(self, made)
    )
    config, kept = GeneformerConfig(**SMALL), Resources(activations=tmp_path)

    def fit_alone(resources=None):
        read.clear()
        model = Geneformer(config, resources=resources)
        model.exposures = sorted(set(parts[0].obs["exposure"]))
        model._learn(parts[0], parts[1], contract.silent, None)
        return len(read), model._network.head.weight.detach().numpy()

    n, wanted = fit_alone()
    assert n == parts[0].n_obs + parts[1].n_obs
    assert fit_alone(kept)[0] == n
    n, found = fit_alone(kept)
    assert n == 0
    assert np.array_equal(found, wanted)


def test_the_penalty_is_chosen_on_validation_cells_and_told(parts):
    told = []
    model = Geneformer(GeneformerConfig(**SMALL))
    model.fit(parts[0], parts[1], watch=lambda step, said: told.append(said))
    losses = [said["valid_loss"] for said in told]
    assert model.provenance["penalty"] == told[int(np.argmin(losses))]["penalty"]
    assert model.provenance["has_converged"]
    none = parts[1][:0].copy()
    assert Geneformer(GeneformerConfig(**SMALL)).fit(parts[0], none).provenance["penalty"] == 0.01


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"has_votes": True}, "head alone reads"),
        ({"frozen_layers": 1}, "freezes every layer"),
        ({"pooling": "cls"}, "whole cell in one row"),
    ],
)
def test_levers_that_undo_each_other_are_refused_in_one_line(parts, change, said):
    with pytest.raises(Refusal, match=rf"models\.x: .*{said}"):
        GeneformerConfig.of(SMALL | change, where="models.x")
    skipped = GeneformerConfig(**SMALL).model_copy(update=change)  # past the door
    with pytest.raises(Refusal, match=said):
        Geneformer(skipped).fit(parts[0], parts[1])


# -- the row ------------------------------------------------------------------------------------
def test_a_row_may_be_another_with_other_defaults(monkeypatch):
    probe = contract.model_class("probe")
    assert issubclass(probe, Geneformer)
    assert (probe.name, Geneformer.name) == ("probe", "geneformer")
    assert probe.Config().head_only
    assert not Geneformer.Config().head_only
    assert contract.model_class("probe") is probe
    assert probe.Config.search_space() == GeneformerConfig.search_space()
    with pytest.raises(Refusal, match="fields here are"):
        probe.Config.of({"heads_only": True}, where="models.probe")
    assert issubclass(probe.Config, Config)
    here = Row("endoprint.models.scgpt:Scgpt", "", "", "", "", overrides=TABLE["probe"].overrides)
    monkeypatch.setitem(TABLE, "probe-scgpt", here)
    other = contract.model_class("probe-scgpt")
    assert issubclass(other, Scgpt)
    assert other.Config().head_only


def test_a_saved_probe_is_loaded_as_a_probe(parts, tmp_path):
    cls = contract.model_class("probe")
    model = cls(cls.Config(layers=1, hidden=24, ffn=16)).fit(parts[0], parts[1])
    model.save(tmp_path / "probe")
    again = contract.load(tmp_path / "probe")
    assert type(again) is cls
    assert np.array_equal(again.evidence(parts[2]), model.evidence(parts[2]))


@pytest.mark.parametrize(
    "change",
    [
        {"frozen_layers": -1}, {"lora_rank": -2}, {"lora_alpha": 0}, {"grow_after": -1},
        {"cache_gib": -1}, {"head_penalty": 0},
    ],
)  # fmt: skip
def test_a_lever_below_nothing_is_refused(change):
    with pytest.raises(Refusal, match=rf"models\.geneformer\.{next(iter(change))}.*greater"):
        GeneformerConfig.of(change, where="models.geneformer")
