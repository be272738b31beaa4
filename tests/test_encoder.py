"""The encoder: equal to upstream where upstream is the oracle, and deaf to neighbours."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from endoprint.config import Refusal
from endoprint.encoder import backbone
from endoprint.encoder.loop import Lesson, Loop
from endoprint.encoder.minibatches import Layout, assemble, plan
from endoprint.encoder.network import Network, answer, hidden_states
from endoprint.encoder.pooling import token_weights
from endoprint.encoder.recipe import Recipe, schedule_of
from endoprint.tokens import Tokens


def tokens_of(*cells: list[int]) -> Tokens:
    lengths = [len(cell) for cell in cells]
    return Tokens(
        values=np.array([token for cell in cells for token in cell], dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        cell_ids=pd.Index([f"c{i}" for i in range(len(cells))]),
        coverage=pd.DataFrame(),
        vocabulary_sha256="",
    )


def random_tokens(rng, n_cells: int, longest: int, n_genes: int = 60) -> Tokens:
    return tokens_of(
        *(
            list(4 + rng.permutation(n_genes)[: rng.integers(0, min(longest, n_genes) + 1)])
            for _ in range(n_cells)
        )
    )


def small(seed: int = 0, **over):
    shape = {
        "layers": 2, "hidden": 16, "heads": 2, "ffn": 32, "vocabulary_size": 64, "max_length": 64,
    } | over  # fmt: skip
    return backbone.build(backbone.shape_of(**shape), seed=seed, dropout=0.0)


def network(seed: int = 0, n_exposures: int = 3, **over) -> Network:
    net = Network(
        small(seed).bert, n_exposures, **{"has_votes": True, "genes_per_cell": 20} | over
    )
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for tensor in (net.head.weight, net.standardise.running_mean):
            tensor.normal_()
        if net.votes is not None:
            net.votes.weight.normal_()
    return net


# -- equal to upstream --------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["v1", "v2"])
def golden(request, shared):
    folder = shared / "golden/geneformer_tiny" / request.param
    model = backbone.read(folder)
    model.eval()
    return model, dict(np.load(folder / "inputs_outputs.npz")), request.param == "v2"


def golden_cells(outputs) -> Tokens:
    rows = zip(outputs["input_ids"], outputs["length"])
    return tokens_of(*(list(ids[:length]) for ids, length in rows))


@pytest.mark.parametrize(("pooling", "key"), [("mean", "cell_emb"), ("cls", None)])
@pytest.mark.parametrize("minibatch", ["alone", "together"])
def test_pooled_vectors_are_upstreams(golden, pooling, key, minibatch):
    model, outputs, has_specials = golden
    key = key or ("cls_emb" if has_specials else "first_token_emb")
    net = Network(model.bert, 2, has_votes=False).eval()
    cells = golden_cells(outputs)
    layout = Layout(0, pooling, has_specials)
    # the longest cell (4,096 tokens) is always alone: padding five others to it takes seconds
    each = [[i] for i in range(6)] if minibatch == "alone" else [[0], [1, 2, 3, 4, 5]]
    found = {"last": {}, "second_to_last": {}}
    layers = model.bert.encoder.layer
    for chosen in map(np.array, each):
        for name, kept in (("last", layers), ("second_to_last", layers[:-1])):
            model.bert.encoder.layer = kept
            with torch.inference_mode():
                pooled = net.pool(assemble(cells, chosen, layout)).numpy()
            model.bert.encoder.layer = layers
            found[name] |= dict(zip(chosen.tolist(), pooled))
    for name, vectors in found.items():
        wanted = outputs[f"{key}.layer_{name}"]
        assert np.stack([vectors[i] for i in range(6)]) == pytest.approx(wanted, abs=2e-5)


def test_hidden_states_are_upstreams(golden):
    model, outputs, has_specials = golden
    ids, mask = outputs["mlm.input_ids"], outputs["mlm.attention_mask"].astype(bool)
    cells = tokens_of(*(list(row[is_token]) for row, is_token in zip(ids, mask)))
    minibatch = assemble(cells, np.arange(2), Layout(0, "mean", has_specials))
    layers = model.bert.encoder.layer
    for depth in (0, 1, 2):
        model.bert.encoder.layer = layers[:depth]
        with torch.inference_mode():
            found = hidden_states(model.bert, minibatch).numpy()
        model.bert.encoder.layer = layers
        wanted = outputs[f"mlm.hidden_states.{depth}"]
        for row, is_token in enumerate(mask):
            assert found[row][is_token] == pytest.approx(wanted[row][is_token], abs=2e-5)


def test_masked_logits_are_upstreams(golden):
    model, outputs, _ = golden
    with torch.inference_mode():
        logits = model(
            input_ids=torch.from_numpy(outputs["mlm.input_ids"].astype(np.int64)),
            attention_mask=torch.from_numpy(outputs["mlm.attention_mask"].astype(bool)),
        ).logits
    row, column = outputs["mlm.masked_row_col"].T
    found = logits[row, column]
    assert found.numpy() == pytest.approx(outputs["mlm.logits"], abs=1e-4)
    truth = torch.from_numpy(outputs["mlm.true_ids"].astype(np.int64))
    loss = float(torch.nn.functional.cross_entropy(found, truth))
    assert loss == pytest.approx(float(outputs["mlm.loss"]), abs=1e-4)


def test_a_golden_checkpoint_written_and_read_again_is_the_same(golden, tmp_path):
    model, _, _ = golden
    sha256 = backbone.write(tmp_path, model)
    again = backbone.read(tmp_path)
    assert sha256 == backbone.digest(tmp_path / backbone.WEIGHTS)
    own = dict(again.named_parameters())
    for key, tensor in model.named_parameters():
        assert torch.equal(tensor, own[key]), key
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight


# -- rows ---------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    block=st.integers(0, 20),
    pooling=st.sampled_from(["rank", "mean"]),
    has_specials=st.booleans(),
)
def test_every_token_is_in_one_row_at_its_own_rank(seed, block, pooling, has_specials):
    rng = np.random.default_rng(seed)
    cells = random_tokens(rng, 5, 40)
    made = assemble(cells, np.arange(5), Layout(block, pooling, has_specials))
    mask = np.ones(made.ids_RT.shape, bool) if made.mask_RT is None else made.mask_RT.numpy()
    for i in range(5):
        rows = (made.owner_R == i).numpy()
        length = int(cells.lengths[i])
        assert rows.sum() == max(-(-length // (block or max(length, 1))), 1)
        if length == 0:
            continue
        rank = made.positions_RT.numpy()[rows][mask[rows]]
        assert sorted(rank) == list(range(length))
        assert (made.ids_RT.numpy()[rows][mask[rows]][np.argsort(rank)] == cells[i]).all()
        per_row = mask[rows].sum(axis=1)
        assert per_row.max() - per_row.min() <= 1
        assert not block or per_row.max() <= block
        n_genes = length - 2 if has_specials else length
        weight = made.weights_RT.numpy()[rows].sum()
        assert weight == pytest.approx(1.0 if n_genes > 0 else 0.0, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.1, 1.0), most=st.integers(0, 3))
def test_a_training_step_reads_its_share_of_rows_with_whole_weight(seed, share, most):
    rng = np.random.default_rng(seed)
    cells = random_tokens(rng, 6, 60)
    made = assemble(cells, np.arange(6), Layout(8, "rank", False, share, most), rng)
    dealt = np.maximum(-(-cells.lengths // 8), 1)
    kept = np.maximum(np.rint(dealt * share), 1)
    assert (np.bincount(made.owner_R) == np.minimum(kept, most or kept)).all()
    weight = np.zeros(6)
    np.add.at(weight, made.owner_R.numpy(), made.weights_RT.numpy().sum(axis=1))
    assert weight[cells.lengths > 0] == pytest.approx(1.0, abs=1e-5)
    assert len(made.ids_N) == cells.lengths.sum()  # all of them vote all the same


def test_rank_weights_fall_evenly_and_specials_have_none():
    found = token_weights("rank", np.arange(6), np.full(6, 6), has_specials=True)
    assert found == pytest.approx(np.array([0, 4, 3, 2, 1, 0]) / 10)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=60),
    cells=st.integers(1, 9),
    budget=st.integers(1, 120),
    least=st.integers(1, 2),
    seed=st.none() | st.integers(0, 9),
)
def test_every_cell_is_in_one_minibatch_and_budgets_hold(lengths, cells, budget, least, seed):
    lengths = np.array(lengths)
    rng = None if seed is None else np.random.default_rng(seed)
    dealt = plan(lengths, cells=cells, tokens=budget, least=least, rng=rng)
    assert sorted(np.concatenate(dealt)) == list(range(len(lengths)))
    for chosen in dealt:
        if least == 1:
            assert len(chosen) <= cells
            assert lengths[chosen].sum() <= budget or len(chosen) == 1


def test_no_training_minibatch_holds_one_cell_alone():
    lengths = np.full(65, 10)
    dealt = plan(lengths, cells=32, tokens=10**6, least=2, rng=np.random.default_rng(0))
    assert min(map(len, dealt)) >= 2


# -- independence -------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [0, 7, 64])
@pytest.mark.parametrize("pooling", ["rank", "mean"])
def test_a_cells_answer_ignores_its_neighbours(block, pooling):
    cells = random_tokens(np.random.default_rng(1), 12, 60)
    net, layout = network(), Layout(block, pooling, False)
    together = answer(net, cells, layout, minibatch_tokens=10_000)
    few = answer(net, cells, layout, minibatch_tokens=70)
    assert few.logits_BE == pytest.approx(together.logits_BE, abs=1e-5)
    for i in range(12):
        alone = answer(net, tokens_of(list(cells[i])), layout, minibatch_tokens=10_000)
        assert alone.logits_BE[0] == pytest.approx(together.logits_BE[i], abs=1e-5)
        assert alone.vectors_BD[0] == pytest.approx(together.vectors_BD[i], abs=1e-5)


def test_blocks_as_long_as_the_cell_are_full_attention():
    cells = random_tokens(np.random.default_rng(2), 8, 60)
    net = network()
    with torch.no_grad():  # attention that looks at something, unlike that of a fresh backbone
        for name, tensor in net.bert.encoder.named_parameters():
            if "attention" in name and name.endswith("weight") and tensor.ndim > 1:
                tensor.mul_(20)
    full = answer(net, cells, Layout(0, "rank", False), minibatch_tokens=10_000)
    blocks = answer(net, cells, Layout(60, "rank", False), minibatch_tokens=10_000)
    short = answer(net, cells, Layout(5, "rank", False), minibatch_tokens=10_000)
    assert blocks.logits_BE == pytest.approx(full.logits_BE, abs=1e-5)
    assert np.abs(short.vectors_BD - full.vectors_BD).max() > 1e-3  # blocks do change what is seen


def test_an_empty_cell_gets_a_finite_answer_among_others():
    cells = tokens_of([], [5, 6, 7], [9])
    found = answer(network(), cells, Layout(2, "rank", False), minibatch_tokens=100)
    assert np.isfinite(found.logits_BE).all()


def test_without_layers_attention_blocks_do_not_matter():
    net = Network(small(layers=0).bert, 2, has_votes=False)
    cells = random_tokens(np.random.default_rng(3), 5, 50)
    one, other = (
        answer(net, cells, Layout(b, "rank", False), minibatch_tokens=999) for b in (0, 4)
    )
    assert one.vectors_BD == pytest.approx(other.vectors_BD, abs=1e-5)


def test_layers_that_start_as_the_identity_change_nothing():
    model = small()
    backbone.start_as_identity(model)
    minibatch = assemble(tokens_of([5, 9, 7]), np.array([0]), Layout(0, "mean", False))
    with torch.inference_mode():
        deep = hidden_states(model.bert.eval(), minibatch)
        model.bert.encoder.layer = model.bert.encoder.layer[:0]
        assert torch.allclose(deep, hidden_states(model.bert, minibatch), atol=1e-5)


# -- checkpoints refused ------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    backbone.write(tmp_path / "b", small())
    return tmp_path / "b"


def test_a_missing_file_is_one_clear_refusal(folder):
    (folder / backbone.WEIGHTS).unlink()
    with pytest.raises(Refusal, match=r"no model.safetensors"):
        backbone.read(folder)


def test_a_missing_or_misshapen_tensor_is_refused_by_name(folder):
    path = folder / backbone.WEIGHTS
    weights = load_file(path)
    key = "bert.encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in weights.items() if k != key}, path)
    with pytest.raises(Refusal, match=f"missing {key}"):
        backbone.read(folder)
    save_file(weights | {key: weights[key][:4].clone()}, path)
    with pytest.raises(Refusal, match=f"wrong shape {key}"):
        backbone.read(folder)
    extra = {"bert.encoder.layer.2.output.dense.weight": weights[key].clone()}
    save_file(weights | extra, path)
    with pytest.raises(Refusal, match="foreign"):
        backbone.read(folder)


def test_a_truncated_weight_file_is_refused(folder):
    path = folder / backbone.WEIGHTS
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(Refusal, match="safetensors"):
        backbone.read(folder)


def test_other_heads_are_ignored_and_a_missing_one_is_drawn(folder):
    path = folder / backbone.WEIGHTS
    weights = {k: v for k, v in load_file(path).items() if k.startswith("bert.")}
    save_file(weights | {"bert.pooler.dense.weight": torch.zeros(16, 16)}, path)
    again = backbone.read(folder)
    key = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(dict(again.named_parameters())[key], weights[key])


def test_where_weights_come_from_is_said(folder):
    assert backbone.origin_of(folder).origin == "supplied"
    sha256 = backbone.digest(folder / backbone.WEIGHTS)
    label = {"label": "mine", "sha256": sha256, "vocabulary_sha256": "v", "units": ["u1"]}
    (folder / backbone.LABEL).write_text(json.dumps(label))
    found = backbone.origin_of(folder)
    assert (found.origin, found.label, found.units) == ("pretrained here", "mine", ["u1"])
    (folder / backbone.LABEL).write_text(json.dumps(label | {"sha256": "0" * 64}))
    with pytest.raises(Refusal, match="beside"):
        backbone.origin_of(folder)


# -- the loop -----------------------------------------------------------------------------------
def lesson(seed: int, n_cells: int = 48) -> Lesson:
    """Cells of three exposures, each with its own five genes on top."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, n_cells)
    cells = []
    for exposure in truth:
        own = 4 + 5 * exposure + rng.permutation(5)
        cells.append([*own, *(20 + rng.permutation(30)[:20])])
    return Lesson(tokens_of(*cells), truth)


