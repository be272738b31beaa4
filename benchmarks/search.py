"""What a search costs until it is as good as trying everything: 60 configurations, replayed.

Recorded once for each of three simulated atlases (five exposures, 2,000 cells; a Geneformer of
one layer x 32): 60 configurations drawn evenly from the model's own search space, and its defaults
as number 60. Each is fitted on one development fold as a trial is: macro-F1 on validation cells
and processor seconds after every epoch, macro-F1 on the held-out units at the end. No test unit is
read. One thread. The table is kept beside this file, so that a replay fits nothing. How trials are
given up was chosen looking at both atlases: no third one was recorded to hold it against.

    python benchmarks/search.py --record      # about 10 minutes of one processor for an atlas
    python benchmarks/search.py [--seeds 50]
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from anndata import AnnData
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from tasks import FIVE, SIMULATED_CELLS
from threadpoolctl import threadpool_limits

from endoprint import cells
from endoprint.design import DesignConfig, Split, make_split
from endoprint.judge import cross_fit
from endoprint.model import Pruned
from endoprint.models.geneformer import Geneformer
from endoprint.search import Limits, Trial, tune
from endoprint.search.pruning import pruner
from endoprint.search.study import ByNumber
from endoprint.search.tuning import STARTS
from endoprint.simulate import SimulateConfig, simulate

RECORDED = Path(__file__).with_suffix(".csv")
N_CONFIGURATIONS = 60
ATLASES = (0, 1, 2)  # seeds; what is searched by was chosen on the first two
ATLAS = SimulateConfig(cells=6000, genes=1000, median_umi=2500, pool_cells=0)
SMALL = {"layers": 1, "hidden": 32, "ffn": 32}
COLUMNS = ("atlas", "number", "values", "epoch", "valid_macro_f1", "cpu_seconds", "macro_f1")


# -- recording ----------------------------------------------------------------------------------
def record() -> None:
    """Fit every configuration that the table lacks, and add its epochs."""
    for atlas in ATLASES:
        done = {int(row["number"]) for row in _rows() if int(row["atlas"]) == atlas}
        todo = {n: values for n, values in configurations(atlas).items() if n not in done}
        if not todo:
            continue
        known, split = drawn(atlas)
        for number, values in todo.items():
            _add(fitted(atlas, number, values, known, split))
            print(f"atlas {atlas}, configuration {number}", flush=True)


def drawn(atlas: int) -> tuple[AnnData, Split]:
    """Draw the atlas of a seed: its cells and its split."""
    made = simulate(ATLAS, atlas).cells
    made = made[np.isin(made.obs["condition"], FIVE)].copy()
    known, _ = cells.curate(made, SIMULATED_CELLS)
    return known, make_split(known.obs, DesignConfig(), atlas)


def configurations(atlas: int) -> dict[int, dict[str, Any]]:
    """Draw 60 points of the model's search space, and add its defaults as the last."""
    space = Geneformer.Config.search_space()
    sampler = optuna.samplers.RandomSampler(seed=atlas)
    study = optuna.create_study(sampler=sampler)
    points = {n: dict(study.ask(space).params) for n in range(N_CONFIGURATIONS)}
    now = Geneformer.Config().model_dump()
    return points | {N_CONFIGURATIONS: {name: now[name] for name in space}}


def fitted(
    atlas: int, number: int, values: dict[str, Any], known: AnnData, split: Split
) -> list[dict[str, Any]]:
    """Fit one configuration as a trial is fitted; return a row for each epoch."""
    config = Geneformer.Config(**SMALL, **values)
    began, epochs = time.process_time(), list[tuple[int, float, float]]()

    def watch(epoch: int, metrics: dict[str, float]) -> None:
        epochs.append((epoch, metrics["valid_macro_f1"], time.process_time() - began))

    judged = cross_fit(
        lambda: Geneformer(config, seed=atlas), known, split, folds=[0], watch=watch
    )
    total, last = time.process_time() - began, epochs[-1][0]
    said = " ".join(f"{name}={value:.6g}" for name, value in values.items())
    return [
        {
            "atlas": atlas,
            "number": number,
            "values": said,
            "epoch": epoch,
            "valid_macro_f1": f"{valid:.4f}",
            # judging is paid by whoever reaches the end
            "cpu_seconds": f"{total if epoch == last else spent:.2f}",
            "macro_f1": f"{judged.metrics['macro_f1']:.4f}" if epoch == last else "",
        }
        for epoch, valid, spent in epochs
    ]


def _rows() -> list[dict[str, str]]:
    if not RECORDED.is_file():
        return []
    with RECORDED.open() as file:
        return list(csv.DictReader(file))


def _add(rows: list[dict[str, Any]]) -> None:
    is_new = not RECORDED.is_file()
    with RECORDED.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


# -- replaying ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recorded:
    """One configuration: its values, its epochs, what it came to and cost."""

    values: dict[str, float]
    epochs: list[tuple[int, float, float]]  # epoch, macro-F1 on validation, seconds so far
    macro_f1: float

    @property
    def cpu_seconds(self) -> float:
        """Cost of the whole trial, judging included."""
        return self.epochs[-1][2]


