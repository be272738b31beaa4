"""How fast cells are read: transformers' Trainer.predict against this project's, on a processor.

Cells of about 2,000 genes (simulated, 5,000 genes, 6,000 counts per cell), cut at V1's 2,048
tokens. One thread, fp32, processor seconds, runs of both sides in turn.

- The same tokens: both sides read every token of every cell with the very same backbone, which
  their hidden states at the first token confirm. Trainer.predict takes minibatches of 12 in the
  cells' order, padded to the longest among them; ours takes like lengths together.
- The model's own budget: the default recipe, whose tokens attend in blocks, against the reference,
  and its macro-F1 on unseen units against that of a model fitted and asked at full length.

    python benchmarks/inference.py                # the same tokens, and blocks: minutes
    python benchmarks/inference.py --fit          # macro-F1 of both fits: half an hour and more
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from anndata import AnnData
from sklearn.metrics import f1_score
from tasks import FIVE, SIMULATED_CELLS
from threadpoolctl import threadpool_limits
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from endoprint import cells, tokens
from endoprint.design import DesignConfig, make_split
from endoprint.encoder import backbone
from endoprint.encoder.minibatches import Layout, assemble
from endoprint.encoder.network import Network, answer
from endoprint.models.geneformer import Geneformer, GeneformerConfig
from endoprint.simulate import SimulateConfig, simulate
from endoprint.tokens import Tokens
from endoprint.vocabulary import Vocabulary

MINIBATCH = 12  # cells, upstream's when it trains
MAX_LENGTH = 2048
# layers, width, heads, width of the feed-forward part; the second is V1-10M's
SHAPES = {"2 x 64": (2, 64, 2, 128), "6 x 256": (6, 256, 4, 512)}
CELLS = {"2 x 64": 96, "6 x 256": 24}  # read per run
SIMULATED = SimulateConfig(cells=2700, genes=5000, median_umi=6000, pool_cells=0)
# both fits: so many steps of 32 cells, all of them, whatever the validation cells say
FITTED = {"min_steps": 100, "epochs": 1, "patience": 100}


@dataclass(frozen=True)
class Sides:
    """One backbone, and two ways to ask it."""

    trainer: Trainer
    network: Network
    tokens: Tokens
    vocabulary: Vocabulary

    def published(self) -> None:
        """Read every cell with Trainer.predict."""
        self.trainer.predict([{"input_ids": ids} for ids in _ids(self.tokens)])

    def ours(self, block: int) -> None:
        """Read every cell as the default recipe does, in blocks or (0) whole."""
        answer(
            self.network,
            self.tokens,
            self._layout(block),
            minibatch_tokens=GeneformerConfig().minibatch_tokens,
        )

    def _layout(self, block: int) -> Layout:
        return Layout(block, "rank", has_specials=self.vocabulary.cls_id is not None)

    def difference(self) -> float:
        """Return the largest difference between both sides' hidden states of first tokens."""
        worst = 0.0
        self.network.eval()
        with torch.inference_mode():
            for cell in range(4):
                ids = torch.from_numpy(_ids(self.tokens)[cell])[None]
                theirs = self.trainer.model.bert(ids).last_hidden_state[0, 0]
                minibatch = assemble(self.tokens, np.array([cell]), self._layout(0))
                here = self.network.hidden(minibatch)[0, 0]
                worst = max(worst, float((theirs - here).abs().max()))
        return worst


def sides(shape: str, made: AnnData, folder: str, seed: int = 0) -> Sides:
    """Draw one backbone and give it to both."""
    layers, hidden, heads, ffn = SHAPES[shape]
    vocabulary = Vocabulary.fit(made, max_length=MAX_LENGTH)
    config = backbone.shape_of(
        layers=layers,
        hidden=hidden,
        heads=heads,
        ffn=ffn,
        vocabulary_size=len(vocabulary),
        max_length=MAX_LENGTH,
    )
    config.num_labels = len(FIVE)
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=MINIBATCH,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, data_collator=_padded(vocabulary.pad_id))
    found = tokens.of(made[: CELLS[shape]], vocabulary)
    genes = float(found.lengths.mean())
    network = Network(model.bert, len(FIVE), has_votes=True, genes_per_cell=genes)
    return Sides(trainer, network, found, vocabulary)


