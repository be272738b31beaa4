"""Embeddings: upstream's numbers, in the file's order, and never another cell's."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import sparse
from typer.testing import CliRunner

from children import endoprint
from conftest import planted_cells
from endoprint import jobs, tokens
from endoprint.cli import app
from endoprint.cli import data as _data  # noqa: F401 -- with more than one command, each has a name
from endoprint.cli import embedding as _embedding  # noqa: F401 -- adds `embed`
from endoprint.config import Refusal
from endoprint.encoder import backbone, embedding
from endoprint.encoder.embedding import Embedder, embed_file
from endoprint.tokens import Tokens
from endoprint.vocabulary import Vocabulary


# -- equal to upstream --------------------------------------------------------------------------
def golden_tokens(outputs, vocabulary) -> Tokens:
    rows = [ids[:length] for ids, length in zip(outputs["input_ids"], outputs["length"])]
    return Tokens(
        values=np.concatenate(rows).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(outputs["length"])]).astype(np.int64),
        cell_ids=pd.Index([f"c{i}" for i in range(len(rows))]),
        coverage=pd.DataFrame(),
        vocabulary_sha256=vocabulary.sha256,
    )


@pytest.mark.parametrize("layer", ["second-to-last", "last"])
@pytest.mark.parametrize(("version", "mode"), [("v1", "cell"), ("v2", "cell"), ("v2", "cls")])
def test_embeddings_are_upstreams(shared, version, mode, layer):
    folder = shared / "golden/geneformer_tiny" / version
    outputs = np.load(folder / "inputs_outputs.npz")
    vocabulary = Vocabulary.load(version, shared / "data/geneformer")
    # the longest cell is always alone: padding five others to it takes seconds
    embedder = Embedder(folder, vocabulary, mode=mode, layer=layer, minibatch_tokens=1_500)
    found = embedder.of(golden_tokens(outputs, vocabulary))
    wanted = outputs[f"{mode}_emb.layer_{layer.replace('-', '_')}"]
    assert found == pytest.approx(wanted, abs=2e-5)
    assert np.abs(wanted).max() > 0.1  # else the tolerance would say nothing


def test_a_shape_says_which_published_vocabulary_it_speaks(shared):
    for version in ("v1", "v2"):
        assert embedding.series_of(shared / "golden/geneformer_tiny" / version) == version


# -- a small backbone of one's own --------------------------------------------------------------
@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    made = planted_cells(n_units=2, n_cells=10, n_genes=40)
    counts = made.X.tolil()
    counts[7] = 0
    counts[7, 39] = 3  # a cell whose only gene the vocabulary will not know
    made.X = sparse.csr_matrix(counts.tocsr(), dtype=np.float32)
    made.obsm["X_pca"] = np.ones((made.n_obs, 2))
    made.uns["note"] = "kept"
    return made


@pytest.fixture(scope="module")
def model(cells, tmp_path_factory) -> Path:
    """A backbone's folder with its vocabulary beside it."""
    known = cells[:, :39].copy()
    vocabulary = Vocabulary.fit(known[np.arange(known.n_obs) != 7].copy(), max_length=32)
    shape = backbone.shape_of(
        layers=2, hidden=16, heads=2, ffn=16, vocabulary_size=len(vocabulary), max_length=32
    )
    folder = tmp_path_factory.mktemp("model")
    backbone.write(folder, backbone.build(shape, seed=1, dropout=0.1))
    vocabulary.write(folder / "vocabulary.json")
    return folder


