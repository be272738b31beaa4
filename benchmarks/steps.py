"""What one training cell costs by the published recipe and by ours, where whole fits take hours.

The shape is V1-10M's (6 layers x 256, 4 heads, vocabulary of 25,426), every cell 2,048 tokens; the
tokens are random, which changes no cost. `python benchmarks/steps.py [--steps 20] [--cells 60]`.
Nothing is learned here, so this speaks of cost alone.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import pandas as pd
import reference
import torch
import transformers
from reference import Shape
from threadpoolctl import threadpool_limits

from endoprint.encoder import backbone
from endoprint.encoder.loop import Lesson, Loop
from endoprint.encoder.network import Network
from endoprint.model import silent
from endoprint.models.geneformer import GeneformerConfig
from endoprint.tokens import Tokens
from endoprint.vocabulary import Vocabulary

V1_10M = Shape(6, 256, 4, 512)
N_GENES, LENGTH, N_EXPOSURES = 25_424, 2048, 5
# Twelve cells of 2,048 tokens keep some 14 GB of attention with dropout; four times three, a
# quarter. The sums are the same and so is the update.
ACCUMULATE = 4


def vocabulary(n_genes: int, length: int) -> Vocabulary:
    """Return a vocabulary of V1's size, of no real genes."""
    genes = tuple(f"ENSG9{i:010d}" for i in range(n_genes))
    return Vocabulary("random", genes, np.ones(n_genes), ("<pad>", "<mask>"), length)


def lesson(n_cells: int, known: Vocabulary, seed: int = 0) -> Lesson:
    """Draw cells that fill the vocabulary's length, each gene at most once."""
    rng = np.random.default_rng(seed)
    length, first = known.max_length, len(known.specials)
    drawn = [rng.choice(len(known.genes), length, replace=False) + first for _ in range(n_cells)]
    found = Tokens(
        np.concatenate(drawn).astype(np.int32),
        np.arange(n_cells + 1, dtype=np.int64) * length,
        pd.Index([f"c{i}" for i in range(n_cells)]),
        pd.DataFrame(),
        known.sha256,
    )
    return Lesson(found, np.arange(n_cells) % N_EXPOSURES)


def published(n_steps: int, shape: Shape, known: Vocabulary) -> dict[str, float]:
    """Time so many steps of twelve cells by the Trainer; validation left out."""
    cells = lesson(n_steps * reference.MINIBATCH, known)
    done = reference.fit(
        cells,
        cells,
        known,
        shape,
        n_exposures=N_EXPOSURES,
        lr=5e-5,
        seed=0,
        most_steps=n_steps,
        accumulate=ACCUMULATE,
    )
    return _told(len(cells.truth), done.n_steps, done.cpu_seconds)


def ours(
    n_cells: int, shape: Shape, known: Vocabulary, config: GeneformerConfig
) -> dict[str, float]:
    """Time one pass of our loop over so many cells; validation left out."""
    told = backbone.shape_of(
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        ffn=shape.ffn,
        vocabulary_size=len(known),
        max_length=known.max_length,
    )
    bert = backbone.build(told, seed=0, dropout=config.dropout).bert
    network = Network(
        bert,
        N_EXPOSURES,
        has_votes=config.has_votes,
        vector_dropout=config.vector_dropout,
        genes_per_cell=float(known.max_length),
    )
    layout = config.layout(has_specials=False)
    started = time.process_time()
    loop = Loop(network, lesson(n_cells, known), lesson(1, known), config, layout, seed=0)
    loop.run(silent)
    spent = time.process_time() - started
    return _told(n_cells, -(-n_cells // config.minibatch_cells), spent)


def _told(n_cells: int, n_steps: int, cpu_seconds: float) -> dict[str, float]:
    return {
        "n_cells": n_cells,
        "n_steps": n_steps,
        "cpu_seconds": cpu_seconds,
        "cpu_ms_per_cell": 1000 * cpu_seconds / n_cells,
    }


def main() -> None:
    """Print one JSON line per side, and the ratio per cell."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=20, help="of 12 cells, for the reference")
    options.add_argument("--cells", type=int, default=240, help="of ours")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    config = GeneformerConfig(epochs=1, min_steps=1, precision="fp32")
    known = vocabulary(N_GENES, LENGTH)
    with threadpool_limits(1):
        cheap = ours(chosen.cells, V1_10M, known, config)
        print(json.dumps({"side": "ours", **cheap}), flush=True)
        dear = published(chosen.steps, V1_10M, known)
        print(json.dumps({"side": "published recipe", **dear}), flush=True)
    print(f"{dear['cpu_ms_per_cell'] / cheap['cpu_ms_per_cell']:.1f} times cheaper per cell")


if __name__ == "__main__":
    main()
