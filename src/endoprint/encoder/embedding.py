"""One vector per cell out of a backbone that is only read: Geneformer's embeddings, exactly.

`cell` averages the hidden states of a cell's genes, `<cls>` and `<eos>` left out; `cls` takes the
first position, where the vocabulary has `<cls>` (Theodoris 2023; upstream's `emb_mode`). Which of
the two vocabularies it is decides, as upstream, not the network. `second-to-last` is upstream's
default (`emb_layer` -1), `last` its 0. Unlike upstream, cells keep their order, none is left out
of a sample of 1,000, and a cell without any gene of the vocabulary has NaN, never a number.

Attention runs over the whole cell, in fp32. Shapes: n cells, D width.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from anndata.io import write_elem

from endoprint import sources, stored, tokens
from endoprint.config import Refusal
from endoprint.curated import refuse_double_cells
from endoprint.encoder import backbone, checkpoints
from endoprint.encoder.minibatches import Layout, assemble, plan
from endoprint.encoder.network import hidden_states
from endoprint.encoder.recipe import device_at_hand
from endoprint.tokens import Tokens
from endoprint.vocabulary import Vocabulary

Array = np.ndarray[Any, np.dtype[Any]]
Mode = Literal["cell", "cls"]
Layer = Literal["second-to-last", "last"]
Progress = Callable[[int, int], None]  # (cells done, cells in all)

CELLS = 1024  # read, ranked and embedded at a time: memory does not grow with the file
MINIBATCH_TOKENS = 16_384  # most tokens at once: bounds memory, not answers
KEY = "X_geneformer"  # in obsm


class Embedder:
    """A backbone at rest, and how a cell's vector is read from it."""

    def __init__(
        self,
        folder: Path,
        vocabulary: Vocabulary,
        *,
        mode: Mode = "cell",
        layer: Layer = "second-to-last",
        minibatch_tokens: int = MINIBATCH_TOKENS,
    ) -> None:
        model = backbone.read(folder, dropout=0.0)
        self.origin = backbone.origin_of(folder)
        backbone.refuse_mismatch(self.origin, model, vocabulary)
        has_specials = vocabulary.cls_id is not None
        if mode == "cls" and not has_specials:
            raise Refusal(
                "a cls embedding is read at <cls>",
                f"vocabulary {vocabulary.name}, which has none",
                "use mode cell",
            )
        self._bert = model.bert
        n_read = int(model.config.num_hidden_layers) - (layer == "second-to-last")
        if n_read < 0:
            raise Refusal(
                "a second-to-last layer needs one layer", "a backbone of none", "use layer last"
            )
        self._bert.encoder.layer = self._bert.encoder.layer[:n_read]
        self._bert.eval().to(device_at_hand())
        self._layout = Layout(0, "mean" if mode == "cell" else "cls", has_specials)
        self._minibatch_tokens = minibatch_tokens
        self.vocabulary, self.mode, self.layer = vocabulary, mode, layer
        self.width = int(model.config.hidden_size)

    def of(self, found: Tokens) -> Array:
        """Return the vector of every cell in the order of the tokens, (n, D) float32.

        A cell without genes has NaN. No vector depends on the other cells.
        """
        self.vocabulary.require(found.vocabulary_sha256, "the tokens")
        vectors = np.full((len(found), self.width), np.nan, dtype=np.float32)
        lengths = found.lengths
        n_genes = lengths - 2 if self._layout.has_specials else lengths
        filled = np.flatnonzero(n_genes > 0)
        device = device_at_hand()
        with torch.inference_mode():
            for chosen in plan(lengths[filled], cells=256, tokens=self._minibatch_tokens):
                cells = filled[chosen]
                minibatch = assemble(found, cells, self._layout).to(device)
                # a cell is one row here, for its attention is not cut into blocks
                hidden_BTD = hidden_states(self._bert, minibatch).float()
                pooled_BD = torch.einsum("bt,btd->bd", minibatch.weights_RT, hidden_BTD)
                vectors[cells] = pooled_BD.cpu().numpy()
        return vectors

    def about(self) -> dict[str, str]:
        """Say what the vectors are made of, for whoever finds them."""
        return {
            "mode": self.mode,
            "layer": self.layer,
            "backbone": self.origin.label,
            "backbone_sha256": str(self.origin.sha256),
            "vocabulary": self.vocabulary.name,
            "vocabulary_sha256": self.vocabulary.sha256,
        }


