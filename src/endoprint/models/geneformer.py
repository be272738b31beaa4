"""Geneformer: a transformer over a cell's genes, ranked by expression, fine-tuned on exposure.

The backbone is Geneformer's BERT (Theodoris 2023, Nature 618:616), read from a checkpoint folder
or drawn at random; which of the two, and whose weights, is in `provenance["backbone"]`. What is
read of a cell differs from upstream where measurements said so: all tokens, attending in blocks;
pooled by rank weight; a shallow path by which every gene votes (`has_votes`; switched off, it is
the backbone alone).

What to expect: a small backbone of a few thousand cells does not beat logistic regression where
responses are additive. With the votes it comes level, without them it stays clearly behind, and
pre-training on some thousand cells adds nothing (docs/performance.md). It says nothing about the
published checkpoints, trained on 30 to 104 million cells.

n cells, E exposures, D width of the backbone.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from transformers import BertConfig, BertForMaskedLM, BertModel

from endoprint import tokens
from endoprint.encoder import backbone
from endoprint.encoder.network import Network
from endoprint.encoder.recipe import Recipe
from endoprint.encoder.tuned import EncoderModel
from endoprint.vocabulary import Vocabulary

SCRATCH = "endoprint small backbone, random start, never pre-trained; not the published Geneformer"


class GeneformerConfig(Recipe):
    """The shared levers, and the shape of a backbone where none is given."""

    layers: int = 2  # of a backbone from scratch; one that is loaded keeps its own
    hidden: int = 64  # width, likewise
    heads: int = 2
    ffn: int = 128  # width inside each layer's feed-forward part


class Geneformer(EncoderModel):
    """Read a cell's genes in the order of their expression and weigh every exposure."""

    Config = GeneformerConfig
    reader = Network
    _network: Network
    name = "geneformer"
    takes_backbone = True

    def _choose_vocabulary(self, train: AnnData) -> Vocabulary:
        """Take the workspace's, else the backbone's own, else fit one on the training cells."""
        if self.resources.vocabulary is not None:
            return Vocabulary.read(self.resources.vocabulary)
        folder = self.resources.backbone
        if folder is not None and (folder / backbone.VOCABULARY).is_file():
            return Vocabulary.read(folder / backbone.VOCABULARY)
        return Vocabulary.fit(train)

    def _begin(self, train: AnnData) -> tuple[BertModel, dict[str, Any]]:
        self._take(self._choose_vocabulary(train))
        model, origin = self._drawn_or_read()
        return model.bert, {
            "backbone": origin.to_json(),
            "vocabulary": {
                "name": self._vocabulary.name,
                "sha256": self._vocabulary.sha256,
                "units": self._vocabulary.provenance.get("units", []),
            },
        }

    def _take(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.has_specials = vocabulary.cls_id is not None
        self.n_more = 2 if self.has_specials else 0

    def _drawn_or_read(self) -> tuple[BertForMaskedLM, backbone.Origin]:
        config, folder = self.config, self.resources.backbone
        if folder is not None:
            model = backbone.read(
                folder, dropout=config.dropout, attention_dropout=config.attention_dropout
            )
            origin = backbone.origin_of(folder)
            backbone.refuse_mismatch(origin, model, self._vocabulary)
            return model, origin
        shape = backbone.shape_of(
            layers=config.layers,
            hidden=config.hidden,
            heads=config.heads,
            ffn=config.ffn,
            vocabulary_size=len(self._vocabulary),
            max_length=self._vocabulary.max_length,
        )
        model = backbone.build(
            shape,
            seed=self.seed,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )
        backbone.start_as_identity(model)
        return model, backbone.Origin(
            SCRATCH, "scratch", vocabulary_sha256=self._vocabulary.sha256
        )

    def _sentences(self, cells: AnnData) -> tokens.Tokens:
        if not self._vocabulary.identify(list(cells.var_names)).n_known:
            # none of the genes the model knows was measured: every cell is an empty sentence
            cells = AnnData(
                X=sparse.csr_matrix(np.zeros((cells.n_obs, 1), dtype=np.float32)),
                obs=pd.DataFrame(index=cells.obs_names),
                var=pd.DataFrame(index=[self._vocabulary.genes[0]]),
            )
        return tokens.of(cells, self._vocabulary, self.resources.tokens)

    # -- disk -----------------------------------------------------------------------------------
    def _values(self) -> dict[str, Any]:
        vocabulary = self._vocabulary
        return {
            "shape": self._network.shape(),
            "vocabulary": asdict(vocabulary)
            | {"medians": vocabulary.medians.tolist(), "sha256": vocabulary.sha256},
        }

    def _again(self, values: dict[str, Any]) -> BertModel:
        told = dict(values["vocabulary"])
        sha256 = told.pop("sha256")
        vocabulary = Vocabulary(
            name=told["name"],
            genes=tuple(told["genes"]),
            medians=np.array(told["medians"], dtype=np.float64),
            specials=tuple(told["specials"]),
            max_length=told["max_length"],
            aliases=told["aliases"],
            provenance=told["provenance"],
        )
        vocabulary.require(sha256, "the saved model")
        self._take(vocabulary)
        shape = BertConfig.from_dict(values["shape"])
        config = self.config
        return backbone.build(
            shape, seed=0, dropout=config.dropout, attention_dropout=config.attention_dropout
        ).bert
