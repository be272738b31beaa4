"""What a whole sample looks exposed to, and how sure that is, in numbers and in a sentence.

A population is weighed by the mean of its cells' evidence with a temperature of its own
(`ExposureModel.population_proba`): summing would take cells as independent and be wildly
over-confident. Where it spans several units, each is weighed alone and all count the same: what
is uncertain is what another unit would say (judging rule 1). n cells, E exposures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import stats
from scipy.special import softmax

from endoprint.config import Refusal
from endoprint.labels import CONTROL, DIRECTIONS, DISRUPTORS, find_control
from endoprint.model import ExposureModel

Array = np.ndarray[Any, np.dtype[Any]]

FEW_CELLS = 20  # fewer say little about a sample, however sure each is (a guess)
FEW_UNITS, MANY_UNITS = 5, 20  # below: the range alone; from: a bootstrap (judging rule 1)
DRAWS = 2000
UNDECIDED = 0.5  # below, the second call is named too
MOSTLY = 0.5  # share of a sample's cells that must be novel for the sentence to say so

NAMES = {
    "ANDROGEN": "androgen",
    "ARYL_HYD": "aryl hydrocarbon",
    "ESTROGEN": "estrogen",
    "GLUCOCORT": "glucocorticoid",
    "LIVER-X": "liver X",
    "RET": "retinoic acid",
    "THYROID": "thyroid",
}


class Pools:
    """What cells said, added up per population and unit: cells may come a few at a time."""

    def __init__(self, model: ExposureModel) -> None:
        self.model = model
        self._at: dict[tuple[str, str], int] = {}  # (population, unit) -> row of the sums
        n_exposures = len(model.exposures)
        self._evidence = np.zeros((0, n_exposures))  # sum of log probabilities
        self._called = np.zeros((0, n_exposures))  # cells whose own call it is
        self._shown = np.zeros((0, n_exposures))  # of these, cells whose call is not withheld
        self._n = np.zeros((0, 4))  # cells, answered, novel, of unknown novelty
        self._weighed: dict[tuple[str, str], Array] = {}

    def __len__(self) -> int:
        return len(self._at)

    def add(
        self,
        population: Array,
        unit: Array,
        probabilities: Array,
        novelty: Array,
        abstain: Array | None = None,
    ) -> None:
        """Add cells: (n,), (n,), (n, E), (n,), (n,); those of no answer (NaN) only count."""
        pairs = pd.MultiIndex.from_arrays([population, unit])
        codes, found = pd.factorize(pairs)
        for pair in found:
            self._at.setdefault((str(pair[0]), str(pair[1])), len(self._at))
        self._grow()
        row = np.array([self._at[(str(a), str(b))] for a, b in found], dtype=np.int64)[codes]
        is_answered: Array = np.asarray(np.isfinite(probabilities).all(axis=1))
        said = probabilities[is_answered]
        # stored scores are coarser than fresh ones: what rounds to zero was no smaller than this
        floor = float(np.finfo(said.dtype).tiny)
        np.add.at(
            self._evidence,
            row[is_answered],
            np.log(np.maximum(said.astype(np.float64), floor)),
        )
        if len(said):
            best = said.argmax(axis=1)
            np.add.at(self._called, (row[is_answered], best), 1)
            is_shown = ~abstain[is_answered] if abstain is not None else np.ones(len(best), bool)
            np.add.at(self._shown, (row[is_answered][is_shown], best[is_shown]), 1)
        far = np.column_stack([
            np.ones(len(row)), is_answered, novelty > self.model.novelty_threshold,
            is_answered & np.isnan(novelty),
        ])  # fmt: skip
        np.add.at(self._n, row, far)

    def weigh(self, population: str, unit: str, probabilities: Array) -> None:
        """Tell what a model that weighs populations itself says of one, (E,)."""
        self._weighed[(population, unit)] = probabilities

    def units(self) -> pd.DataFrame:
        """Return one row per population and unit: n_cells, call, confidence, p_<exposure>."""
        rows = [
            {"population": population, "unit": unit, "n_cells": int(self._n[row, 0]),
             **self._named(self._alone(population, unit))}
            for (population, unit), row in sorted(self._at.items()) if self._n[row, 1]
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def shares(self) -> pd.DataFrame:
        """Return which share of each population's cells shows which call; rows may miss 1."""
        populations = self._populations()
        shown = np.array([self._shown[rows].sum(axis=0) for rows in populations.values()])
        n = np.array([self._n[rows, 0].sum() for rows in populations.values()])
        table = pd.DataFrame(shown.reshape(len(n), -1) / n[:, None], columns=self.model.exposures)
        return table.set_axis(pd.Index(list(populations), dtype=object))

    def calls(self, *, by: str, control: str | None = None) -> pd.DataFrame:
        """Return one row per population that has a cell with an answer; see `sample_calls`."""
        rows = {}
        for name, at in self._populations().items():
            told = {
                unit: self._alone(name, unit)
                for (population, unit), row in sorted(self._at.items())
                if population == name and self._n[row, 1]
            }
            if told:
                rows[name] = self._row(name, at, told, control)
        table = pd.DataFrame.from_dict(rows, orient="index")
        if not rows:  # every cell was set aside: nobody is called, and the report says so
            table = pd.DataFrame(columns=["unit", "n_cells", "call", "confidence", "sentence"])
        table.index.name = by
        return table

    def _row(
        self, name: str, at: list[int], told: Mapping[str, Array], control: str | None
    ) -> dict[str, Any]:
        every = np.array(list(told.values()))
        # units count the same, however many cells each has; one unit is itself
        weighed = every[0] if len(every) == 1 else softmax(np.log(every).mean(axis=0))
        order = np.argsort(-weighed, kind="stable")
        first, second = (self.model.exposures[i] for i in order[:2])
        n_cells, n_answered, n_novel, n_unknown = self._n[at].sum(axis=0)
        is_of_units = "" not in told
        low, high, kind = interval(every[:, order[0]] if is_of_units else every[:0, order[0]])
        knows_novelty = np.isfinite(self.model.novelty_threshold) and not n_unknown
        row: dict[str, Any] = {
            "unit": next(iter(told)) if len(told) == 1 else f"{len(told)} units",
            "n_cells": int(n_cells),
            "call": first,
            "confidence": float(weighed[order[0]]),
            "second_call": second,
            "second_confidence": float(weighed[order[1]]),
            "agreement": float(self._called[at, order[0]].sum() / n_answered),
            "novel_share": float(n_novel / n_answered) if knows_novelty else float("nan"),
            "n_units": len(told) if is_of_units else 0,
            "units_agree": int((every.argmax(axis=1) == order[0]).sum()),
            "low": low,
            "high": high,
            "interval": kind,
            "is_calibration_unit_validated": bool(
                self.model.provenance.get("is_calibration_unit_validated", False)
            ),
        }
        row["sentence"] = sentence(name, row, control=control)
        return row | {f"p_{e}": float(p) for e, p in zip(self.model.exposures, weighed)}

    def _alone(self, population: str, unit: str) -> Array:
        """Return the probabilities of one population in one unit, (E,)."""
        if (population, unit) in self._weighed:
            return self._weighed[(population, unit)]
        row = self._at[(population, unit)]
        model = self.model
        # evidence is the logarithm of a probability times the temperature, up to a constant per
        # cell, which the soft-max forgets: the cells need not be weighed a second time
        mean = self._evidence[row] / self._n[row, 1]
        told: Array = softmax(mean * model.temperature / model.population_temperature)
        return told

    def _named(self, probabilities: Array) -> dict[str, Any]:
        best = int(probabilities.argmax())
        said = {"call": self.model.exposures[best], "confidence": float(probabilities[best])}
        return said | {f"p_{e}": float(p) for e, p in zip(self.model.exposures, probabilities)}

    def _populations(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for (population, _), row in sorted(self._at.items()):
            found.setdefault(population, []).append(row)
        return found

    def _grow(self) -> None:
        more = len(self._at) - len(self._n)
        self._evidence, self._called, self._shown, self._n = (
            np.pad(old, ((0, more), (0, 0)))
            for old in (self._evidence, self._called, self._shown, self._n)
        )


def interval(of_units: Array) -> tuple[float, float, str]:
    """Return what units allow to be said of one figure (judging rule 1): low, high, and its kind.

    Under 5 units the range, no interval; from 5 a t interval; from 20 a bootstrap over units.
    """
    n = len(of_units)
    if n < 2:
        return float("nan"), float("nan"), "none: one unit" if n else "none: units unknown"
    if n < FEW_UNITS:
        return float(of_units.min()), float(of_units.max()), f"range of {n} units, no interval"
    if n < MANY_UNITS:
        half = stats.t.ppf(0.975, n - 1) * of_units.std(ddof=1) / np.sqrt(n)
        low, high = np.clip([of_units.mean() - half, of_units.mean() + half], 0, 1)
        return float(low), float(high), f"95 % t interval over {n} units"
    rng = np.random.default_rng(0)
    means = of_units[rng.integers(0, n, (DRAWS, n))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high), f"95 % bootstrap over {n} units"


def sample_calls(
    model: ExposureModel,
    cells: AnnData,
    *,
    by: str = "sample",
    probabilities: pd.DataFrame | None = None,
    novelty: Array | None = None,
    control: str | None = None,
) -> pd.DataFrame:
    """Say what every sample looks exposed to, and how sure that is; one row per sample.

    Index: the values of `obs[by]`, sorted. Columns: unit, n_cells, call, confidence, second_call,
    second_confidence, agreement (share of cells whose own call is the sample's), novel_share
    (cells farther from the training cells than the model's threshold; NaN where the model keeps
    none), n_units, units_agree (units whose own call is the sample's), low, high, interval (what
    they are), is_calibration_unit_validated, sentence, p_<exposure>. `probabilities` (n, E) and
    `novelty` (n,) of the same cells spare computing them again; with both, a model that does not
    weigh populations itself needs no counts. `control`: the label that is no exposure, unless the
    cells or its spelling tell.
    """
    if by not in cells.obs:
        raise Refusal(f"samples are told apart by obs[{by!r}]", "no such column", "name one")
    if probabilities is None:
        probabilities = model.predict_proba(cells)
    distance = model.novelty(cells) if novelty is None else novelty
    sample = cells.obs[by].astype(str).to_numpy()
    unit = cells.obs["unit"].astype(str).to_numpy() if "unit" in cells.obs else sample
    told = control or cells.uns.get("endoprint", {}).get("control")
    control = told or find_control(model.exposures)
    pools = Pools(model)
    pools.add(sample, unit, probabilities.to_numpy(), distance)
    if weighs_itself(model):
        is_control = np.zeros(cells.n_obs, dtype=bool)
        if "exposure" in cells.obs:
            is_control = (cells.obs["exposure"].astype(str) == control).to_numpy()
        for name, of in sorted(set(zip(sample, unit))):
            inside = (sample == name) & (unit == of)
            # its own unit's vehicle; a sample that is itself the vehicle is held to no other
            beside = (unit == of) & is_control & ~inside
            own = cells[beside] if beside.any() else None
            weighed = model.population_proba(cells[inside], control=own)
            pools.weigh(str(name), str(of), weighed.to_numpy())
    return pools.calls(by=by, control=control)


def weighs_itself(model: ExposureModel) -> bool:
    """Say whether a model weighs populations by other means than its cells' mean evidence."""
    return type(model).population_evidence is not ExposureModel.population_evidence


def sentence(sample: str, row: Mapping[str, Any], *, control: str | None = None) -> str:
    """Say one sample's call in plain words, with the doubt that the design leaves.

    `row`: as in the table of `sample_calls`; `control`: the label that is no exposure.
    """
    head = f"Sample {sample} ({row['n_cells']} {'cell' if row['n_cells'] == 1 else 'cells'})"
    if row["confidence"] < UNDECIDED:
        said = (
            f"is undecided between {row['call']} ({_share(row['confidence'])}) "
            f"and {row['second_call']} ({_share(row['second_confidence'])})"
        )
    else:
        words = described(row["call"])
        said = f"looks exposed to {row['call']}{f' ({words})' if words else ''}"
        if row["call"] in (control, CONTROL):
            said = f"looks like the control ({row['call']})"
        said += f": confidence {_share(row['confidence'])}"
    if row.get("n_units", 0) > 1:
        said += (
            f", {_share(row['low'])} to {_share(row['high'])} ({row['interval']}; "
            f"{row['units_agree']} of {row['n_units']} units agree)"
        )
    doubts = []
    if row["novel_share"] > MOSTLY:
        doubts.append(f"{row['novel_share']:.0%} of its cells are unlike any training cell")
    if row["n_cells"] < FEW_CELLS:
        doubts.append("too few cells to lean on")
    if not row["is_calibration_unit_validated"]:
        doubts.append("calibration not unit-validated")
    return "; ".join([f"{head} {said}", *doubts])


def described(exposure: str) -> str:
    """Return what a canonical label means in words; empty for a label of the user's own."""
    if exposure in DISRUPTORS:
        return "endocrine disruptor"
    for stem, pathway in NAMES.items():
        for direction in DIRECTIONS:
            if exposure == f"{stem}_{direction}":
                return f"{pathway} pathway, {direction.lower()}"
    return ""


def _share(value: float) -> str:
    """Write a probability as a reader takes it: .93, never a false 1.00."""
    if value > 0.99:
        return "> .99"
    return f"{value:.2f}".removeprefix("0")
