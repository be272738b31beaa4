"""What each lever of an encoder costs and brings, alone and together.

Simulated cells, 15 exposures, easy, 1,500 training cells, units held out; and interferon in blood
cells (Kang 2018) where a folder of it is given. Costs are processor seconds of one thread for a
whole fit: tokenising, reading frozen layers, validation, calibration. Rows that begin from a
backbone share one per seed, pre-trained here on 800 other simulated cells (Kang: on the training
cells); its cost is no row's.
A finished fit is one JSON line, and a line that is there is not measured again:

    python benchmarks/levers.py --rows ROWS.jsonl                      # or one --seed at a time
    python benchmarks/levers.py --rows ROWS.jsonl --shared FOLDER      # Kang as well
    python benchmarks/levers.py --rows ROWS.jsonl --table
    python benchmarks/levers.py --steps    # cost of one training cell, 4 x 128, under a minute
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tasks
from sklearn.metrics import f1_score
from threadpoolctl import threadpool_limits

from endoprint import cells, tokens
from endoprint.design import DesignConfig, make_split
from endoprint.encoder import backbone
from endoprint.encoder.activations import Activations
from endoprint.encoder.frozen import states_of
from endoprint.encoder.loop import Lesson, Loop
from endoprint.encoder.lora import adapt
from endoprint.encoder.network import Network, as_it_is
from endoprint.encoder.pretrain import PretrainConfig, pretrain
from endoprint.model import ExposureModel, Resources
from endoprint.models.geneformer import Geneformer, GeneformerConfig
from endoprint.models.logistic import Logistic
from endoprint.simulate import SimulateConfig, simulate
from endoprint.vocabulary import Vocabulary

SIMULATED = SimulateConfig(cells=3000, genes=300, median_umi=450, pool_cells=800)
SEEDS = 3
BASE = "default: 2 x 64, random start, votes"
FROM = "default from a backbone"


@dataclass(frozen=True)
class Lever:
    """One way to fit: what its Config says, and whether it begins from the backbone."""

    name: str
    against: str  # the row it is compared with
    change: dict[str, Any] = field(default_factory=dict)
    has_backbone: bool = False
    keeps: str = ""  # rows of one name share a folder for what frozen layers say
    is_again: bool = False  # measured when that folder is filled


FROZEN = {"frozen_layers": 1}
HEAD = {"head_only": True, "has_votes": False}
LEVERS = (
    Lever("logistic regression", BASE),
    Lever(BASE, BASE),
    Lever("attention over whole cells (block 0)", BASE, {"block": 0}),
    Lever("all blocks in every step (block_share 1)", BASE, {"block_share": 1.0}),
    Lever("attention dropout .02", BASE, {"attention_dropout": 0.02}),
    Lever("mean instead of rank-weighted pooling", BASE, {"pooling": "mean"}),
    Lever("no votes", BASE, {"has_votes": False}),
    Lever("no layers", BASE, {"layers": 0}),
    Lever("layers grown after 3 of 5 epochs", BASE, {"grow_after": 3}),
    Lever("structured head", BASE, {"head": "structured"}),
    Lever("gradient checkpointing", BASE, {"gradient_checkpointing": True}),
    Lever("grown, structured, checkpointed", BASE,
          {"grow_after": 3, "head": "structured", "gradient_checkpointing": True}),
    Lever(FROM, FROM, {}, True),
    Lever("1 of 2 layers frozen, nothing kept", FROM, FROZEN, True),
    Lever("the same, kept (fp32), first fit", FROM, FROZEN, True, "fp32"),
    Lever("the same, kept (fp32), next fit", FROM, FROZEN, True, "fp32", True),
    Lever("the same, kept (fp16), next fit", FROM, {**FROZEN, "cache_precision": "fp16"}, True,
          "fp16", True),
    Lever("LoRA, rank 8, attention", FROM, {"lora_rank": 8}, True),
    Lever("LoRA on the layer above a frozen one, kept, next fit", FROM,
          {**FROZEN, "lora_rank": 8}, True, "fp32", True),
    Lever("head only, first fit", FROM, HEAD, True, "head"),
    Lever("head only, next fit", FROM, HEAD, True, "head", True),
)  # fmt: skip


@dataclass(frozen=True)
class Material:
    """What one seed's fits are given."""

    fold: tasks.Fold
    folder: Path  # for a backbone and for what frozen layers say
    backbone: Path


