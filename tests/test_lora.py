"""LoRA: begins as the encoder, learns its corrections only, ends as an ordinary encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from conftest import planted_cells
from endoprint import model as contract
from endoprint.config import Refusal
from endoprint.encoder.lora import adapt, merge
from endoprint.encoder.minibatches import assemble
from endoprint.models.geneformer import Geneformer, GeneformerConfig
from endoprint.models.scgpt import Scgpt, ScgptConfig
from readers import LAYOUT, logits, reader, sentences

KINDS = ["geneformer", "scgpt"]
N_MATRICES = {("geneformer", "attention"): 4, ("geneformer", "all"): 6,
              ("scgpt", "attention"): 2, ("scgpt", "all"): 4}  # fmt: skip


def adapted(kind: str, *, frozen: int = 0, matrices: str = "attention", rank: int = 2):
    made = reader(kind, frozen=frozen)
    adapt(made, rank=rank, alpha=4.0, matrices=matrices, seed=0)
    return made


def corrections(made) -> dict[str, torch.Tensor]:
    return {k: p for k, p in made.named_parameters() if k.endswith((".up", ".down"))}


def learn_a_little(made) -> None:
    with torch.no_grad():
        for tensor in corrections(made).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.manual_seed(1)))


@pytest.mark.parametrize("kind", KINDS)
def test_before_training_it_is_the_encoder(kind):
    cells = sentences(has_levels=kind == "scgpt")
    assert np.array_equal(logits(adapted(kind), cells), logits(reader(kind, frozen=0), cells))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_answers_as_unmerged(kind):
    cells = sentences(has_levels=kind == "scgpt")
    made = adapted(kind, matrices="all")
    base = logits(made, cells)
    learn_a_little(made)
    wanted = logits(made, cells)
    merge(made)
    assert not any(parametrize.is_parametrized(module) for module in made.modules())
    assert set(made.state_dict()) == set(reader(kind).state_dict())
    assert logits(made, cells) == pytest.approx(wanted, abs=1e-6)
    assert np.abs(wanted - base).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matrices", ["attention", "all"])
@pytest.mark.parametrize("frozen", [0, 2])
def test_only_corrections_head_and_votes_get_gradients(kind, matrices, frozen):
    made = adapted(kind, frozen=frozen, matrices=matrices)
    learn_a_little(made)
    cells = sentences(has_levels=kind == "scgpt")
    made.train()
    made(assemble(cells, np.arange(1, 9), LAYOUT))[0].square().sum().backward()
    learned = {k for k, p in made.named_parameters() if p.grad is not None}
    assert learned == {"head.weight", "head.bias", "votes.weight", *corrections(made)}
    assert len(corrections(made)) == 2 * (3 - frozen) * N_MATRICES[kind, matrices]


def test_the_correction_is_that_of_the_paper():
    made = adapted("geneformer")
    learn_a_little(made)
    query = made.bert.encoder.layer[0].attention.self.query
    held = query.parametrizations.weight
    wanted = held.original + 4.0 / 2 * held[0].up @ held[0].down
    assert torch.allclose(query.weight, wanted)


def test_nothing_left_to_correct_and_too_high_a_rank_are_refused():
    with pytest.raises(Refusal, match="3 of 3 layers frozen"):
        adapted("geneformer", frozen=3)
    with pytest.raises(Refusal, match="lower rank"):
        adapted("geneformer", rank=17)
    with pytest.raises(Refusal, match="leaves the encoder as it is"):
        GeneformerConfig.of({"head_only": True, "has_votes": False, "lora_rank": 2}, where="x")


@pytest.mark.parametrize(("cls", "config"), [(Geneformer, GeneformerConfig), (Scgpt, ScgptConfig)])
def test_a_fit_moves_adapted_matrices_only_and_saves_an_ordinary_model(cls, config, tmp_path):
    cells = planted_cells(n_units=2, n_cells=12)
    unit = cells.obs["unit"]
    train, valid = (cells[(unit == name).to_numpy()].copy() for name in ("u0", "u1"))
    chosen = config(
        layers=2, hidden=16, ffn=16, epochs=2, min_steps=20, minibatch_cells=8,
        lora_rank=2, frozen_layers=1,
    )  # fmt: skip
    model = cls(chosen)
    begun, _ = model._begin(train)
    before = {key: tensor.clone() for key, tensor in begun.state_dict().items()}
    model.fit(train, valid)
    body = model._network.get_submodule(model._network.name).state_dict()
    moved = {key for key in body if not torch.equal(body[key], before[key])}
    assert set(body) == set(before)
    assert moved
    assert all("layer.1.attention" in key or "layers.1.self_attn" in key for key in moved)
    model.save(tmp_path / "model")
    again = contract.load(tmp_path / "model")
    assert np.array_equal(again.evidence(valid), model.evidence(valid))


def test_a_killed_fit_taken_up_again_is_the_fit_that_was_not(tmp_path):
    cells = planted_cells(n_units=2, n_cells=12)
    unit = cells.obs["unit"]
    train, valid = (cells[(unit == name).to_numpy()].copy() for name in ("u0", "u1"))
    config = GeneformerConfig(
        layers=1, hidden=16, ffn=16, epochs=3, min_steps=0, minibatch_cells=8, lora_rank=2
    )
    straight = Geneformer(config).fit(train, valid)

    def stop(epoch, metrics):
        if epoch == 2:
            raise contract.Pruned

    with pytest.raises(contract.Pruned):
        Geneformer(config).fit(train, valid, watch=stop, work=tmp_path)
    resumed = Geneformer(config).fit(train, valid, work=tmp_path)
    assert np.array_equal(resumed.evidence(valid), straight.evidence(valid))
