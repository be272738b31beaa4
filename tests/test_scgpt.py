"""The model `scgpt`: equal to upstream, and what it takes from a checkpoint and says of it."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file, save_file

from conftest import planted_cells
from endoprint import bins
from endoprint import model as contract
from endoprint.config import Refusal
from endoprint.encoder import scgpt_backbone as backbone
from endoprint.encoder import scgpt_checkpoint as checkpoint
from endoprint.encoder.loop import Lesson, Loop
from endoprint.encoder.minibatches import Layout, assemble
from endoprint.encoder.network import answer
from endoprint.encoder.recipe import Recipe
from endoprint.metrics import call, f1_by_exposure
from endoprint.model import Resources
from endoprint.models.scgpt import Scgpt, ScgptConfig, ScgptNetwork

QUICK = ScgptConfig(epochs=8, min_steps=60, minibatch_cells=16, layers=1, hidden=32, ffn=32)
FILES = ("model.safetensors", "model_flash_names.safetensors")


@pytest.fixture(scope="module")
def parts() -> tuple[AnnData, AnnData, AnnData]:
    cells = planted_cells(n_units=4, n_cells=12)
    cells.var["symbol"] = [f"GENE{i:03d}" for i in range(cells.n_vars)]  # 120 of golden's 200
    unit = cells.obs["unit"]
    return tuple(
        cells[unit.isin(units).to_numpy()].copy() for units in (["u0", "u1"], ["u2"], ["u3"])
    )


@pytest.fixture
def folder(shared, tmp_path):
    """A copy of the golden checkpoint, its weights under flash attention's names."""
    return copied(shared, tmp_path / "scgpt", FILES[1])


def copied(shared, folder, weights: str):
    golden = shared / "golden/scgpt_tiny"
    folder.mkdir()
    for name in ("args.json", "vocab.json"):
        shutil.copyfile(golden / name, folder / name)
    shutil.copyfile(golden / weights, folder / "model.safetensors")
    return folder


def alike(n_cells: int, *, level: float = 9) -> bins.Binned:
    """Cells of the same three genes."""
    return bins.Binned(
        values=np.tile(np.array([bins.CLS, 5, 6, 7], dtype=np.int32), n_cells),
        levels=np.tile(np.array([0, level, 5, 1], dtype=np.float32), n_cells),
        offsets=np.arange(n_cells + 1) * 4,
        cell_ids=pd.Index([f"c{i}" for i in range(n_cells)]),
        share=np.ones(n_cells),
    )


def fit(parts, config=QUICK, resources=None, **over) -> Scgpt:
    return Scgpt(config, resources=resources).fit(parts[0], parts[1], **over)


def macro_f1(model, cells) -> float:
    truth = cells.obs["exposure"].astype(object)
    return float(f1_by_exposure(truth, call(model.predict_proba(cells))).mean())


# -- equal to upstream --------------------------------------------------------------------------
@pytest.mark.parametrize("weights", FILES)
@pytest.mark.parametrize("case", ["finetune", "embed", "clamp_mask"])
def test_embeddings_and_logits_are_upstreams(shared, tmp_path, weights, case):
    held = checkpoint.read(copied(shared, tmp_path / "c", weights))
    outputs = dict(np.load(shared / "golden/scgpt_tiny/inputs_outputs.npz"))
    ids, levels, is_padding = (
        torch.from_numpy(outputs[f"{case}.{key}"])
        for key in ("gene_ids", "values", "padding_mask")
    )
    with torch.inference_mode():
        hidden = held.encoder.eval()(ids, levels, ~is_padding)
        logits = held.classifier(hidden[:, 0])
    assert hidden[:, 0].numpy() == pytest.approx(outputs[f"{case}.cell_emb"], abs=2e-5)
    assert logits.numpy() == pytest.approx(outputs[f"{case}.cls_logits"], abs=1e-4)
    is_token = ~is_padding.numpy()
    wanted = outputs[f"{case}.token_output"][is_token]
    assert hidden.numpy()[is_token] == pytest.approx(wanted, abs=2e-5)