RECIPE = Recipe(
    epochs=3, min_steps=0, block=8, minibatch_cells=12, lr=1e-2, votes_lr=3e-2, precision="fp32"
)


def loop(recipe: Recipe = RECIPE, work=None, seed: int = 0, machine=None, **over) -> Loop:
    net = Network(small(seed).bert, 3, **{"has_votes": True, "genes_per_cell": 25} | over)
    layout = recipe.layout(has_specials=False)
    return Loop(
        net, lesson(1), lesson(2, 24), recipe, layout, seed=seed, work=work, machine=machine
    )


def weights(made: Loop) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in made.network.state_dict().items()}


def silent(epoch, metrics): ...


@pytest.mark.parametrize("has_votes", [True, False])
def test_the_loop_finds_a_planted_signal(has_votes):
    recipe = RECIPE.model_copy(update={"epochs": 15})
    seen = []
    made = loop(recipe, has_votes=has_votes)
    progress = made.run(lambda epoch, metrics: seen.append((epoch, metrics)))
    assert progress.history[progress.best_epoch - 1]["valid_macro_f1"] > 0.9
    assert [epoch for epoch, _ in seen] == list(range(1, progress.epoch + 1))
    assert set(seen[0][1]) == {"train_loss", "valid_loss", "valid_macro_f1"}


