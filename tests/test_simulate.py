"""The atlas keeps its own law, its design is what it claims, and the oracle is right."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import integrate, optimize, sparse, stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from endoprint import responses
from endoprint.config import Refusal
from endoprint.simulate import Atlas, SimulateConfig, law_of, oracle, save, simulate
from endoprint.simulate import atlas as atlas_room
from endoprint.simulate import law as law_room
from endoprint.simulate.counts import Means, draw
from endoprint.simulate.oracle import integrated
from endoprint.simulate.samples import EDCS, cell_ids

SMALL = SimulateConfig(cells=400, genes=200, pool_cells=120, new_cells=300)


@pytest.fixture(scope="module")
def small() -> Atlas:
    return simulate(SMALL, seed=3)


@pytest.fixture(scope="module")
def easy() -> Atlas:
    return simulate(SimulateConfig(cells=1200, pool_cells=0), seed=21)


@pytest.fixture(scope="module")
def easy_oracle(easy: Atlas) -> pd.DataFrame:
    return oracle(easy.law, easy.cells, library=easy.hidden["library"])


@pytest.fixture(scope="module")
def published() -> Atlas:
    config = SimulateConfig(cells=5000, genes=120, pool_cells=0, as_published=True)
    return simulate(config, seed=1)


def calls(probabilities: pd.DataFrame) -> np.ndarray:
    return probabilities.columns.to_numpy()[probabilities.to_numpy().argmax(axis=1)]


def components(runs_of: dict[str, set[str]]) -> list[set[str]]:
    """Connected components of exposures that share a run, the long way round."""
    left, found = set(runs_of), []
    while left:
        here = {left.pop()}
        while more := {e for e in left if any(runs_of[e] & runs_of[h] for h in here)}:
            here |= more
            left -= more
        found.append(here)
    return found


def runs_of(atlas: Atlas) -> dict[str, set[str]]:
    obs = atlas.cells.obs.astype(str)
    return {e: set(runs) for e, runs in obs.groupby("condition")["run"]}


# -- counts -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dispersion", [0.05, 0.3, 2.0])
def test_counts_follow_the_negative_binomial_law(dispersion: float) -> None:
    mean = np.array([0.02, 0.7, 5.0, 60.0], dtype=np.float32)
    n = 40_000
    means = Means(library=np.ones(n), factors=((mean[None, :], np.zeros(n, dtype=int)),))
    counts = draw(means, dispersion=dispersion, seed=5, part="cells").toarray()
    for g, m in enumerate(mean.astype(float)):
        law = stats.nbinom(1 / dispersion, 1 / (1 + dispersion * m))
        edges = np.unique(law.ppf(np.linspace(0, 1, 12)[1:-1]))
        cells_in_bin = np.bincount(np.searchsorted(edges, counts[:, g]), minlength=len(edges) + 1)
        expected = np.diff([0.0, *law.cdf(edges), 1.0]) * n
        # 12 comparisons at a false-alarm rate of 1e-4 each; the seed is fixed
        assert stats.chisquare(cells_in_bin, expected).pvalue > 1e-4
        assert counts[:, g].mean() == pytest.approx(m, abs=5 * law.std() / np.sqrt(n))
        assert counts[:, g].var() == pytest.approx(m + dispersion * m**2, rel=0.15)


def test_means_are_library_times_share_times_every_effect() -> None:
    rng = np.random.default_rng(0)
    share, unit = (rng.random((2, 5)).astype(np.float32) for _ in range(2))
    means = Means(
        library=np.array([10.0, 20.0, 30.0]),
        factors=((share, np.array([0, 1, 1])), (unit, np.array([1, 1, 0]))),
    )
    by_hand = [10 * share[0] * unit[1], 20 * share[1] * unit[1], 30 * share[1] * unit[0]]
    np.testing.assert_allclose(means.block(0, 3), by_hand, rtol=1e-6)
    np.testing.assert_array_equal(means.block(1, 3), means.block(0, 3)[1:])


def test_the_number_of_threads_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    share = rng.random((3, 700)).astype(np.float32)
    means = Means(library=np.ones(2500), factors=((share, rng.integers(0, 3, 2500)),))
    one, three = (
        draw(means, dispersion=0.3, seed=2, part="cells", threads=threads) for threads in (1, 3)
    )
    np.testing.assert_array_equal(one.indptr, three.indptr)
    np.testing.assert_array_equal(one.indices, three.indices)
    np.testing.assert_array_equal(one.data, three.data)


def test_no_two_cells_share_their_chance() -> None:
    n, n_genes = 1500, 700  # several blocks, each of its own stream
    means = Means(
        library=np.ones(n), factors=((np.full((1, n_genes), 2.0, np.float32), np.zeros(n, int)),)
    )
    counts = draw(means, dispersion=0.3, seed=2, part="cells").toarray()
    assert len(np.unique(counts, axis=0)) == n
    other = draw(means, dispersion=0.3, seed=2, part="pool").toarray()
    assert not (counts == other).all(axis=1).any()


def test_progress_rises_to_the_number_of_cells() -> None:
    told: list[tuple[int, int]] = []
    simulate(SMALL, seed=3, watch=lambda done, total: told.append((done, total)))
    assert all(a < b for (a, _), (b, _) in pairwise(told))
    assert told[-1] == (820, 820)
    assert {total for _, total in told} == {820}


# -- seeds --------------------------------------------------------------------------------------
def test_one_seed_gives_one_atlas_and_another_seed_another(small: Atlas) -> None:
    again, other = simulate(SMALL, seed=3), simulate(SMALL, seed=4)
    for part in ("cells", "pool", "new"):
        one, two = getattr(small, part), getattr(again, part)
        assert (one.X != two.X).nnz == 0
        pd.testing.assert_frame_equal(one.obs, two.obs)
        assert (one.X != getattr(other, part).X).nnz > 0
    pd.testing.assert_frame_equal(small.truth, again.truth)
    pd.testing.assert_frame_equal(small.hidden, again.hidden)


def test_more_cells_or_another_design_leave_the_biology_alone() -> None:
    law = law_of(SMALL, seed=3)
    wider = SMALL.model_copy(update={"cells": 900, "lines": 4, "confounding": "complete"})
    np.testing.assert_array_equal(law.effect, law_of(wider, seed=3).effect)
    np.testing.assert_array_equal(law.log_share, law_of(wider, seed=3).log_share)
    assert (law.effect != law_of(SMALL, seed=4).effect).any()


def test_a_line_keeps_its_effect_whatever_other_lines_there_are() -> None:
    two, row = atlas_room._nuisance(pd.Series(["CTL04E", "CTL08A"]), 0.2, 50, 7, "line")
    four, rows = atlas_room._nuisance(
        pd.Series(["CTL01A", "CTL02A", "CTL04E", "CTL08A"]), 0.2, 50, 7, "line"
    )
    np.testing.assert_array_equal(two[row], four[rows[2:]])
    many, _ = atlas_room._nuisance(pd.Series(["CTL04E"]), 0.2, 50_000, 7, "line")
    assert many.mean() == pytest.approx(1.0, abs=0.005)
    assert np.log(many).std() == pytest.approx(0.2, rel=0.02)


# -- what is in the file ------------------------------------------------------------------------
def test_cells_are_raw_counts_in_the_source_atlas_spelling(small: Atlas) -> None:
    for cells in (small.cells, small.pool, small.new):
        assert cells is not None
        assert isinstance(cells.X, sparse.csr_matrix)
        assert cells.X.dtype == np.float32
        assert cells.X.has_sorted_indices
        assert (cells.X.data > 0).all()
        assert (cells.X.data == np.round(cells.X.data)).all()
        assert cells.obs_names.is_unique
        assert cells.var_names.is_unique
        assert cells.var["gene_ids"].is_unique
        assert cells.obs_names.str.fullmatch(r"[ACGT]{16}-1-\d{3}").all()
        assert (cells.obs_names.str[-3:] == cells.obs["run"].astype(str)).all()
    columns = ["condition", "line", "replicate", "run", "cell_type", "sample_id"]
    assert list(small.cells.obs) == columns
    assert set(small.cells.obs["condition"]) == set(small.law.exposures)
    assert set(small.cells.obs["line"]) == {"CTL04E", "CTL08A"}


def test_unlabelled_cells_carry_no_label_and_share_no_line_or_run(small: Atlas) -> None:
    labelled, pool, new = small.cells.obs, small.pool.obs, small.new.obs
    for obs in (pool, new):
        assert list(obs) == ["line", "replicate", "run", "cell_type", "sample_id"]
        assert not set(obs["line"]) & set(labelled["line"])
        assert not set(obs["run"]) & set(labelled["run"])
    assert not set(pool["line"]) & set(new["line"])
    assert set(new["line"]) == {"CTL01A", "CTL02A"}
    assert pool.groupby(["line", "replicate"], observed=True).ngroups == SMALL.pool_units


def test_barcodes_repeat_across_runs_but_never_within_one() -> None:
    run = pd.Series(np.repeat(["491", "492", "493"], 2000))
    ids = cell_ids(run, seed=0, part="cells")
    assert ids.is_unique
    assert ids.str[:16].nunique() < len(ids)


def test_no_part_is_drawn_that_was_not_asked_for() -> None:
    atlas = simulate(SimulateConfig(cells=90, genes=120, pool_cells=0, new_cells=0), seed=0)
    assert atlas.pool is None
    assert atlas.new is None
    assert atlas.truth.empty


def test_library_size_and_cell_types_are_as_asked(easy: Atlas) -> None:
    known = easy.hidden
    assert known["library"].median() == pytest.approx(1500, rel=0.05)
    assert np.log(known["library"]).std() == pytest.approx(0.35, rel=0.1)
    total = np.asarray(easy.cells.X.sum(axis=1)).ravel()
    # unit and run effects have mean one over genes, so the total stays near the library size
    assert np.median(total / known.loc[easy.cells.obs_names, "library"]) == pytest.approx(
        1, abs=0.1
    )
    assert (known["cell_type"] == "Neurons").mean() == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("effect", ["line", "replicate", "run"])
def test_units_and_runs_shift_genes_as_much_as_asked(effect: str) -> None:
    sds = {f"{name}_sd": 0.4 if name == effect else 0.0 for name in ("line", "replicate", "run")}
    values = {"cells": 3000, "genes": 300, "pool_cells": 0, "runs": 2, "replicates": 2, **sds}
    atlas = simulate(SimulateConfig.of(values, where="simulate"), seed=8)
    obs, counts = atlas.cells.obs, atlas.cells.X
    group = obs[effect].astype(str)
    if effect == "replicate":
        group = group[obs["line"] == "CTL04E"]  # a culture is line x replicate
    names = sorted(set(group))
    one, two = (
        np.asarray(counts[obs.index.get_indexer(group.index[group == name])].mean(axis=0)).ravel()
        for name in names
    )
    is_high = one + two > 1.0  # counting noise is small there
    log_ratio = np.log(one / two, where=is_high, out=np.zeros_like(one))[is_high]
    assert len(names) == 2
    assert is_high.sum() > 80
    assert log_ratio.std() == pytest.approx(0.4 * np.sqrt(2), rel=0.25)


# -- biology ------------------------------------------------------------------------------------
def test_background_effects_have_the_published_strength_and_twins() -> None:
    law = law_of(SimulateConfig(genes=60_000), seed=0)
    is_background = np.array([s.startswith("SIM") for s in law.symbols])
    scale = law_room.SCALE["easy"] * np.log(2)
    effect = {e: law.effect[i][:, is_background] / scale for i, e in enumerate(law.exposures)}
    assert not effect["DMSO"].any()
    for exposure, strong in law_room.STRONG_GENES.items():
        share = (np.abs(effect[exposure]) > 1).mean(axis=1)
        np.testing.assert_allclose(share, np.array(strong) / law_room.GENES_TESTED, rtol=0.12)
    for pathway, published in law_room.TWIN_CORRELATION.items():
        for t, r in enumerate(published):
            pair = effect[f"{pathway}_AGONIST"][t], effect[f"{pathway}_ANTAGONIST"][t]
            assert np.corrcoef(*pair)[0, 1] == pytest.approx(r, abs=0.02)


def test_named_genes_move_as_published_and_only_there() -> None:
    law = law_of(SimulateConfig(difficulty="hard"), seed=0)
    scale = law_room.SCALE["hard"] * np.log(2)
    e, g = law.exposures.index, law.symbols.index
    assert law.effect[e("RET_AGONIST"), :, g("HOXB9")] / scale == pytest.approx([10.8, 12.9])
    assert law.effect[e("THYROID_AGONIST"), :, g("KLF9")] / scale == pytest.approx([0.0, 1.4])
    assert not law.effect[e("ESTROGEN_AGONIST"), :, g("HOXB9")].any()
    np.testing.assert_allclose(np.exp(law.log_share).sum(axis=2), 1.0)


def test_textbook_genes_never_mix_with_measured_ones() -> None:
    measured, textbook = responses.table(), responses.table(kind="textbook")
    assert not set(measured["gene_id"]) & set(textbook["gene_id"])
    assert textbook.filter(like="log2fc").isna().all(axis=None)
    mode = law_of(SimulateConfig(responses="textbook"), seed=0)
    assert set(textbook["symbol"]) <= set(mode.symbols)
    assert not set(measured["symbol"]) & set(mode.symbols)
    assert not set(textbook["symbol"]) & set(law_of(SimulateConfig(), seed=0).symbols)


def test_gene_ids_are_ensembl_ids_and_background_ids_are_no_real_gene() -> None:
    law = law_of(SimulateConfig(), seed=0)
    ids = pd.Series(law.gene_ids, index=law.symbols)
    assert ids.is_unique
    assert ids.str.fullmatch(r"ENSG\d{11}").all()
    assert ((ids > "ENSG99") == ids.index.str.startswith("SIM")).all()
    assert set(responses.table()["exposure"]) <= set(law.exposures)


def test_response_genes_are_the_published_ones(shared: Path) -> None:
    published = pd.read_csv(shared / "data/noha_sc_edgeR_effects_FDR05.csv.gz")
    log2fc = published.set_index(["gene", "condition", "celltype"])["log2FC"]
    ids = pd.read_json(
        shared / "data/geneformer/gene_name_id_dict_gc104M.json", typ="series", convert_dates=False
    )
    table = responses.table()
    assert (table["gene_id"].to_numpy() == ids[table["symbol"]].to_numpy()).all()
    in_cells = table[table["bulk_log2fc"].isna()]
    for cell_type in ("Neurons", "Progenitors"):
        key = pd.MultiIndex.from_arrays(
            [in_cells["symbol"], in_cells["exposure"], [cell_type] * len(in_cells)]
        )
        ours = in_cells[f"{cell_type.lower()}_log2fc"].to_numpy()
        # ours are rounded to one decimal, as the facts are
        np.testing.assert_allclose(ours, log2fc.reindex(key).to_numpy(), atol=0.051)


# -- a table of measured effects ----------------------------------------------------------------
def write_effects(folder: Path, **changes: object) -> SimulateConfig:
    """Two hundred genes, G0 to G199; G7 rises threefold under GW3965 in neurons."""
    rows = [
        {"gene": f"G{g}", "celltype": c, "condition": "RET_AGONIST", "log2FC": 0.5, "logCPM": 5.0}
        for g in range(200)
        for c in ("Neurons", "Progenitors")
    ]
    rows += [
        {"gene": "G7", "celltype": "Neurons", "condition": "LIVER-X_AGONIST", "log2FC": 3.0,
         "logCPM": 9.0}
    ]  # fmt: skip
    pd.DataFrame(rows).assign(**changes).to_csv(folder / "effects.csv", index=False)
    names = pd.Series({f"G{g}": f"ENSG{g + 1:011d}" for g in range(190)})
    names.to_json(folder / "names.json")
    return SimulateConfig(
        cells=90,
        genes=150,
        pool_cells=0,
        effects=str(folder / "effects.csv"),
        effects_names=str(folder / "names.json"),
    )


def test_a_table_of_effects_replaces_what_would_be_drawn(tmp_path: Path) -> None:
    atlas = simulate(write_effects(tmp_path), seed=0)
    law, scale = atlas.law, law_room.SCALE["easy"] * np.log(2)
    g = law.symbols.index("G7")
    effect = law.effect[law.exposures.index("LIVER-X_AGONIST")] / scale
    assert effect[:, g] == pytest.approx([3.0, 0.0])
    assert np.count_nonzero(effect) == 1
    assert law.gene_ids[g] == "ENSG00000000008"
    assert not set(law.symbols) & {f"G{i}" for i in range(190, 200)}  # no id, no gene
    assert atlas.cells.shape == (90, 150)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"condition": "BPA"}, "BPA"),
        ({"celltype": "Astrocytes"}, "Astrocytes"),
        ({"log2FC": "high"}, "finite"),
        ({"gene": "G1"}, "1 with an id"),
    ],
)
def test_a_table_of_effects_that_makes_no_sense_is_refused(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(Refusal, match=says):
        law_of(write_effects(tmp_path, **changes), seed=0)


def test_a_table_of_effects_needs_its_files_and_columns(tmp_path: Path) -> None:
    config = write_effects(tmp_path)
    for change, says in (
        ({"effects": str(tmp_path / "none.csv")}, "none.csv"),
        ({"effects": str(tmp_path / "names.json")}, "without gene"),
        ({"effects_names": ""}, "gene_id"),
        ({"effects_names": str(tmp_path / "effects.csv")}, "JSON"),
    ):
        with pytest.raises(Refusal, match=says):
            law_of(config.model_copy(update=change), seed=0)


def test_the_published_effects_give_real_genes_and_a_law(shared: Path) -> None:
    config = SimulateConfig(
        genes=2000,
        effects=str(shared / "data/noha_sc_edgeR_effects_FDR05.csv.gz"),
        effects_names=str(shared / "data/geneformer/gene_name_id_dict_gc104M.json"),
    )
    law = law_of(config, seed=0)
    assert all(gene.startswith("ENSG0") for gene in law.gene_ids)
    published = pd.read_csv(config.effects)
    published = published[published["condition"] == "RET_AGONIST"]
    log2fc = published.set_index(["celltype", "gene"])["log2FC"]
    scale = law_room.SCALE["easy"] * np.log(2)
    ours = law.effect[law.exposures.index("RET_AGONIST")] / scale
    for t, cell_type in enumerate(law_room.CELL_TYPES):
        theirs = log2fc[cell_type].reindex(law.symbols).fillna(0.0)
        np.testing.assert_allclose(ours[t], theirs, atol=1e-9)


# -- confounding --------------------------------------------------------------------------------
def test_without_confounding_every_run_holds_every_exposure(small: Atlas) -> None:
    obs = small.cells.obs
    table = pd.crosstab(obs["run"], obs["condition"])
    assert table.shape == (3, 15)
    assert (table.to_numpy() > 0).all()
    by_unit = obs.groupby(["line", "replicate", "run"], observed=True).size()
    assert len(by_unit) == 6 * 3


def test_partial_confounding_leaves_some_exposures_beside_the_control() -> None:
    config = SMALL.model_copy(update={"confounding": "partial", "pool_cells": 0, "new_cells": 0})
    parts = components(runs_of(simulate(config, seed=0)))
    beside_control = next(part for part in parts if "DMSO" in part)
    assert len(beside_control) == 9
    assert sorted(len(part) for part in parts) == [1] * 6 + [9]


def test_complete_confounding_gives_every_exposure_one_run_of_its_own() -> None:
    config = SMALL.model_copy(update={"confounding": "complete", "pool_cells": 0, "new_cells": 0})
    atlas = simulate(config, seed=0)
    runs = runs_of(atlas)
    assert [len(part) for part in components(runs)] == [1] * 15
    assert runs["DMSO"] == {"505"}
    assert set(atlas.cells.obs["sample_id"].str.count("_")) == {2}
    assert atlas.cells.obs["sample_id"].nunique() == 90


def test_a_crossed_sample_holds_one_exposure(small: Atlas) -> None:
    obs = small.cells.obs
    assert (obs.groupby("sample_id", observed=True)["condition"].nunique() == 1).all()


# -- as published -------------------------------------------------------------------------------
def test_as_published_has_the_source_atlas_samples(published: Atlas) -> None:
    obs = published.cells.obs
    assert obs["sample_id"].nunique() == 85
    n_samples = obs.groupby("condition", observed=True)["sample_id"].nunique().to_dict()
    assert n_samples.pop("RET_AGONIST") == 2
    assert n_samples.pop("RET_ANTAGONIST") == 5
    assert set(n_samples.values()) == {6}
    assert "2_CTL08A_509" not in set(obs["sample_id"])
    assert {"3_CTL04E_491", "NA_CTL04E_508", "NA_CTL08A_508"} <= set(obs["sample_id"])
    assert obs["replicate"].isna().equals(obs["condition"] == "RET_AGONIST")
    assert all(len(runs) == 1 for runs in runs_of(published).values())
    assert len(obs) == 5000


def test_as_published_swaps_two_percent_of_replicates_within_line_and_run(
    published: Atlas,
) -> None:
    label = published.cells.obs
    truth = published.hidden.loc[label.index]
    known = label["replicate"].notna()
    swapped = known & (label["replicate"].astype(object) != truth["replicate"])
    assert swapped.sum() == 100  # 2 % of 5,000
    for column, true_column in (("line", "line"), ("run", "run"), ("condition", "exposure")):
        assert (label[column].astype(str) == truth[true_column]).all()
    spelled = label["replicate"].astype(object) + "_" + truth["line"] + "_" + truth["run"]
    assert (spelled[known] == label.loc[known, "sample_id"].astype(str)).all()


def test_without_flaws_no_label_is_swapped(small: Atlas) -> None:
    truth = small.hidden.loc[small.cells.obs_names, "replicate"]
    assert (small.cells.obs["replicate"].astype(str) == truth).all()


# -- the oracle ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("x", "mean"),
    [(0, 0.01), (1, 0.01), (3, 0.01), (0, 1.0), (7, 1.0), (0, 50.0), (50, 50.0), (400, 100.0)],
)
def test_quadrature_equals_the_integral(x: int, mean: float) -> None:
    size, sd = 1 / 0.3, 0.26

    def joint(z: float) -> float:
        m = mean * np.exp(sd * z - sd**2 / 2)
        return stats.nbinom.pmf(x, size, size / (size + m)) * stats.norm.pdf(z)

    by_hand = np.log(integrate.quad(joint, -12, 12, epsabs=0, epsrel=1e-10, limit=200)[0])
    constant = stats.nbinom.logpmf(x, size, 0.5) - (x + size) * np.log(0.5)
    ours = integrated(np.array([float(x)]), np.log([mean]), dispersion=0.3, sd=sd, n_nodes=7)
    assert ours[0] + constant == pytest.approx(by_hand, abs=2e-3)


def test_seven_nodes_are_enough(easy: Atlas, easy_oracle: pd.DataFrame) -> None:
    # far out in a tail seven nodes fall short of the integral, but only where all is decided
    some = easy.cells[:100]
    fine = oracle(easy.law, some, library=easy.hidden["library"], n_nodes=61)
    np.testing.assert_allclose(fine, easy_oracle.loc[some.obs_names], atol=0.005)


@pytest.mark.parametrize(("dispersion", "sd"), [(0.3, 0.5), (1.5, 0.05)])
def test_the_oracle_means_its_probabilities(dispersion: float, sd: float) -> None:
    # A posterior from the true law is calibrated: confidence and accuracy agree. Any mismatch
    # between what draws the cells and what the oracle believes would break this. Many lines and
    # runs, because cells of one line and run err together; few genes, so that doubt remains.
    config = SimulateConfig(
        cells=3000, genes=150, pool_cells=0, lines=40, replicates=1, runs=30, median_umi=1000,
        line_sd=sd, replicate_sd=0.0, run_sd=sd, dispersion=dispersion,
    )  # fmt: skip
    atlas = simulate(config, seed=3)
    probabilities = oracle(atlas.law, atlas.cells, library=atlas.hidden["library"])
    is_right = calls(probabilities) == atlas.cells.obs["condition"].astype(str).to_numpy()
    confidence = probabilities.max(axis=1).to_numpy()
    assert confidence.mean() == pytest.approx(is_right.mean(), abs=0.03)
    for low, high in pairwise([0.0, 0.4, 0.7, 1.0]):
        here = (confidence > low) & (confidence <= high)
        assert here.sum() > 200
        assert confidence[here].mean() == pytest.approx(is_right[here].mean(), abs=0.06)


def test_the_oracle_reaches_its_easy_band_and_beats_a_classifier(
    easy: Atlas, easy_oracle: pd.DataFrame
) -> None:
    obs = easy.cells.obs
    truth = obs["condition"].astype(str).to_numpy()
    held_out = (obs["replicate"] == "3").to_numpy()
    x = easy.cells.X.multiply(1 / easy.cells.X.sum(axis=1)).tocsr() * 1e4
    model = LogisticRegression(C=1e-2, max_iter=1000).fit(x.log1p()[~held_out], truth[~held_out])
    ours = f1_score(truth[held_out], model.predict(x.log1p()[held_out]), average="macro")
    bound = f1_score(truth[held_out], calls(easy_oracle)[held_out], average="macro")
    assert 2 / 15 < ours < bound
    assert f1_score(truth, calls(easy_oracle), average="macro") == pytest.approx(0.95, abs=0.03)


def test_the_oracle_knows_genes_by_id_and_cells_one_by_one(
    easy: Atlas, easy_oracle: pd.DataFrame
) -> None:
    rng = np.random.default_rng(0)
    chosen = easy.cells[rng.permutation(easy.cells.n_obs)[:40], rng.permutation(1500)].copy()
    chosen.var_names = chosen.var.pop("gene_ids")  # as curated cells name their genes
    alone = oracle(easy.law, chosen, library=easy.hidden["library"])
    pd.testing.assert_frame_equal(
        alone, easy_oracle.loc[chosen.obs_names], atol=1e-9, rtol=0, check_names=False
    )


def test_the_oracle_without_library_sizes_takes_the_totals(easy: Atlas) -> None:
    some = easy.cells[:60].copy()
    implied = oracle(easy.law, some)
    some.obs["n_counts"] = np.asarray(some.X.sum(axis=1)).ravel()
    pd.testing.assert_frame_equal(implied, oracle(easy.law, some))
    known = oracle(easy.law, some, library=easy.hidden["library"])
    assert (calls(implied) == calls(known)).mean() > 0.8


def test_the_oracle_refuses_what_it_cannot_know(easy: Atlas) -> None:
    some = easy.cells[:5].copy()
    with pytest.raises(Refusal, match="library size"):
        oracle(easy.law, some, library=easy.hidden["library"].iloc[:0])
    typed = some.copy()
    typed.obs["cell_type"] = "Astrocytes"
    with pytest.raises(Refusal, match="cell types"):
        oracle(easy.law, typed)
    some.var["gene_ids"] = [f"ENSG0{i:010d}" for i in range(some.n_vars)]
    with pytest.raises(Refusal, match="genes of its own"):
        oracle(easy.law, some)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difficulty", "band"), [("easy", 0.95), ("middle", 0.80), ("hard", 0.60)]
)
def test_each_difficulty_keeps_its_oracle(difficulty: str, band: float) -> None:
    config = SimulateConfig.of({"difficulty": difficulty, "pool_cells": 0}, where="simulate")
    atlas = simulate(config, seed=11)
    probabilities = oracle(atlas.law, atlas.cells, library=atlas.hidden["library"])
    truth = atlas.cells.obs["condition"].astype(str)
    assert f1_score(truth, calls(probabilities), average="macro") == pytest.approx(band, abs=0.02)


# -- new samples --------------------------------------------------------------------------------
def test_the_truth_names_every_new_sample_and_its_weights(small: Atlas) -> None:
    truth, obs = small.truth, small.new.obs
    assert set(truth.index) == set(obs["sample_id"])
    assert truth["n_cells"].sum() == len(obs) == 300
    weights = truth.filter(like="w_")
    assert weights.shape[1] == 14
    assert (weights.to_numpy() >= 0).all()
    is_edc = truth["exposure"].isin(EDCS)
    assert truth[is_edc].groupby("line")["exposure"].nunique().eq(8).all()
    np.testing.assert_allclose(weights[is_edc].sum(axis=1), 1.0)
    for sample, exposure in truth.loc[~is_edc, "exposure"].items():
        one_hot = [float(name == f"w_{exposure}") for name in weights]
        assert weights.loc[sample].tolist() == one_hot  # all zero for the control
    assert (truth.loc[is_edc, "unmodelled_share"] == 0.3).all()
    assert (truth.loc[~is_edc, "unmodelled_share"] == 0.0).all()
    assert (truth["exposure"] == "DMSO").sum() == 2 * SMALL.new_units  # the null of a projection
    hidden = small.hidden.loc[small.new.obs_names, "exposure"]
    assert (truth.loc[obs["sample_id"].astype(str), "exposure"].to_numpy() == hidden).all()


def test_an_edc_mixes_the_effects_its_weights_say_and_something_else() -> None:
    law = law_of(SimulateConfig(genes=5000), seed=2)
    weights = atlas_room._mixtures(law, seed=2)
    log_share = atlas_room._mixture_shares(law, weights, seed=2)
    control = law.exposures.index("DMSO")
    known = [law.exposures.index(e) for e in weights.columns]
    for m in range(len(EDCS)):
        # a log fold change of shares is the effect plus one constant per cell type
        change = log_share[m] - law.log_share[control]
        design = law.effect[known]
        centred = (design - design.mean(axis=2, keepdims=True)).reshape(len(known), -1)
        target = (change - change.mean(axis=1, keepdims=True)).ravel()
        found, residual = optimize.nnls(centred.T, target)
        np.testing.assert_allclose(found, weights.iloc[m], atol=0.1)
        assert residual**2 / (target @ target) == pytest.approx(0.3, abs=0.03)


# -- saving -------------------------------------------------------------------------------------
def test_the_same_atlas_is_saved_as_the_same_bytes(small: Atlas, tmp_path: Path) -> None:
    names = ["cells.h5ad", "pool.h5ad", "new.h5ad", "truth.csv"]
    for folder, atlas in (("one", small), ("two", simulate(SMALL, seed=3))):
        save(atlas, *(tmp_path / folder / name for name in names))
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_is_saved_is_what_was_drawn(small: Atlas, tmp_path: Path) -> None:
    save(small, tmp_path / "cells.h5ad", new=tmp_path / "new.h5ad", truth=tmp_path / "truth.csv")
    for part, name in ((small.cells, "cells"), (small.new, "new")):
        read = anndata.read_h5ad(tmp_path / f"{name}.h5ad")
        assert (read.X != part.X).nnz == 0
        pd.testing.assert_frame_equal(read.obs, part.obs)
        assert list(read.var["gene_ids"]) == list(small.law.gene_ids)
    truth = pd.read_csv(tmp_path / "truth.csv", index_col="sample_id", dtype={"run": str})
    pd.testing.assert_frame_equal(truth, small.truth.astype({"replicate": "int64"}))


def test_the_published_flaws_survive_the_file(published: Atlas, tmp_path: Path) -> None:
    save(published, tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_frame_equal(read.obs, published.cells.obs)


def test_nothing_half_written_stays_behind(
    small: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="disk full"):
        save(small, tmp_path / "cells.h5ad", truth=tmp_path / "truth.csv")
    assert not list(tmp_path.iterdir())


def test_saving_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    atlas = simulate(SimulateConfig(cells=90, genes=120, pool_cells=0), seed=0)
    with pytest.raises(Refusal, match="pool"):
        save(atlas, tmp_path / "cells.h5ad", pool=tmp_path / "pool.h5ad")
    assert not list(tmp_path.iterdir())


# -- mistakes -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"cells": 89}, "cells: 89 for 90 samples"),
        ({"genes": 100}, "genes: 100"),
        ({"pool_cells": 10}, "pool_cells: 10 for 60"),
        ({"new_cells": 10}, "new_cells: 10 for 48"),
        ({"cells": 0}, "greater than or equal to 1"),
        ({"dispersion": 0}, "greater than 0"),
        ({"confounding": "total"}, "'none', 'partial' or 'complete'"),
        ({"difficulty": "trivial"}, "'easy', 'middle' or 'hard'"),
        ({"as_published": True, "lines": 3}, "2 lines x 3 replicates"),
        ({"as_published": True, "confounding": "partial"}, "confounding: complete"),
        ({"effects": "a.csv", "responses": "textbook"}, "never mix"),
        ({"effects_names": "a.json"}, "give both"),
        ({"cels": 90}, "fields here are"),
    ],
)
def test_a_mistake_is_refused_in_one_line(values: dict[str, object], says: str) -> None:
    with pytest.raises(Refusal) as refused:
        simulate(SimulateConfig.of(values, where="simulate"), seed=0)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(Refusal, match="seed"):
        simulate(SMALL, seed=-1)
