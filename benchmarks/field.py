"""What every row of the table is worth, and what it costs: the tables of docs/field.md.

`python benchmarks/field.py measure FOLDER [--only KIND/TASK/ROW ...]` fits and judges; each result
is a file of FOLDER, so that a run that was stopped goes on where it was. `... tell FOLDER` prints
the tables. Every row is used by its defaults, one thread, one seed. Kinds:

- `fold`: 6,000 simulated cells, 15 exposures, 2 lines x 3 cultures; one culture held out, one
  validates, four train. At all three difficulties, beside the oracle's answer for the same cells.
- `shuffled`: 2,400 cells at the easy difficulty, 2 lines x 6 cultures in two folds, so that twelve
  unseen units judge, true labels against permuted ones.
- `real`: interferon by donor, dexamethasone (0, 1, 3 h) by plate; ENDOPRINT_SHARED has the files.
- `calibration`: all six folds of `fold`, at the easy and the middle difficulty; the oracle beside.
- `edc`: weights of unknown mixtures against the truth, 100 cells a sample, two new units.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from anndata import AnnData
from tasks import EXAMPLES, REAL, SIMULATED_CELLS

from endoprint import cells as door
from endoprint import controls, judge, metrics, negatives, projection
from endoprint.config import read_params
from endoprint.design import DesignConfig, Split, make_split
from endoprint.model import ExposureModel, model_class
from endoprint.paired import compare_units
from endoprint.simulate import SimulateConfig, oracle, simulate
from endoprint.table import TABLE

SEED = 100  # of atlas and models; no default was chosen on it
DIFFICULTIES = ("easy", "middle", "hard")
SHUFFLED = SimulateConfig(cells=2400, replicates=6, pool_cells=0)
FIGURES = ("macro_f1", "balanced_accuracy", "auroc_macro", "ece", "ece_noise_floor",
           "population_macro_f1", "top2_balanced_accuracy", "worst_unit_macro_f1",
           "fit_seconds", "cpu_seconds", "score_seconds_per_1000_cells")  # fmt: skip


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("verb", choices=["measure", "tell"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="kind/task/row, or the start of one")
    told = parser.parse_args()
    if told.verb == "tell":
        tell(told.folder)
        return
    told.folder.mkdir(parents=True, exist_ok=True)
    for kind, task, row in wanted():
        name = f"{kind}/{task}/{row}"
        path = told.folder / f"{name.replace('/', '-')}.json"
        if path.exists() or (told.only and not any(name.startswith(o) for o in told.only)):
            continue
        began, busy = time.perf_counter(), time.process_time()
        found = MEASURES[kind](task, row)
        found |= {
            "kind": kind, "task": task, "row": row, "seed": SEED, "commit": commit(),
            "wall_seconds": time.perf_counter() - began,
            "all_cpu_seconds": time.process_time() - busy,
            "load": os.getloadavg()[0],
        }  # fmt: skip
        path.write_text(json.dumps(found, indent=1) + "\n")
        figure = "mean_absolute_error" if kind == "edc" else "macro_f1"
        print(f"{name}: {figure} {found[figure]:.3f} in {found['wall_seconds']:.0f} s")
        sys.stdout.flush()


def wanted() -> list[tuple[str, str, str]]:
    """Return every measurement, the cheapest kinds first."""
    rows = list(TABLE)
    return [
        *(("fold", task, row) for task in DIFFICULTIES for row in ["oracle", *rows]),
        *(("shuffled", "easy", row) for row in rows),
        *(("real", task, row) for task in REAL for row in rows),
        *(("calibration", task, row) for task in DIFFICULTIES[:2] for row in ["oracle", *rows]),
        *(("edc", task, "projection") for task in DIFFICULTIES),
    ]


def build(row: str) -> ExposureModel:
    """Return an unfitted model by its defaults."""
    return model_class(row)(seed=SEED)


@cache
def atlas(difficulty: str) -> tuple[AnnData, Split, pd.DataFrame]:
    """Return the atlas, its split, and the oracle's answers for every cell."""
    config = SimulateConfig(difficulty=difficulty, pool_cells=0)  # type: ignore[arg-type]
    drawn = simulate(config, SEED)
    cells, _ = door.curate(drawn.cells, SIMULATED_CELLS)
    split = make_split(cells.obs, DesignConfig(n_test_units=0, n_folds=6), seed=SEED)
    return cells, split, oracle(drawn.law, drawn.cells, library=drawn.hidden["library"])


def fold(difficulty: str, row: str) -> dict[str, Any]:
    """Judge one row on one unseen unit."""
    cells, split, best = atlas(difficulty)
    if row == "oracle":
        return of_oracle(best, cells.obs.iloc[split.parts(cells.obs, 0).held_out])
    return figures(judge.cross_fit(lambda: build(row), cells, split, folds=[0], seed=SEED))


