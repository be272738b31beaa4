"""A head of pathways and directions: the same answers asked for, learned from shared parts."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import planted_cells
from endoprint import labels
from endoprint import model as contract
from endoprint.config import Refusal
from endoprint.encoder.structure import composition_of
from endoprint.metrics import call
from endoprint.models.geneformer import Geneformer, GeneformerConfig
from endoprint.models.scgpt import Scgpt, ScgptConfig

SMALL = {
    "layers": 1,
    "hidden": 16,
    "ffn": 16,
    "epochs": 4,
    "min_steps": 120,
    "minibatch_cells": 16,
}
ONE_WAY = ("DMSO", "LIVER-X_AGONIST", "RET_AGONIST", "THYROID_ANTAGONIST", "BPA")
BOTH_WAYS = ("DMSO", "BPA", "RET_AGONIST", "RET_ANTAGONIST", "THYROID_AGONIST")
KINDS = [(Geneformer, GeneformerConfig), (Scgpt, ScgptConfig)]


def parts(exposures):
    cells = planted_cells(exposures=exposures, n_units=3, n_cells=12)
    unit = cells.obs["unit"]
    return tuple(cells[(unit == name).to_numpy()].copy() for name in ("u0", "u1", "u2"))


def test_a_logit_is_its_pathways_part_and_its_directions():
    exposures = sorted(BOTH_WAYS)
    names, made = composition_of(exposures)
    assert names == ["BPA", "DMSO", "RET", "RET direction", "THYROID_AGONIST"]
    wanted = {
        "BPA": [1, 0, 0, 0, 0],
        "DMSO": [0, 1, 0, 0, 0],
        "RET_AGONIST": [0, 0, 1, 1, 0],
        "RET_ANTAGONIST": [0, 0, 1, -1, 0],
        "THYROID_AGONIST": [0, 0, 0, 0, 1],
    }
    assert made.tolist() == [wanted[exposure] for exposure in exposures]


@pytest.mark.parametrize("n", [2, 9, len(labels.CANONICAL)])
def test_the_parts_can_say_whatever_exposures_can(n):
    rng = np.random.default_rng(n)
    for _ in range(5):
        exposures = sorted(rng.choice(labels.CANONICAL, n, replace=False))
        assert np.linalg.matrix_rank(composition_of(exposures)[1]) == n


def test_where_every_pathway_has_one_direction_parts_are_exposures():
    for exposures in (sorted(ONE_WAY), ["ctrl", "stim"]):
        names, made = composition_of(exposures)
        assert names == exposures
        assert (made == np.eye(len(exposures))).all()


@pytest.mark.parametrize(("cls", "config"), KINDS)
def test_there_the_fitted_model_is_the_flat_one(cls, config):
    train, valid, unseen = parts(ONE_WAY)
    flat, structured = (
        cls(config(**SMALL, head=head)).fit(train, valid).evidence(unseen)
        for head in ("flat", "structured")
    )
    assert structured == pytest.approx(flat, abs=1e-4)


@pytest.mark.parametrize(("cls", "config"), KINDS)
def test_both_directions_are_found_and_the_saved_model_agrees(cls, config, tmp_path):
    train, valid, unseen = parts(BOTH_WAYS)
    model = cls(config(**SMALL, head="structured")).fit(train, valid)
    answer = model.predict_proba(unseen)
    assert list(answer.columns) == sorted(BOTH_WAYS)
    assert (call(answer) == unseen.obs["exposure"]).mean() > 0.8
    model.save(tmp_path / "model")
    again = contract.load(tmp_path / "model")
    assert np.array_equal(again.evidence(unseen), model.evidence(unseen))
    alone = again.predict_proba(unseen[[3]].copy())
    assert alone.to_numpy() == pytest.approx(answer.iloc[[3]].to_numpy(), abs=1e-5)


def test_a_direction_that_was_never_met_is_no_answer_and_harms_none():
    train, valid, unseen = parts(BOTH_WAYS)
    kept = (train.obs["exposure"] != "RET_ANTAGONIST").to_numpy()
    model = Geneformer(GeneformerConfig(**SMALL, head="structured")).fit(train[kept].copy(), valid)
    answer = model.predict_proba(unseen)
    assert "RET_ANTAGONIST" not in answer.columns
    met = (unseen.obs["exposure"] != "RET_ANTAGONIST").to_numpy()
    assert (call(answer) == unseen.obs["exposure"])[met].mean() > 0.8


def test_a_head_alone_is_flat():
    with pytest.raises(Refusal, match="row per exposure"):
        GeneformerConfig.of(
            {"head": "structured", "head_only": True, "has_votes": False}, where="models.x"
        )
