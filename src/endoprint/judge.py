"""Folds x models -> tables: every figure is of cells whose unit the model never saw.

A fresh model is fitted in every fold on training and validation units, and answers for the
held-out units only; figures are of the pooled answers. The judge fits, times and counts; it
keeps nothing and knows no tracking store. n cells, E exposures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from endoprint import controls, metrics
from endoprint.config import Refusal
from endoprint.meter import Meter
from endoprint.model import ExposureModel, Watch, silent
from endoprint.paired import FEWEST_FOR_INTERVAL, Comparison, compare_units, holm, interval
from endoprint.population import sample_calls

if TYPE_CHECKING:
    from endoprint.design import Split

Array = np.ndarray[Any, np.dtype[Any]]
Build = Callable[[], ExposureModel]

# obs columns that a judged cell keeps
CARRIED = ("unit", "sample", "line", "batch", "technical_fold", "cell_type")


# -- cross-fitting ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Judgement:
    """What one model said of cells it never saw, and what that is worth.

    `predictions`: one row per held-out cell, index cell id; unit (and sample, line, batch,
    technical_fold, cell_type where the cells have them), fold, truth, novelty, p_<exposure>.
    `samples`: as `population.sample_calls`, with fold and truth. `metrics`: names as in
    `metrics.summary`, the same of whole samples as population_<name>, false_novel_rate,
    fit_seconds, cpu_seconds (both mean per fit), score_seconds_per_1000_cells, peak_memory_gib.
    `by_unit`: as `metrics.by_unit`, over what is
    held out whole: units, or lines, or technical folds (`is_replicated` is then false).
    `folds`: cost, temperature and units of every fit.
    """

    model: str
    predictions: pd.DataFrame
    samples: pd.DataFrame
    metrics: dict[str, float]
    by_unit: pd.DataFrame
    folds: pd.DataFrame
    is_replicated: bool
    caveats: tuple[str, ...] = ()

    @property
    def probabilities(self) -> pd.DataFrame:
        """The answers alone, (n, E)."""
        return metrics.probabilities_of(self.predictions)


def cross_fit(
    build: Build,
    cells: AnnData,
    split: Split,
    *,
    folds: Sequence[int] | None = None,
    watch: Watch = silent,
    work: Path | None = None,
    told: Callable[[int, int], None] = lambda done, total: None,
    seed: int = 0,
) -> Judgement:
    """Fit a fresh model in every fold and judge it on the units it did not see.

    `build` makes an unfitted model; `folds`: some of the split's, all unless told; `told(done,
    total)` hears of finished folds; `work`: folder for checkpoints, one subfolder per fold;
    `seed` drives only the simulated noise floor of the calibration error.
    """
    chosen = list(range(split.n_folds)) if folds is None else list(folds)
    if not chosen:
        raise Refusal("a model is judged on at least one fold", "none", "mend the split")
    heard, fits = [], []
    flags: list[str] = []
    for done, fold in enumerate(chosen):
        told(done, len(chosen))
        parts = split.parts(cells.obs, fold)
        train, valid, held_out = (
            cells[np.asarray(part)].copy() for part in (parts.train, parts.valid, parts.held_out)
        )
        if not held_out.n_obs:
            raise Refusal("a fold holds cells out", f"none in fold {fold}", "mend the split")
        flags += [flag for flag in parts.flags if flag not in flags]
        model = build()
        with Meter() as cost:
            model.fit(train, valid, watch=watch, work=work and work / f"fold-{fold}")
        heard.append(_hear(model, held_out, fold))
        fits.append(
            {
                "fold": fold,
                "fit_seconds": cost.seconds,
                "cpu_seconds": cost.cpu_seconds,
                "fit_memory_gib": cost.peak_memory_gib,
            }
        )
    told(len(chosen), len(chosen))
    return _judged(heard, fits, split, flags, seed=seed)


@dataclass(frozen=True)
class _Heard:
    """What one fitted model said of one held-out part."""

    model: ExposureModel
    predictions: pd.DataFrame
    samples: pd.DataFrame
    score_seconds_per_1000_cells: float
    memory_gib: float


def _hear(model: ExposureModel, held_out: AnnData, fold: int) -> _Heard:
    with Meter() as cost:
        probabilities = model.predict_proba(held_out)
    novelty = model.novelty(held_out)
    obs = held_out.obs
    said = pd.DataFrame(
        {name: obs[name].astype(str).astype(object) for name in CARRIED if name in obs}
    )
    said["fold"] = fold
    said["truth"] = obs["exposure"].astype(str).astype(object)
    said["novelty"] = novelty
    samples = _sampled(model, held_out, probabilities, novelty)
    samples["fold"] = fold
    return _Heard(
        model,
        said.join(probabilities.add_prefix("p_")),
        samples,
        cost.seconds * 1000 / held_out.n_obs,
        cost.peak_memory_gib,
    )


def _sampled(
    model: ExposureModel, cells: AnnData, probabilities: pd.DataFrame, novelty: Array
) -> pd.DataFrame:
    """Return calls per sample; cells of one unit and exposure are one where samples mix them."""
    exposure = cells.obs["exposure"].astype(str)
    if "sample" in cells.obs and exposure.groupby(cells.obs["sample"]).nunique().max() == 1:
        sample = cells.obs["sample"].astype(str)
    else:
        sample = cells.obs["unit"].astype(str) + "|" + exposure
    named = cells.copy()
    named.obs["sample"] = sample
    table = sample_calls(model, named, probabilities=probabilities, novelty=novelty)
    table["truth"] = exposure.groupby(sample).first().reindex(table.index).astype(object)
    return table


def _judged(
    heard: list[_Heard], fits: list[dict[str, Any]], split: Split, flags: list[str], *, seed: int
) -> Judgement:
    predictions = _joined([part.predictions for part in heard])
    samples = _joined([part.samples for part in heard])
    samples.index = _once_each(samples)
    folds = pd.DataFrame([fit | _facts(part) for fit, part in zip(fits, heard)]).set_index("fold")
    truth, probabilities = predictions["truth"], metrics.probabilities_of(predictions)
    unit = predictions[split.scheme]  # lines, where whole lines are held out: new ones are claimed
    figures = metrics.summary(probabilities, truth, unit, seed=seed)
    figures |= _of_populations(samples, seed=seed)
    figures |= {
        "false_novel_rate": _false_novel_rate(predictions, folds),
        "fit_seconds": float(folds["fit_seconds"].mean()),
        "cpu_seconds": float(folds["cpu_seconds"].mean()),
        "score_seconds_per_1000_cells": float(folds["score_seconds_per_1000_cells"].mean()),
        "peak_memory_gib": float(folds[["fit_memory_gib", "score_memory_gib"]].to_numpy().max()),
    }
    return Judgement(
        model=heard[0].model.name,
        predictions=predictions,
        samples=samples,
        metrics=figures,
        by_unit=metrics.by_unit(probabilities, truth, unit),
        folds=folds,
        is_replicated=not split.is_technical,
        caveats=_caveats(predictions, split, flags),
    )


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Put folds' answers together; an exposure a fold's training never met had no chance there.

    An answer that is no number where the model does know the exposure stays an error.
    """
    columns = sorted({name for table in tables for name in table.columns if _is_answer(name)})
    whole = []
    for table in tables:
        own = [name for name in columns if name in table]
        if table[own].isna().to_numpy().any():
            at = table.index[table[own].isna().any(axis=1)]
            raise Refusal(
                "a model answers every judged cell with numbers",
                f"none for {len(at)}, the first {at[0]}",
                "mend the model: its probabilities are NaN",
            )
        whole.append(table.assign(**{name: 0.0 for name in columns if name not in table}))
    return pd.concat(whole)


def _is_answer(column: Any) -> bool:
    return str(column).startswith("p_")


def _once_each(samples: pd.DataFrame) -> pd.Index:
    """Name samples once each: technical folds may cut one in several."""
    if samples.index.is_unique:
        return samples.index
    names = [f"{name}|fold {fold}" for name, fold in zip(samples.index, samples["fold"])]
    return pd.Index(names, name=samples.index.name)


def _of_populations(samples: pd.DataFrame, *, seed: int) -> dict[str, float]:
    """Return the figures of cells, taken over whole samples: population_<figure>."""
    told = metrics.summary(
        metrics.probabilities_of(samples), samples["truth"], samples["unit"], seed=seed
    )
    return {f"population_{k}": value for k, value in told.items() if not k.startswith("f1_")}


def _false_novel_rate(predictions: pd.DataFrame, folds: pd.DataFrame) -> float:
    """Return which share of held-out cells is taken for novel though none is (judging rule 11)."""
    threshold = predictions["fold"].map(folds["novelty_threshold"]).astype(float)
    return float((predictions["novelty"].astype(float) > threshold).mean())


def _facts(part: _Heard) -> dict[str, Any]:
    provenance = part.model.provenance
    return {
        "score_seconds_per_1000_cells": part.score_seconds_per_1000_cells,
        "score_memory_gib": part.memory_gib,
        "temperature": part.model.temperature,
        "population_temperature": part.model.population_temperature,
        "novelty_threshold": part.model.novelty_threshold,
        "n_parameters": part.model.n_parameters(),
        "n_training_cells": provenance.get("n_training_cells"),
        "training_units": ", ".join(provenance.get("training_units", ())),
        "validation_units": ", ".join(provenance.get("validation_units", ())),
        "is_calibration_unit_validated": bool(
            provenance.get("is_calibration_unit_validated", False)
        ),
    }


def _caveats(predictions: pd.DataFrame, split: Split, flags: list[str]) -> tuple[str, ...]:
    said = list(flags)
    if not split.is_technical:
        n = predictions[split.scheme].nunique()
        if n < FEWEST_FOR_INTERVAL:
            said.append(f"{n} held-out {split.scheme}{'s' * (n != 1)}: range, no interval")
    unmet = sorted(set(predictions["truth"]) - set(metrics.probabilities_of(predictions).columns))
    if unmet:
        said.append(f"never in training: {', '.join(unmet)}")
    return tuple(said)


# -- the leaderboard ----------------------------------------------------------------------------
def leaderboard(
    judgements: Sequence[Judgement],
    *,
    audit: Mapping[str, Any] | None = None,
    shuffles: Mapping[str, controls.Control] | None = None,
    bar: str = "logistic",
) -> pd.DataFrame:
    """Return one row per model, best first: figures, doubt, cost, control and caveats.

    `audit`: the design's (JSON form); `shuffles`: `shuffled_control` by model name; `bar`: the
    model that others are compared with, p values corrected for their number (Holm 1979).
    Columns beyond the metric names: n_units, low, high (a 95 % interval over units, else the
    range: `is_interval`), chance, shuffled_macro_f1, against_shuffled, against_bar,
    against_bar_p, against_bar_said, caveats.
    """
    if not judgements:
        raise Refusal("a leaderboard ranks judged models", "none", "train one first")
    first = judgements[0].predictions.index.sort_values()
    for other in judgements[1:]:
        if not other.predictions.index.sort_values().equals(first):
            raise Refusal(
                "models are ranked on the same held-out cells",
                f"others for {other.model} than for {judgements[0].model}",
                "judge all on one split",
            )
    standard = {one.model: one for one in judgements}.get(bar)
    rows = {one.model: _row(one, (shuffles or {}).get(one.model), audit) for one in judgements}
    compared = {one.model: _against(one, standard) for one in judgements}
    corrected = holm([pair.p_value if pair else None for pair in compared.values()])
    for (model, pair), p_value in zip(compared.items(), corrected):
        rows[model] |= {
            "against_bar": pair.difference if pair else np.nan,
            "against_bar_p": np.nan if p_value is None else p_value,
            "against_bar_said": pair.sentence() if pair else "",
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "model"
    return table.sort_values("macro_f1", ascending=False, kind="stable")


def _row(
    one: Judgement, shuffle: controls.Control | None, audit: Mapping[str, Any] | None
) -> dict[str, Any]:
    scores = one.by_unit["macro_f1"]
    found = interval(scores) if one.is_replicated else None
    low, high = found or (float(scores.min()), float(scores.max()))
    said = list(one.caveats)
    if (audit or {}).get("confounded"):
        said.insert(0, "confounded: an upper bound that includes recognising the batch")
    against_shuffled = ""
    if shuffle is not None:
        pair = compare_units(scores, shuffle.by_unit)
        against_shuffled = pair.verdict if shuffle.is_informative else "not informative"
    n_exposures = one.probabilities.shape[1]
    return {
        **one.metrics,
        "n_units": len(scores) if one.is_replicated else 0,
        "low": low,
        "high": high,
        "is_interval": found is not None,
        "chance": controls.chance_macro_f1(one.predictions["truth"], n_exposures),
        "shuffled_macro_f1": shuffle.macro_f1 if shuffle and shuffle.is_informative else np.nan,
        "against_shuffled": against_shuffled,
        "caveats": "; ".join(said),
    }


def _against(one: Judgement, bar: Judgement | None) -> Comparison | None:
    """Compare with the bar over independent units; technical folds are none."""
    if bar is None or bar is one or not one.is_replicated:
        return None
    return compare_units(one.by_unit["macro_f1"], bar.by_unit["macro_f1"])
