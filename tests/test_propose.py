"""What `init` proposes is right for real files, and curates them as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from conftest import planted_cells
from endoprint.cells import CellsConfig, curate, read
from endoprint.config import Params, Refusal
from endoprint.design import DesignConfig, make_split
from endoprint.propose import propose


def curated(proposed: dict[str, Any], folder: Path) -> ad.AnnData:
    """The proposal must be valid params and must work as it stands."""
    params = Params.of(proposed, "params.yaml")
    config = params.section("cells", CellsConfig)
    params.section("design", DesignConfig)
    assert Path(config.source).parent == Path("data/raw")
    cells, _ = curate(read(folder / Path(config.source).name, config), config)
    return cells


def test_kang_is_two_donors_read_from_sample_names(shared: Path) -> None:
    params, checks = propose(shared / "data/real/kang_ifnb_muscat_example.h5ad")
    said = {key: value for key, value in params["cells"].items() if key != "source"}
    assert said == {
        "exposure_key": "group_id",
        "control": "ctrl",
        "aliases": {"ctrl": "ctrl", "stim": "stim"},
        "unit_keys": ["sample_id"],
        "unit_pattern": r"(\d+)$",
        "sample_key": "sample_id",
        "gene_id_key": "ensembl_id",
        "cell_type_key": "cluster_id",
    }
    cells = curated(params, shared / "data/real")
    assert cells.obs["unit"].value_counts().to_dict() == {"101": 954, "107": 602}
    assert make_split(cells.obs, DesignConfig(), 0).folds == [["101"], ["107"]]
    assert any("confounding with the run cannot be excluded" in line for line in checks)


def test_a549_has_no_unit_and_says_so(shared: Path) -> None:
    params, checks = propose(shared / "data/real/a549_dex_sciCAR_scAI.h5ad")
    said = {key: value for key, value in params["cells"].items() if key != "source"}
    assert said == {
        "exposure_key": "condition",
        "control": "DMSO",
        "aliases": {"CTL": "DMSO"},
        "unit_keys": [],
        "technical_fold": "plate",
        "library_size_key": "implied_total_counts",
        "allow_symbols": True,
    }
    cells = curated(params, shared / "data/real")
    assert set(cells.obs["exposure"]) == {"DMSO", "GLUCOCORT_AGONIST"}
    assert any("replicated: false" in line for line in checks)
    assert any("time_h" in line for line in checks)
    by_hour = {**params["cells"], "exposure_key": "time_h", "control": "0"}
    by_hour["aliases"] = {"1": "1", "3": "3"}
    config = CellsConfig.of(by_hour, "cells")
    hours, _ = curate(read(shared / "data/real/a549_dex_sciCAR_scAI.h5ad", config), config)
    assert hours.obs["exposure"].value_counts().to_dict() == {"0": 583, "1": 983, "3": 1075}


def atlas() -> ad.AnnData:
    """A file with the source atlas's columns: one run per condition, 508 without replicates."""
    runs = {"DMSO": "505", "RET_AGONIST": "508", "LIVER-X_AGONIST": "497", "BPA": "506"}
    cells = planted_cells(exposures=tuple(runs), n_units=6, n_cells=3, n_genes=60)
    obs = pd.DataFrame(index=cells.obs_names)
    unit = cells.obs["unit"].str[1:].astype(int)
    obs["tags"] = "CMO301"
    obs["cmo"] = "301"
    obs["condition"] = pd.Categorical(cells.obs["exposure"])
    obs["replicate"] = (unit // 2 + 1).astype(float)
    obs.loc[obs["condition"] == "RET_AGONIST", "replicate"] = np.nan
    obs["condition_clean"] = obs["condition"].astype(str).str.replace("_", "")
    obs["line"] = np.where(unit % 2, "CTL04E", "CTL08A")
    obs["run"] = obs["condition"].astype(str).map(runs)
    obs["sample_id"] = [
        f"{r:.0f}_{line}_{run}" for r, line, run in zip(obs["replicate"], obs["line"], obs["run"])
    ]
    obs["tissue"], obs["PCW"], obs["study"] = "Organoid", "0", "noha"
    total = np.asarray(cells.X.sum(axis=1)).ravel()
    obs["n_genes_by_counts"] = cells.obs["n_genes"]
    obs["total_counts"], obs["log1p_total_counts"] = total, np.log1p(total)
    obs["pct_counts_mt"] = 1.5
    obs["hormones_substudy"] = np.where(obs["condition"] == "BPA", "no", "yes")
    obs["EDCs_substudy"] = np.where(obs["condition"].isin(["BPA", "DMSO"]), "yes", "no")
    obs["MacroCelltype"] = cells.obs["cell_type"].to_numpy()
    obs["Leiden_1"] = "3"
    obs["phase"] = np.where(unit % 2, "G1", "S")
    var = pd.DataFrame({"gene_ids": list(cells.var_names)}, index=[f"GENE{i}" for i in range(60)])
    return ad.AnnData(
        X=sparse.csr_matrix(np.log1p(cells.X.toarray())),
        obs=obs,
        var=var,
        layers={"counts": cells.X},
    )


def test_the_source_atlas_is_understood(tmp_path: Path) -> None:
    atlas().write_h5ad(tmp_path / "atlas.h5ad")
    params, checks = propose(tmp_path / "atlas.h5ad")
    said = {key: value for key, value in params["cells"].items() if key != "source"}
    assert params["task"] == "hormones"
    assert said == {
        "layer": "counts",
        "gene_id_key": "gene_ids",
        "exposure_key": "condition",
        "control": "DMSO",
        "line_key": "line",
        "unit_keys": ["line", "replicate"],
        "batch_key": "run",
        "cell_type_key": "MacroCelltype",
    }
    told = " ".join(checks)
    assert "holds one exposure only" in told
    assert "18 cells lack a part of their unit" in told
    assert "CTL04E|?" in set(curated(params, tmp_path).obs["unit"])


def test_placeholders_and_bulk_spellings_are_known(tmp_path: Path) -> None:
    cells = atlas()
    named = (
        cells.obs["condition"]
        .astype(str)
        .replace({"RET_AGONIST": "Ret_Ag", "BPA": "MTR_393_3GEX"})
    )
    cells.obs["condition"] = named.to_numpy()
    cells.write_h5ad(tmp_path / "early.h5ad")
    params, checks = propose(tmp_path / "early.h5ad")
    assert params["cells"]["drop_labels"] == ["MTR_393_3GEX"]
    assert "aliases" not in params["cells"]
    assert set(curated(params, tmp_path).obs["exposure"]) == {
        "DMSO",
        "RET_AGONIST",
        "LIVER-X_AGONIST",
    }


@pytest.mark.parametrize(
    ("make", "pattern", "units"),
    [
        (lambda group, donor: f"{donor}_{group}", r"^(.+?)[_\-. ]?(?:vehicle|dexa)$", ["A", "B"]),
        (lambda group, donor: f"{group}-{donor}", r"^(?:vehicle|dexa)[_\-. ]?(.+)$", ["A", "B"]),
    ],
)
def test_units_are_read_from_sample_names(
    make: object, pattern: str, units: list[str], tmp_path: Path
) -> None:
    cells = planted_cells(exposures=("DMSO", "E"), n_units=2, n_cells=5, n_genes=30)
    group = cells.obs["exposure"].map({"DMSO": "vehicle", "E": "dexa"})
    donor = cells.obs["unit"].map({"u0": "A", "u1": "B"})
    sample = [make(g, d) for g, d in zip(group, donor)]
    cells.obs = pd.DataFrame({"treatment": group, "sample": sample}, index=cells.obs_names)
    cells.write_h5ad(tmp_path / "My Cells (2).h5ad")
    params, checks = propose(tmp_path / "My Cells (2).h5ad")
    assert params["task"] == "my-cells-2"
    assert params["cells"]["unit_pattern"] == pattern
    assert sorted(set(curated(params, tmp_path).obs["unit"])) == units


def test_a_donor_column_is_the_unit(tmp_path: Path) -> None:
    cells = planted_cells(exposures=("DMSO", "E"), n_units=3, n_cells=5, n_genes=30)
    cells.obs = pd.DataFrame(
        {
            "Donor_ID": cells.obs["unit"],
            "Treatment": cells.obs["exposure"].map({"DMSO": "DMSO", "E": "compound X"}),
            "batch": "1",
        },
        index=cells.obs_names,
    )
    cells.write_h5ad(tmp_path / "cells.h5ad")
    params, checks = propose(tmp_path / "cells.h5ad")
    assert params["cells"]["unit_keys"] == ["Donor_ID"]
    assert params["cells"]["exposure_key"] == "Treatment"
    assert params["cells"]["batch_key"] == "batch"
    assert set(curated(params, tmp_path).obs["exposure"]) == {"DMSO", "compound X"}


def test_a_file_without_counts_or_exposure_is_refused(tmp_path: Path) -> None:
    cells = atlas()
    del cells.layers["counts"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(Refusal, match="raw counts somewhere"):
        propose(tmp_path / "cells.h5ad")
    cells = planted_cells(n_units=2, n_cells=3, n_genes=30)
    cells.obs = pd.DataFrame({"n_counts": cells.obs["n_counts"]})
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(Refusal, match="exposed to"):
        propose(tmp_path / "cells.h5ad")
    with pytest.raises(Refusal, match="no file"):
        propose(tmp_path / "absent.h5ad")


def two_donors() -> ad.AnnData:
    """A plain file: treatment, and a sample whose name holds the donor."""
    cells = planted_cells(exposures=("DMSO", "E"), n_units=2, n_cells=8, n_genes=30)
    group = cells.obs["exposure"].map({"DMSO": "vehicle", "E": "dexa"})
    donor = cells.obs["unit"].map({"u0": "101", "u1": "107"})
    arm = group.map({"vehicle": "a", "dexa": "b"})
    cells.obs = pd.DataFrame(
        {"treatment": group, "sample": [f"{one}{two}" for one, two in zip(arm, donor)]},
        index=cells.obs_names,
    )
    return cells


def test_a_donor_is_found_in_samples_that_spell_exposure_otherwise(tmp_path: Path) -> None:
    two_donors().write_h5ad(tmp_path / "cells.h5ad")
    params, _ = propose(tmp_path / "cells.h5ad")
    assert set(curated(params, tmp_path).obs["unit"]) == {"101", "107"}


def test_gaps_are_counted_before_curation_refuses_them(tmp_path: Path) -> None:
    cells = two_donors()
    cells.obs["treatment"] = pd.Categorical(cells.obs["treatment"])
    cells.obs.loc[cells.obs_names[:3], "treatment"] = np.nan
    cells.write_h5ad(tmp_path / "cells.h5ad")
    params, checks = propose(tmp_path / "cells.h5ad")
    assert any(line.startswith("3 cells have no 'treatment'") for line in checks)
    assert params["cells"]["unit_pattern"] == r"(\d+)$"
    with pytest.raises(Refusal, match="3 cells without"):
        curated(params, tmp_path)


def test_counts_are_found_where_a_file_has_layers_only(tmp_path: Path) -> None:
    cells = two_donors()
    layers = {"counts": cells.X.copy(), "logcounts": np.log1p(cells.X.toarray())}
    bare = ad.AnnData(obs=cells.obs, var=cells.var, layers=layers)
    bare.write_h5ad(tmp_path / "cells.h5ad")
    params, _ = propose(tmp_path / "cells.h5ad")
    assert params["cells"]["layer"] == "counts"
    assert curated(params, tmp_path).X.sum() == cells.X.sum()


def test_columns_typed_with_spaces_are_known(tmp_path: Path) -> None:
    cells = two_donors()
    cells.obs["Donor ID"] = cells.obs.pop("sample").str[1:]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert propose(tmp_path / "cells.h5ad")[0]["cells"]["unit_keys"] == ["Donor ID"]


def test_nothing_to_hold_out_is_said_at_once(tmp_path: Path) -> None:
    cells = two_donors()
    del cells.obs["sample"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert any(
        "the run stops at the split" in line for line in propose(tmp_path / "cells.h5ad")[1]
    )


def test_a_refusal_stays_short_however_many_columns_there_are(tmp_path: Path) -> None:
    cells = two_donors()
    del cells.obs["treatment"]
    flags = {f"flag_{i}": np.arange(cells.n_obs) % 2 for i in range(60)}
    cells.obs = pd.DataFrame(flags, index=cells.obs_names)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(Refusal, match=r"flag_7 \.\.\.") as refused:
        propose(tmp_path / "cells.h5ad")
    assert len(str(refused.value)) < 300


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_repeated_cell_ids_are_refused_before_a_workspace_is_written(tmp_path: Path) -> None:
    cells = two_donors()
    cells.obs_names = ["AAAC-1"] * cells.n_obs
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(Refusal, match="cell ids are unique"):
        propose(tmp_path / "cells.h5ad")