def simulated(seed: int, folder: Path) -> Material:
    """Draw an atlas, hold its test units out, and pre-train a backbone on its pool."""
    drawn = simulate(SIMULATED, seed)
    known, _ = cells.curate(drawn.cells, tasks.SIMULATED_CELLS)
    split = make_split(known.obs, DesignConfig(), seed)
    parts = split.parts(known.obs, None)
    fold = tasks.Fold(
        "simulator",
        "+".join(split.test),
        *(known[at].copy() for at in (parts.train, parts.valid, parts.held_out)),
    )
    assert drawn.pool is not None
    pool = drawn.pool.copy()
    pool.var_names = pool.var["gene_ids"].astype(str).to_numpy()
    return Material(fold, folder, pretrained(pool, folder / "backbone", seed))


def kang(shared: Path, seed: int, folder: Path) -> Material:
    """Hold the first donor out; the backbone is pre-trained on the donors that are fitted on."""
    fold = next(tasks.real("kang", shared / "data/real"))
    return Material(fold, folder, pretrained(fold.train, folder / "backbone", seed))


def pretrained(pool: Any, folder: Path, seed: int) -> Path:
    """Return the folder of a small backbone."""
    vocabulary = Vocabulary.fit(pool)
    config = PretrainConfig(layers=2, hidden=64, heads=2, ffn=128, epochs=2)
    pretrain(tokens.of(pool, vocabulary), vocabulary, config, folder, units=[], seed=seed)
    return folder


def fitted(lever: Lever, material: Material, seed: int) -> dict[str, float]:
    """Fit once and judge on what was held out."""
    fold = material.fold
    resources = Resources(
        backbone=material.backbone if lever.has_backbone else None,
        activations=material.folder / lever.keeps if lever.keeps else None,
    )
    config = GeneformerConfig(**lever.change)

    def fit() -> tuple[ExposureModel, float]:
        began = time.process_time()
        is_bar = lever.name == "logistic regression"
        model = (
            Logistic(seed=seed) if is_bar else Geneformer(config, seed=seed, resources=resources)
        )
        model.fit(fold.train, fold.valid)
        return model, time.process_time() - began

    if lever.is_again and not (material.folder / lever.keeps).exists():
        fit()
    model, cpu_seconds = fit()
    began = time.process_time()
    told = model.predict_proba(fold.held_out)
    answering = (time.process_time() - began) * 1000 / fold.held_out.n_obs
    calls = told.columns.to_numpy()[told.to_numpy().argmax(axis=1)]
    truth = fold.held_out.obs["exposure"].astype(str).to_numpy()
    f1 = f1_score(truth, calls, average="macro", labels=sorted(set(truth)))
    return {"macro_f1": float(f1), "cpu_seconds": cpu_seconds, "cpu_s_per_1000_cells": answering}


def measured(rows: Path, seeds: list[int], shared: Path | None) -> None:
    """Measure what is not in the file yet; one line each."""
    with threadpool_limits(1), tempfile.TemporaryDirectory() as place:
        for task in ("simulator", "kang") if shared else ("simulator",):
            for seed in seeds:
                done = {(row["task"], row["seed"], row["lever"]) for row in read(rows)}
                wanted = [each for each in LEVERS if (task, seed, each.name) not in done]
                if not wanted:
                    continue
                folder = Path(place) / f"{task}-{seed}"
                folder.mkdir()
                material = (
                    kang(shared, seed, folder)
                    if task == "kang" and shared
                    else (simulated(seed, folder))
                )
                for lever in wanted:
                    row = {"task": task, "seed": seed, "lever": lever.name}
                    row |= {"n_train": material.fold.train.n_obs, **fitted(lever, material, seed)}
                    with rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, flush=True)


def read(rows: Path) -> Iterator[dict[str, Any]]:
    """Return the rows measured so far."""
    if rows.is_file():
        yield from map(json.loads, rows.read_text().splitlines())


