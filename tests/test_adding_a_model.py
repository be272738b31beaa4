"""docs/adding-a-model.md shows a whole model: here it is run and held to the contract."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import planted_cells
from endoprint import model as contract
from endoprint.table import TABLE, Row

PAGE = Path(__file__).parents[1] / "docs/adding-a-model.md"


@pytest.fixture
def centroid(tmp_path, monkeypatch):
    shown = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    module, row = shown
    (tmp_path / "shown_centroid.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    rows = eval(f"{{{row}}}", {"Row": Row})  # the page's own words, as a dict
    assert list(rows) == ["centroid"]
    here = Row("shown_centroid:Centroid", *list(vars(rows["centroid"]).values())[1:])
    monkeypatch.setitem(TABLE, "centroid", here)
    yield contract.model_class("centroid")
    sys.modules.pop("shown_centroid", None)


def test_the_model_shown_finds_a_planted_signal_in_units_it_never_saw(centroid):
    cells = planted_cells(n_units=4)
    unit = cells.obs["unit"].to_numpy()
    model = centroid(seed=0).fit(cells[np.isin(unit, ["u0", "u1"])], cells[unit == "u2"])
    unseen = cells[unit == "u3"]
    called = model.predict_proba(unseen).idxmax(axis=1)
    assert (called == unseen.obs["exposure"].astype(str)).mean() > 0.9


def test_the_model_shown_is_the_same_once_loaded_and_whatever_the_minibatch(centroid, tmp_path):
    cells = planted_cells(n_units=3)
    unit = cells.obs["unit"].to_numpy()
    model = centroid(seed=0).fit(cells[unit == "u0"], cells[unit == "u1"])
    model.save(tmp_path / "saved")
    unseen = cells[unit == "u2"].copy()
    answer = model.predict_proba(unseen)
    assert contract.load(tmp_path / "saved").predict_proba(unseen).equals(answer)
    alone = model.predict_proba(unseen[5:6])
    assert np.allclose(alone.to_numpy(), answer.iloc[[5]].to_numpy(), atol=1e-5)
    turned = unseen[:, ::-1].copy()
    assert np.allclose(model.predict_proba(turned).to_numpy(), answer.to_numpy(), atol=1e-5)