def of_oracle(best: pd.DataFrame, obs: pd.DataFrame) -> dict[str, Any]:
    """Judge the simulator's own posterior on these cells, as rows are judged."""
    truth, unit = obs["exposure"].astype(str), obs["unit"].astype(str)
    best = best.loc[obs.index]
    by_unit = {
        name: float(metrics.summary(best.loc[at], truth[at], unit[at])["macro_f1"])
        for name, at in obs.groupby(unit).groups.items()
    }
    chance = controls.chance_macro_f1(truth, best.shape[1])
    return {**metrics.summary(best, truth, unit), "chance": chance, "by_unit": by_unit}


def calibration(difficulty: str, row: str) -> dict[str, Any]:
    """Judge one row on every unit of the atlas."""
    cells, split, best = atlas(difficulty)
    if row == "oracle":
        return of_oracle(best, cells.obs)
    return figures(judge.cross_fit(lambda: build(row), cells, split, seed=SEED))


def shuffled(difficulty: str, row: str) -> dict[str, Any]:
    """Judge one row on true and on permuted labels, unit by unit."""
    drawn = simulate(SHUFFLED.model_copy(update={"difficulty": difficulty}), SEED)
    cells, _ = door.curate(drawn.cells, SIMULATED_CELLS)
    split = make_split(cells.obs, DesignConfig(n_test_units=0, n_folds=2), seed=SEED)
    found = judge.cross_fit(lambda: build(row), cells, split, seed=SEED)
    blind = negatives.shuffled_control(lambda: build(row), cells, split, seed=SEED)
    pair = compare_units(found.by_unit["macro_f1"], blind.by_unit)
    return figures(found) | {
        "shuffled_macro_f1": blind.macro_f1, "chance": blind.chance, "p_value": pair.p_value,
        "verdict": pair.verdict, "n_units": pair.n_units,
    }  # fmt: skip


def real(task: str, row: str) -> dict[str, Any]:
    """Judge one row on a public data set as its example says."""
    example, file = REAL[task]
    params = read_params(EXAMPLES / example / "params.yaml")
    config = params.section("cells", door.CellsConfig)
    shared = Path(os.environ["ENDOPRINT_SHARED"]) / "data/real" / file
    cells, _ = door.curate(door.read(shared, config), config)
    split = make_split(cells.obs, params.section("design", DesignConfig), seed=params.seed)
    return figures(judge.cross_fit(lambda: build(row), cells, split, seed=params.seed))


def edc(difficulty: str, row: str) -> dict[str, Any]:
    """Judge the projection on the mixtures that the simulator drew."""
    config = SimulateConfig(difficulty=difficulty, pool_cells=0, new_cells=4800)  # type: ignore[arg-type]
    drawn = simulate(config, SEED)
    labelled, _ = door.curate(drawn.cells, SIMULATED_CELLS)
    new, _ = door.curate(drawn.new, SIMULATED_CELLS, labelled=False)
    truth = drawn.truth
    is_control = new.obs["sample"].map(truth["exposure"]).eq("DMSO").to_numpy()
    made = projection.projected(labelled, new, control="DMSO", is_control=is_control)
    weights = truth.filter(regex="^w_").rename(columns=lambda name: name.removeprefix("w_"))
    wanted = pd.DataFrame({g: weights[g.split(" + ")].sum(axis=1) for g in made.weights})
    mixed = truth.index[truth["unmodelled_share"] > 0].intersection(made.weights.index)
    found, wanted = made.weights.loc[mixed], wanted.loc[mixed]
    error, is_present = (found - wanted).abs().to_numpy(), (wanted > 0).to_numpy()
    inside = (made.low.loc[mixed] <= wanted) & (wanted <= made.high.loc[mixed])
    return {
        "mean_absolute_error": float(error.mean()),
        "of_present": float(error[is_present].mean()),
        "of_saying_nothing": float(wanted.to_numpy().mean()),
        "residual_share": float(made.samples.loc[mixed, "residual_share"].mean()),
        "null_largest": float("nan") if made.null is None else float(made.null.max()),
        "covered": float(inside.to_numpy().mean()),
        "n_groups": found.shape[1],
        "n_samples": len(mixed),
    }


MEASURES = {
    "fold": fold,
    "shuffled": shuffled,
    "real": real,
    "calibration": calibration,
    "edc": edc,
}


def figures(found: judge.Judgement) -> dict[str, Any]:
    """Return what is told of a judgement."""
    return {name: found.metrics[name] for name in FIGURES} | {
        "by_unit": found.by_unit["macro_f1"].to_dict()
    }


