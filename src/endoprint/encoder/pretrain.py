"""Masked learning: hide genes of unlabelled cells and let the backbone guess them (Devlin 2018).

As Geneformer's pre-training (Theodoris 2023): 15 % of the genes are chosen, of which 80 % become
`<mask>`, 10 % another gene, 10 % stay. Each step reads a few rows of each cell, so that long cells
cost no more than short ones. The decoder is tied to the gene embeddings and starts at the genes'
frequencies, which is where learning anything begins.

Some thousand cells on two cores do not make a Geneformer: measured, such a start was useless or
harmful to fine-tuning (.03 to .15 against .20 to .80 macro-F1 in a prototype without votes). What
comes out says of itself that it is small and ours.

Shapes: B cells, R rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertForMaskedLM

from endoprint.config import Config, Refusal
from endoprint.encoder import backbone, checkpoint
from endoprint.encoder.minibatches import Layout, Minibatch, assemble, plan
from endoprint.encoder.recipe import device_at_hand, schedule_of
from endoprint.encoder.step import Losses, Steps
from endoprint.encoder.team import here
from endoprint.model import Watch, silent
from endoprint.tokens import Tokens
from endoprint.vocabulary import Vocabulary

Array = np.ndarray[Any, np.dtype[Any]]

CHOSEN, MASKED, REPLACED = 0.15, 0.8, 0.1  # Devlin 2018; Geneformer's collator keeps them


class PretrainConfig(Config):
    """A small backbone and how it is pre-trained."""

    layers: int = 2  # 0: gene and rank embeddings only
    hidden: int = 64  # width
    heads: int = 2
    ffn: int = 128  # width inside each layer's feed-forward part
    epochs: int = 3
    lr: float = 2e-3  # peak; from scratch. Continuing a checkpoint wants about a tenth
    weight_decay: float = 0.01
    warmup_share: float = 0.1  # of all steps
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip: float = 1.0  # largest norm of the gradient
    dropout: float = 0.02  # as published (V1)
    block: int = 64  # tokens attending to each other; 0: the whole cell
    max_rows: int = 2  # rows of `block` tokens read per cell and epoch; 0: all
    minibatch_cells: int = 32
    minibatch_tokens: int = 65_536  # most tokens of a minibatch, all rows counted: bounds memory
    held_out_share: float = 0.1  # of the cells, to measure what was learned


@dataclass(frozen=True)
class Masked:
    """A minibatch with genes hidden, and what they were."""

    minibatch: Minibatch
    chosen_RT: Tensor  # True where a gene is to be guessed
    truth_M: Tensor  # what it is

    def take(self, chosen: Array) -> Masked:
        """Return some of its cells, by their places in it (rising)."""
        taken = self.minibatch.take(chosen)
        rows = torch.from_numpy(np.isin(self.minibatch.owner_R.numpy(), chosen))
        row_M = self.chosen_RT.nonzero()[:, 0]  # in the order of the truth
        n_columns = taken.ids_RT.shape[1]
        return Masked(taken, self.chosen_RT[rows, :n_columns], self.truth_M[rows[row_M]])

    def portions(self, most: int) -> list[Masked]:
        """Return it in portions of at most so many cells; itself, where that is all."""
        n_cells = len(self.minibatch.cells_B)
        if most >= n_cells:
            return [self]
        starts = range(0, n_cells, most)
        return [self.take(np.arange(start, min(start + most, n_cells))) for start in starts]


class Masker:
    """Hide genes: 15 % of them, at least one wherever there is one."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.mask_id, self.n_specials = vocabulary.mask_id, len(vocabulary.specials)
        self.n_tokens = len(vocabulary)

    def __call__(self, minibatch: Minibatch, rng: np.random.Generator) -> Masked:
        """Return the minibatch with genes hidden; special tokens and padding never are."""
        ids = minibatch.ids_RT.numpy().copy()
        is_gene = ids >= self.n_specials
        draw = np.where(is_gene, rng.random(ids.shape), 2.0)
        chosen = draw < CHOSEN
        if not chosen.any() and is_gene.any():
            chosen.flat[draw.argmin()] = True
        truth = ids[chosen]
        fate = rng.random(len(truth))
        other = rng.integers(self.n_specials, self.n_tokens, len(truth))
        ids[chosen] = np.where(
            fate < MASKED, self.mask_id, np.where(fate < MASKED + REPLACED, other, truth)
        )
        hidden = replace(minibatch, ids_RT=torch.from_numpy(ids))
        return Masked(hidden, torch.from_numpy(chosen), torch.from_numpy(truth))