def _padded(pad_id: int) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    def collate(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(cell["input_ids"]) for cell in some],
            batch_first=True,
            padding_value=pad_id,
        )
        return {"input_ids": ids, "attention_mask": (ids != pad_id).long()}

    return collate


def _ids(found: Tokens) -> list[np.ndarray[Any, Any]]:
    return [found[cell].astype(np.int64) for cell in range(len(found))]


def padding_share(lengths: np.ndarray[Any, Any]) -> float:
    """Return the share of padding in minibatches of 12 in the cells' order."""
    room = sum(
        int(part.max()) * len(part)
        for part in np.split(lengths, range(MINIBATCH, len(lengths), MINIBATCH))
    )
    return 1.0 - float(lengths.sum()) / room


# -- speed --------------------------------------------------------------------------------------
def speed(shape: str, made: AnnData, repeats: int) -> dict[str, Any]:
    """Return processor milliseconds per cell of each side, the least of its runs, and ratios."""
    with tempfile.TemporaryDirectory() as folder:
        both = sides(shape, made, folder)
        ways: dict[str, Callable[[], None]] = {
            "published": both.published,
            "ours": lambda: both.ours(0),
            "ours_in_blocks": lambda: both.ours(GeneformerConfig().block),
        }
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():  # in turn: a busy minute meets all of them
                started = time.process_time()
                way()
                spent[name].append((time.process_time() - started) / len(both.tokens) * 1000)
        difference = both.difference()
    assert difference < 2e-5, difference
    ratio = (
        np.array(spent["published"])[:, None]
        / np.array([spent["ours"], spent["ours_in_blocks"]]).T
    )
    return {
        "shape": shape,
        "cells": len(both.tokens),
        "mean_tokens": round(float(both.tokens.lengths.mean())),
        "padding_share": round(padding_share(both.tokens.lengths), 3),
        "cpu_ms_per_cell": {name: [round(ms, 1) for ms in each] for name, each in spent.items()},
        "times_faster": round(float(np.median(ratio[:, 0])), 2),
        "times_faster_in_blocks": round(float(np.median(ratio[:, 1])), 2),
        "largest_difference": difference,
    }


# -- quality ------------------------------------------------------------------------------------
def quality(made: AnnData, seed: int) -> dict[str, Any]:
    """Fit at full length and in blocks, otherwise alike; return macro-F1 on unseen units."""
    split = make_split(made.obs, DesignConfig(), 0)
    parts = split.parts(made.obs, None)
    train, valid, held_out = (made[at].copy() for at in (parts.train, parts.valid, parts.held_out))
    vocabulary = Vocabulary.fit(train, max_length=MAX_LENGTH)
    truth = held_out.obs["exposure"].astype(str).to_numpy()
    row: dict[str, Any] = {"seed": seed, "n_train": len(train), "n_held_out": len(held_out)}
    row["mean_tokens"] = round(float(tokens.of(held_out, vocabulary).lengths.mean()))
    for name, block in (("in_blocks", GeneformerConfig().block), ("full_length", 0)):
        model = Geneformer(GeneformerConfig.of({**FITTED, "block": block}, where=name), seed=seed)
        started = time.process_time()
        model.fit(train, valid)
        spent = time.process_time() - started
        calls = model.predict_proba(held_out).idxmax(axis=1).to_numpy()
        f1 = float(f1_score(truth, calls, average="macro", zero_division=0))
        row[name] = {"macro_f1": round(f1, 4), "fit_cpu_seconds": round(spent, 1)}
    return row


def cells_of(seed: int = 0) -> AnnData:
    """Draw cells of five exposures in six cultures."""
    drawn = simulate(SIMULATED, seed).cells
    known, _ = cells.curate(drawn[np.isin(drawn.obs["condition"], FIVE)].copy(), SIMULATED_CELLS)
    return known


def main() -> None:
    """Print one JSON line per shape, or per fit."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--fit", action="store_true", help="compare scores instead of speed")
    options.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = options.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    with threadpool_limits(1):
        made = cells_of()
        for seed in chosen.seeds if chosen.fit else ():
            print(json.dumps(quality(made, seed)), flush=True)
        for shape in () if chosen.fit else chosen.shapes:
            print(json.dumps(speed(shape, made, chosen.repeats)), flush=True)


if __name__ == "__main__":
    main()