def test_a_killed_run_taken_up_again_ends_with_the_very_same_weights(tmp_path, monkeypatch):
    class Killed(Exception): ...

    def kill(epoch, metrics):
        if epoch == 2:
            raise Killed

    straight = loop()
    straight.run(silent)
    with pytest.raises(Killed):
        loop(work=tmp_path).run(kill)
    resumed = loop(work=tmp_path)
    told = []
    learned = []
    one_epoch = resumed._one_epoch
    monkeypatch.setattr(
        resumed, "_one_epoch", lambda: learned.append(resumed.progress.epoch) or one_epoch()
    )
    progress = resumed.run(lambda epoch, metrics: told.append(epoch))
    assert learned == [2]  # counted from 0: only the last
    assert told == [1, 2, 3]  # but the whole curve is told
    assert progress.history == straight.progress.history
    for key, tensor in weights(resumed).items():
        assert torch.equal(tensor, weights(straight)[key]), key
    assert not list(tmp_path.glob("*.part"))


def test_another_runs_checkpoint_is_not_taken_up(tmp_path):
    loop(work=tmp_path).run(silent)
    told = []
    loop(RECIPE.model_copy(update={"lr": 5e-3}), work=tmp_path).run(lambda e, m: told.append(e))
    assert told == [1, 2, 3]


def test_a_damaged_checkpoint_starts_the_run_anew(tmp_path):
    loop(work=tmp_path).run(silent)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    told = []
    loop(work=tmp_path).run(lambda e, m: told.append(e))
    assert told == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_with_where_and_what_to_do():
    made = loop()
    with torch.no_grad():
        made.network.head.bias.fill_(float("nan"))
    with pytest.raises(Refusal, match=r"finite; got nan at epoch 1, step 1; lower lr"):
        made.run(silent)


class Small:
    """Memory for so many cells at a time: more of them raise what an allocator raises."""

    def __init__(self, made: Loop, room: int, error: Exception, *, on_the_way_back: bool) -> None:
        self.asked: list[int] = []
        self._network, self._pool = made.network, made.network.pool
        self._room, self._error = room, error
        self._on_the_way_back = on_the_way_back
        made.network.pool = self

    def __call__(self, minibatch):
        if not self._network.training:
            return self._pool(minibatch)
        n_cells = len(minibatch.cells_B)
        self.asked.append(n_cells)
        if n_cells <= self._room:
            return self._pool(minibatch)
        if not self._on_the_way_back:
            raise self._error
        pooled = self._pool(minibatch)
        pooled.register_hook(self._run_out)
        return pooled

    def _run_out(self, gradient):
        raise self._error


CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 99999999999 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize("on_the_way_back", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), CPU_ERROR])
def test_memory_that_runs_out_halves_what_is_read_at_a_time_and_changes_no_step(
    error, on_the_way_back
):
    plenty = loop(vector_dropout=0.3)
    plenty.run(silent)
    made = loop(vector_dropout=0.3)
    memory = Small(made, 4, error, on_the_way_back=on_the_way_back)
    made.run(silent)
    assert list(dict.fromkeys(memory.asked)) == [12, 6, 3]
    assert max(memory.asked[memory.asked.index(3) :]) == 3
    planned = loop(vector_dropout=0.3)
    planned.steps.portions.most = 3
    planned.run(silent)
    for key, tensor in weights(made).items():
        assert torch.allclose(tensor, weights(planned)[key], atol=1e-6), key
    # the same steps as without portions too, but for the order of sums, which Adam magnifies
    for ours, theirs in zip(made.progress.history, plenty.progress.history):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_cells_that_fit_at_a_time_are_remembered_by_a_run_taken_up(tmp_path):
    class Killed(Exception): ...

    def kill(epoch, metrics):
        raise Killed

    made = loop(work=tmp_path)
    Small(made, 4, CPU_ERROR, on_the_way_back=False)
    with pytest.raises(Killed):
        made.run(kill)
    again = loop(work=tmp_path)
    memory = Small(again, 4, CPU_ERROR, on_the_way_back=False)
    again.run(silent)
    assert memory.asked[0] == 3


def test_where_not_one_cell_fits_it_gives_up_in_a_line():
    made = loop()
    memory = Small(made, 0, CPU_ERROR, on_the_way_back=False)
    with pytest.raises(Refusal, match=r"one cell at a time; got .*DefaultCPUAllocator"):
        made.run(silent)
    assert memory.asked == [12, 6, 3, 2, 1]


def test_another_error_is_no_lack_of_memory():
    made = loop()
    Small(made, 0, RuntimeError("shapes cannot be multiplied"), on_the_way_back=False)
    with pytest.raises(RuntimeError, match="shapes"):
        made.run(silent)