def series_of(folder: Path) -> str | None:
    """Return which published vocabulary a backbone's shape speaks of ("v1", "v2"), or None."""
    try:
        shape = json.loads((folder / backbone.SHAPE).read_text())
        return checkpoints.series_of(int(shape["vocab_size"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # reading the backbone says what is wrong with it


@dataclass(frozen=True)
class EmbeddingFile:
    """What became of a file of cells."""

    path: str
    n_cells: int
    n_empty: int  # cells without a gene of the vocabulary: their vectors are NaN
    width: int
    about: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def embed_file(
    path: Path,
    out: Path,
    embedder: Embedder,
    *,
    counts: str | None = None,
    key: str = KEY,
    watch: Progress | None = None,
) -> EmbeddingFile:
    """Embed a file of cells, in its order, whole or not at all; the file itself is only read.

    `out` ending in .h5ad is a copy of the file with the vectors in `obsm[key]` and what they are
    made of in `uns[key]`; any other is parquet: `cell_id` string, `embedding` float32 list of
    the width. `counts`: where raw counts are (null for X, "raw", or a layer).
    """
    ids = pd.Index(sources.read_obs(path).index.astype(str))
    refuse_double_cells(ids)
    if not len(ids):
        raise Refusal("there are cells to embed", f"none in {path.name}", "check the file")
    if out.exists() and (not out.is_file() or out.samefile(path)):
        raise Refusal("embeddings are written to a file of their own", str(out), "name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    n_done = n_empty = 0
    try:
        hand = (
            _obsm(path, beside, key, len(ids), embedder)
            if out.suffix == ".h5ad"
            else _parquet(beside, embedder)
        )
        with (
            hand as put,
            # cells stored by gene are laid out by cell beside the output, not in memory
            tempfile.TemporaryDirectory(dir=out.parent, prefix=".embed.") as scratch,
            stored.opened(path, layer=counts, scratch=Path(scratch)) as found,
        ):
            for start in range(0, found.n_cells, CELLS):
                block = found.part(start, min(start + CELLS, found.n_cells))
                vectors = embedder.of(tokens.of(block, embedder.vocabulary))
                put(n_done, block.obs_names, vectors)
                n_done += len(vectors)
                n_empty += int(np.isnan(vectors[:, 0]).sum())
                if watch is not None:
                    watch(n_done, len(ids))
        os.replace(beside, out)
    except OSError as error:
        raise Refusal(
            "embeddings are written whole or not at all",
            str(error),
            "make room, or name another file",
        ) from None
    finally:
        beside.unlink(missing_ok=True)
    return EmbeddingFile(str(out), n_done, n_empty, embedder.width, embedder.about())


Put = Callable[[int, pd.Index, Array], None]  # (first row, cell ids, vectors)


@contextmanager
def _parquet(beside: Path, embedder: Embedder) -> Iterator[Put]:
    told = {"endoprint.embedding": json.dumps(embedder.about())}
    schema = pa.schema(
        [("cell_id", pa.string()), ("embedding", pa.list_(pa.float32(), embedder.width))],
        metadata=told,
    )
    with pq.ParquetWriter(beside, schema, compression="zstd", use_dictionary=False) as parquet:

        def put(first: int, cell_ids: pd.Index, vectors: Array) -> None:
            lists = pa.FixedSizeListArray.from_arrays(vectors.ravel(), embedder.width)
            parquet.write_table(
                pa.Table.from_arrays([pa.array(cell_ids, pa.string()), lists], schema=schema)
            )

        yield put


@contextmanager
def _obsm(path: Path, beside: Path, key: str, n_cells: int, embedder: Embedder) -> Iterator[Put]:
    """Give a hand that writes into `obsm` of a copy, rows at a time."""
    if path.is_dir() or not h5py.is_hdf5(path):
        raise _not_h5ad(path)
    shutil.copyfile(path, beside)
    beside.chmod(0o644)  # a copy of a read-only file is one's own
    with h5py.File(beside, "r+") as file:
        if not isinstance(file.get("obs"), h5py.Group):  # 10x, or before anndata 0.7
            raise _not_h5ad(path)
        for name in ("obsm", "uns"):
            if name not in file:
                write_elem(file, name, {})
            elif not isinstance(file[name], h5py.Group):
                raise _not_h5ad(path)
            if not key or "/" in key or key in file[name]:
                raise Refusal(
                    f"a key of {name} is free and has no slash",
                    f"{key!r} in {path.name}",
                    "name another --key",
                )
        made = file["obsm"].create_dataset(key, shape=(n_cells, embedder.width), dtype=np.float32)
        made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        write_elem(file["uns"], key, embedder.about())

        def put(first: int, cell_ids: pd.Index, vectors: Array) -> None:
            made[first : first + len(vectors)] = vectors

        yield put


def _not_h5ad(path: Path) -> Refusal:
    return Refusal(
        "embeddings go into a copy of an h5ad of anndata 0.7 or later",
        path.name,
        "name an OUT ending in .parquet, or convert the file",
    )