def test_pooled_through_our_minibatches_cls_is_upstreams(shared, folder):
    """The same cells laid out in our rows, sorted and padded otherwise."""
    outputs = dict(np.load(shared / "golden/scgpt_tiny/inputs_outputs.npz"))
    held = checkpoint.read(folder)
    is_token = ~outputs["finetune.padding_mask"]
    lengths = is_token.sum(axis=1)
    cells = bins.Binned(
        values=outputs["finetune.gene_ids"][is_token].astype(np.int32),
        levels=outputs["finetune.values"][is_token].astype(np.float32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        cell_ids=pd.Index([f"c{i}" for i in range(8)]),
        share=np.ones(8),
    )
    network = ScgptNetwork(held.encoder, 2, has_votes=False).eval()
    for chosen in (np.arange(8), np.array([3]), np.array([6, 1])):
        with torch.inference_mode():
            found = network.pool(assemble(cells, chosen, Layout(0, "cls", False))).numpy()
        assert found == pytest.approx(outputs["finetune.cell_emb"][chosen], abs=2e-5)


def test_every_key_not_loaded_is_listed(shared, tmp_path):
    for number, weights in enumerate(FILES):
        folder = copied(shared, tmp_path / str(number), weights)
        held = checkpoint.read(folder)
        used = set(held.encoder.state_dict())
        used |= {f"cls_decoder.{key}" for key in held.classifier.state_dict()}
        in_file = set(load_file(shared / "golden/scgpt_tiny" / FILES[0]))
        assert used | set(held.unloaded) == in_file | (
            {"flag_encoder.weight"} if number else set()
        )
        assert not used & set(held.unloaded)
        assert "mvc_decoder.W.weight" in held.unloaded


# -- the folder ---------------------------------------------------------------------------------
def as_released(folder):
    """Give the folder its weights as the pickle that is released."""
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "best_model.pt")
    (folder / "model.safetensors").unlink()
    return weights


def same(one: backbone.ScgptEncoder, other: backbone.ScgptEncoder) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[key]) for key, tensor in one.state_dict().items())


def test_a_released_pickle_is_read_and_converted_once(folder, monkeypatch):
    wanted = checkpoint.read(folder)
    as_released(folder)
    first = checkpoint.read(folder)
    assert (folder / "model.safetensors").is_file()
    assert not list(folder.glob("*.part"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("read twice"))
    second = checkpoint.read(folder)
    assert same(wanted.encoder, first.encoder)
    assert same(wanted.encoder, second.encoder)
    assert first.origin == second.origin
    assert first.unloaded == second.unloaded == wanted.unloaded


def test_another_pickle_in_its_place_is_converted_again(folder):
    weights = as_released(folder)
    checkpoint.read(folder)
    key = "encoder.embedding.weight"
    torch.save(weights | {key: weights[key] + 1}, folder / "best_model.pt")
    again = checkpoint.read(folder).encoder.encoder.embedding.weight
    assert torch.equal(again, weights[key] + 1)


def test_a_pickle_that_would_execute_something_is_refused(folder, tmp_path):
    class Harm:
        def __reduce__(self):
            return (tmp_path.joinpath("harmed").touch, ())

    as_released(folder)
    (folder / "best_model.pt").write_bytes(pickle.dumps({"encoder.embedding.weight": Harm()}))
    with pytest.raises(Refusal, match="plain tensors"):
        checkpoint.read(folder)
    torch.save({"encoder.embedding.weight": Harm()}, folder / "best_model.pt")
    with pytest.raises(Refusal, match="plain tensors"):
        checkpoint.read(folder)
    assert not (tmp_path / "harmed").exists()
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["args.json", "vocab.json", "model.safetensors"])
def test_a_missing_or_damaged_file_is_one_clear_refusal(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    with pytest.raises(Refusal):
        checkpoint.read(folder)
    (folder / name).unlink()
    with pytest.raises(Refusal, match=name):
        checkpoint.read(folder)


def test_weights_that_do_not_fit_are_refused_by_name(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    key = "transformer_encoder.layers.1.linear1.weight"
    save_file({k: v for k, v in weights.items() if k != key}, path)
    with pytest.raises(Refusal, match=f"missing {key}"):
        checkpoint.read(folder)
    save_file(weights | {key: weights[key][:4].clone()}, path)
    with pytest.raises(Refusal, match=f"wrong shape {key}"):
        checkpoint.read(folder)
    save_file(weights | {"dsbn.bns.0.weight": torch.ones(64)}, path)
    with pytest.raises(Refusal, match="batch normalisation"):
        checkpoint.read(folder)


@pytest.mark.parametrize("change", [{"input_emb_style": "category"}, {"pre_norm": True}])
def test_an_scgpt_of_another_kind_is_refused(folder, change):
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | change))
    with pytest.raises(Refusal, match="continuous levels and post-norm"):
        checkpoint.read(folder)


