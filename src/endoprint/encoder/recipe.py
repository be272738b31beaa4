"""How an encoder is trained: every lever of cost and quality is a field here, with its measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, Self

import torch
from optuna.distributions import FloatDistribution
from pydantic import Field, model_validator

from endoprint.config import Config, Refusal
from endoprint.encoder.activations import Precision as CachePrecision
from endoprint.encoder.lora import Matrices
from endoprint.encoder.minibatches import Layout
from endoprint.encoder.pooling import Pooling

NotNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Recipe(Config):
    """The levers encoders share; a model's Config adds its own.

    Defaults were measured on two cores with 1,500 simulated cells of 600 tokens, 15 exposures:
    docs/performance.md.
    """

    # -- steps ------------------------------------------------------------------------------------
    epochs: int = 5  # passes over the training cells, at most
    min_steps: int = 200  # a small set is gone through more often than `epochs` until so many
    patience: int = 4  # epochs without a lower validation loss before stopping
    lr: Annotated[float, FloatDistribution(1e-5, 1e-2, log=True)] = 1e-3  # peak, of the backbone
    embedding_lr_multiple: float = 3.0  # gene embeddings learn so many times faster
    weight_decay: float = 0.1
    warmup_share: float = 0.1  # of all steps; never a fixed number, which small sets do not reach
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up
    clip: float = 1.0  # largest norm of the gradient
    grow_after: NotNegative = 0  # epochs without layers, which then begin as the identity; 0: none
    # -- what keeps it from learning by heart -----------------------------------------------------
    dropout: float = 0.0  # inside the backbone; published: .02 (V1), .1 (V2); costs a sixth
    attention_dropout: float = 0.0  # published: the same; costs 2.3 times the time on a CPU
    vector_dropout: Annotated[float, FloatDistribution(0.0, 0.9)] = 0.5  # of the pooled vector
    # -- reading a cell ---------------------------------------------------------------------------
    block: int = 64  # tokens attending to each other; 0: all
    block_share: float = 0.34  # read per training step
    pooling: Pooling = "rank"  # by rank weight | mean over genes | first position
    head: Literal["flat", "structured"] = "flat"  # a row per exposure | per pathway and direction
    has_votes: bool = True  # each gene also votes directly for each exposure
    votes_lr: Annotated[float, FloatDistribution(3e-4, 3e-2, log=True)] = 3e-3  # peak
    votes_decay: float = 0.3  # weight decay of the votes
    # -- cost -------------------------------------------------------------------------------------
    minibatch_cells: int = 32  # cells per training step
    # each: every cell once an epoch, rare exposures weighing more in the loss; balanced: exposures
    # equally often, cells of rare ones again and again, of common ones in part. The latter for an
    # exposure so rare that most minibatches lack it: its weight would make single steps jump
    sampling: Literal["each", "balanced"] = "each"
    minibatch_tokens: int = 65_536  # most tokens per minibatch: bounds memory
    gradient_checkpointing: bool = False  # a layer's inside is computed twice: memory for time
    frozen_layers: NotNegative = 0  # counted from the input, embeddings included
    head_only: bool = False  # the encoder at rest, logistic regression on its vectors; no votes
    head_penalty: Positive | None = None  # of that regression, per cell; none: by validation
    lora_rank: NotNegative = (
        0  # learn low-rank corrections to the layers' matrices; 0: the matrices
    )
    lora_alpha: Positive = 16.0  # over the rank: how much a correction counts
    lora_matrices: Matrices = "attention"  # all: the feed-forward parts' too
    # what frozen layers say of a cell is kept on disk, where the workspace has a place for it:
    cache_gib: Annotated[float, Field(ge=0)] = (
        4.0  # of all fits together, least recently used first to go; 0: not kept
    )
    cache_precision: CachePrecision = "fp32"  # fp16: half the room, and answers not quite equal
    # of training steps; auto: what a few timed steps say pays on this machine (encoder/machine.py)
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # answers: bf16 on a GPU, fp32 elsewhere
    compile: Literal["auto", "off", "on"] = "auto"  # auto: timed on a GPU, off on a processor

    @model_validator(mode="after")
    def _agree(self) -> Self:
        self.refuse_contradictions()
        return self

    def refuse_contradictions(self) -> None:
        """Refuse levers that undo each other."""
        for is_wrong, rule, got, remedy in (
            (
                self.pooling == "cls" and self.block > 0,
                "first-position pooling needs the whole cell in one row",
                f"block {self.block}",
                "set block to 0, or pool by rank or mean",
            ),
            (
                self.head_only and self.has_votes,
                "a head alone reads the encoder's vectors and nothing else",
                "head_only with has_votes",
                "set has_votes to false",
            ),
            (
                self.head_only and self.frozen_layers > 0,
                "a head alone freezes every layer",
                f"head_only with frozen_layers {self.frozen_layers}",
                "leave frozen_layers at 0",
            ),
            (
                self.head_only and self.lora_rank > 0,
                "a head alone leaves the encoder as it is",
                f"head_only with lora_rank {self.lora_rank}",
                "set lora_rank to 0",
            ),
            (
                self.head_only and self.head == "structured",
                "a head alone has a row per exposure",
                "head_only with a structured head",
                "set head to flat",
            ),
            (
                self.grow_after > 0
                and (self.head_only or self.lora_rank > 0 or self.frozen_layers > 0),
                "layers that grow are trained whole",
                f"grow_after {self.grow_after} with layers that are frozen or corrected",
                "set grow_after, or frozen_layers, lora_rank and head_only, to nothing",
            ),
        ):
            if is_wrong:
                raise Refusal(rule, got, remedy)

    def layout(self, *, has_specials: bool) -> Layout:
        """Return how cells are laid out in rows."""
        return Layout(self.block, self.pooling, has_specials, share=self.block_share)

    def epochs_for(self, steps_per_epoch: int) -> int:
        """Return the passes a set of this size gets."""
        n_epochs = max(self.epochs, math.ceil(self.min_steps / max(steps_per_epoch, 1)))
        if self.grow_after >= n_epochs:
            raise Refusal(
                "layers that grow need epochs to learn in",
                f"grow_after {self.grow_after} of {n_epochs} epochs",
                "lower grow_after, or raise epochs",
            )
        return n_epochs


def device_at_hand() -> torch.device:
    """Return the GPU where there is one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def schedule_of(
    kind: Literal["linear", "cosine", "constant"], n_steps: int, warmup_share: float
) -> Callable[[int], float]:
    """Return the share of the peak learning rate at each step: a warm-up, then a decline."""
    warmup = max(round(n_steps * warmup_share), 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / max(n_steps - warmup, 1), 1.0)
        if kind == "constant":
            return 1.0
        return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor
