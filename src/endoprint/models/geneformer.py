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
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from transformers import BertConfig, BertForMaskedLM

from endoprint import tokens
from endoprint.config import Refusal
from endoprint.encoder import backbone
from endoprint.encoder.loop import Lesson, Loop
from endoprint.encoder.minibatches import Layout
from endoprint.encoder.network import Answers, Network, answer
from endoprint.encoder.recipe import Recipe, device_at_hand
from endoprint.model import ExposureModel, State, Watch
from endoprint.vocabulary import Vocabulary

Array = np.ndarray[Any, np.dtype[Any]]

SCRATCH = "endoprint small backbone, random start, never pre-trained; not the published Geneformer"


VOTES = "each gene also votes directly, which is no part of Geneformer"


class GeneformerConfig(Recipe):
    """The shared levers, and the shape of a backbone where none is given."""

    layers: int = 2  # of a backbone from scratch; one that is loaded keeps its own
    hidden: int = 64  # width, likewise
    heads: int = 2
    ffn: int = 128  # width inside each layer's feed-forward part


class Geneformer(ExposureModel):
    """Read a cell's genes in the order of their expression and weigh every exposure."""

    Config = GeneformerConfig
    name = "geneformer"
    takes_backbone = True

    def _learn(self, train: AnnData, valid: AnnData, watch: Watch, work: Path | None) -> None:
        if self.config.pooling == "cls" and self.config.block:
            raise Refusal(
                "first-position pooling needs the whole cell in one row",
                f"block {self.config.block}",
                "set block to 0, or pool by rank or mean",
            )
        known = valid.obs["exposure"].astype(str).isin(self.exposures).to_numpy()
        self._vocabulary = self._choose_vocabulary(train)
        model, origin = self._begin()
        learned, checked = self._lesson(train), self._lesson(valid[known])
        self._layout = self._layout_of()
        n_specials = 2 if self._layout.has_specials else 0
        self._network = self._network_of(
            model, genes_per_cell=max(float(learned.tokens.lengths.mean()) - n_specials, 1.0)
        )
        loop = Loop(
            self._network,
            learned,
            checked,
            self.config,
            self._layout,
            seed=self.seed,
            work=work,
        )
        progress = loop.run(watch)
        self.provenance |= {
            "backbone": origin.to_json(),
            "vocabulary": {
                "name": self._vocabulary.name,
                "sha256": self._vocabulary.sha256,
                "units": self._vocabulary.provenance.get("units", []),
            },
            "epochs": progress.epoch,
            "best_epoch": progress.best_epoch,
        }
        if self.config.has_votes:
            self.provenance["note"] = VOTES

    def _choose_vocabulary(self, train: AnnData) -> Vocabulary:
        """Take the workspace's, else the backbone's own, else fit one on the training cells."""
        if self.resources.vocabulary is not None:
            return Vocabulary.read(self.resources.vocabulary)
        folder = self.resources.backbone
        if folder is not None and (folder / backbone.VOCABULARY).is_file():
            return Vocabulary.read(folder / backbone.VOCABULARY)
        return Vocabulary.fit(train)

    def _begin(self) -> tuple[BertForMaskedLM, backbone.Origin]:
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

    def _lesson(self, cells: AnnData) -> Lesson:
        truth = pd.Index(self.exposures).get_indexer(pd.Index(cells.obs["exposure"].astype(str)))
        return Lesson(
            tokens.of(cells, self._vocabulary, self.resources.tokens), truth.astype(np.int64)
        )

    def _layout_of(self) -> Layout:
        layout: Layout = self.config.layout(has_specials=self._vocabulary.cls_id is not None)
        return layout

    def _network_of(self, model: BertForMaskedLM, *, genes_per_cell: float) -> Network:
        config, device = self.config, device_at_hand()
        with torch.random.fork_rng(devices=[]):  # layers draw weights that are then zeroed
            network = Network(
                model.bert,
                len(self.exposures),
                has_votes=config.has_votes,
                vector_dropout=config.vector_dropout,
                genes_per_cell=genes_per_cell,
                uses_bf16=config.precision == "bf16"
                or (config.precision == "auto" and device.type == "cuda"),
            )
        return network.to(device)

    # -- answers --------------------------------------------------------------------------------
    def _answer(self, cells: AnnData) -> Answers:
        if not self._vocabulary.identify(list(cells.var_names)).n_known:
            # none of the genes the model knows was measured: every cell is an empty sentence
            cells = AnnData(
                X=sparse.csr_matrix(np.zeros((cells.n_obs, 1), dtype=np.float32)),
                obs=pd.DataFrame(index=cells.obs_names),
                var=pd.DataFrame(index=[self._vocabulary.genes[0]]),
            )
        found = tokens.of(cells, self._vocabulary, self.resources.tokens)
        return answer(
            self._network, found, self._layout, minibatch_tokens=self.config.minibatch_tokens
        )

    def evidence(self, cells: AnnData) -> Array:
        return self._answer(cells).logits_BE.astype(np.float64)

    def embed(self, cells: AnnData) -> Array:
        """Return the pooled, standardised hidden states, (n, D)."""
        return self._answer(cells).vectors_BD

    # -- disk -----------------------------------------------------------------------------------
    def _state(self) -> State:
        vocabulary = self._vocabulary
        weights = self._network.state_dict()
        return State(
            {
                "shape": self._network.bert.config.to_dict(),
                "vocabulary": asdict(vocabulary)
                | {"medians": vocabulary.medians.tolist(), "sha256": vocabulary.sha256},
            },
            {key: value.detach().cpu().numpy() for key, value in weights.items()},
        )

    def _restore(self, state: State) -> None:
        values = dict(state.values["vocabulary"])
        sha256 = values.pop("sha256")
        self._vocabulary = Vocabulary(
            name=values["name"],
            genes=tuple(values["genes"]),
            medians=np.array(values["medians"], dtype=np.float64),
            specials=tuple(values["specials"]),
            max_length=values["max_length"],
            aliases=values["aliases"],
            provenance=values["provenance"],
        )
        self._vocabulary.require(sha256, "the saved model")
        self._layout = self._layout_of()
        model = backbone.build(
            BertConfig.from_dict(state.values["shape"]),
            seed=0,
            dropout=self.config.dropout,
            attention_dropout=self.config.attention_dropout,
        )
        self._network = self._network_of(model, genes_per_cell=1.0)
        self._network.load_state_dict(
            {key: torch.from_numpy(array) for key, array in state.arrays.items()}
        )
        self._network.eval()