def pretrain(
    tokens: Tokens,
    vocabulary: Vocabulary,
    config: PretrainConfig,
    folder: Path,
    *,
    units: Sequence[str],
    start: Path | None = None,
    seed: int = 0,
    watch: Watch = silent,
    work: Path | None = None,
) -> dict[str, Any]:
    """Teach a backbone the company genes keep in unlabelled cells; write it as a folder.

    `tokens` of unlabelled cells, made with `vocabulary`; `units` they come from, which must not
    be held out of any later comparison. `start`: the folder of a backbone to go on from, whose
    shape wins over the config's. `work`: where a killed run is taken up again.
    Writes config.json, model.safetensors, vocabulary.json and backbone.json; returns the last.
    In a team of processes (`encoder.team`) the lead does so; the others return nothing.
    """
    run = Pretraining(tokens, vocabulary, config, start=start, seed=seed, work=work)
    before = run.loss()
    run.learn(watch)
    after = run.loss()
    if not run.team.is_lead:
        return {}
    n_cells = len(tokens.offsets) - 1
    continued = f", continued from {backbone.origin_of(start).label}" if start else ""
    seen = sorted(set(map(str, units)) | set(backbone.origin_of(start).units if start else []))
    sha256 = backbone.write(folder, run.model)
    vocabulary.write(folder / backbone.VOCABULARY)
    label = {
        "label": f"endoprint small backbone, pre-trained here on {n_cells:,} unlabelled cells"
        f"{continued}; not the published Geneformer",
        "sha256": sha256,
        "vocabulary_sha256": vocabulary.sha256,
        "units": seen,
        "n_cells": n_cells,
        "n_held_out_cells": len(run.held_out),
        "epochs": config.epochs,
        "seed": seed,
        "loss_before": before,
        "loss_after": after,
        "loss_of_frequencies": run.loss_of_frequencies(),
        "config": config.model_dump(mode="json"),
    }
    text = json.dumps(label, indent=1, sort_keys=True) + "\n"
    backbone.replace_text(folder / backbone.LABEL, text)
    return label