def test_a_vocabulary_of_another_length_is_refused(folder):
    tokens = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(tokens | {"MORE": len(tokens)}))
    with pytest.raises(Refusal, match="wrong shape encoder.embedding.weight"):
        checkpoint.read(folder)
    (folder / "vocab.json").write_text(json.dumps(tokens | {"MORE": 7}))
    with pytest.raises(Refusal, match="do not count up"):
        checkpoint.read(folder)


def test_special_tokens_the_vocabulary_lacks_are_appended_as_upstream_does(folder):
    tokens = json.loads((folder / "vocab.json").read_text())
    bare = {name: row for name, row in tokens.items() if not name.startswith("<")}
    (folder / "vocab.json").write_text(json.dumps(bare))
    assert checkpoint.read(folder).tokens == tokens


# -- the model ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fitted(parts) -> Scgpt:
    return fit(parts)


def test_from_scratch_it_says_so_and_its_genes_are_the_training_cells(parts, fitted):
    said = fitted.provenance
    assert said["backbone"]["origin"] == "scratch"
    assert "not the published scGPT" in said["backbone"]["label"]
    assert said["vocabulary"]["units"] == ["u0", "u1"]
    assert said["vocabulary"]["share_of_counts"] == 1.0
    assert macro_f1(fitted, parts[2]) > 0.8


def test_a_checkpoint_is_fine_tuned_and_its_coverage_and_unused_weights_are_told(parts, folder):
    train, valid, unseen = (cells.copy() for cells in parts)
    for cells in (train, valid, unseen):
        cells.var["symbol"] = [f"gene{i + 90:03d}" for i in range(cells.n_vars)]  # 110 are known
    model = fit((train, valid), resources=Resources(backbone=folder))
    said = model.provenance
    assert said["backbone"]["origin"] == "supplied"
    assert "flag_encoder.weight" in said["backbone"]["unloaded"]
    assert said["backbone"]["sha256"] == checkpoint.digest(folder / "model.safetensors")
    assert (said["vocabulary"]["n_genes"], said["vocabulary"]["n_known"]) == (120, 110)
    assert 0.8 < said["vocabulary"]["share_of_counts"] < 1
    assert macro_f1(model, unseen) > 0.7


def test_before_training_a_checkpoints_genes_have_their_own_embeddings(parts, folder):
    held = checkpoint.read(folder)
    model = Scgpt(QUICK, resources=Resources(backbone=folder))
    encoder, _ = model._begin(parts[0])
    whole = held.encoder.encoder.embedding.weight
    mine = encoder.encoder.embedding.weight
    assert torch.equal(mine[bins.PAD], whole[held.tokens["<pad>"]])
    assert torch.equal(mine[bins.CLS], whole[held.tokens["<cls>"]])
    for i in (0, 57, 119):
        row = bins.FIRST_GENE + model._tokens[model._genes.index(parts[0].var_names[i])]
        assert torch.equal(mine[row], whole[held.tokens[f"GENE{i:03d}"]])


