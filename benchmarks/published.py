"""What this project's Geneformer costs against the published way to fine-tune, at equal quality.

Both sides start from the same counts, with the same vocabulary, split, size of backbone and
random start, and end with a model that was chosen by the same validation cells. Costs are
processor seconds of one thread, tokenising and validation passes included; ours also pays for
calibration and for remembering what training cells look like. Each finished fit is one JSON line
in a file, and a line that is there is not measured again:

    python benchmarks/published.py --rows ROWS.jsonl --data FOLDER   # hours; may be stopped
    python benchmarks/published.py --rows ROWS.jsonl --table
    python benchmarks/published.py --quick     # minutes: one fold, one seed; DATA as above

The reference's learning rate is chosen among three on one seed of every task's first fold, by
validation loss; the two fits that lose are not counted in any ratio.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import reference
import tasks
import torch
import transformers
from reference import Shape
from threadpoolctl import threadpool_limits

from endoprint import tokens
from endoprint.encoder.loop import Lesson
from endoprint.models.geneformer import Geneformer, GeneformerConfig
from endoprint.models.logistic import Logistic
from endoprint.simulate import SimulateConfig
from endoprint.vocabulary import Vocabulary

Row = dict[str, Any]

PUBLISHED, LOGISTIC = "published recipe", "logistic"
# side -> what its Config says beside the shape
OURS: dict[str, dict[str, Any]] = {"ours": {}, "ours without votes": {"has_votes": False}}
SHAPES = {"2 x 64": Shape(2, 64, 2, 128), "4 x 128": Shape(4, 128, 2, 256)}
SEEDS = 5
HISTORY = ("valid_loss", "valid_macro_f1", "cpu_seconds")  # of every epoch
TOLERANCE = 0.01  # of macro-F1: what is called equal
QUICK = SimulateConfig(cells=1500, genes=300, median_umi=600, pool_cells=0)


@dataclass(frozen=True)
class Job:
    """One fit: who, of which size, from which seed; `lr` is the reference's, else 0."""

    side: str
    shape: str
    seed: int
    lr: float = 0.0


# -- measuring ----------------------------------------------------------------------------------
def measure(job: Job, fold: tasks.Fold) -> Row:
    """Fit once and judge on what was held out."""
    if job.side == PUBLISHED:
        found = _published(job, fold)
    else:
        found = _ours(job, fold) if job.side in OURS else _logistic(job, fold)
    return {**key_of(job, fold), **found, "n_train": fold.train.n_obs}


def key_of(job: Job, fold: tasks.Fold) -> Row:
    """Return what a finished row is known by: a changed recipe is measured again."""
    recipe = config_of(job).model_dump(mode="json") if job.side in OURS else {}
    return {"task": fold.task, "fold": fold.name, **asdict(job), "recipe": recipe}


def config_of(job: Job) -> GeneformerConfig:
    """Return our recipe at a size."""
    values = {**asdict(SHAPES[job.shape]), **OURS[job.side]}
    return GeneformerConfig.of(values, where=job.side)


def _published(job: Job, fold: tasks.Fold) -> Row:
    started = time.process_time()
    vocabulary = Vocabulary.fit(fold.train)
    exposures, train, valid = lessons(fold, vocabulary)
    prepared = time.process_time() - started
    done = reference.fit(
        train,
        valid,
        vocabulary,
        SHAPES[job.shape],
        n_exposures=len(exposures),
        lr=job.lr,
        seed=job.seed,
    )
    _, held_out = lessons_of(fold, vocabulary, exposures)
    return {
        "macro_f1": reference.macro_f1(held_out.truth, done.answers(held_out.tokens)),
        "valid_loss": done.best.valid_loss,
        "cpu_seconds": prepared + done.cpu_seconds,
        "epochs": len(done.epochs),
        "best_epoch": done.epochs.index(done.best) + 1,
        "steps": done.n_steps,
        "cell_steps": len(done.epochs) * fold.train.n_obs,
        "history": [asdict(epoch) for epoch in done.epochs],
    }


def _ours(job: Job, fold: tasks.Fold) -> Row:
    heard: list[dict[str, float]] = []
    model = Geneformer(config_of(job), seed=job.seed)
    started = time.process_time()

    def watch(epoch: int, metrics: dict[str, float]) -> None:
        heard.append(metrics | {"cpu_seconds": time.process_time() - started})

    model.fit(fold.train, fold.valid, watch=watch)
    spent = time.process_time() - started
    epochs = int(model.provenance["epochs"])
    return {
        "macro_f1": _judged(model, fold),
        "valid_loss": min(metrics["valid_loss"] for metrics in heard),
        "cpu_seconds": spent,
        "epochs": epochs,
        "best_epoch": int(model.provenance["best_epoch"]),
        "cell_steps": epochs * fold.train.n_obs,
        "history": [{name: epoch[name] for name in HISTORY} for epoch in heard],
    }


