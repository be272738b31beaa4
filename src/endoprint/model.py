"""The contract every model keeps, and how a row of the table becomes one.

A model weighs how strongly a cell speaks for each exposure (*evidence*); everything else
(probabilities, calls, populations, novelty) is derived here, once, for all of them.

Shapes: n cells, E exposures, D width of the embedding.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from pydantic import create_model
from safetensors.numpy import load_file, save_file
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, softmax

from endoprint import drift
from endoprint.calibration import abstention_threshold, fit_temperature
from endoprint.config import Config as AnyConfig
from endoprint.config import Refusal
from endoprint.curated import matrix, sums
from endoprint.table import TABLE, Row

Array = np.ndarray[Any, np.dtype[Any]]
Watch = Callable[[int, dict[str, float]], None]  # (epoch, metrics); may raise Pruned

NOVELTY_NEIGHBOURS = 10  # a guess: enough to smooth, few enough to stay local
NOVELTY_REFERENCE = 2000  # training cells kept with the model; bounds its size and its cost
FEWEST_SAMPLES = 8  # validation samples behind a population's temperature (a guess)
NOVELTY_QUANTILE = 0.95  # per validation unit, maximum over units


def silent(epoch: int, metrics: dict[str, float]) -> None:
    """Watch nothing."""


class Pruned(Exception):
    """A watcher may raise this to stop a fit that is not worth finishing."""


@dataclass(frozen=True)
class Resources:
    """What a workspace offers to every model; each takes what it needs.

    `vocabulary`: JSON of `tokens.Vocabulary`; absent: fitted on the training cells.
    `tokens`: parquet of precomputed tokens, joined by cell id.
    `backbone`: folder of a pre-trained encoder; absent: trained from scratch.
    `activations`: folder where what frozen layers say of a cell is kept; absent: computed anew.
    `machine`: JSON of what was found to pay on this machine; absent: found out by each process.
    """

    vocabulary: Path | None = None
    tokens: Path | None = None
    backbone: Path | None = None
    activations: Path | None = None
    machine: Path | None = None


@dataclass
class State:
    """What a fitted model is, in plain values and arrays: all that is ever written to disk."""

    values: dict[str, Any] = field(default_factory=dict)  # JSON
    arrays: dict[str, Array] = field(default_factory=dict)  # safetensors


class ExposureModel(ABC):
    """Say what each cell was exposed to, from its raw counts.

    Cells are curated AnnData (`endoprint.cells`): raw counts in `X`, Ensembl ids in `var_names`,
    `obs` with `exposure`, `unit` and `n_counts`. The input is never modified, and a cell's answer
    never depends on its neighbours, their order or the minibatch.

    A model writes `_learn`, `evidence`, `embed`, `_state` and `_restore`.
    """

    Config: type[AnyConfig] = AnyConfig
    name: ClassVar[str]  # its row in the table
    takes_backbone: ClassVar[bool] = False  # whether a pre-trained encoder is of use to it

    def __init__(
        self, config: AnyConfig | None = None, *, seed: int = 0, resources: Resources | None = None
    ) -> None:
        self.config: Any = config if config is not None else self.Config()
        self.seed = seed
        self.resources = resources or Resources()
        self.exposures: list[str] = []  # column order of every answer; sorted; set by fit
        self.genes: list[str] = []  # measured in the training cells; set by fit
        self.temperature = 1.0
        self.population_temperature = 1.0
        self.novelty_threshold = float("inf")
        self.abstention_threshold = 0.0  # confidence below which calls are mostly wrong
        self.drift_reference: dict[str, Any] = {}  # what the validation cells were like
        self.provenance: dict[str, Any] = {}  # what fit saw: units, cells, backbone
        self._reference: Array | None = None  # embeddings of training cells, for novelty

    @classmethod
    def as_row(cls, name: str, overrides: dict[str, Any]) -> type[Self]:
        """Return this model under another name, with other defaults: a row, not a file."""
        fields: dict[str, Any] = {
            key: (cls.Config.model_fields[key].rebuild_annotation(), value)
            for key, value in overrides.items()
        }
        config = create_model(
            f"{cls.Config.__name__}As{name.title()}", __base__=cls.Config, **fields
        )
        return type(
            name.title(),
            (cls,),
            {"name": name, "Config": config, "__doc__": cls.__doc__, "__module__": cls.__module__},
        )

    # -- what each model writes -----------------------------------------------------------------
    @abstractmethod
    def _learn(self, train: AnnData, valid: AnnData, watch: Watch, work: Path | None) -> None:
        """Fit on `train`; `valid` may stop early or choose a penalty; `work` keeps checkpoints."""

    @abstractmethod
    def evidence(self, cells: AnnData) -> Array:
        """Return log p(cell | exposure) + a constant per cell, (n, E): balanced and prior-free."""

    @abstractmethod
    def embed(self, cells: AnnData) -> Array:
        """Return one vector per cell, (n, D)."""

    @abstractmethod
    def _state(self) -> State:
        """Return all that `_restore` needs, without executable parts."""

    @abstractmethod
    def _restore(self, state: State) -> None:
        """Take back what `_state` gave."""

    def n_parameters(self) -> int:
        """How many numbers were fitted: the size of every array the model keeps."""
        return int(sum(array.size for array in self._state().arrays.values()))

    # -- derived, once for all ------------------------------------------------------------------
    def fit(
        self, train: AnnData, valid: AnnData, *, watch: Watch = silent, work: Path | None = None
    ) -> Self:
        """Fit on training cells, calibrate on validation cells: whole units, if there are enough.

        `watch(epoch, metrics)` is told of progress and may raise `Pruned`; `work` is a folder for
        resumable checkpoints.
        """
        self.exposures = sorted(set(train.obs["exposure"].astype(str)))
        if len(self.exposures) < 2:
            raise Refusal(
                "a model needs at least two exposures to tell apart",
                ", ".join(self.exposures) or "none",
                "check the exposure key and the split",
            )
        self.genes = [str(gene) for gene in train.var_names]
        self._learn(train, valid, watch, work)
        units = {
            part: sorted(set(cells.obs["unit"].astype(str)))
            for part, cells in (("training", train), ("validation", valid))
        }
        self.provenance |= {
            "training_units": units["training"],
            "validation_units": units["validation"],
            "n_training_cells": train.n_obs,
            "n_validation_cells": valid.n_obs,
            "is_calibration_unit_validated": bool(units["validation"])
            and not set(units["training"]) & set(units["validation"]),
        }
        self._calibrate(valid)
        self._remember(train, valid)
        self._describe(valid)
        return self

    def predict_proba(self, cells: AnnData) -> pd.DataFrame:
        """Return calibrated probabilities: index cell ids, columns exposures, rows sum to one."""
        return pd.DataFrame(
            softmax(self.evidence(cells) / self.temperature, axis=1),
            index=cells.obs_names,
            columns=self.exposures,
        )

    def novelty(self, cells: AnnData) -> Array:
        """Return how far each cell lies from the training cells in `embed`, (n,), per root width.

        The mean distance to the nearest training cells; above `novelty_threshold` a cell looks
        like nothing the model was shown.
        """
        if self._reference is None or not cells.n_obs:
            return np.full(cells.n_obs, np.nan)
        vectors = np.asarray(self.embed(cells), dtype=np.float64)
        neighbours = min(NOVELTY_NEIGHBOURS, len(self._reference))
        distances = np.empty(len(vectors))
        for start in range(0, len(vectors), 1024):  # bounds memory
            block = cdist(vectors[start : start + 1024], self._reference)
            nearest = np.partition(block, neighbours - 1, axis=1)[:, :neighbours]
            distances[start : start + 1024] = nearest.mean(axis=1)
        scaled: Array = distances / np.sqrt(vectors.shape[1])
        return scaled

    def population_evidence(self, cells: AnnData, control: AnnData | None = None) -> Array:
        """Return the evidence of all cells of one sample taken together, (E,): their mean.

        The mean of log probabilities, not their sum, which would treat cells as independent
        (judging rule 6). `control`: the sample's own vehicle cells, for models that use them.
        """
        pooled: Array = log_softmax(self.evidence(cells), axis=1).mean(axis=0)
        return pooled

    def population_proba(self, cells: AnnData, control: AnnData | None = None) -> pd.Series:
        """Return calibrated probabilities of one sample, (E,), indexed by exposure."""
        weighed = self.population_evidence(cells, control) / self.population_temperature
        return pd.Series(softmax(weighed), index=self.exposures)

    # -- disk -----------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Write the fitted model as `model.json` and `model.safetensors`: nothing executable."""
        if not self.exposures:
            raise Refusal("only a fitted model is saved", "one never fitted", "call fit first")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self._state()
        arrays = {key: np.ascontiguousarray(array) for key, array in state.arrays.items()}
        if self._reference is not None:
            arrays["novelty.reference"] = self._reference.astype(np.float32)
        save_file(arrays, str(folder / "model.safetensors"))
        head = {
            "model": self.name,
            "exposures": self.exposures,
            "genes": self.genes,
            "config": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "temperature": self.temperature,
            "population_temperature": self.population_temperature,
            "novelty_threshold": self.novelty_threshold
            if np.isfinite(self.novelty_threshold)
            else None,
            "abstention_threshold": self.abstention_threshold
            if np.isfinite(self.abstention_threshold)
            else None,
            "drift_reference": self.drift_reference,
            "provenance": self.provenance,
            "state": state.values,
        }
        (folder / "model.json").write_text(json.dumps(head, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote."""
        head, arrays = _read(Path(folder))
        if head["model"] != cls.name:
            raise Refusal(
                f"{cls.__name__} loads its own kind", head["model"], "use endoprint.model.load"
            )
        model = cls(cls.Config.of(head["config"], where="model.json config"), seed=head["seed"])
        model.exposures = list(head["exposures"])
        model.genes = list(head["genes"])
        model.temperature = head["temperature"]
        model.population_temperature = head["population_temperature"]
        threshold = head["novelty_threshold"]
        model.novelty_threshold = float("inf") if threshold is None else threshold
        silence = head.get("abstention_threshold", 0.0)  # models before November 2026 have none
        model.abstention_threshold = float("inf") if silence is None else silence
        model.drift_reference = head.get("drift_reference", {})
        model.provenance = head["provenance"]
        reference = arrays.pop("novelty.reference", None)
        model._reference = None if reference is None else reference.astype(np.float64)
        model._restore(State(head["state"], arrays))
        return model

    # -- calibration and novelty ----------------------------------------------------------------
    def _calibrate(self, valid: AnnData) -> None:
        """Fit one temperature by likelihood, validation units weighing equally (Guo 2017)."""
        known = valid.obs["exposure"].astype(str).isin(self.exposures).to_numpy()
        valid = valid[known]
        if not valid.n_obs:
            return
        evidence = self.evidence(valid)
        column = {exposure: i for i, exposure in enumerate(self.exposures)}
        truth = valid.obs["exposure"].astype(str).map(column).to_numpy()
        unit = valid.obs["unit"].astype(str).to_numpy()
        weight = 1.0 / pd.Series(unit).map(pd.Series(unit).value_counts()).to_numpy()
        self.temperature = fit_temperature(evidence, truth, weight)
        said = softmax(evidence / self.temperature, axis=1)
        is_right = said.argmax(axis=1) == truth
        self.abstention_threshold = abstention_threshold(said.max(axis=1), is_right, weight)
        # A population's temperature needs several samples of units never fitted on; without, the
        # cells' own is the cautious choice: it treats a sample as no surer than its average cell.
        self.population_temperature = self.temperature
        self._calibrate_populations(valid, evidence, truth)

    def _calibrate_populations(self, valid: AnnData, evidence: Array, truth: Array) -> bool:
        """Fit the temperature of whole samples on `population_evidence`, whoever wrote it.

        Returns whether validation has whole units and samples enough; else nothing is fitted.
        """
        named = "sample" if "sample" in valid.obs else "unit"
        sample = valid.obs[named].astype(str).to_numpy()
        groups = valid.obs.groupby([sample, truth], sort=True).indices
        is_whole = bool(self.provenance.get("is_calibration_unit_validated"))
        if not is_whole or len(groups) < FEWEST_SAMPLES:
            return False
        if type(self).population_evidence is ExposureModel.population_evidence:
            log_p = log_softmax(evidence, axis=1)  # the same, without weighing the cells again
            weighed = [log_p[rows].mean(axis=0) for rows in groups.values()]
        else:
            weighed = [self.population_evidence(valid[rows]) for rows in groups.values()]
        columns = np.array([int(column) for _, column in groups])
        self.population_temperature = fit_temperature(
            np.stack(weighed), columns, np.ones(len(columns))
        )
        return True

    def _remember(self, train: AnnData, valid: AnnData) -> None:
        """Keep embeddings of training cells and the distance beyond which a cell is novel."""
        chosen = np.arange(train.n_obs)
        if train.n_obs > NOVELTY_REFERENCE:
            rng = np.random.default_rng(self.seed)
            chosen = np.sort(rng.choice(train.n_obs, NOVELTY_REFERENCE, replace=False))
        # through float32, as it will be read back: save -> load is the identity
        reference = np.asarray(self.embed(train[chosen]), dtype=np.float32)
        self._reference = reference.astype(np.float64)
        if valid.n_obs:
            distance = pd.Series(self.novelty(valid))
            by_unit = distance.groupby(valid.obs["unit"].astype(str).to_numpy())
            self.novelty_threshold = float(by_unit.quantile(NOVELTY_QUANTILE).max())

    def _describe(self, valid: AnnData) -> None:
        """Keep what cells of units not fitted on are like, for new cells to be held against."""
        if not valid.n_obs:
            return
        total = valid.obs["n_counts"].to_numpy(dtype=np.float64)
        told = {
            "n_counts": total,
            "n_genes": valid.obs["n_genes"].to_numpy(dtype=np.float64),
            "known_share": sums(matrix(valid, self.genes)) / np.maximum(total, 1),
            "confidence": self.predict_proba(valid).to_numpy().max(axis=1),
            "novelty": self.novelty(valid),
        }
        unit = valid.obs["unit"].astype(str).to_numpy()
        self.drift_reference = drift.reference(pd.DataFrame(told), unit)


# -- from the table to a class -------------------------------------------------------------------
def model_class(name: str) -> type[ExposureModel]:
    """Return the class of a row, importing its module only now."""
    if name not in TABLE:
        raise Refusal("a model stands in the table", name, f"one of {', '.join(TABLE)}")
    return _class_of(name, TABLE[name])


@cache
def _class_of(name: str, row: Row) -> type[ExposureModel]:
    module, _, cls = row.cls.partition(":")
    found: type[ExposureModel] = getattr(importlib.import_module(module), cls)
    return found.as_row(name, dict(row.overrides)) if row.overrides else found


def load(folder: str | Path) -> ExposureModel:
    """Read a saved model of whichever kind."""
    head, _ = _read(Path(folder), with_arrays=False)
    return model_class(head["model"]).load(folder)


def _read(folder: Path, *, with_arrays: bool = True) -> tuple[dict[str, Any], dict[str, Array]]:
    try:
        head = json.loads((folder / "model.json").read_text())
        arrays = load_file(str(folder / "model.safetensors")) if with_arrays else {}
    except (OSError, ValueError) as error:
        raise Refusal(
            "a saved model is model.json and model.safetensors", str(error), "save it again"
        ) from None
    return head, arrays


# -- MLflow's pyfunc, without importing MLflow --------------------------------------------------
class Predictor:
    """What `mlflow.pyfunc.load_model(...)` hands out: counts in, probabilities out."""

    def __init__(self, model: ExposureModel) -> None:
        self.model = model

    def predict(
        self, cells: pd.DataFrame | AnnData, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return probabilities per exposure; `cells` holds raw counts, genes as Ensembl ids.

        A cell without a count in the model's genes has none: its row is NaN, as in scoring.
        """
        from endoprint.curated import as_cells

        known = as_cells(cells, self.model.genes)
        told = self.model.predict_proba(known)
        told[sums(matrix(known, self.model.genes)) <= 0] = np.nan
        return told


def _load_pyfunc(path: str) -> Predictor:
    """Load for MLflow, which calls this by module name: code never comes from an artefact."""
    return Predictor(load(path))
