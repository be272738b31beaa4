"""Geneformer's published checkpoints by name: their shapes, sizes, sha256, and how to fetch them.

Weights only, as safetensors, from the pinned revision of the hub's repository. Beside them are
put a `config.json` written from the published shape (so that nothing unpinned is read), the
vocabulary their tokens are told in, and a label that says what they are.

The weights were never at hand where this was built: names and shapes of the tensors were checked
against the published parameter counts and, to the byte, file sizes, fetching against a server on
the same machine, and loading against upstream's outputs on small random checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError

from filelock import FileLock
from transformers import BertConfig

from endoprint.config import Refusal
from endoprint.dictionaries import REPOSITORY, REVISION, SERIES, address, asked
from endoprint.encoder import backbone
from endoprint.vocabulary import Vocabulary

Progress = Callable[[int, int], None]  # (bytes here, bytes in all)

CHUNK = 2**20  # bytes read and written at a time
SHA256 = {name.removeprefix("Geneformer "): sha for sha, name in backbone.PUBLISHED.items()}
TOKENS = {"v1": 25_426, "v2": 20_275}  # of each published vocabulary, special tokens included


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint: its shape, and which bytes it is.

    `folder` inside the hub's repository at the pinned revision; None where it is known by shape
    only, or kept elsewhere, and so can be loaded from a folder but not fetched.
    """

    series: Literal["v1", "v2"]
    layers: int
    hidden: int  # width
    heads: int
    ffn: int  # width inside each layer's feed-forward part
    dropout: float  # of hidden states and of attention alike
    n_bytes: int  # of the weights as safetensors
    sha256: str
    folder: str | None
    n_tokens: int  # of the vocabulary, special ones included

    def shape(self) -> BertConfig:
        """Return the configuration of the network."""
        made = backbone.shape_of(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            ffn=self.ffn,
            vocabulary_size=self.n_tokens,
            max_length=SERIES[self.series].max_length,
        )
        made.hidden_dropout_prob = made.attention_probs_dropout_prob = self.dropout
        return made


def _v1(name: str, sizes: tuple[int, int, int, int], n_bytes: int, folder: str) -> Checkpoint:
    return Checkpoint("v1", *sizes, 0.02, n_bytes, SHA256[name], folder, TOKENS["v1"])


def _v2(
    name: str, sizes: tuple[int, int, int, int], dropout: float, n_bytes: int, folder: str | None
) -> Checkpoint:
    return Checkpoint("v2", *sizes, dropout, n_bytes, SHA256[name], folder, TOKENS["v2"])


# (layers, width, heads, feed-forward width) and bytes as published; folders as third parties that
# pin the same revision name them. The two oldest shapes, gf-6L-30M (V1-10M under its first name)
# and gf-12L-30M (published as a .bin only), have no row of their own.
CHECKPOINTS: dict[str, Checkpoint] = {
    "V1-10M": _v1("V1-10M", (6, 256, 4, 512), 41_183_536, "Geneformer-V1-10M"),
    "V2-104M": _v2("V2-104M", (12, 768, 12, 3072), 0.1, 417_571_156, "Geneformer-V2-104M"),
    "V2-104M_CLcancer": _v2(
        "V2-104M_CLcancer", (12, 768, 12, 3072), 0.1, 417_571_156, "Geneformer-V2-104M_CLcancer"
    ),
    "V2-316M": _v2("V2-316M", (18, 1152, 18, 4608), 0.1, 1_265_455_076, "Geneformer-V2-316M"),
    # no longer at the pinned revision: from a folder only
    "gf-12L-95M": _v2("gf-12L-95M", (12, 512, 8, 1024), 0.02, 152_012_980, None),
    "gf-12L-95M_CLcancer": _v2("gf-12L-95M_CLcancer", (12, 512, 8, 1024), 0.02, 152_012_980, None),
    "gf-20L-95M": _v2("gf-20L-95M", (20, 896, 14, 1792), 0.02, 605_292_732, None),
}


def published(name: str) -> Checkpoint:
    """Return a published checkpoint that can be fetched by name."""
    found = CHECKPOINTS.get(name)
    fetched = [each for each, row in CHECKPOINTS.items() if row.folder is not None]
    if found is None:
        raise Refusal(
            "a checkpoint is a folder with config.json and model.safetensors, or a published name",
            name,
            f"published are {', '.join(fetched)}",
        )
    if found.folder is None:
        raise Refusal(
            "a checkpoint fetched by name is at the pinned revision of the hub",
            f"{name}, which is not",
            f"give a folder that holds it, or name one of {', '.join(fetched)}",
        )
    return found


def series_of(n_tokens: int) -> str | None:
    """Return which published vocabulary has so many tokens, special ones included, or None."""
    return next((name for name, n in TOKENS.items() if n == n_tokens), None)


def fetch(
    name: str,
    into: Path,
    vocabulary: Vocabulary,
    *,
    base: str | None = None,
    watch: Progress | None = None,
) -> Path:
    """Return the folder `into/name` of a published checkpoint, downloading what is not there.

    `vocabulary`: the published one of its series, kept beside the weights. `base`: the hub's
    address; else the environment variable HF_ENDPOINT, else the public hub. A download that broke
    off goes on where it stopped; weights of another size or sha256 are refused and not kept.
    """
    row = published(name)
    shape = row.shape()
    if (len(vocabulary), vocabulary.max_length) != (row.n_tokens, shape.max_position_embeddings):
        raise Refusal(
            f"checkpoint {name} goes with vocabulary {row.series}, of {row.n_tokens:,} tokens and "
            f"{shape.max_position_embeddings:,} ranks",
            f"{vocabulary.name}, of {len(vocabulary):,} and {vocabulary.max_length:,}",
            f"use tokens.vocabulary: {row.series}",
        )
    folder = Path(into) / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # two commands that want the same weights fetch them once
        _fetch_weights(name, row, folder / backbone.WEIGHTS, address(base), watch)
        _describe(name, row, shape, vocabulary, folder)
    return folder


def _describe(
    name: str, row: Checkpoint, shape: BertConfig, vocabulary: Vocabulary, folder: Path
) -> None:
    """Write what goes beside the weights, anew each time: none of it is ever a download."""
    label = {
        "label": f"Geneformer {name}, published weights",
        "sha256": row.sha256,
        "vocabulary_sha256": vocabulary.sha256,
        "units": [],  # trained on cells of public atlases; which, upstream does not list by unit
        "source": f"{REPOSITORY}/{row.folder} at {REVISION}",
    }
    said = shape.to_dict() | {"architectures": ["BertForMaskedLM"]}
    for file, values in ((backbone.SHAPE, said), (backbone.LABEL, label)):
        text = json.dumps(values, indent=1, sort_keys=True) + "\n"
        backbone.replace_text(folder / file, text)
    vocabulary.write(folder / backbone.VOCABULARY)


# -- the weights --------------------------------------------------------------------------------
def _fetch_weights(
    name: str, row: Checkpoint, target: Path, hub: str, watch: Progress | None
) -> None:
    if _is(target, row):
        return
    part = target.with_name(f".{target.name}.{row.sha256[:12]}.part")
    if not (part.is_file() and part.stat().st_size == row.n_bytes):
        _download(name, row, part, f"{hub}/{row.folder}/{target.name}", watch)
    if not _is(part, row):
        found = backbone.digest(part)
        part.unlink()
        raise Refusal(
            f"the weights of {name} must have the published sha256 {row.sha256[:12]}",
            f"{found[:12]} from {hub}",
            "fetch them again, from another hub if it stays so",
        )
    os.replace(part, target)


def _is(path: Path, row: Checkpoint) -> bool:
    """Say whether a file is the published one; its size is asked first, hashing takes seconds."""
    return (
        path.is_file()
        and path.stat().st_size == row.n_bytes
        and backbone.digest(path) == row.sha256
    )


def _download(name: str, row: Checkpoint, part: Path, url: str, watch: Progress | None) -> None:
    """Bring `part` to the published size, from where it stands; what is missing stays missing."""
    here = part.stat().st_size if part.is_file() else 0
    here = here if here < row.n_bytes else 0
    room = shutil.disk_usage(part.parent).free
    if room < row.n_bytes - here:
        raise Refusal(
            f"{name} needs {row.n_bytes / 1e6:,.0f} MB", f"{room / 1e6:,.0f} MB free", "make room"
        )
    try:
        with asked(url, f"checkpoint {name}", "give a folder that holds it", start=here) as answer:
            is_rest = answer.status == 206 and str(
                answer.headers.get("Content-Range", "")
            ).startswith(f"bytes {here}-")
            here = here if is_rest else 0  # a hub that can not go on sends it from the start
            length = answer.headers.get("Content-Length")
            if length is not None and int(length) != row.n_bytes - here:
                raise _wrong_size(name, row, here + int(length), url)
            with part.open("ab" if here else "wb") as stream:
                while chunk := answer.read(CHUNK):
                    here += len(chunk)
                    if here > row.n_bytes:
                        raise _wrong_size(name, row, here, url)
                    stream.write(chunk)
                    if watch is not None:
                        watch(here, row.n_bytes)
    except Refusal as refusal:
        cause = refusal.__cause__
        is_lost = cause is None or (isinstance(cause, HTTPError) and cause.code == 416)
        if is_lost:  # what is here can never become the published file
            part.unlink(missing_ok=True)
        raise
    if here < row.n_bytes:
        raise Refusal(
            f"the weights of {name} come whole",
            f"{here:,} of {row.n_bytes:,} bytes before the hub broke off",
            "run it again: it goes on from there",
        )


def _wrong_size(name: str, row: Checkpoint, n_bytes: int, url: str) -> Refusal:
    return Refusal(
        f"the weights of {name} have the published {row.n_bytes:,} bytes",
        f"{n_bytes:,} or more at {url}",
        "name another hub in HF_ENDPOINT, or give a folder that holds them",
    )