def commit() -> str:
    """Return the commit that is measured, with a mark where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip()


# -- tables -------------------------------------------------------------------------------------
def tell(folder: Path) -> None:
    """Print what was measured, as the tables of docs/field.md."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text())
        found[one["kind"], one["task"], one["row"]] = one
    _tell_folds(found)
    _tell_costs(found)
    _tell_shuffled(found)
    _tell_real(found)
    _tell_calibration(found)
    _tell_edc(found)


Found = dict[tuple[str, str, str], dict[str, Any]]


def _tell_folds(found: Found) -> None:
    shares = {}
    for task in DIFFICULTIES:
        best = found.get(("fold", task, "oracle"))
        if best is None:
            continue
        room = best["macro_f1"] - best["chance"]
        shares[task] = {
            row: (one["macro_f1"], (one["macro_f1"] - best["chance"]) / room)
            for (kind, where, row), one in found.items()
            if (kind, where) == ("fold", task)
        }
    rows = sorted(
        {row for each in shares.values() for row in each},
        key=lambda row: -max(each[row][1] for each in shares.values() if row in each),
    )
    _print(["row", *(f"{task}: macro-F1, share of the oracle's" for task in shares)])
    for row in rows:
        told = [shares[task].get(row) for task in shares]
        _print([row, *("–" if t is None else f"{t[0]:.3f}, {t[1]:.2f}" for t in told)])


def _tell_costs(found: Found) -> None:
    ran = {row: one for (kind, task, row), one in found.items()
           if (kind, task) == ("fold", "easy") and row != "oracle"}  # fmt: skip
    _print(["row", "wall s", "CPU s", "s per 1,000 cells scored", "load"], space=True)
    for row, one in ran.items():
        _print([row, f"{one['wall_seconds']:.0f}", f"{one['all_cpu_seconds']:.0f}",
                f"{one['score_seconds_per_1000_cells']:.2f}", f"{one['load']:.1f}"])  # fmt: skip
    wall, busy = (sum(one[key] for one in ran.values())
                  for key in ("wall_seconds", "all_cpu_seconds"))  # fmt: skip
    _print(["all", f"{wall:.0f}", f"{busy:.0f}", "", ""])


def _tell_shuffled(found: Found) -> None:
    _print(["row", "macro-F1", "on shuffled labels", "chance", "p", "verdict"], space=True)
    for (kind, _, row), one in found.items():
        if kind == "shuffled":
            _print([row, f"{one['macro_f1']:.3f}", f"{one['shuffled_macro_f1']:.3f}",
                    f"{one['chance']:.3f}", f"{one['p_value']:.4f}", one["verdict"]])  # fmt: skip


def _tell_real(found: Found) -> None:
    _print(["row", *(f"{task}: bal. acc., macro-F1 (parts)" for task in REAL)], space=True)
    for row in TABLE:
        told = [row]
        for task in REAL:
            one = found.get(("real", task, row))
            parts = [] if one is None else [f"{value:.3f}" for value in one["by_unit"].values()]
            told.append("–" if one is None else f"{one['balanced_accuracy']:.3f}, "
                        f"{one['macro_f1']:.3f} ({' '.join(parts)})")  # fmt: skip
        _print(told)


def _tell_calibration(found: Found) -> None:
    _print(["row", "units", "macro-F1", "share of the oracle's, by unit", "ECE", "floor"],
           space=True)  # fmt: skip
    for (kind, task, row), one in found.items():
        best = found.get(("calibration", task, "oracle"))
        if kind != "calibration" or best is None:
            continue
        shares = [(value - best["chance"]) / (best["by_unit"][unit] - best["chance"])
                  for unit, value in one["by_unit"].items()]  # fmt: skip
        told = f"{sum(shares) / len(shares):.2f} ({' '.join(f'{s:.2f}' for s in sorted(shares))})"
        _print([f"{task}: {row}", str(len(shares)), f"{one['macro_f1']:.3f}", told,
                f"{one['ece']:.3f}", f"{one.get('ece_noise_floor', 0.0):.3f}"])  # fmt: skip


def _tell_edc(found: Found) -> None:
    names = ("mean_absolute_error", "of_present", "of_saying_nothing", "residual_share",
             "null_largest", "covered")  # fmt: skip
    _print(["row", *(name.replace("_", " ") for name in names)], space=True)
    for (kind, task, _), one in found.items():
        if kind == "edc":
            _print([task, *(f"{one[name]:.3f}" for name in names)])


def _print(told: list[str], *, space: bool = False) -> None:
    if space:
        print()
    print(f"| {' | '.join(told)} |")
    if told[0] == "row":
        print("|" + "--|" * len(told))


if __name__ == "__main__":
    main()