def table(rows: Path) -> str:
    """Return the figures as markdown: means over seeds, and differences within a seed."""
    frame = pd.DataFrame(list(read(rows)))
    lines = []
    for task, of_task in frame.groupby("task", sort=False):
        by_seed = of_task.set_index(["lever", "seed"])
        n_train = sorted(set(of_task["n_train"]))
        lines += [
            f"{task}, {' to '.join(map(str, dict.fromkeys((n_train[0], n_train[-1]))))} "
            "training cells:",
            "",
            "| lever | seeds | CPU s of a fit | of its base | macro-F1 "
            "| against its base, by seed | CPU s per 1,000 answers |",
            "|---|---|---|---|---|---|---|",
        ]
        for lever in LEVERS:
            if lever.name not in set(of_task["lever"]) or lever.against not in set(
                of_task["lever"]
            ):
                continue
            mine, base = by_seed.loc[lever.name], by_seed.loc[lever.against]
            seeds = mine.index.intersection(base.index)
            mine, base = mine.loc[seeds], base.loc[seeds]
            share = mine["cpu_seconds"].sum() / base["cpu_seconds"].sum()
            by = (mine["macro_f1"] - base["macro_f1"]).sort_index()
            same = lever.name == lever.against
            lines.append(
                f"| {lever.name} | {len(seeds)} | {mine['cpu_seconds'].mean():.1f} "
                f"| {share:.2f} | {mine['macro_f1'].mean():.3f} "
                f"| {'' if same else ' '.join(f'{each:+.3f}' for each in by)} "
                f"| {mine['cpu_s_per_1000_cells'].mean():.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def steps() -> None:
    """Print the cost of one training cell under each lever, 4 x 128 at 256 tokens, as markdown."""
    rng = np.random.default_rng(0)
    n_cells, n_tokens, n_genes, n_steps = 12, 256, 2000, 4
    values = np.concatenate([4 + rng.permutation(n_genes)[:n_tokens] for _ in range(n_cells)])
    offsets = np.arange(n_cells + 1) * n_tokens
    ids = pd.Index([f"c{i}" for i in range(n_cells)])
    found = tokens.Tokens(values.astype(np.int32), offsets, ids, pd.DataFrame(), "")
    truth = np.arange(n_cells) % 3
    print("| lever | CPU ms per training cell |\n|---|---|", flush=True)
    whole = {"block": 0, "block_share": 1.0, "has_votes": False, "minibatch_cells": n_cells}
    for name, change, is_kept in (
        ("everything learns", {}, False),
        ("gradient checkpointing", {"gradient_checkpointing": True}, False),
        ("3 of 4 layers frozen", {"frozen_layers": 3}, False),
        ("the same, kept (fp32)", {"frozen_layers": 3}, True),
        ("the same, kept (fp16)", {"frozen_layers": 3, "cache_precision": "fp16"}, True),
        ("LoRA, rank 8, attention", {"lora_rank": 8}, False),
        ("LoRA, rank 8, all matrices", {"lora_rank": 8, "lora_matrices": "all"}, False),
        ("LoRA above 3 frozen layers, kept", {"frozen_layers": 3, "lora_rank": 8}, True),
    ):
        recipe = GeneformerConfig(**{**whole, **change}, epochs=1, min_steps=0)
        shape = backbone.shape_of(
            layers=4, hidden=128, heads=2, ffn=256, vocabulary_size=n_genes + 4, max_length=256
        )
        model = backbone.build(shape, seed=0, dropout=0.0)
        network = Network(model.bert, 3, has_votes=False)
        network.freeze(recipe.frozen_layers)
        network.recomputes = recipe.gradient_checkpointing
        if recipe.lora_rank:
            matrices = recipe.lora_matrices
            adapt(network, rank=recipe.lora_rank, alpha=16.0, matrices=matrices, seed=0)
        layout = recipe.layout(has_specials=False)
        with tempfile.TemporaryDirectory() as place, threadpool_limits(1):
            put = as_it_is
            if is_kept:
                store = Activations(Path(place), gib=1.0, precision=recipe.cache_precision)
                put = states_of(network, found, layout, store, minibatch_tokens=65_536).put
            lesson, nobody = Lesson(found, truth, put), Lesson(found, truth[:0])
            loop = Loop(network, lesson, nobody, recipe, layout, seed=0)
            network.train()
            took = []
            for _ in range(n_steps):
                began = time.process_time()
                loop._step(np.arange(n_cells), rng)
                took.append((time.process_time() - began) * 1000 / n_cells)
        print(f"| {name} | {np.median(took[1:]):.1f} |", flush=True)


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=Path, default=Path("levers.jsonl"))
    parser.add_argument("--shared", type=Path, help="folder with data/real/ of Kang's cells")
    parser.add_argument("--seed", type=int, help="one seed only; several may run side by side")
    parser.add_argument("--table", action="store_true", help="print, measure nothing")
    parser.add_argument("--steps", action="store_true", help="the cost of a training cell alone")
    asked = parser.parse_args()
    if asked.steps:
        steps()
        return
    if not asked.table:
        seeds = list(range(SEEDS)) if asked.seed is None else [asked.seed]
        measured(asked.rows, seeds, asked.shared)
    print(table(asked.rows))


if __name__ == "__main__":
    main()
