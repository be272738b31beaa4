"""What one GPU does: fine-tuning, inference, memory, at the published shapes with random weights.

`python benchmarks/gpu.py` (or `make gpu`) prints one JSON line per row in under ten minutes; where
there is no CUDA GPU it says so and measures nothing. `--try` walks the same code with tiny shapes
on whatever is here, to see that it runs: its figures mean nothing and are not printed.

MFU: (6 N + 12 L T D) FLOP per token, over time, over the matrix-product ceiling measured first
(8,192 square, bf16): N the weights of the layers' matrices, L layers, T tokens of a row, D width.
Nothing is padded (all cells are full length) and nothing recomputed is counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import transformers
from reference import Collator
from transformers import (
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from endoprint.encoder import backbone
from endoprint.encoder.checkpoints import CHECKPOINTS, Checkpoint
from endoprint.encoder.loop import Lesson, Loop
from endoprint.encoder.lora import adapt
from endoprint.encoder.network import Network, answer
from endoprint.encoder.recipe import Recipe
from endoprint.tokens import Tokens

N_EXPOSURES = 15
CEILING_WIDTH = 8192
PUBLISHED_MINIBATCH = 12  # cells of a step of the published recipe
GIB = 2**30
A100_FP32 = {"V1-10M": 4295.0, "V2-104M": 706.0, "V2-316M": 277.0}  # third-party, cells/s
TINY = Checkpoint("v2", 2, 32, 2, 64, 0.1, 0, "", None, 200)  # for --try


@dataclass(frozen=True)
class Size:
    """How much of a row is run."""

    length: int  # tokens of every cell
    cells: int  # per step or minibatch
    steps: int  # timed, after as many to warm up


def lesson(n_cells: int, length: int, n_tokens: int) -> Lesson:
    """Draw full-length cells of random genes, each at most once; random tokens change no cost."""
    rng = np.random.default_rng(0)
    first = 4  # beyond the special tokens
    drawn = [rng.choice(n_tokens - first, length, replace=False) + first for _ in range(n_cells)]
    tokens = Tokens(
        np.concatenate(drawn).astype(np.int32),
        np.arange(n_cells + 1, dtype=np.int64) * length,
        pd.Index([f"c{i}" for i in range(n_cells)]),
        pd.DataFrame(),
        "",
    )
    return Lesson(tokens, np.arange(n_cells) % N_EXPOSURES)


def network_of(row: Checkpoint, device: torch.device) -> Network:
    """Return a network of a published shape with random weights, its backbone alone."""
    bert = backbone.build(row.shape(), seed=0, dropout=0.0).bert
    return Network(bert, N_EXPOSURES, has_votes=False, uses_bf16=True).to(device)


def flop_per_token(row: Checkpoint, length: int) -> float:
    """Return the FLOP of a training step per token: forward once, backward twice as much."""
    weights = row.layers * (4 * row.hidden**2 + 2 * row.hidden * row.ffn)
    return 6.0 * weights + 12.0 * row.layers * length * row.hidden


def ceiling(device: torch.device, width: int) -> float:
    """Return the FLOP/s of a bf16 matrix product here, the best of ten."""
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = min(timed(device, lambda: a @ b) for _ in range(10))
    return 2.0 * width**3 / best


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Return the seconds that work took, the GPU's included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


# -- rows ---------------------------------------------------------------------------------------
def ours(
    row: Checkpoint, size: Size, device: torch.device, *, compiled: bool, lora: int = 0
) -> dict[str, float]:
    """Fine-tune with this project's loop: full attention, every token, bf16."""
    cells = lesson(size.cells * size.steps, size.length, row.n_tokens)
    recipe = Recipe(
        epochs=2, min_steps=0, block=0, block_share=1.0, has_votes=False,
        minibatch_cells=size.cells, minibatch_tokens=size.cells * size.length,
        precision="bf16", compile="on" if compiled else "off",
    )  # fmt: skip
    network = network_of(row, device)
    if lora:
        adapt(network, rank=lora, alpha=16.0, matrices="attention", seed=0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    nobody = Lesson(lesson(1, size.length, row.n_tokens).tokens, np.zeros(0, dtype=np.int64))
    loop = Loop(network, cells, nobody, recipe, recipe.layout(has_specials=False), seed=0)
    told: list[float] = []
    loop.run(lambda epoch, metrics: told.append(time.perf_counter()))
    # the first pass warms up; a pass ends by reading its losses, which waits for the GPU
    cells_per_second = size.cells * size.steps / (told[1] - told[0])
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
    return {"cells_per_second": cells_per_second, "peak_gib": peak}


def published(row: Checkpoint, size: Size, device: torch.device) -> dict[str, float]:
    """Fine-tune by the published recipe in bf16: transformers' Trainer, minibatches of 12."""
    cells = lesson(size.cells * size.steps, size.length, row.n_tokens)
    shape = row.shape()  # dropout as published
    shape.num_labels = N_EXPOSURES
    data = [
        {"input_ids": cells.tokens[i].astype(np.int64), "labels": int(cells.truth[i])}
        for i in range(len(cells.truth))
    ]
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=size.cells, num_train_epochs=1,
            learning_rate=5e-5, weight_decay=0.001, bf16=on_gpu, use_cpu=not on_gpu,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(
            BertForSequenceClassification(shape),
            arguments,
            train_dataset=data,
            data_collator=Collator(pad_id=0),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()  # warms up
        seconds = timed(device, trainer.train)
    return {"cells_per_second": len(data) / seconds}


def inference(row: Checkpoint, size: Size, device: torch.device) -> dict[str, float]:
    """Answer full-length cells, host to host: tokens in, logits and vectors out."""
    cells = lesson(size.cells * size.steps, size.length, row.n_tokens)
    network = network_of(row, device)
    layout = Recipe(block=0).layout(has_specials=False)
    budget = size.cells * size.length

    def read() -> None:
        answer(network, cells.tokens, layout, minibatch_tokens=budget)

    read()
    return {"cells_per_second": len(cells.truth) / timed(device, read)}


# -- the table ----------------------------------------------------------------------------------
def rows(device: torch.device, *, is_try: bool) -> list[dict[str, object]]:
    """Measure every row; with `is_try` the same code, tiny."""
    told: list[dict[str, object]] = []

    def say(name: str, **figures: object) -> None:
        told.append({"row": name, **figures})
        if not is_try:
            print(json.dumps(told[-1], default=float), flush=True)

    def shape(name: str) -> Checkpoint:
        return TINY if is_try else CHECKPOINTS[name]

    def size(length: int, cells: int, steps: int) -> Size:
        return Size(64, 3, 2) if is_try else Size(length, cells, steps)

    most = ceiling(device, 64 if is_try else CEILING_WIDTH)
    say("bf16 matrix product", tflop_per_second=most / 1e12)
    big, full = shape("V2-104M"), size(4096, 16, 12)
    per_cell = flop_per_token(big, full.length) * full.length
    reference = published(big, size(4096, PUBLISHED_MINIBATCH, 12), device)
    say("fine-tuning V2-104M, 4,096 tokens: Trainer, bf16", **reference)
    for compiled in (False, True):
        found = ours(big, full, device, compiled=compiled and not is_try)
        say(
            f"fine-tuning V2-104M, 4,096 tokens: ours{', compiled' if compiled else ''}",
            **found,
            mfu=found["cells_per_second"] * per_cell / most,
            times_trainer=found["cells_per_second"] / reference["cells_per_second"],
        )
    for name, length in (("V1-10M", 2048), ("V2-104M", 4096), ("V2-316M", 4096)):
        found = inference(shape(name), size(length, 32, 16), device)
        times = found["cells_per_second"] / A100_FP32[name]
        say(f"inference {name}, {length:,} tokens", **found, times_a100_fp32=times)
    found = ours(shape("V2-316M"), size(2048, 8, 4), device, compiled=False, lora=8)
    say("fine-tuning V2-316M, 2,048 tokens, LoRA: peak memory, 8 cells a step", **found)
    return told


def main() -> None:
    """Print the rows, or the one line that says why there are none."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--try", dest="is_try", action="store_true", help="tiny, no figures")
    is_try = options.parse_args().is_try
    transformers.logging.set_verbosity_error()
    has_gpu = torch.cuda.is_available()
    if is_try:
        n = len(rows(torch.device("cuda" if has_gpu else "cpu"), is_try=True))
        print(f"{n} rows were walked through with tiny shapes; nothing was measured")
        return
    if not has_gpu:
        print("no CUDA GPU here: no GPU row was measured")
        return
    held = torch.cuda.get_device_properties(0)
    about = {"device": held.name, "memory_gib": held.total_memory / GIB}
    print(json.dumps({**about, "torch": torch.__version__, "command": " ".join(sys.argv)}))
    began = time.perf_counter()
    rows(torch.device("cuda"), is_try=False)
    print(json.dumps({"minutes": (time.perf_counter() - began) / 60}))


if __name__ == "__main__":
    main()