def test_ids_of_one_symbol_are_one_gene(parts, folder):
    train = parts[0].copy()
    train.var["symbol"] = ["GENE000", "GENE000", *train.var["symbol"][2:]]
    model = Scgpt(QUICK, resources=Resources(backbone=folder))
    encoder, told = model._begin(train)
    assert told["vocabulary"]["n_known"] == 120
    assert encoder.shape.n_tokens == 119 + bins.FIRST_GENE
    made = model._sentences(train)
    both = (train.X[:, :2] > 0).sum(axis=1).A1 > 1
    expressed = (train.X > 0).sum(axis=1).A1
    assert both.any()
    assert (made.lengths - 1 == expressed - both).all()


def test_a_checkpoint_that_knows_none_of_the_genes_is_refused(parts, folder):
    bare = tuple(cells.copy() for cells in parts)
    for cells in bare:
        del cells.var["symbol"]
    with pytest.raises(Refusal, match="symbol per gene"):
        fit(bare, resources=Resources(backbone=folder))


def test_another_encoders_folder_is_not_taken_for_an_scgpt(parts, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = QUICK.model_copy(update={"min_steps": 5})
    model = fit(parts, config, resources=Resources(backbone=tmp_path))
    assert model.provenance["backbone"]["origin"] == "scratch"


def test_a_checkpoint_may_be_named_among_the_models_own_values(parts, folder, tmp_path):
    named = QUICK.model_copy(update={"checkpoint": str(folder)})
    found, _ = Scgpt(named)._begin(parts[0])
    wanted, _ = Scgpt(QUICK, resources=Resources(backbone=folder))._begin(parts[0])
    assert same(found, wanted)
    nowhere = QUICK.model_copy(update={"checkpoint": str(tmp_path / "nowhere")})
    with pytest.raises(Refusal, match=r"args\.json"):
        fit(parts, nowhere)


def test_the_saved_model_needs_nothing_beside_it_and_keeps_its_own_genes_only(
    parts, folder, tmp_path
):
    config = QUICK.model_copy(update={"min_steps": 5})
    model = fit(parts, config, resources=Resources(backbone=folder))
    model.save(tmp_path / "model")
    shutil.rmtree(folder)
    again = contract.load(tmp_path / "model")
    assert np.array_equal(again.evidence(parts[2]), model.evidence(parts[2]))
    assert again._network.scgpt.shape.n_tokens == 120 + bins.FIRST_GENE  # not 203
    assert again.embed(parts[2]).shape == (parts[2].n_obs, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0},
        {"has_votes": False, "min_steps": 150},
        {"ties": "drawn", "max_length": 81},
    ],
)
def test_it_learns_with_each_lever(parts, change):
    assert macro_f1(fit(parts, QUICK.model_copy(update=change)), parts[2]) > 0.7


def test_first_position_pooling_demands_the_whole_cell(parts):
    with pytest.raises(Refusal, match="whole cell in one row"):
        fit(parts, QUICK.model_copy(update={"pooling": "cls"}))
    fit(parts, QUICK.model_copy(update={"pooling": "cls", "block": 0, "min_steps": 5}))


def test_levels_matter_and_not_only_which_genes_are_there(parts, fitted):
    cells = parts[2][:8].copy()
    swapped = cells.copy()
    for row in range(8):
        data = swapped.X.data[swapped.X.indptr[row] : swapped.X.indptr[row + 1]]
        data[:] = data[::-1].copy()
    assert (np.abs(fitted.evidence(swapped) - fitted.evidence(cells)).max(axis=1) > 0.01).all()


