"""Nothing of a held-out unit reaches a fit: every row of the table, every number it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from conftest import planted_cells
from endoprint import judge
from endoprint import model as contract
from endoprint.design import DesignConfig, Split, make_split
from endoprint.latent import Latent
from endoprint.models.neighbours import Neighbours
from endoprint.table import TABLE
from test_every_model import SMALL

TINY: dict[str, dict[str, object]] = SMALL | {
    "geneformer": {"layers": 1, "hidden": 16, "ffn": 16, "epochs": 1, "min_steps": 2},
    "scgpt": {"layers": 1, "hidden": 16, "ffn": 16, "epochs": 1, "min_steps": 2},
    "diffusion": {"hidden": 16, "blocks": 1, "steps": 20},
    "bridge": {"first_steps": 5, "later_steps": 5, "iterations": 1, "latent_width": 6},
}


@pytest.fixture(scope="module")
def cells() -> AnnData:
    made = planted_cells(n_units=5, n_cells=12)
    made.uns["endoprint"] = {"control": "DMSO", "fingerprint": "planted"}
    return made


@pytest.fixture(scope="module")
def split(cells) -> Split:
    return make_split(cells.obs, DesignConfig(n_test_units=1, n_folds=4), seed=0)


@pytest.fixture(scope="module")
def spoiled(cells, split) -> AnnData:
    """The same cells, but what is held out and what is tested is loud, strange and mislabelled."""
    rng = np.random.default_rng(0)
    parts = split.parts(cells.obs, 0)
    out = np.setdiff1d(np.arange(cells.n_obs), np.concatenate([parts.train, parts.valid]))
    counts = cells.X.toarray()
    counts[out] = rng.poisson(40.0, (len(out), cells.n_vars)) * (rng.random(cells.n_vars) < 0.3)
    strange = cells.copy()
    strange.X = sparse.csr_matrix(counts.astype(np.float32))
    strange.obs["n_counts"] = counts.sum(axis=1)
    strange.obs["n_genes"] = (counts > 0).sum(axis=1)
    labels = strange.obs["exposure"].to_numpy(dtype=object).copy()
    labels[out] = rng.permutation(labels[out])
    strange.obs["exposure"] = labels
    return strange


def kept(build, cells: AnnData, split: Split, folder: Path) -> tuple[dict[str, object], dict]:
    """All that a model fitted in the first fold would write to disk."""
    made = []

    def remember() -> contract.ExposureModel:
        made.append(build())
        return made[-1]

    judge.cross_fit(remember, cells, split, folds=[0])
    made[0].save(folder)
    return json.loads((folder / "model.json").read_text()), made[0]._state().arrays


def leaks(build, cells: AnnData, spoiled: AnnData, split: Split, folder: Path) -> list[str]:
    """The names of everything kept that the held-out cells changed."""
    head, arrays = kept(build, cells, split, folder / "plain")
    other_head, other_arrays = kept(build, spoiled, split, folder / "spoiled")
    found = [name for name in head if head[name] != other_head[name] and name != "provenance"]
    assert arrays.keys() == other_arrays.keys()
    return found + [k for k in arrays if not np.array_equal(arrays[k], other_arrays[k])]


@pytest.mark.parametrize("row", sorted(TABLE))
def test_no_number_that_a_row_keeps_knows_a_held_out_unit(row, cells, spoiled, split, tmp_path):
    cls = contract.model_class(row)
    config = cls.Config.of(TINY.get(row, {}), where=row)
    assert leaks(lambda: cls(config, seed=0), cells, spoiled, split, tmp_path) == []


def test_a_latent_fitted_on_every_cell_is_caught(cells, spoiled, split, tmp_path):
    class Peeking(Neighbours):
        every: AnnData

        def _learn(self, train, valid, watch, work):
            super()._learn(train, valid, watch, work)
            self._latent = Latent.fit(self.every, width=len(self._latent.components))

    def build_on(each: AnnData):
        return type("Peeking", (Peeking,), {"every": each})()

    given = iter([cells, spoiled])
    found = leaks(lambda: build_on(next(given)), cells, spoiled, split, tmp_path)
    assert "latent.centre" in found
    assert "latent.components" in found


def test_a_threshold_taken_from_held_out_cells_is_caught(cells, spoiled, split, tmp_path):
    class Peeking(Neighbours):
        every: AnnData

        def _remember(self, train, valid):
            super()._remember(train, valid)
            self.novelty_threshold = float(np.quantile(self.novelty(self.every), 0.95))

    given = iter([cells, spoiled])
    found = leaks(
        lambda: type("Peeking", (Peeking,), {"every": next(given)})(),
        cells, spoiled, split, tmp_path,
    )  # fmt: skip
    assert found == ["novelty_threshold"]
