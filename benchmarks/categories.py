"""What one more exposure costs: one model for all of them, and one model for each.

Two questions, on simulated cells of six lines, each with every one of the source atlas's 23
exposures (control, 14 hormones and antagonists, 8 endocrine disruptors). Lines are the units:
three fit, one validates, two are held out. About 2,000 cells whatever the number of exposures, so
that more exposures mean fewer cells of each.

- 2, 5, 15 and 23 exposures: processor seconds of a fit and macro-F1 on unseen lines, of the
  default Geneformer recipe and of logistic regression.
- 15 exposures in one fit against 14 fits of one exposure and control, on the very same cells. The
  one fit answers each binary question by its probabilities of those two, made to sum to one.

One thread. Each finished fit is one JSON line in a file and is not measured again:

    python benchmarks/categories.py --rows ROWS.jsonl [--seeds 3]
    python benchmarks/categories.py --rows ROWS.jsonl --table
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from sklearn.metrics import f1_score
from threadpoolctl import threadpool_limits

from endoprint import cells
from endoprint.cells import CellsConfig
from endoprint.design import DesignConfig, make_split
from endoprint.labels import CONTROL, DISRUPTORS, HORMONES
from endoprint.models.geneformer import Geneformer
from endoprint.models.logistic import Logistic
from endoprint.simulate import SimulateConfig, simulate

Row = dict[str, Any]

N_CELLS = 2000
UNITS = 6
# Named before anything was measured; each set holds the one before it
SETS: dict[int, tuple[str, ...]] = {
    2: (CONTROL, "ANDROGEN_AGONIST"),
    5: (CONTROL, "ANDROGEN_AGONIST", "ESTROGEN_AGONIST", "GLUCOCORT_AGONIST", "THYROID_AGONIST"),
    15: (CONTROL, *HORMONES),
    23: (CONTROL, *HORMONES, *DISRUPTORS),
}
# Every line holds every exposure, disruptors too, only among the cells drawn as new ones
ATLAS = SimulateConfig(
    cells=90, genes=1000, pool_cells=0, new_cells=24 * UNITS * 170, new_units=UNITS
)
CELLS = CellsConfig(
    exposure_key="condition",
    control=CONTROL,
    unit_keys=["line"],
    line_key="line",
    cell_type_key="cell_type",
    gene_id_key="gene_ids",
)
MODELS = {"geneformer": Geneformer, "logistic": Logistic}


@dataclass(frozen=True)
class Fold:
    """Cells to fit on, to validate on, and of unseen lines."""

    train: AnnData
    valid: AnnData
    held_out: AnnData

    def among(self, exposures: tuple[str, ...]) -> Fold:
        """Return the cells of some exposures only."""
        parts = (self.train, self.valid, self.held_out)
        return Fold(*(part[part.obs["exposure"].isin(exposures)].copy() for part in parts))


def atlas(seed: int) -> AnnData:
    """Draw all cells of one seed, with what each met."""
    drawn = simulate(ATLAS, seed)
    assert drawn.new is not None
    known = drawn.new.copy()
    known.obs["condition"] = drawn.hidden.loc[known.obs_names, "exposure"].to_numpy()
    return known


def fold(drawn: AnnData, exposures: tuple[str, ...], seed: int) -> Fold:
    """Take as many cells of each exposure and line as make 2,000, and hold two lines out."""
    rng = np.random.default_rng([seed, len(exposures)])
    obs = drawn.obs.reset_index(drop=True)
    obs = obs[obs["condition"].isin(exposures)].iloc[
        rng.permutation(int(obs["condition"].isin(exposures).sum()))
    ]
    turn = obs.groupby(["condition", "line"], observed=True).cumcount()
    chosen = np.sort(obs.index[turn < round(N_CELLS / len(exposures) / UNITS)])
    known, _ = cells.curate(drawn[chosen].copy(), CELLS)
    split = make_split(known.obs, DesignConfig(), seed)
    parts = split.parts(known.obs, None)
    return Fold(*(known[at].copy() for at in (parts.train, parts.valid, parts.held_out)))


def measure(name: str, given: Fold, seed: int) -> tuple[Row, pd.DataFrame]:
    """Fit once; return cost and score, and the probabilities of held-out cells."""
    model = MODELS[name](seed=seed)
    started = time.process_time()
    model.fit(given.train, given.valid)
    spent = time.process_time() - started
    told = model.predict_proba(given.held_out)
    truth = given.held_out.obs["exposure"].astype(str).to_numpy()
    return {
        "cpu_seconds": spent,
        "macro_f1": macro_f1(told, truth),
        "n_train": given.train.n_obs,
        "n_held_out": given.held_out.n_obs,
        "cell_passes": int(model.provenance.get("epochs", 0)) * given.train.n_obs,
    }, told


def macro_f1(told: pd.DataFrame, truth: np.ndarray[Any, Any]) -> float:
    """Return the mean F1 over exposures of the likeliest calls."""
    calls = told.columns.to_numpy()[told.to_numpy().argmax(axis=1)]
    return float(f1_score(truth, calls, average="macro", zero_division=0))


def binary_scores(told: pd.DataFrame, held_out: AnnData) -> dict[str, float]:
    """Return macro-F1 on each question of one exposure against control, from all probabilities."""
    truth = held_out.obs["exposure"].astype(str).to_numpy()
    scores = {}
    for exposure in HORMONES:
        asked = np.isin(truth, (CONTROL, exposure))
        two = told.loc[asked, [CONTROL, exposure]]
        # dividing by their sum makes them probabilities and changes no call
        scores[exposure] = macro_f1(two.div(two.sum(axis=1), axis=0), truth[asked])
    return scores


# -- running ------------------------------------------------------------------------------------
def run(path: Path, seeds: int) -> None:
    """Measure what is not there yet: first every number of exposures, then the binary fits."""
    done = {_id(row) for row in read(path)}
    for kind in ("numbers", "binary"):
        for seed in range(seeds):
            drawn = atlas(seed)
            for row, given, model in jobs(kind, drawn, seed):
                if _id(row) in done:
                    continue
                found, told = measure(model, given, seed)
                if row["exposures"] == 15 and row["only"] == "":
                    found["binary"] = binary_scores(told, given.held_out)
                with path.open("a") as file:
                    file.write(json.dumps({**row, **found}) + "\n")
                print({**row, **found}, flush=True)


def jobs(kind: str, drawn: AnnData, seed: int) -> Iterator[tuple[Row, Fold, str]]:
    """Give what names a fit, its cells, and the model."""
    if kind == "numbers":
        for n, exposures in SETS.items():
            given = fold(drawn, exposures, seed)
            for model in MODELS:
                yield {"exposures": n, "only": "", "model": model, "seed": seed}, given, model
        return
    given = fold(drawn, SETS[15], seed)
    for exposure in HORMONES:
        two = given.among((CONTROL, exposure))
        for model in MODELS:
            yield {"exposures": 15, "only": exposure, "model": model, "seed": seed}, two, model


def _id(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("exposures", "only", "model", "seed"))


def read(path: Path) -> list[Row]:
    """Return the finished fits."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# -- the tables ---------------------------------------------------------------------------------
