"""The genes a rank-value tokeniser knows, and how strongly each is usually expressed.

A vocabulary is one of the two published by Geneformer (Theodoris 2023, Nature 618:616; V2: Chen
2024, bioRxiv 2024.08.16.608180), read from its official dictionaries, or fitted on one's own
cells. Whatever decides a token is in its sha256, so that tokens, backbone and model can be told
apart when they do not belong together.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from anndata import AnnData
from scipy import sparse

from endoprint.config import Refusal
from endoprint.dictionaries import REPOSITORY, SERIES, fetch, find, put, read_official

__all__ = ["Identifiers", "Vocabulary", "fetch", "strip_version"]

Array = np.ndarray[Any, np.dtype[Any]]

TARGET_COUNTS = 10_000  # counts per cell that medians are normalised to (Theodoris 2023)
TINY_MEDIAN = 0.05  # V2 holds 106 such genes, 10 at 7e-7: one stray count then ranks first
FORMAT = "endoprint-vocabulary-1"
VERSION_SUFFIX = re.compile(r"^(ENS[A-Z]*\d+)\.\d+(?:_PAR_Y)?$")  # ENSG00000141510.17, GENCODE


@dataclass(frozen=True)
class Identifiers:
    """What became of the columns of a matrix: the token of each, and what was done to get it."""

    tokens: Array  # int32 (n_columns,), -1 where the vocabulary does not know the identifier
    n_known: int  # columns with a token
    n_case_folded: int  # known only in upper case: mouse-style symbols, counted as the human gene
    n_summed: int  # columns that share their token with an earlier one, and are added to it


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The genes that can be tokens, their typical expression, and the special tokens.

    `genes` (G,) in token order: gene i has token id `len(specials) + i`; `medians` float64 (G,),
    non-zero median of counts per 10,000; `aliases`: upper-case identifier -> gene; `provenance`
    says what a fitted one was fitted on and is not part of the sha256.
    """

    name: str
    genes: tuple[str, ...]
    medians: Array
    specials: tuple[str, ...]
    max_length: int  # of a cell's tokens, specials included
    aliases: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    # -- making one -----------------------------------------------------------------------------
    @classmethod
    def load(cls, name_or_folder: str | Path, dictionaries: str | Path | None = None) -> Self:
        """Take a published vocabulary ("v1", "v2"), or whatever a folder or JSON file holds.

        `dictionaries`: the folder of the official dictionaries, JSON or the published pickles,
        for a published name (`fetch` makes such a folder). Every file's sha256 is checked.
        """
        name = str(name_or_folder).lower()
        if name in SERIES:
            if dictionaries is None:
                raise Refusal(
                    f"vocabulary {name} is read from Geneformer's official dictionaries",
                    "no folder of dictionaries",
                    "name the folder that holds them, or fetch them",
                )
            return cls._published(name, Path(dictionaries))
        path = Path(name_or_folder)
        if dictionaries is not None:
            raise Refusal(
                "a folder of dictionaries goes with vocabulary v1 or v2",
                f"it goes with {name_or_folder}",
                "name v1 or v2, or leave the folder of dictionaries out",
            )
        if path.is_file():
            return cls.read(path)
        if (path / "vocabulary.json").is_file():
            return cls.read(path / "vocabulary.json")
        held = [name for name, series in SERIES.items() if find(path, series, "tokens")]
        if len(held) != 1:
            raise Refusal(
                "a vocabulary is v1, v2, a vocabulary.json, or a folder of one's dictionaries",
                f"{path} with {' and '.join(held) or 'neither'}",
                f"name {' or '.join(SERIES)} and give the folder as the dictionaries",
            )
        return cls._published(held[0], path)

    @classmethod
    def _published(cls, name: str, folder: Path) -> Self:
        series = SERIES[name]
        tokens, medians, aliases = (
            read_official(folder, series, role) for role in ("tokens", "medians", "aliases")
        )
        # ids run on from the specials in the dictionary's own order: checked, for all rests on it
        genes = tuple(tokens)[len(series.specials) :]
        if tuple(tokens) != series.specials + genes or list(tokens.values()) != [
            *range(len(tokens))
        ]:
            raise Refusal(
                "token ids must count up from <pad>", name, "fetch the dictionaries again"
            )
        known = set(genes)
        return cls(
            name=name,
            genes=genes,
            medians=np.array([medians[gene] for gene in genes], dtype=np.float64),
            specials=series.specials,
            max_length=series.max_length,
            aliases={
                alias.upper(): gene
                for alias, gene in aliases.items()
                if gene in known and alias != gene
            },
            provenance={"source": REPOSITORY, "dictionaries": series.tag},
        )

    @classmethod
    def fit(cls, cells: AnnData, *, max_length: int = 2048) -> Self:
        """Learn the vocabulary of one's own cells: every gene seen, and its non-zero median.

        `cells`: raw counts, unique gene ids; the library size is `obs["n_counts"]`, else the sum
        over all genes. The median is exact, over the cells that express the gene, of counts per
        10,000 (Theodoris 2023, Methods; there by t-digest). Special tokens are V2's.
        """
        specials = SERIES["v2"].specials
        if max_length < len(specials):
            raise Refusal("max_length has room for tokens", str(max_length), "set it to 2048")
        genes = [strip_version(gene) for gene in cells.var_names]
        if len(set(genes)) != len(genes):
            raise Refusal("gene ids must be unique", "some repeat", "curate the cells first")
        counts = sparse.csr_matrix(cells.X, dtype=np.float64, copy=True)
        counts.eliminate_zeros()
        library = (
            np.asarray(cells.obs["n_counts"], dtype=np.float64)
            if "n_counts" in cells.obs
            else np.asarray(counts.sum(axis=1)).ravel()
        )
        per_cell = np.divide(TARGET_COUNTS, library, out=np.zeros(len(library)), where=library > 0)
        counts.data *= np.repeat(per_cell, np.diff(counts.indptr))
        by_gene = counts.tocsc()
        ends = by_gene.indptr
        medians = {
            gene: float(np.median(by_gene.data[ends[i] : ends[i + 1]]))
            for i, gene in enumerate(genes)
            if ends[i + 1] > ends[i]
        }
        if not medians or not all(0 < median < np.inf for median in medians.values()):
            raise Refusal(
                "a vocabulary is fitted on raw counts, at least one above zero",
                f"{cells.n_obs} cells without any" if not medians else "a median out of range",
                "give the raw counts",
            )
        known = sorted(medians)
        units = sorted(set(cells.obs["unit"].astype(str))) if "unit" in cells.obs else []
        return cls(
            name="fitted",
            genes=tuple(known),
            medians=np.array([medians[gene] for gene in known]),
            specials=specials,
            max_length=max_length,
            provenance={"n_cells": cells.n_obs, "units": units},
        )

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read one from the JSON that `write` made; a damaged file is refused by its sha256."""
        try:
            values = json.loads(Path(path).read_text())
            found = cls(
                name=str(values["name"]),
                genes=tuple(values["medians"]),
                medians=np.array(list(values["medians"].values()), dtype=np.float64),
                specials=tuple(values["specials"]),
                max_length=int(values["max_length"]),
                aliases=dict(values["aliases"]),
                provenance=dict(values["provenance"]),
            )
            is_sound = values["format"] == FORMAT and values["sha256"] == found.sha256
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refusal(
                "a vocabulary is a JSON file written by endoprint",
                f"{path}: {type(error).__name__} {error}",
                "write or fit it again",
            ) from None
        if not is_sound:
            raise Refusal(
                "a vocabulary's sha256 must be the one it was written with",
                f"another in {path}",
                "write or fit it again",
            )
        return found

    def write(self, path: str | Path) -> None:
        """Write it as one JSON file, whole or not at all; equal ones give equal bytes."""
        values = {
            "format": FORMAT,
            "name": self.name,
            "sha256": self.sha256,
            "max_length": self.max_length,
            "specials": list(self.specials),
            "provenance": self.provenance,
            "medians": dict(zip(self.genes, self.medians.tolist())),
            "aliases": self.aliases,
        }
        put(Path(path), json.dumps(values).encode())

    # -- what it says ---------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self.specials) + len(self.genes)

    @cached_property
    def sha256(self) -> str:
        """Over all that decides a token: genes, medians, specials, length and aliases."""
        digest = hashlib.sha256(
            f"{len(self.specials)} {len(self.genes)} {self.max_length}\n".encode()
        )
        aliases = map("\t".join, sorted(self.aliases.items()))
        for names in (self.specials, self.genes, aliases):
            digest.update("\n".join(names).encode() + b"\n")
        digest.update(self.medians.astype("<f8").tobytes())
        return digest.hexdigest()

    def _special(self, token: str) -> int | None:
        return self.specials.index(token) if token in self.specials else None

    @property
    def pad_id(self) -> int:
        """Fills minibatches; never in a cell's tokens."""
        return self.specials.index("<pad>")

    @property
    def mask_id(self) -> int:
        """Hides a gene in masked learning; never in a cell's tokens."""
        return self.specials.index("<mask>")

    @property
    def cls_id(self) -> int | None:
        """Opens every cell, where the vocabulary has it (V2, fitted)."""
        return self._special("<cls>")

    @property
    def eos_id(self) -> int | None:
        """Closes every cell, where the vocabulary has it (V2, fitted)."""
        return self._special("<eos>")

    @cached_property
    def _token_of(self) -> dict[str, int]:
        return {gene: i for i, gene in enumerate(self.genes, start=len(self.specials))}

    def identify(self, identifiers: Sequence[str]) -> Identifiers:
        """Find the token of each identifier: an Ensembl id of any version, or a known alias.

        As upstream, an identifier is looked up in upper case. Unlike upstream, whose test for
        duplicates minds the case and so leaves `Eya4` and `EYA4` two columns, and which adds
        nothing where one identifier is given twice, columns of one gene are always summed.
        """
        tokens = np.full(len(identifiers), -1, dtype=np.int32)
        n_case_folded = 0
        for i, identifier in enumerate(map(strip_version, identifiers)):
            token = self._token_of.get(identifier)
            if token is None and self.aliases:
                upper = identifier.upper()
                token = self._token_of.get(self.aliases.get(upper, upper))
                n_case_folded += token is not None and upper != identifier
            if token is not None:
                tokens[i] = token
        known = tokens[tokens >= 0]
        return Identifiers(
            tokens, len(known), int(n_case_folded), len(known) - len(np.unique(known))
        )

    def require(self, sha256: str, owner: str) -> None:
        """Refuse if `owner` (a backbone, a model, tokens) was made with another vocabulary."""
        if sha256 != self.sha256:
            raise Refusal(
                f"the vocabulary of {owner} must be the one in use",
                f"sha256 {sha256[:12] or 'none'} against {self.sha256[:12]} ({self.name})",
                f"use the vocabulary {owner} was made with, or make it again with this one",
            )


def strip_version(identifier: str) -> str:
    """Return an Ensembl id without its version (`ENSG00000141510.17`); a symbol as it is."""
    found = VERSION_SUFFIX.match(identifier)
    return found.group(1) if found else identifier