def _logistic(job: Job, fold: tasks.Fold) -> Row:
    model = Logistic(seed=job.seed)
    started = time.process_time()
    model.fit(fold.train, fold.valid)
    spent = time.process_time() - started
    return {"macro_f1": _judged(model, fold), "cpu_seconds": spent}


def _judged(model: Geneformer | Logistic, fold: tasks.Fold) -> float:
    truth = _columns(fold.held_out.obs, model.exposures)
    return reference.macro_f1(truth, model.evidence(fold.held_out))


def lessons(fold: tasks.Fold, vocabulary: Vocabulary) -> tuple[list[str], Lesson, Lesson]:
    """Return the exposures, and training and validation cells as tokens."""
    exposures = sorted(set(fold.train.obs["exposure"].astype(str)))
    train, valid = (
        Lesson(tokens.of(cells, vocabulary), _columns(cells.obs, exposures))
        for cells in (fold.train, fold.valid)
    )
    return exposures, train, valid


def lessons_of(
    fold: tasks.Fold, vocabulary: Vocabulary, exposures: list[str]
) -> tuple[list[str], Lesson]:
    """Return the exposures and the held-out cells as tokens."""
    held_out = fold.held_out
    return exposures, Lesson(tokens.of(held_out, vocabulary), _columns(held_out.obs, exposures))


def _columns(obs: pd.DataFrame, exposures: list[str]) -> np.ndarray[Any, np.dtype[Any]]:
    return pd.Index(exposures).get_indexer(pd.Index(obs["exposure"].astype(str)))


# -- what is measured, in which order -----------------------------------------------------------
def folds_of(options: argparse.Namespace) -> Iterator[tasks.Fold]:
    """Give the folds in the order of their worth: donors, two plates, simulated, other plates."""
    if options.quick:
        yield next(tasks.real("kang", options.data) if options.data else tasks.simulated(QUICK))
        return
    plates: list[tasks.Fold] = []
    if options.data:
        yield from tasks.real("kang", options.data)
        plates = list(tasks.real("a549", options.data))
        yield from plates[:2]
    yield from tasks.simulated()
    yield from plates[2:]


def jobs_of(fold: tasks.Fold, shape: str, seeds: int, rows: list[Row]) -> Iterator[Job]:
    """Give the fits of one fold at one size: cheap ones first, then the reference.

    `rows` grows while the jobs are done: the reference's rate is read from it.
    """
    for side, seed in itertools.product((LOGISTIC, *OURS), range(seeds)):
        yield Job(side, shape, seed)
    if best_rate(rows, fold.task, shape) is None:
        for lr in reference.LEARNING_RATES:
            yield Job(PUBLISHED, shape, 0, lr)
    lr = best_rate(rows, fold.task, shape)
    for seed in range(seeds) if lr is not None else ():
        yield Job(PUBLISHED, shape, seed, lr)


def best_rate(rows: Sequence[Row], task: str, shape: str) -> float | None:
    """Return the reference's rate with the lowest validation loss of the first fold and seed.

    None until every rate was tried there.
    """
    of_task = [r for r in rows if (r["task"], r["shape"], r["side"]) == (task, shape, PUBLISHED)]
    tried = [r for r in of_task if r["seed"] == 0 and r["fold"] == of_task[0]["fold"]]
    if len({row["lr"] for row in tried}) < len(reference.LEARNING_RATES):
        return None
    return float(min(tried, key=lambda row: row["valid_loss"])["lr"])


def run(options: argparse.Namespace) -> None:
    """Measure what is asked for and not yet there, one line per fit."""
    rows = read(options.rows)
    done = {_id(row) for row in rows}
    chosen = [fold for fold in folds_of(options) if options.task in ("", fold.task)]
    if options.fold:
        chosen = [fold for fold in chosen if fold.name in options.fold]
    for shape in options.shapes:
        for fold in chosen:
            for job in jobs_of(fold, shape, options.seeds, rows):
                if _id(key_of(job, fold)) in done or options.side not in ("", job.side):
                    continue
                rows.append(measure(job, fold))
                done.add(_id(rows[-1]))
                with options.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                said = {name: rows[-1][name] for name in ("macro_f1", "cpu_seconds")}
                print(fold.task, fold.name, *asdict(job).values(), said, flush=True)


