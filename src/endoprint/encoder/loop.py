"""The fine-tuning loop: steps, validation, early stopping, exact resume.

Shapes: B cells, E exposures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as checkpointed

from endoprint.bins import Binned
from endoprint.encoder import checkpoint
from endoprint.encoder.machine import Way, candidates, choose, clock_of, key_of, named, remembered
from endoprint.encoder.minibatches import Layout, Minibatch, Sentences, assemble, balanced, plan
from endoprint.encoder.network import Put, Reader, answer, as_it_is
from endoprint.encoder.recipe import Recipe, schedule_of
from endoprint.encoder.step import Losses, Steps
from endoprint.encoder.team import Team, TeamNorm, here
from endoprint.encoder.validation import held_out
from endoprint.model import Watch

Array = np.ndarray[Any, np.dtype[Any]]

CHECKPOINT = "training.safetensors"


@dataclass(frozen=True)
class Lesson:
    """Tokens of some cells, and which exposure each met (a column number)."""

    tokens: Sentences
    truth: Array
    put: Put = as_it_is  # gives a minibatch what is known of it already


@dataclass
class Progress:
    """How far a run has come: what a checkpoint keeps beside the weights."""

    epoch: int = 0  # epochs finished
    best_epoch: int = 0  # counted from 1; 0: none yet
    best_loss: float = float("inf")  # on validation cells
    has_stopped: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


class Loop:
    """Train a network on some cells until others are called no better.

    Exposures weigh equally, however many cells each has, so that the logits are evidence without a
    prior: by their weight in the loss, or by how often they are met (`Recipe.sampling`). The epoch
    with the lowest validation loss is restored; without validation cells the last one stays. The
    loss is taken at its best temperature, since models are calibrated afterwards. Macro-F1 of some
    hundred cells is too coarse to choose by: chosen so, the epoch before the last was taken by
    chance and cost .01 to .02 on unseen units.
    """

    def __init__(
        self,
        network: Reader,
        train: Lesson,
        valid: Lesson,
        recipe: Recipe,
        layout: Layout,
        *,
        seed: int,
        work: Path | None = None,
        team: Team | None = None,
        machine: Path | None = None,
    ) -> None:
        self.network, self.train, self.valid = network, train, valid
        self.recipe, self.layout, self.seed = recipe, layout, seed
        self.team = team or here()
        self.device = network.head.weight.device
        n_exposures = network.n_exposures
        n_cells = np.bincount(train.truth, minlength=n_exposures)
        weight = len(train.truth) / (n_exposures * np.maximum(n_cells, 1))
        if recipe.sampling == "balanced":  # what is met equally often weighs equally already
            weight = np.ones(n_exposures)
        self.weight_E = torch.tensor(weight, dtype=torch.float32, device=self.device)
        self._steps = len(self._plan(0))  # per epoch; lengths shift it by a few
        self.epochs = recipe.epochs_for(self._steps)
        network.freeze(recipe.frozen_layers)
        self.optimizer = _optimizer(network, recipe)
        self.steps = Steps(network, self.optimizer, clip=recipe.clip, team=self.team)
        n_steps = self._steps * self.epochs
        self._factor = schedule_of(recipe.schedule, n_steps, recipe.warmup_share)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.path = work / CHECKPOINT if work is not None else None
        self._run = self._fingerprint() if self.path else ""
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self._machine, self._way = machine, Way()
        self.way = ""  # how steps are computed: fp32 or bf16, compiled or not; set by `run`
        self._pool: Callable[[Minibatch], Tensor] = network.pool

    def run(self, watch: Watch) -> Progress:
        """Train, validate, stop early, restore the best epoch; go on from `work` if it can.

        Epochs that an earlier attempt finished are told again, so that the curve is whole.
        """
        self._resume()
        for epoch, metrics in enumerate(self.progress.history, start=1):
            watch(epoch, metrics)
        alone = self.network.standardise
        if self.team.size > 1:
            self.network.standardise = TeamNorm.over(alone)
        self._choose_way()
        while self.progress.epoch < self.epochs and not self.progress.has_stopped:
            metrics = {"train_loss": self._one_epoch(), **self._validate()}
            if self.device.type == "cuda":
                metrics["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
            metrics = self.team.told(metrics)
            self._judge(metrics)
            self._keep()
            watch(self.progress.epoch, metrics)
        self.network.standardise = alone
        if self.best:
            self.network.load_state_dict(self.best)
        self.network.settle()
        self.network.eval()
        return self.progress

    # -- one epoch ------------------------------------------------------------------------------
    def _plan(self, epoch: int) -> list[Array]:
        lengths, truth = np.diff(self.train.tokens.offsets), self.train.truth
        rng = np.random.default_rng([self.seed, epoch])
        is_even = self.recipe.sampling == "balanced"
        drawn = balanced(truth, rng) if is_even else np.arange(len(truth))
        cells, tokens = self.recipe.minibatch_cells, self.recipe.minibatch_tokens
        # at least two: one cell alone has no spread to be standardised by; and one per process
        least = max(2, self.team.size)
        dealt = plan(lengths[drawn], cells=cells, tokens=tokens, least=least, rng=rng)
        return [drawn[places] for places in dealt]

    def _one_epoch(self) -> float:
        epoch = self.progress.epoch
        planned = self._plan(epoch)
        rng = np.random.default_rng([self.seed, epoch, 1])
        losses = Losses(epoch, "lower lr and votes_lr, or set precision to fp32")
        self.network.is_grown = epoch >= self.recipe.grow_after
        self.network.train()
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=on_gpu), self._by(self._way):
            # what is dropped differs between the cells of a team's processes
            torch.manual_seed(self.seed * 1_000_003 + epoch + self.team.rank * 10_000_019)
            for number, cells in enumerate(planned):
                self._set_rate(epoch + number / len(planned))
                losses.add(self._step(cells, rng))
            return losses.mean()

    def _step(self, cells: Array, rng: np.random.Generator) -> Tensor:
        minibatch = assemble(self.train.tokens, cells, self.layout, rng)
        if self.team.size > 1:
            mine = self.team.mine(len(cells))
            minibatch = minibatch.take(mine)
        minibatch = self.train.put(minibatch)
        truth_B = torch.from_numpy(self.train.truth[minibatch.cells_B]).to(self.device)

        def gradients(most: int) -> Tensor:
            return self._gradients(minibatch, truth_B, len(cells), most)

        return self.steps.take(len(truth_B), gradients)

    def _gradients(self, minibatch: Minibatch, truth_B: Tensor, n_cells: int, most: int) -> Tensor:
        """Leave the gradients of this process's cells of `n_cells`; return their part of the loss.

        What needs memory, reading the cells, stands apart from weighing them, which is done for
        all at once: batch normalisation, of all processes' cells if there are several.
        """
        with self.team.as_one():
            if most >= len(truth_B):
                whole = minibatch.to(self.device)
                pooled_BD = self._pool(whole)
            else:
                whole = replace(minibatch, states_RTD=None).to(self.device)
                portions = minibatch.portions(most)
                pooled_BD = torch.cat([self._pool_lightly(each) for each in portions])
        leaf_BD = pooled_BD.detach().requires_grad_()
        logits_BE, _ = self.network.weigh(leaf_BD, whole)
        # divided by the cells, not by their weights: a cell weighs the same in every minibatch
        summed = functional.cross_entropy(logits_BE, truth_B, self.weight_E, reduction="sum")
        loss = summed / n_cells
        loss.backward()  # type: ignore[no-untyped-call]
        with self.team.as_one():
            if pooled_BD.requires_grad:
                pooled_BD.backward(leaf_BD.grad)  # type: ignore[no-untyped-call]
        return loss.detach()

    def _pool_lightly(self, portion: Minibatch) -> Tensor:
        """Pool cells, forgetting how: it is done again when gradients are wanted."""

        def pool(cells: Minibatch) -> Tensor:
            return self._pool(cells.to(self.device))

        pooled_BD: Tensor = checkpointed(pool, portion, use_reentrant=False)
        return pooled_BD

    # -- how steps are computed -----------------------------------------------------------------
    def _choose_way(self) -> None:
        """Time a step in the ways this machine has, unless the recipe says which; lead's word."""
        recipe = self.recipe
        ways = {
            named(way): way for way in candidates(recipe.precision, recipe.compile, self.device)
        }
        own = named(Way(self.network.uses_bf16))  # stands where no way could be timed
        chosen = own if own in ways else next(iter(ways))
        if len(ways) > 1 and self.progress.epoch < self.epochs:
            n_steps = self._steps * (self.epochs - self.progress.epoch)
            if self.team.is_lead:
                steps = {name: partial(self._try, way) for name, way in ways.items()}
                key = {**key_of(self.device), **self._size(), "ways": sorted(ways)}
                clock = clock_of(self.device)
                found = remembered(
                    self._machine, key, lambda: choose(steps, clock, n_steps=n_steps, start=chosen)
                )
                chosen = str(found["way"])
            chosen = self.team.told(chosen)
        self.way = chosen
        self._way = ways[chosen]
        self._pool = self._pool_by(self._way)

    def _size(self) -> dict[str, object]:
        lengths = np.diff(self.train.tokens.offsets)
        return {
            "shape": self.network.shape(),
            "layout": vars(self.layout),
            "cells": self.recipe.minibatch_cells,
            # rounded, so that folds of one task ask once
            "tokens": int(2 ** np.round(np.log2(max(float(lengths.mean()), 1.0)))),
        }

    def _pool_by(self, way: Way) -> Callable[[Minibatch], Tensor]:
        pool = self.network.pool
        return torch.compile(pool, dynamic=True) if way.is_compiled else pool

    @contextmanager
    def _by(self, way: Way) -> Iterator[None]:
        """Compute in bf16 or not while the block runs; answers stay in the network's own way."""
        before = self.network.uses_bf16
        self.network.uses_bf16 = way.has_bf16
        try:
            yield
        finally:
            self.network.uses_bf16 = before

    def _try(self, way: Way) -> None:
        """Read the first minibatch forth and back, and change nothing."""
        cells = self._plan(0)[0]
        rng = np.random.default_rng(self.seed)
        minibatch = self.train.put(assemble(self.train.tokens, cells, self.layout, rng))
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=on_gpu), self._by(way):
            pooled_BD = self._pool_by(way)(minibatch.to(self.device))
            if pooled_BD.requires_grad:
                pooled_BD.sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad(set_to_none=True)

    def _set_rate(self, epochs_done: float) -> None:
        factor = self._factor(int(epochs_done * self._steps))
        for group, peak in zip(self.optimizer.param_groups, self._peaks):
            group["lr"] = peak * factor

    # -- after an epoch -------------------------------------------------------------------------
    def _validate(self) -> dict[str, float]:
        if not len(self.valid.truth):
            return {}
        logits = answer(
            self.network,
            self.valid.tokens,
            self.layout,
            minibatch_tokens=self.recipe.minibatch_tokens,
            put=self.valid.put,
        ).logits_BE
        return held_out(logits, self.valid.truth)

    def _judge(self, metrics: dict[str, float]) -> None:
        progress = self.progress
        progress.epoch += 1
        progress.history.append(metrics)
        if "valid_loss" not in metrics:
            return
        if metrics["valid_loss"] < progress.best_loss:
            progress.best_loss, progress.best_epoch = metrics["valid_loss"], progress.epoch
            self.best = checkpoint.snapshot(self.network)
        progress.has_stopped = progress.epoch - progress.best_epoch >= self.recipe.patience

    # -- surviving ------------------------------------------------------------------------------
    def _fingerprint(self) -> str:
        """Say which run this is: recipe, seed, first weights, cells and truth."""
        digest = hashlib.sha256(self.recipe.model_dump_json().encode())
        digest.update(str((self.seed, self.network.n_exposures, self.epochs)).encode())
        for key, tensor in checkpoint.snapshot(self.network).items():
            digest.update(key.encode() + tensor.numpy().tobytes())
        for lesson in (self.train, self.valid):
            for array in (lesson.tokens.values, lesson.tokens.offsets, lesson.truth):
                digest.update(np.ascontiguousarray(array).tobytes())
            if isinstance(lesson.tokens, Binned):
                digest.update(np.ascontiguousarray(lesson.tokens.levels).tobytes())
        return digest.hexdigest()

    def _keep(self) -> None:
        if self.path is None or not self.team.is_lead:
            return
        progress = self.progress
        values = {
            "fingerprint": self._run,
            "epoch": progress.epoch,
            "best_epoch": progress.best_epoch,
            # JSON has no infinity; none is there without validation cells
            "best_loss": progress.best_loss if progress.best_epoch else None,
            "has_stopped": progress.has_stopped,
            "history": progress.history,
            "cells_at_a_time": self.steps.portions.most,
        }
        checkpoint.save(self.path, values, self.network, self.optimizer, self.best)

    def _resume(self) -> None:
        if self.path is None:
            return
        found = checkpoint.resume(self.path, self._run, self.network, self.optimizer)
        self.team.refuse_unless_alike(found is not None)
        if found is None:
            return
        values, self.best = found
        self.steps.portions.most = values["cells_at_a_time"]
        self.progress = Progress(
            epoch=int(values["epoch"]),
            best_epoch=int(values["best_epoch"]),
            best_loss=float("inf") if values["best_loss"] is None else values["best_loss"],
            has_stopped=bool(values["has_stopped"]),
            history=list(values["history"]),
        )


def _optimizer(network: Reader, recipe: Recipe) -> torch.optim.AdamW:
    """Group parameters by rate and decay: genes learn faster, votes apart, biases undecayed."""
    genes: list[nn.Parameter] = []
    votes: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("votes."):
            votes.append(parameter)
        elif parameter is network.gene_table():
            genes.append(parameter)
        else:
            (matrices if parameter.ndim > 1 else others).append(parameter)
    decay = recipe.weight_decay
    groups = [
        {"params": genes, "lr": recipe.lr * recipe.embedding_lr_multiple, "weight_decay": decay},
        {"params": votes, "lr": recipe.votes_lr, "weight_decay": recipe.votes_decay},
        {"params": matrices, "lr": recipe.lr, "weight_decay": decay},
        {"params": others, "lr": recipe.lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