def test_the_best_epoch_is_restored_and_stops_the_run_early(monkeypatch):
    made = loop(RECIPE.model_copy(update={"epochs": 20, "patience": 3}))
    losses = iter([0.5, 0.1, 0.9, 0.8, 0.7, 0.2])
    at_best = {}

    def validate():
        loss = next(losses)
        if loss == 0.1:
            at_best.update(weights(made))
        return {"valid_loss": loss, "valid_macro_f1": 0.5}

    monkeypatch.setattr(made, "_validate", validate)
    progress = made.run(silent)
    assert (progress.epoch, progress.best_epoch) == (5, 2)
    for key, tensor in weights(made).items():
        assert torch.equal(tensor, at_best[key]), key


def test_frozen_layers_stay_as_they_are():
    made = loop(RECIPE.model_copy(update={"frozen_layers": 1}))
    before = weights(made)
    made.run(silent)
    for key, tensor in weights(made).items():
        is_frozen = key.startswith(("bert.embeddings.", "bert.encoder.layer.0."))
        if key.endswith("output.dense.weight"):
            assert torch.equal(tensor, before[key]) == is_frozen, key
        elif is_frozen:
            assert torch.equal(tensor, before[key]), key
    with pytest.raises(Refusal, match="frozen"):
        loop(RECIPE.model_copy(update={"frozen_layers": 3}))


RARE = np.array([0] * 40 + [1] * 8 + [2] * 3)


def test_balanced_sampling_meets_exposures_equally_often_and_leaves_no_rare_cell_out():
    recipe = RECIPE.model_copy(update={"sampling": "balanced"})
    cells = Lesson(tokens_of(*([[5, 6, 7]] * 51)), RARE)
    nobody = Lesson(tokens_of(), np.zeros(0, dtype=np.int64))
    net = Network(small().bert, 3, has_votes=True)
    made = Loop(net, cells, nobody, recipe, recipe.layout(has_specials=False), seed=0)
    assert made.weight_E.tolist() == [1, 1, 1]
    met = []
    for epoch in range(2):
        drawn = np.concatenate(made._plan(epoch))
        assert np.bincount(RARE[drawn]).tolist() == [17, 17, 17]
        times = np.bincount(drawn, minlength=51)
        assert set(times[:40]) == {0, 1}  # common: some once
        assert set(times[40:48]) == {2, 3}  # rare: all, and again
        assert set(times[48:]) == {5, 6}
        met.append(tuple(drawn))
    assert met[0] != met[1]


def test_both_ways_to_weigh_exposures_alike_know_no_prior():
    """With every cell alike, evidence without a prior is equal for all exposures."""
    for sampling in ("each", "balanced"):
        recipe = Recipe(
            epochs=40, min_steps=0, minibatch_cells=51, vector_dropout=0.0, block_share=1,
            sampling=sampling,
        )  # fmt: skip
        alike = Lesson(tokens_of(*([[5, 6, 7]] * 51)), RARE)
        nobody = Lesson(tokens_of(), np.zeros(0, dtype=np.int64))
        net = Network(small().bert, 3, has_votes=True)
        Loop(net, alike, nobody, recipe, recipe.layout(has_specials=False), seed=0).run(silent)
        layout = Layout(0, "rank", False)
        logits = answer(net, alike.tokens, layout, minibatch_tokens=999).logits_BE
        assert np.ptp(logits, axis=1).max() < 0.05, sampling


def test_the_learning_rate_rises_then_declines_to_nothing():
    for kind in ("linear", "cosine"):
        factor = [schedule_of(kind, 100, 0.1)(step) for step in range(100)]
        assert np.argmax(factor) == 9
        assert max(factor) == 1.0
        assert factor[0] == pytest.approx(0.1)
        assert factor[-1] < 0.02
        assert (np.diff(factor[10:]) <= 0).all()


def test_small_sets_are_gone_through_more_often():
    recipe = Recipe(epochs=5, min_steps=200)
    assert recipe.epochs_for(100) == 5
    assert recipe.epochs_for(5) == 40


def test_a_model_folder_moved_is_the_same_model(folder, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    assert backbone.origin_of(tmp_path / "elsewhere").sha256