def read(atlas: int) -> dict[int, Recorded]:
    """Return what was recorded on an atlas, by number."""
    rows: dict[int, list[dict[str, str]]] = {}
    for row in _rows():
        if int(row["atlas"]) == atlas:
            rows.setdefault(int(row["number"]), []).append(row)
    return {
        number: Recorded(
            {
                each.partition("=")[0]: float(each.partition("=")[2])
                for each in found[0]["values"].split()
            },
            [
                (int(r["epoch"]), float(r["valid_macro_f1"]), float(r["cpu_seconds"]))
                for r in found
            ],
            float(found[-1]["macro_f1"]),
        )
        for number, found in rows.items()
    }


class Snapped(BaseSampler):
    """Let a sampler ask, and answer with the nearest recorded configuration not yet tried."""

    def __init__(self, own: BaseSampler, table: dict[int, Recorded]) -> None:
        self._own, self._space = own, Geneformer.Config.search_space()
        self._points = [each.values for each in table.values()]

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._own.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        own = self._own
        asked = own.sample_relative(study, trial, own.infer_relative_search_space(study, trial))
        for name, range_ in search_space.items():
            if name not in asked:
                asked[name] = own.sample_independent(study, trial, name, range_)
        tried = [each.params for each in study.get_trials(deepcopy=False)]
        left = [values for values in self._points if values not in tried]
        return min(left, key=lambda values: self._distance(values, asked))

    def _distance(self, one: dict[str, float], other: dict[str, float]) -> float:
        """Return the squared distance where every range is as wide as every other."""
        total = 0.0
        for name, range_ in self._space.items():
            assert isinstance(range_, FloatDistribution)
            scale = np.log if range_.log else float
            width = scale(range_.high) - scale(range_.low)
            total += ((scale(one[name]) - scale(other[name])) / width) ** 2
        return float(total)

    def sample_independent(self, *asked: Any) -> Any:
        raise AssertionError("every value is drawn with the others")


def replay(
    table: dict[int, Recorded],
    sampler: BaseSampler,
    pruner: BasePruner,
    *,
    defaults: bool,
    name: str = "replay",
) -> float:
    """Search the table until a trial is within 1 % of the best of 60; return the share of compute.

    The project's own loop, with a table in place of a fit. Infinite: all were tried, and the good
    ones given up.
    """
    drawn = {n: each for n, each in table.items() if n < N_CONFIGURATIONS}
    best = max(each.macro_f1 for each in drawn.values())
    spent = 0.0

    def look_up(trial: Trial) -> float:
        nonlocal spent
        found = next(each for each in table.values() if each.values == trial.values)
        for epoch, valid, seconds in found.epochs:
            try:
                trial.watch(epoch, {"valid_macro_f1": valid})
            except Pruned:
                spent += seconds
                raise
        spent += found.cpu_seconds
        return found.macro_f1

    snapped = Snapped(sampler, drawn)
    study = optuna.create_study(
        study_name=name, direction="maximize", sampler=snapped, pruner=pruner
    )
    study.set_user_attr(STARTS, [table[N_CONFIGURATIONS].values] if defaults else [])
    goal, most = 0.99 * best, len(drawn) + defaults
    tune(study, Geneformer.Config, {}, look_up, limits=Limits(trials=most, target=goal))
    is_there = any(t.value is not None and t.value >= goal for t in study.get_trials(False)
                   if t.state == TrialState.COMPLETE)  # fmt: skip
    return spent / sum(each.cpu_seconds for each in drawn.values()) if is_there else float("inf")


WAYS: dict[str, tuple[Callable[[int], BaseSampler], Callable[[], BasePruner], bool]] = {
    "random, nothing pruned": (RandomSampler, NopPruner, False),
    "TPE, nothing pruned": (ByNumber, NopPruner, False),
    "TPE, median": (ByNumber, lambda: MedianPruner(n_startup_trials=4, n_warmup_steps=1), False),
    "TPE, Hyperband": (ByNumber, HyperbandPruner, False),
    "endoprint": (ByNumber, pruner, False),
    "endoprint, defaults first": (ByNumber, pruner, True),
}


def table_of_ways(atlas: int, n_seeds: int) -> str:
    """Return what each way of searching takes, over seeds, in Markdown."""
    recorded = read(atlas)
    lines = [
        f"atlas {atlas}: share of the compute of all 60 until within 1 % of their best",
        "| way | median | quartiles | not found | of seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, (sampler, made, defaults) in WAYS.items():
        shares = [
            replay(recorded, sampler(seed), made(), defaults=defaults, name=f"replay {seed}")
            for seed in range(n_seeds)
        ]
        low, middle, high = np.quantile(shares, [0.25, 0.5, 0.75], method="nearest")
        missed = sum(np.isinf(shares))
        lines.append(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {missed} | {n_seeds} |")
    return "\n".join(lines)


def main() -> None:
    """Record, or replay what was recorded."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--record", action="store_true", help="fit what the table lacks")
    options.add_argument("--seeds", type=int, default=50)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if chosen.record:
        with threadpool_limits(1):
            record()
    for atlas in ATLASES:
        print(table_of_ways(atlas, chosen.seeds), flush=True)


if __name__ == "__main__":
    main()
