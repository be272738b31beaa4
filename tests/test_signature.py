from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from conftest import planted_cells
from endoprint import responses
from endoprint.models.signature import (
    STRONGEST,
    Signature,
    SignatureConfig,
    published_panels,
)


def of_units(cells: AnnData, *units: str) -> AnnData:
    return cells[cells.obs["unit"].isin(units).to_numpy()].copy()


def named_after(cells: AnnData, panels: dict[str, list[str]]) -> AnnData:
    """Give each exposure's planted responders (8 genes each) the names of published targets."""
    names = list(cells.var_names)
    order = sorted(set(cells.obs["exposure"]))
    for exposure, genes in panels.items():
        start = order.index(exposure) * 8
        names[start : start + len(genes)] = genes
    cells.var_names = names
    return cells


def rising(exposure: str, n: int) -> list[str]:
    panel = published_panels()[exposure]
    return sorted(gene for gene, change in panel.items() if change > 0)[:n]


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return named_after(planted_cells(n_units=4), {"RET_AGONIST": rising("RET_AGONIST", 8)})


@pytest.fixture(scope="module")
def fitted(cells) -> Signature:
    return Signature().fit(of_units(cells, "u0", "u1"), of_units(cells, "u2"))


def test_published_panels_are_the_published_figures():
    panels = published_panels()
    table = responses.table()
    assert set(panels) == set(table["exposure"])
    one = table[(table["exposure"] == "LIVER-X_AGONIST") & (table["symbol"] == "ABCG1")].iloc[0]
    assert panels["LIVER-X_AGONIST"][one["gene_id"]] == STRONGEST  # 3.7 and 4.7, held to 3
    per1 = table[(table["exposure"] == "GLUCOCORT_AGONIST") & (table["symbol"] == "PER1")].iloc[0]
    assert panels["GLUCOCORT_AGONIST"][per1["gene_id"]] == pytest.approx(1.2)
    textbook = set(responses.table(kind="textbook")["gene_id"])
    assert not any(set(panel) & textbook for panel in panels.values())


def test_a_known_exposure_is_scored_by_its_published_targets(fitted):
    told = fitted.provenance["panels"]["RET_AGONIST"]
    assert told["source"] == "published targets"
    assert set(told["genes"]) <= set(published_panels()["RET_AGONIST"])


def test_an_unknown_exposure_gets_a_learned_panel_and_says_so(fitted):
    told = fitted.provenance["panels"]["LIVER-X_AGONIST"]
    assert told["source"] == "learned from the training cells"
    assert told["n_genes"] == SignatureConfig().learned_genes


def test_a_learned_panel_finds_the_planted_genes():
    made = planted_cells(n_units=4)
    model = Signature(SignatureConfig(learned_genes=8))
    model.fit(of_units(made, "u0", "u1"), of_units(made, "u2"))
    found = set(model.provenance["panels"]["RET_AGONIST"]["genes"])
    assert len(found & set(made.var_names[16:24])) >= 7


def test_the_control_has_no_panel_and_still_gets_evidence(fitted, cells):
    assert "DMSO" not in fitted.provenance["panels"]
    unseen = of_units(cells, "u3")
    calls = fitted.predict_proba(unseen).idxmax(axis=1)
    assert (calls == unseen.obs["exposure"])[unseen.obs["exposure"] == "DMSO"].mean() > 0.7


def test_a_files_own_control_is_taken_from_the_cells():
    made = planted_cells(exposures=("ctrl", "stim"), n_units=4)
    labels = {"ctrl": "stim", "stim": "ctrl"}  # conftest plants nothing in the label DMSO only
    made.obs["exposure"] = made.obs["exposure"].map(labels)
    made.uns["endoprint"] = {"control": "ctrl"}
    model = Signature().fit(of_units(made, "u0", "u1"), of_units(made, "u2"))
    assert set(model.provenance["panels"]) == {"stim"}


def test_the_score_is_the_weighed_mean_of_standardised_expression(fitted, cells):
    from endoprint.curated import log_normalised

    unseen = of_units(cells, "u3")
    row = list(fitted.provenance["panels"]).index("RET_AGONIST")
    genes = fitted.provenance["panels"]["RET_AGONIST"]["genes"]
    weights = np.array([published_panels()["RET_AGONIST"][gene] for gene in genes])
    place = [fitted._genes.index(gene) for gene in genes]
    values = log_normalised(unseen, genes).toarray()
    standard = (values - fitted._mean[place]) / fitted._spread[place]
    wanted = standard @ weights / np.abs(weights).sum()
    assert fitted._scores(unseen)[:, row] == pytest.approx(wanted, abs=1e-6)


def test_falling_targets_count_against():
    falling = sorted(g for g, change in published_panels()["RET_AGONIST"].items() if change < 0)
    made = named_after(planted_cells(n_units=4), {"RET_AGONIST": falling[:6]})
    model = Signature().fit(of_units(made, "u0", "u1"), of_units(made, "u2"))
    unseen = of_units(made, "u3")
    row = list(model.provenance["panels"]).index("RET_AGONIST")
    scores = (
        pd.Series(model._scores(unseen)[:, row]).groupby(unseen.obs["exposure"].to_numpy()).mean()
    )
    assert scores["RET_AGONIST"] < scores["DMSO"]  # what should fall was planted to rise


def test_too_few_measured_targets_are_not_called_published():
    made = named_after(planted_cells(n_units=4), {"RET_AGONIST": rising("RET_AGONIST", 1)})
    model = Signature().fit(of_units(made, "u0", "u1"), of_units(made, "u2"))
    source = model.provenance["panels"]["RET_AGONIST"]["source"]
    assert source == "learned from the training cells"


def test_exposures_that_never_share_a_unit_still_get_panels():
    made = planted_cells(n_units=4)
    kept = made.obs["unit"].map({"u0": "DMSO", "u1": "RET_AGONIST", "u2": "LIVER-X_AGONIST"})
    train = made[(made.obs["exposure"] == kept).to_numpy()].copy()
    model = Signature().fit(train, of_units(made, "u3"))
    assert set(model.provenance["panels"]) == {"RET_AGONIST", "LIVER-X_AGONIST"}