def _id(row: Row) -> str:
    names = ("task", "fold", "side", "shape", "seed", "lr", "recipe")
    return json.dumps([row[name] for name in names], sort_keys=True)


def read(path: Path) -> list[Row]:
    """Return the finished rows of a file; a last line cut short by a kill is left out."""
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            print("left out, not a whole line:", line[:60])
    return rows


# -- the table ----------------------------------------------------------------------------------
def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table: one line per fold, size and side, ratios against the reference."""
    lines = [
        "| task, held out | backbone | who | macro-F1, mean (range), n | "
        "CPU s (till it was as good) | times cheaper | "
        "= per cell and pass x fewer passes | equal quality? |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, fold, shape in dict.fromkeys((r["task"], r["fold"], r["shape"]) for r in rows):
        of_fold = [r for r in rows if (r["task"], r["fold"], r["shape"]) == (task, fold, shape)]
        lr = best_rate(rows, task, shape)
        bar = [r for r in of_fold if r["side"] == PUBLISHED and r["lr"] == lr]
        for side in (PUBLISHED, *OURS, LOGISTIC):
            ours = [row for row in of_fold if row["side"] == side] if side != PUBLISHED else bar
            if ours:
                told = " | ".join(compared(ours, bar))
                where = f"{task}, {fold}".replace("|", " ")  # a unit's own name may hold one
                lines.append(f"| {where} | {shape} | {_named(side, bar)} | {told} |")
    return "\n".join(lines)


def _named(side: str, bar: Sequence[Row]) -> str:
    return f"{side}, lr {bar[0]['lr']:g}" if side == PUBLISHED and bar else side


def compared(ours: Sequence[Row], bar: Sequence[Row]) -> list[str]:
    """Return the cells of one line: score, cost, ratio, its two causes, and whether it is equal.

    The ratio is the product of its causes: cost per cell and pass (validation and preparation
    shared out over the passes), and the number of times a training cell is gone through.
    """
    f1 = np.array([row["macro_f1"] for row in ours])
    cpu = _mean(ours, "cpu_seconds")
    cells = [f"{f1.mean():.3f} ({f1.min():.3f} to {f1.max():.3f}), {len(f1)}", f"{cpu:.1f}"]
    if all("history" in row for row in ours):
        cells[1] += f" ({np.mean([seconds_till_as_good(row) for row in ours]):.1f})"
    if not bar or ours == bar:
        return [*cells, "", "", ""]
    ratio = _mean(bar, "cpu_seconds") / cpu
    causes = ""
    if "cell_steps" in ours[0]:
        fewer = _mean(bar, "cell_steps") / _mean(ours, "cell_steps")
        causes = f"{ratio / fewer:.1f} x {fewer:.2f}"
    short = _mean(bar, "macro_f1") - f1.mean()
    verdict = "yes" if short <= TOLERANCE else "no"
    return [*cells, f"{ratio:.1f}", causes, f"{verdict} ({-short:+.3f})"]


def seconds_till_as_good(row: Row) -> float:
    """Return what a fit had cost when validation cells were first called as well as ever.

    Within a hundredth of its best macro-F1: what one would pay who knew when to stop.
    """
    scores = [epoch["valid_macro_f1"] for epoch in row["history"]]
    first = next(i for i, score in enumerate(scores) if score >= max(scores) - TOLERANCE)
    return float(row["history"][first]["cpu_seconds"])


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def main() -> None:
    """Measure, or print the table of what was measured."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=Path, help="file of finished fits, one JSON line each")
    options.add_argument("--data", type=Path, help="folder of the two public h5ad files")
    options.add_argument("--quick", action="store_true", help="one fold and seed")
    options.add_argument("--table", action="store_true", help="only print the table of ROWS")
    options.add_argument("--task", default="", choices=["", "kang", "a549", "simulator"])
    options.add_argument("--fold", nargs="*", help="some folds, by what they hold out")
    options.add_argument("--side", default="", choices=["", PUBLISHED, LOGISTIC, *OURS])
    options.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    options.add_argument("--seeds", type=int, default=SEEDS)
    chosen = options.parse_args()
    if chosen.quick:
        chosen.seeds, chosen.shapes = 1, ["2 x 64"]
    elif chosen.rows is None:
        options.error("--rows FILE says where finished fits are kept")
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    with threadpool_limits(1), tempfile.TemporaryDirectory() as folder:
        chosen.rows = chosen.rows or Path(folder) / "rows.jsonl"
        if not chosen.table:
            run(chosen)
        print(table(read(chosen.rows)))


if __name__ == "__main__":
    main()