@pytest.fixture(scope="module")
def file(cells, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


def vocabulary_of(model: Path) -> Vocabulary:
    return Vocabulary.read(model / "vocabulary.json")


def vectors_of(path: Path) -> pd.DataFrame:
    table = pd.read_parquet(path)
    return pd.DataFrame(np.stack(table["embedding"]), index=table["cell_id"])


@pytest.mark.parametrize("mode", ["cell", "cls"])
def test_a_cells_vector_ignores_its_neighbours(cells, model, mode):
    vocabulary = vocabulary_of(model)
    found = tokens.of(cells, vocabulary)
    together = Embedder(model, vocabulary, mode=mode).of(found)
    apart = Embedder(model, vocabulary, mode=mode, minibatch_tokens=1).of(found)
    order = np.random.default_rng(0).permutation(cells.n_obs)
    shuffled = Embedder(model, vocabulary, mode=mode).of(tokens.of(cells[order], vocabulary))
    assert apart == pytest.approx(together, abs=1e-5, nan_ok=True)
    assert shuffled == pytest.approx(together[order], abs=1e-5, nan_ok=True)


def test_a_cell_without_genes_has_no_vector_and_its_place(cells, model):
    for mode in ("cell", "cls"):
        found = Embedder(model, vocabulary_of(model), mode=mode).of(
            tokens.of(cells, vocabulary_of(model))
        )
        is_nan = np.isnan(found)
        assert list(np.flatnonzero(is_nan.all(axis=1))) == [7]
        assert is_nan.sum() == found.shape[1]


def test_layers_and_modes_differ(cells, model):
    vocabulary = vocabulary_of(model)
    found = tokens.of(cells[:5], vocabulary)
    made = [
        Embedder(model, vocabulary, mode=mode, layer=layer).of(found)
        for mode in ("cell", "cls")
        for layer in ("second-to-last", "last")
    ]
    for i, one in enumerate(made):
        assert all(np.abs(one - other).max() > 1e-3 for other in made[:i])


# -- files --------------------------------------------------------------------------------------
def test_parquet_has_every_cell_in_the_files_order(cells, file, model, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "CELLS", 7)  # several blocks, the last one short
    told = []
    vocabulary = vocabulary_of(model)
    embedder = Embedder(model, vocabulary)
    out = tmp_path / "deep/er/out.parquet"
    made = embed_file(file, out, embedder, watch=lambda done, n: told.append((done, n)))
    vectors = vectors_of(out)
    assert list(vectors.index) == list(cells.obs_names)
    assert vectors.to_numpy() == pytest.approx(
        embedder.of(tokens.of(cells, vocabulary)), abs=1e-5, nan_ok=True
    )
    assert (made.n_cells, made.n_empty, made.width) == (60, 1, 16)
    assert told[-1] == (60, 60)
    assert len(told) == 9
    schema = pq.read_schema(out)
    assert str(schema.field("embedding").type) == "fixed_size_list<element: float>[16]"
    about = json.loads(schema.metadata[b"endoprint.embedding"])
    assert about == made.about == embedder.about()
    assert about["backbone_sha256"] == backbone.digest(model / "model.safetensors")
    assert about["vocabulary_sha256"] == vocabulary.sha256
    assert [path.name for path in out.parent.iterdir()] == ["out.parquet"]


def test_an_h5ad_is_copied_with_the_vectors_in_obsm(cells, file, model, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "CELLS", 7)
    before = file.read_bytes()
    embedder = Embedder(model, vocabulary_of(model), mode="cls", layer="last")
    out = tmp_path / "out.h5ad"
    embed_file(file, out, embedder)
    assert file.read_bytes() == before
    found = ad.read_h5ad(out)
    assert found.obsm["X_geneformer"].dtype == np.float32
    assert found.obsm["X_geneformer"] == pytest.approx(
        embedder.of(tokens.of(cells, vocabulary_of(model))), abs=1e-5, nan_ok=True
    )
    assert dict(found.uns["X_geneformer"]) == embedder.about()
    # all the rest is as it was
    assert (found.X != cells.X).nnz == 0
    pd.testing.assert_frame_equal(found.obs, ad.read_h5ad(file).obs)
    assert found.uns["note"] == "kept"
    assert np.array_equal(found.obsm["X_pca"], cells.obsm["X_pca"])

    again = tmp_path / "again.h5ad"  # a second embedding beside the first
    embed_file(out, again, Embedder(model, vocabulary_of(model)), key="X_cell")
    assert set(ad.read_h5ad(again).obsm) == {"X_pca", "X_geneformer", "X_cell"}


def test_a_file_without_obsm_or_uns_gets_them(cells, model, tmp_path):
    path, out = tmp_path / "bare.h5ad", tmp_path / "out.h5ad"
    ad.AnnData(X=cells.X, obs=cells.obs[[]], var=cells.var).write_h5ad(path)
    with h5py.File(path, "r+") as stored:
        del stored["obsm"], stored["uns"]
    path.chmod(0o444)
    embed_file(path, out, Embedder(model, vocabulary_of(model)))
    assert ad.read_h5ad(out).obsm["X_geneformer"].shape == (60, 16)


def test_counts_may_be_in_a_layer(cells, file, model, tmp_path):
    path = tmp_path / "layered.h5ad"
    layered = cells.copy()
    layered.layers["counts"] = layered.X.copy()
    layered.X = layered.X * 0.5
    layered.write_h5ad(path)
    embedder = Embedder(model, vocabulary_of(model))
    embed_file(path, tmp_path / "a.parquet", embedder, counts="counts")
    embed_file(file, tmp_path / "b.parquet", embedder)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    with pytest.raises(Refusal, match="raw counts"):
        embed_file(path, tmp_path / "c.parquet", embedder)


# -- refused, with nothing left behind ----------------------------------------------------------
@pytest.mark.parametrize("kind", ["key", "slash", "itself", "a folder", "not h5ad", "twice"])
def test_what_can_not_be_written_is_refused_and_leaves_nothing(cells, file, model, tmp_path, kind):
    path, out, key, said = file, tmp_path / "out.h5ad", "X_geneformer", ""
    if kind == "key":
        key, said = "X_pca", "--key"
    elif kind == "slash":
        key, said = "a/b", "--key"
    elif kind == "itself":
        path = tmp_path / "mine.h5ad"
        path.write_bytes(file.read_bytes())
        out, said = path, "file of their own"
    elif kind == "a folder":
        out, said = tmp_path, "file of their own"
    elif kind == "not h5ad":
        path, said = tmp_path / "cells.zarr", "OUT ending in .parquet"
        cells.write_zarr(path)
    else:
        path, said = tmp_path / "double.h5ad", "twice|unique|once"
        double = cells.copy()
        double.obs_names = ["a"] * cells.n_obs
        double.write_h5ad(path)
    before = sorted(tmp_path.iterdir())
    stored = path.read_bytes() if path.is_file() else b""
    with pytest.raises(Refusal, match=said) as refused:
        embed_file(path, out, Embedder(model, vocabulary_of(model)), key=key)
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before
    assert not path.is_file() or path.read_bytes() == stored


@pytest.mark.slow
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_memory_does_not_grow_with_the_number_of_cells(model, tmp_path, form):
    script = (
        "import sys; from pathlib import Path;"
        "from endoprint.encoder.embedding import Embedder, embed_file;"
        "from endoprint.vocabulary import Vocabulary;"
        "source, out, model = map(Path, sys.argv[1:]);"
        "embed_file(source, out, Embedder(model, Vocabulary.read(model / 'vocabulary.json')));"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    genes = [*vocabulary_of(model).genes, *(f"ENSG8{i:010d}" for i in range(3000))]
    counts = np.random.default_rng(0).poisson(0.6, (3000, len(genes))).astype(np.float32)
    peaks = []
    for times in (1, 5):
        some = np.tile(counts, (times, 1))
        made = ad.AnnData(
            {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[form](some),
            obs=pd.DataFrame(index=[f"c{i}" for i in range(len(some))]),
            var=pd.DataFrame(index=genes),
        )
        path = tmp_path / f"{times}.h5ad"
        made.write_h5ad(path)
        done = subprocess.run(
            [sys.executable, "-c", script, path, tmp_path / "out.parquet", model],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(int(done.stdout) / 1024)
    # 12,000 more cells are 130 MB of counts, or 146 with their zeros
    assert peaks[1] - peaks[0] < 40


def test_an_embedding_that_dies_half_way_leaves_the_old_file(file, model, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "CELLS", 7)
    embedder = Embedder(model, vocabulary_of(model))
    for name in ("out.parquet", "out.h5ad"):
        out = tmp_path / name
        out.write_bytes(b"old")

        def die(done: int, total: int) -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(Refusal, match="No space left"):
            embed_file(file, out, embedder, watch=die)
        assert out.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"out.parquet", "out.h5ad"}


def test_a_backbone_of_other_tokens_is_refused(cells, model, tmp_path):
    vocabulary = vocabulary_of(model)
    larger = Vocabulary.fit(cells, max_length=32)
    with pytest.raises(Refusal, match="as many tokens"):
        Embedder(model, larger)
    other = replace(vocabulary, medians=vocabulary.medians * 2)
    with pytest.raises(Refusal, match="vocabulary of the tokens"):
        Embedder(model, vocabulary).of(tokens.of(cells, other))


def test_cls_needs_a_vocabulary_with_cls_and_a_layer_before_the_last_needs_two(shared, tmp_path):
    v1 = Vocabulary.load("v1", shared / "data/geneformer")
    with pytest.raises(Refusal, match="<cls>"):
        Embedder(shared / "golden/geneformer_tiny/v1", v1, mode="cls")
    small = Vocabulary.fit(planted_cells(n_units=1, n_cells=3, n_genes=9), max_length=16)
    shape = backbone.shape_of(
        layers=0, hidden=8, heads=2, ffn=8, vocabulary_size=len(small), max_length=16
    )
    backbone.write(tmp_path, backbone.build(shape, seed=0, dropout=0.0))
    with pytest.raises(Refusal, match="layer last"):
        Embedder(tmp_path, small)
    assert Embedder(tmp_path, small, layer="last").width == 8


# -- the job and the command --------------------------------------------------------------------
def test_the_command_embeds_a_file_and_says_so(file, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["embed", str(file), "out.parquet", "--model", str(model)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "60 cells, 16 numbers each (cell, second-to-last): out.parquet" in done.stdout
    assert "origin unknown" in done.stdout
    assert "1 cells without a gene of the vocabulary have NaN" in done.stdout
    done = CliRunner().invoke(app, [*words, "--json", "--layer", "last"])
    said = json.loads(done.stdout)
    assert (said["n_cells"], said["n_empty"], said["width"]) == (60, 1, 16)
    assert said["about"]["layer"] == "last"
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_the_command_is_politely_refused_without_a_model_it_knows(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["embed", str(file), "out.h5ad", "--model", "V9"])
    assert done.exit_code == 2
    assert done.stderr.startswith("endoprint: ")
    assert "V2-316M" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_installed_command_knows_how_to_embed(file, model, tmp_path):
    words = ("embed", str(file), "out.h5ad", "--model", str(model), "--json")
    done = endoprint(*words, cwd=tmp_path, block="prefect")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert json.loads(done.stdout)["n_cells"] == 60


@pytest.mark.parametrize(
    ("over", "named"),
    [
        ({"mode": "gene"}, "--mode"),
        ({"layer": "first"}, "--layer"),
        ({"model": "V9"}, "published name"),
        ({"file": "absent.h5ad"}, "absent.h5ad"),
        ({"vocabulary": "absent"}, "absent"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(file, model, tmp_path, over, named):
    chosen = {"file": str(file), "out": str(tmp_path / "out.h5ad"), "model": str(model)}
    with pytest.raises(Refusal, match=named):
        jobs.embed(**{**chosen, **over}, workspace=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_backbone_without_its_vocabulary_asks_for_it(file, model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    over = {"out": str(tmp_path / "out.parquet"), "model": str(tmp_path)}
    with pytest.raises(Refusal, match="--vocabulary"):
        jobs.embed(str(file), **over)
    jobs.embed(str(file), **over, vocabulary=str(model / "vocabulary.json"))
    assert len(vectors_of(tmp_path / "out.parquet")) == 60


def test_real_cells_are_embedded_from_an_h5ad_as_upstream_tokenises_them(shared, tmp_path):
    folder = shared / "golden/geneformer_tokens"
    few = ad.read_h5ad(folder / "muscat.input.h5ad")[:20].copy()
    few.write_h5ad(tmp_path / "few.h5ad")
    made = jobs.embed(
        str(tmp_path / "few.h5ad"),
        out=str(tmp_path / "out.parquet"),
        model=str(shared / "golden/geneformer_tiny/v2"),
        dictionaries=str(shared / "data/geneformer"),
    )
    assert made["about"]["vocabulary"] == "v2"
    upstream = pd.read_parquet(folder / "muscat.v2.tokens.parquet")[:20]
    vocabulary = Vocabulary.load("v2", shared / "data/geneformer")
    same = {
        "input_ids": upstream["tokens"].to_list(),
        "length": upstream["length"].to_numpy(),
    }
    embedder = Embedder(shared / "golden/geneformer_tiny/v2", vocabulary)
    wanted = embedder.of(golden_tokens(same, vocabulary))
    found = vectors_of(tmp_path / "out.parquet")
    assert list(found.index) == list(upstream["cell_id"])
    assert found.to_numpy() == pytest.approx(wanted, abs=1e-5)
