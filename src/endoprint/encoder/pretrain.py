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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertForMaskedLM

from endoprint.config import Config, Refusal
from endoprint.encoder import backbone, checkpoint
from endoprint.encoder.minibatches import Layout, Minibatch, assemble, plan
from endoprint.encoder.recipe import device_at_hand, schedule_of
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
        hidden = Minibatch(**{**vars(minibatch), "ids_RT": torch.from_numpy(ids)})
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
    """
    run = Pretraining(tokens, vocabulary, config, start=start, seed=seed, work=work)
    before = run.loss()
    run.learn(watch)
    after = run.loss()
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
        history: list[dict[str, float]] = list(found[0]["history"]) if found else []
        for epoch, metrics in enumerate(history, start=1):
            watch(epoch, metrics)
        for epoch in range(len(history), config.epochs):
            train_loss = self.one_epoch(epoch, lambda done: config.lr * factor(int(done * steps)))
            history.append({"train_loss": train_loss, "held_out_loss": self.loss()})
            if self.path is not None:
                values = {"fingerprint": run, "history": history}
                checkpoint.save(self.path, values, self.model, self.optimizer)
            watch(epoch + 1, history[-1])

    def one_epoch(self, epoch: int, rate: Callable[[float], float]) -> float:
        """Go through the cells once; return the mean loss. `rate` of the epochs done so far."""
        planned = self._plan(epoch)
        rng = np.random.default_rng([self.seed, epoch, 1])
        total = 0.0
        self.model.train()
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=on_gpu):
            torch.manual_seed(self.seed * 1_000_003 + epoch)
            for number, cells in enumerate(planned):
                for group in self.optimizer.param_groups:
                    group["lr"] = rate(epoch + number / len(planned))
                total += self._step(cells, rng, f"epoch {epoch + 1}, step {number + 1}")
        return total / len(planned)

    def _step(self, cells: Array, rng: np.random.Generator, where: str) -> float:
        loss, _ = self._loss_of(cells, rng)
        value = float(loss.detach())
        if not np.isfinite(value):
            raise Refusal(
                "the training loss must stay finite", f"{value} at {where}", "lower pretrain.lr"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        return value

    def _loss_of(self, cells: Array, rng: np.random.Generator) -> tuple[Tensor, int]:
        """Return the mean cross-entropy of the hidden genes, and how many there were."""
        hidden = self.masker(assemble(self.tokens, cells, self.layout, rng), rng)
        minibatch = hidden.minibatch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            states_RTD = self.model.bert(
                input_ids=minibatch.ids_RT,
                position_ids=minibatch.positions_RT,
                attention_mask=minibatch.mask_RT,
            ).last_hidden_state
            # only the hidden genes are decoded: the decoder is the vocabulary wide
            logits_MV = self.model.cls(states_RTD[hidden.chosen_RT.to(self.device)])
        truth_M = hidden.truth_M.to(self.device)
        if not len(truth_M):  # cells without genes only: nothing to learn, nothing to break
            return logits_MV.sum() * 0.0, 0
        return functional.cross_entropy(logits_MV.float(), truth_M), len(truth_M)

    # -- measuring ------------------------------------------------------------------------------
    def _plan(self, epoch: int) -> list[Array]:
        dealt = plan(
            self.lengths[self.learned],
            cells=self.config.minibatch_cells,
            tokens=self.config.minibatch_tokens,
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
        with torch.inference_mode():
            losses = [self._loss_of(cells, rng) for cells in self._held_out_plan()]
        return _mean([float(loss) for loss, _ in losses], [n for _, n in losses])

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


def _mean(values: list[float], weights: list[int]) -> float:
    return float(np.average(values, weights=weights)) if sum(weights) else float("nan")
