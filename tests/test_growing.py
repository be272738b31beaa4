"""Layers that grow onto a layer-free model: nothing changes when they come, all of it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import planted_cells
from endoprint import model as contract
from endoprint.config import Refusal
from endoprint.encoder import backbone, scgpt_backbone
from endoprint.encoder.network import Network, Reader
from endoprint.model import Resources
from endoprint.models.geneformer import Geneformer, GeneformerConfig
from endoprint.models.scgpt import Scgpt, ScgptConfig, ScgptNetwork
from endoprint.tokens import Vocabulary
from readers import logits, sentences

SMALL = {"layers": 2, "hidden": 16, "ffn": 16, "min_steps": 0, "minibatch_cells": 8}
KINDS = [(Geneformer, GeneformerConfig), (Scgpt, ScgptConfig)]


@pytest.fixture(scope="module")
def parts():
    cells = planted_cells(n_units=2, n_cells=12)
    unit = cells.obs["unit"]
    return tuple(cells[(unit == name).to_numpy()].copy() for name in ("u0", "u1"))


def fresh(kind: str) -> Reader:
    """A network as it is after epochs without layers: embeddings and the last norm have moved."""
    if kind == "geneformer":
        shape = backbone.shape_of(
            layers=3, hidden=16, heads=2, ffn=32, vocabulary_size=64, max_length=64
        )
        model = backbone.build(shape, seed=0, dropout=0.0)
        backbone.start_as_identity(model)
        made: Reader = Network(model.bert, 3, has_votes=True)
    else:
        wide = scgpt_backbone.Shape(n_tokens=64, width=16, layers=3, heads=2, ffn=32)
        made = ScgptNetwork(scgpt_backbone.build(wide, seed=0, dropout=0.0), 3, has_votes=True)
    embeddings, layers = made.stages()
    learned = [p for part in embeddings for p in part.parameters()]
    learned += [*made.ends(layers[-1])[1][-1].parameters(), *made.head.parameters()]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for tensor in learned:
            tensor.add_(torch.randn_like(tensor))
    return made


@pytest.mark.parametrize("kind", ["geneformer", "scgpt"])
def test_nothing_changes_when_layers_come(kind):
    made, cells = fresh(kind), sentences(has_levels=kind == "scgpt")
    answers = []
    for is_grown in (True, False):
        made.is_grown = is_grown
        answers.append(logits(made, cells))
    assert answers[1] == pytest.approx(answers[0], abs=1e-4 * float(np.abs(answers[0]).max()))
    assert np.abs(answers[0]).max() > 1


@pytest.mark.parametrize("kind", ["geneformer", "scgpt"])
def test_layers_that_add_something_are_never_left_out(kind):
    made = fresh(kind)
    made.settle()
    assert not made.is_grown
    projections, norms = made.ends(made.stages()[1][0])
    for tensor in (projections[0].weight, projections[1].bias, norms[0].weight):
        with torch.no_grad():
            tensor.view(-1)[3] += 0.5
        made.settle()
        assert made.is_grown
        with torch.no_grad():
            tensor.view(-1)[3] -= 0.5
    made.settle()
    assert not made.is_grown


@pytest.mark.parametrize(("cls", "config"), KINDS)
def test_before_they_come_layers_cost_nothing_and_afterwards_they_learn(
    parts, cls, config, monkeypatch
):
    read: list[int] = []
    real = cls.reader.through
    monkeypatch.setattr(
        cls.reader,
        "through",
        lambda self, layer, x, mask_RT: read.append(1) or real(self, layer, x, mask_RT),
    )
    n_read, moved = [], []
    # nothing is asked of the machine, which would try whole layers
    model = cls(config(**SMALL, epochs=4, grow_after=2, precision="fp32", compile="off"))

    def watch(epoch, metrics):
        n_read.append(len(read))
        moved.append(not model._network.is_identity())

    model.fit(*parts, watch=watch)
    assert n_read[1] == 0 < n_read[2] < n_read[3]
    assert moved == [False, False, True, True]


@pytest.mark.parametrize(
    ("cls", "config", "killed_at"),
    [(*KINDS[0], 1), (*KINDS[0], 3), (*KINDS[1], 2)],
)
def test_a_killed_run_taken_up_again_ends_with_the_very_same_weights(
    parts, cls, config, killed_at, tmp_path
):
    chosen = config(**SMALL, epochs=4, grow_after=2)
    straight = cls(chosen).fit(*parts)

    def kill(epoch, metrics):
        if epoch == killed_at:
            raise contract.Pruned

    with pytest.raises(contract.Pruned):
        cls(chosen).fit(*parts, watch=kill, work=tmp_path)
    resumed = cls(chosen).fit(*parts, work=tmp_path)
    for key, tensor in resumed._network.state_dict().items():
        assert torch.equal(tensor, straight._network.state_dict()[key]), key
    assert np.array_equal(resumed.evidence(parts[1]), straight.evidence(parts[1]))


def test_where_the_best_epoch_had_no_layers_none_are_read_and_the_saved_model_agrees(
    parts, tmp_path
):
    model = Geneformer(GeneformerConfig(**SMALL, epochs=3, grow_after=2)).fit(*parts)
    network = model._network
    with torch.no_grad():
        for layer in network.stages()[1]:
            projections, norms = network.ends(layer)
            for projection in projections:
                projection.weight.zero_()
                projection.bias.zero_()
            for norm in norms:
                norm.weight.fill_(1.0)
                norm.bias.zero_()
    wanted = model.evidence(parts[1])
    model.save(tmp_path / "model")
    again = contract.load(tmp_path / "model")
    assert not again._network.is_grown
    assert again.evidence(parts[1]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 0}, "layers that were trained before, or none"),
        ({"epochs": 2}, "need epochs to learn in"),
    ],
)
def test_growing_onto_nothing_or_too_late_is_refused(parts, change, said):
    config = GeneformerConfig(**(SMALL | {"epochs": 4, "grow_after": 2} | change))
    with pytest.raises(Refusal, match=said):
        Geneformer(config).fit(*parts)


def test_layers_of_a_checkpoint_do_not_grow(parts, tmp_path):
    vocabulary = Vocabulary.fit(parts[0])
    shape = backbone.shape_of(
        layers=2, hidden=16, heads=2, ffn=16,
        vocabulary_size=len(vocabulary), max_length=vocabulary.max_length,
    )  # fmt: skip
    backbone.write(tmp_path, backbone.build(shape, seed=0, dropout=0.0))
    config = GeneformerConfig(**SMALL, epochs=4, grow_after=2)
    with pytest.raises(Refusal, match="trained before"):
        Geneformer(config, resources=Resources(backbone=tmp_path)).fit(*parts)


@pytest.mark.parametrize("change", [{"frozen_layers": 1}, {"lora_rank": 2}])
def test_layers_that_grow_are_neither_frozen_nor_corrected(change):
    with pytest.raises(Refusal, match="trained whole"):
        GeneformerConfig.of({"grow_after": 1, **change}, where="models.geneformer")