class Pretraining:
    """One run of masked learning: cells, backbone, optimiser."""

    def __init__(
        self,
        tokens: Tokens,
        vocabulary: Vocabulary,
        config: PretrainConfig,
        *,
        start: Path | None,
        seed: int,
        work: Path | None,
    ) -> None:
        self.tokens, self.config, self.seed = tokens, config, seed
        self.lengths = np.diff(tokens.offsets)
        self.device = device_at_hand()
        self.masker = Masker(vocabulary)
        self.layout = Layout(
            config.block, "mean", vocabulary.cls_id is not None, max_rows=config.max_rows
        )
        n_cells = len(self.lengths)
        if n_cells < 2 or not (self.lengths > 0).any():
            raise Refusal("masked learning needs cells with genes", f"{n_cells} cells", "add some")
        order = np.random.default_rng(seed).permutation(n_cells)
        n_held_out = min(max(round(n_cells * config.held_out_share), 1), n_cells - 1)
        self.held_out, self.learned = np.sort(order[:n_held_out]), np.sort(order[n_held_out:])
        self.model = self._begin(vocabulary, start).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.team = here()
        self.steps = Steps(self.model, self.optimizer, clip=config.clip, team=self.team)
        self.path = work / "pretraining.safetensors" if work is not None else None

    def _begin(self, vocabulary: Vocabulary, start: Path | None) -> BertForMaskedLM:
        config = self.config
        if start is not None:
            model = backbone.read(start, dropout=config.dropout)
            backbone.refuse_mismatch(backbone.origin_of(start), model, vocabulary)
            return model
        shape = backbone.shape_of(
            layers=config.layers,
            hidden=config.hidden,
            heads=config.heads,
            ffn=config.ffn,
            vocabulary_size=len(vocabulary),
            max_length=vocabulary.max_length,
        )
        model = backbone.build(shape, seed=self.seed, dropout=config.dropout)
        with torch.no_grad():
            model.cls.predictions.bias.copy_(torch.from_numpy(self._log_frequency()))
        return model

    def _log_frequency(self) -> Array:
        """Return the log frequency of every token among the cells learned from, float32 (V,)."""
        cell_of_token = np.repeat(np.arange(len(self.lengths)), self.lengths)
        is_learned = np.isin(cell_of_token, self.learned)
        n = np.bincount(self.tokens.values[is_learned], minlength=self.masker.n_tokens) + 0.5
        n[: self.masker.n_specials] = 1e-6
        log_frequency: Array = np.log(n / n.sum()).astype(np.float32)
        return log_frequency

    # -- learning -------------------------------------------------------------------------------
    def learn(self, watch: Watch) -> None:
        """Go through the cells `epochs` times; each epoch draws from its own seed.

        Epochs that an earlier attempt finished are told again, so that the curve is whole.
        """
        config = self.config
        steps = len(self._plan(0))
        factor = schedule_of(config.schedule, steps * config.epochs, config.warmup_share)
        run = self._fingerprint() if self.path else ""
        found = self.path and checkpoint.resume(self.path, run, self.model, self.optimizer)
        self.team.refuse_unless_alike(bool(found))
        history: list[dict[str, float]] = []
        if found:
            history = list(found[0]["history"])
            self.steps.portions.most = found[0]["cells_at_a_time"]
        for epoch, metrics in enumerate(history, start=1):
            watch(epoch, metrics)
        for epoch in range(len(history), config.epochs):
            train_loss = self.one_epoch(epoch, lambda done: config.lr * factor(int(done * steps)))
            metrics = {"train_loss": train_loss, "held_out_loss": self.loss()}
            history.append(self.team.told(metrics))
            if self.path is not None and self.team.is_lead:
                most = self.steps.portions.most
                values = {"fingerprint": run, "history": history, "cells_at_a_time": most}
                checkpoint.save(self.path, values, self.model, self.optimizer)
            watch(epoch + 1, history[-1])

    def one_epoch(self, epoch: int, rate: Callable[[float], float]) -> float:
        """Go through the cells once; return the mean loss. `rate` of the epochs done so far."""
        planned = self._plan(epoch)
        rng = np.random.default_rng([self.seed, epoch, 1])
        losses = Losses(epoch, "lower pretrain.lr")
        self.model.train()
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=on_gpu):
            # what is dropped differs between the cells of a team's processes
            torch.manual_seed(self.seed * 1_000_003 + epoch + self.team.rank * 10_000_019)
            for number, cells in enumerate(planned):
                for group in self.optimizer.param_groups:
                    group["lr"] = rate(epoch + number / len(planned))
                losses.add(self._step(cells, rng))
            return losses.mean()

    def _step(self, cells: Array, rng: np.random.Generator) -> Tensor:
        masked = self.masker(assemble(self.tokens, cells, self.layout, rng), rng)
        n_hidden = len(masked.truth_M)
        if self.team.size > 1:
            masked = masked.take(self.team.mine(len(cells)))

        def gradients(most: int) -> Tensor:
            total = torch.zeros((), device=self.device)
            with self.team.as_one():
                for portion in masked.portions(most):
                    loss = self._summed(portion) / max(n_hidden, 1)
                    loss.backward()  # type: ignore[no-untyped-call]
                    total += loss.detach()
            return total

        return self.steps.take(len(masked.minibatch.cells_B), gradients)

    def _summed(self, masked: Masked) -> Tensor:
        """Return the cross-entropy of the hidden genes, summed."""
        minibatch = masked.minibatch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            states_RTD = self.model.bert(
                input_ids=minibatch.ids_RT,
                position_ids=minibatch.positions_RT,
                attention_mask=minibatch.mask_RT,
            ).last_hidden_state
            # only the hidden genes are decoded: the decoder is the vocabulary wide
            logits_MV = self.model.cls(states_RTD[masked.chosen_RT.to(self.device)])
        truth_M = masked.truth_M.to(self.device)
        if not len(truth_M):  # cells without genes only: nothing to learn, nothing to break
            nothing: Tensor = logits_MV.sum() * 0.0
            return nothing
        summed: Tensor = functional.cross_entropy(logits_MV.float(), truth_M, reduction="sum")
        return summed

    # -- measuring ------------------------------------------------------------------------------
    def _plan(self, epoch: int) -> list[Array]:
        dealt = plan(
            self.lengths[self.learned],
            cells=self.config.minibatch_cells,
            tokens=self.config.minibatch_tokens,
            least=self.team.size,
            rng=np.random.default_rng([self.seed, epoch]),
        )
        return [self.learned[cells] for cells in dealt]

    def _held_out_plan(self) -> list[Array]:
        dealt = plan(
            self.lengths[self.held_out],
            cells=self.config.minibatch_cells,
            tokens=self.config.minibatch_tokens,
        )
        return [self.held_out[cells] for cells in dealt]

    def loss(self) -> float:
        """Return the loss on the cells held out, always the same genes hidden."""
        self.model.eval()
        rng = np.random.default_rng([self.seed, 2])
        total, n_hidden = 0.0, 0
        with torch.inference_mode():
            for cells in self._held_out_plan():
                masked = self.masker(assemble(self.tokens, cells, self.layout, rng), rng)
                total += float(self._summed(masked))
                n_hidden += len(masked.truth_M)
        return total / n_hidden if n_hidden else float("nan")

    def loss_of_frequencies(self) -> float:
        """Return the loss of guessing every hidden gene by how common it is: the bar to beat."""
        log_p = self._log_frequency().astype(np.float64)
        rng = np.random.default_rng([self.seed, 2])
        truths = [
            self.masker(assemble(self.tokens, cells, self.layout, rng), rng).truth_M.numpy()
            for cells in self._held_out_plan()
        ]
        return float(-log_p[np.concatenate(truths)].mean())

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.config.model_dump_json().encode() + str(self.seed).encode())
        for array in (self.tokens.values, self.tokens.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
        for key, tensor in checkpoint.snapshot(self.model).items():
            digest.update(key.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()
