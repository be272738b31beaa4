"""A model that fine-tunes an encoder: everything but which encoder, and how it reads a cell.

n cells, E exposures, D width of the encoder.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import nn

from endoprint.config import Refusal
from endoprint.encoder.activations import Activations, Precision
from endoprint.encoder.frozen import states_of, vectors_of
from endoprint.encoder.head import Vectors, fit_head
from endoprint.encoder.loop import Lesson, Loop
from endoprint.encoder.lora import adapt, merge
from endoprint.encoder.minibatches import Layout, Sentences
from endoprint.encoder.network import Answers, Reader, answer
from endoprint.encoder.recipe import Recipe, device_at_hand
from endoprint.encoder.structure import composition_of
from endoprint.model import ExposureModel, State, Watch

Array = np.ndarray[Any, np.dtype[Any]]


class EncoderModel(ExposureModel):
    """Fine-tune an encoder on exposure and answer with it.

    A kind of encoder writes `_begin`, `_sentences`, `_values` and `_again`, and names its network.
    `Config` is a `Recipe`.
    """

    Config = Recipe
    reader: ClassVar[type[Reader]]
    _network: Reader
    has_specials: bool = False  # tokens begin with `<cls>` and end with `<eos>`
    n_more: int = 0  # tokens of a cell that are no genes

    # -- what each encoder writes ---------------------------------------------------------------
    @abstractmethod
    def _begin(self, train: AnnData) -> tuple[nn.Module, dict[str, Any]]:
        """Return the encoder before fine-tuning, and what provenance says of it.

        Sets whatever `_sentences` needs; of cells, only training cells may be looked at.
        """

    @abstractmethod
    def _sentences(self, cells: AnnData) -> Sentences:
        """Return the tokens of cells, in their order."""

    @abstractmethod
    def _values(self) -> dict[str, Any]:
        """Return what `_again` needs, as plain values."""

    @abstractmethod
    def _again(self, values: dict[str, Any]) -> nn.Module:
        """Take back what `_values` gave; return an encoder of that shape, whatever its weights."""

    # -- fitting --------------------------------------------------------------------------------
    def _learn(self, train: AnnData, valid: AnnData, watch: Watch, work: Path | None) -> None:
        self.config.refuse_contradictions()
        known = valid.obs["exposure"].astype(str).isin(self.exposures).to_numpy()
        encoder, about = self._begin(train)
        learned, checked = self._lesson(train), self._lesson(valid[known])
        genes_per_cell = max(float(np.diff(learned.tokens.offsets).mean()) - self.n_more, 1.0)
        self._network = self._network_of(encoder, genes_per_cell=genes_per_cell)
        if self.config.head_only:
            said = self._learn_head(learned, checked, watch)
        else:
            said = self._learn_all(learned, checked, watch, work)
        self.provenance |= about | said
        if self.config.has_votes:
            self.provenance["note"] = (
                "each gene also votes directly, which is no part of the published model"
            )

    def _learn_all(
        self, learned: Lesson, checked: Lesson, watch: Watch, work: Path | None
    ) -> dict[str, Any]:
        config = self.config
        self._network.freeze(config.frozen_layers)
        if config.lora_rank:
            adapt(
                self._network,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                matrices=config.lora_matrices,
                seed=self.seed,
            )
        self._network.recomputes = config.gradient_checkpointing
        if config.grow_after and not (self._network.stages()[1] and self._network.is_identity()):
            raise Refusal(
                "layers grow that begin as the identity",
                f"grow_after {config.grow_after} and layers that were trained before, or none",
                "set grow_after to 0",
            )
        store = self._store(config.cache_precision)
        if config.frozen_layers and store is not None:
            tokens = config.minibatch_tokens
            learned, checked = (
                replace(
                    lesson,
                    put=states_of(
                        self._network, lesson.tokens, self._layout, store, minibatch_tokens=tokens
                    ).put,
                )
                for lesson in (learned, checked)
            )
        loop = Loop(
            self._network,
            learned,
            checked,
            self.config,
            self._layout,
            seed=self.seed,
            work=work,
            machine=self.resources.machine,
        )
        progress = loop.run(watch)
        merge(self._network)
        return {
            "epochs": progress.epoch,
            "best_epoch": progress.best_epoch,
            "steps_in": loop.way,  # what the machine chose, where the recipe left it open
        }

    def _learn_head(self, learned: Lesson, checked: Lesson, watch: Watch) -> dict[str, Any]:
        self._network.freeze(len(self._network.stages()[1]))
        self._network.settle()
        store, tokens = self._store("fp32"), self.config.minibatch_tokens
        train, valid = (
            Vectors(
                vectors_of(
                    self._network, lesson.tokens, self._layout, store, minibatch_tokens=tokens
                ),
                lesson.truth,
            )
            for lesson in (learned, checked)
        )
        return fit_head(self._network, train, valid, penalty=self.config.head_penalty, watch=watch)

    def _store(self, precision: Precision) -> Activations | None:
        """Return where what frozen layers say is kept; None where it may not be."""
        gib, folder = self.config.cache_gib, self.resources.activations
        return Activations(folder, gib=gib, precision=precision) if folder and gib else None

    def _lesson(self, cells: AnnData) -> Lesson:
        truth = pd.Index(self.exposures).get_indexer(pd.Index(cells.obs["exposure"].astype(str)))
        return Lesson(self._sentences(cells), truth.astype(np.int64))

    @property
    def _layout(self) -> Layout:
        layout: Layout = self.config.layout(has_specials=self.has_specials)
        return layout

    def _network_of(self, encoder: nn.Module, *, genes_per_cell: float) -> Reader:
        config, device = self.config, device_at_hand()
        with torch.random.fork_rng(devices=[]):  # layers draw weights that are then zeroed
            network = self.reader(
                encoder,
                len(self.exposures),
                has_votes=config.has_votes,
                vector_dropout=config.vector_dropout,
                genes_per_cell=genes_per_cell,
                composition_EP=composition_of(self.exposures)[1]
                if config.head == "structured"
                else None,
                uses_bf16=config.precision == "bf16"
                or (config.precision == "auto" and device.type == "cuda"),
            )
        return network.to(device)

    # -- answers --------------------------------------------------------------------------------
    def _answer(self, cells: AnnData) -> Answers:
        return answer(
            self._network,
            self._sentences(cells),
            self._layout,
            minibatch_tokens=self.config.minibatch_tokens,
        )

    def evidence(self, cells: AnnData) -> Array:
        return self._answer(cells).logits_BE.astype(np.float64)

    def embed(self, cells: AnnData) -> Array:
        """Return the pooled, standardised hidden states, (n, D)."""
        return self._answer(cells).vectors_BD

    # -- disk -----------------------------------------------------------------------------------
    def _state(self) -> State:
        weights = self._network.state_dict()
        return State(
            self._values(), {key: value.detach().cpu().numpy() for key, value in weights.items()}
        )

    def _restore(self, state: State) -> None:
        encoder = self._again(state.values)
        self._network = self._network_of(encoder, genes_per_cell=1.0)
        self._network.load_state_dict(
            {key: torch.from_numpy(array) for key, array in state.arrays.items()}
        )
        self._network.settle()
        self._network.eval()