def table(rows: list[Row]) -> str:
    """Return both tables in Markdown."""
    lines = ["| exposures | model | macro-F1 on unseen lines, per seed | CPU s of a fit |"]
    lines.append("|---|---|---|---|")
    for n in SETS:
        for model in MODELS:
            of = [r for r in rows if _id(r)[:3] == (n, "", model)]
            scores = " ".join(f"{r['macro_f1']:.3f}" for r in of)
            spent = " ".join(f"{r['cpu_seconds']:.1f}" for r in of)
            lines.append(f"| {n} | {model} | {scores} | {spent} |")
    lines += ["", "| model, seed | one fit CPU s | 14 fits CPU s | ratio | cell passes, ratio |"]
    lines[-1] += " mean binary macro-F1, one / 14 | questions short by over .01 | worst |"
    lines.append("|---|---|---|---|---|---|---|---|")
    for seed in sorted({r["seed"] for r in rows}):
        for model in MODELS:
            lines += _one_against_many(
                [r for r in rows if (r["model"], r["seed"]) == (model, seed)]
            )
    return "\n".join(lines)


def _one_against_many(rows: list[Row]) -> list[str]:
    whole = [r for r in rows if r["exposures"] == 15 and r["only"] == ""]
    singles = {r["only"]: r for r in rows if r["only"]}
    if not whole or len(singles) < len(HORMONES):
        return []
    one = whole[0]
    spent = sum(r["cpu_seconds"] for r in singles.values())
    passes = sum(r["cell_passes"] for r in singles.values())
    theirs = pd.Series({name: r["macro_f1"] for name, r in singles.items()})
    gain = pd.Series(one["binary"])[theirs.index] - theirs
    fewer = f"{passes / one['cell_passes']:.2f}" if one["cell_passes"] else "–"
    return [
        f"| {one['model']}, {one['seed']} | {one['cpu_seconds']:.1f} | {spent:.1f} | "
        f"{spent / one['cpu_seconds']:.1f} | {fewer} | "
        f"{theirs.mean() + gain.mean():.3f} / {theirs.mean():.3f} | "
        f"{int((gain < -0.01).sum())} of {len(gain)} | {gain.min():+.3f} {gain.idxmin()} |"
    ]


def main() -> None:
    """Measure, then print the tables."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=Path, required=True, help="file of finished fits")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--table", action="store_true", help="only print what is there")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        if not chosen.table:
            run(chosen.rows, chosen.seeds)
    print(table(read(chosen.rows)))


if __name__ == "__main__":
    main()