def test_frozen_layers_and_embeddings_stay_as_they_are(parts):
    model = Scgpt(QUICK.model_copy(update={"frozen_layers": 1, "layers": 2, "min_steps": 5}))
    begun, _ = model._begin(parts[0])
    before = {key: tensor.clone() for key, tensor in begun.state_dict().items()}
    model.fit(parts[0], parts[1])
    moved = {
        key
        for key, tensor in model._network.scgpt.state_dict().items()
        if not torch.equal(tensor, before[key])
    }
    assert moved
    assert all(key.startswith("transformer_encoder.layers.1.") for key in moved)
    with pytest.raises(Refusal, match="frozen"):
        fit(parts, QUICK.model_copy(update={"frozen_layers": 3}))


def test_a_killed_run_taken_up_again_ends_with_the_very_same_weights(parts, tmp_path):
    brief = QUICK.model_copy(update={"epochs": 3, "min_steps": 0})
    straight = fit(parts, brief)

    def stop(epoch, metrics):
        if epoch == 2:
            raise contract.Pruned

    with pytest.raises(contract.Pruned):
        fit(parts, brief, watch=stop, work=tmp_path)
    told = []
    resumed = fit(parts, brief, watch=lambda epoch, metrics: told.append(epoch), work=tmp_path)
    assert told == [1, 2, 3]  # what an earlier attempt finished is told again
    assert np.array_equal(resumed.evidence(parts[2]), straight.evidence(parts[2]))


def test_other_levels_are_another_run(tmp_path):
    shape = backbone.Shape(n_tokens=10, width=8, layers=1, heads=2, ffn=8)
    runs = []
    for level in (9, 8):
        encoder = backbone.build(shape, seed=0, dropout=0.0)
        network = ScgptNetwork(encoder, 2, has_votes=False)
        lesson = Lesson(alike(2, level=level), np.array([0, 1]))
        recipe = Recipe()
        layout = recipe.layout(has_specials=False)
        runs.append(Loop(network, lesson, lesson, recipe, layout, seed=0, work=tmp_path)._run)
    assert runs[0] != runs[1]


def test_a_layer_that_starts_as_the_identity_changes_nothing():
    shape = backbone.Shape(n_tokens=30, width=16, layers=2, heads=2, ffn=16)
    made = backbone.build(shape, seed=0, dropout=0.0).eval()
    ids, levels = torch.arange(12).view(2, 6), torch.rand(2, 6) * 50
    with torch.inference_mode():
        deep = made(ids, levels, None)
        flat = made.encoder(ids) + made.value_encoder(levels)
        for layer in made.layers():  # two normalisations each, which layers keep
            flat = layer.norm2(layer.norm1(flat))
    assert torch.allclose(deep, flat, atol=1e-5)


def test_a_width_its_heads_do_not_divide_is_refused():
    with pytest.raises(Refusal, match="multiple of its heads"):
        backbone.Shape(n_tokens=9, width=30, layers=1, heads=4, ffn=8)


def test_rare_exposures_weigh_as_much_as_common_ones():
    """With every cell alike, class-balanced evidence knows no prior: all exposures are equal."""
    shape = backbone.Shape(n_tokens=10, width=16, layers=1, heads=2, ffn=16)
    network = ScgptNetwork(backbone.build(shape, seed=0, dropout=0.0), 2, has_votes=True)
    recipe = Recipe(epochs=40, min_steps=0, minibatch_cells=48, vector_dropout=0.0, block_share=1)
    layout = recipe.layout(has_specials=False)
    lesson = Lesson(alike(48), np.array([0] * 40 + [1] * 8))
    nobody = Lesson(alike(0), np.zeros(0, dtype=np.int64))
    Loop(network, lesson, nobody, recipe, layout, seed=0).run(lambda epoch, metrics: None)
    logits = answer(network, lesson.tokens, layout, minibatch_tokens=999).logits_BE
    assert np.abs(logits[:, 0] - logits[:, 1]).max() < 0.05
