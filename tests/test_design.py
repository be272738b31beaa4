"""Whole units are held out, by hash, and what the design forbids is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endoprint.cells import CellsConfig, curate, read
from endoprint.config import Refusal
from endoprint.design import DesignConfig, Split, audit, make_split

EXPOSURES = ("DMSO", "LIVER-X_AGONIST", "RET_AGONIST")


def cells_of(
    units: list[str],
    exposures: tuple[str, ...] = EXPOSURES,
    *,
    n_cells: int = 4,
    without: tuple[tuple[str, str], ...] = (),
    batch: dict[str, str] | None = None,
) -> pd.DataFrame:
    """Obs of `n_cells` per unit and exposure, but for the pairs `without`."""
    rows = [
        {
            "exposure": exposure,
            "unit": unit,
            "line": unit.split("|")[0],
            "is_pooled": unit.endswith("?"),
            "batch": (batch or {}).get(exposure, "b0"),
        }
        for unit in units
        for exposure in exposures
        for _ in range(n_cells)
        if (unit, exposure) not in without
    ]
    return pd.DataFrame(rows, index=[f"cell{i:05d}" for i in range(len(rows))])


SIX = [f"{line}|{replicate}" for line in ("CTL04E", "CTL08A") for replicate in (1, 2, 3)]


def names(obs: pd.DataFrame, where: np.ndarray, column: str = "unit") -> set[str]:
    return set(obs[column].to_numpy()[where])


# -- the audit ----------------------------------------------------------------------------------
def audited(obs: pd.DataFrame, batch: str | None = "batch") -> dict[str, object]:
    found = audit(obs, exposure="exposure", units=["unit"], batch=batch, control="DMSO").to_json()
    json.dumps(found)
    return found


def test_one_run_per_condition_is_confounded() -> None:
    obs = cells_of(SIX, batch=dict(zip(EXPOSURES, ("505", "497", "508"))))
    found = audited(obs)
    assert found["confounded"] is True
    assert found["identifiable"] == {
        "DMSO": True,
        "LIVER-X_AGONIST": False,
        "RET_AGONIST": False,
    }
    assert found["overlap"] == {"LIVER-X_AGONIST": [], "RET_AGONIST": []}
    assert any("RET_AGONIST stands only in batch 508" in line for line in found["what_with_what"])
    assert any("confounded: true" in line and "497" in line for line in found["warnings"])


def test_a_shared_batch_makes_exposures_identifiable() -> None:
    found = audited(cells_of(SIX))
    assert (found["confounded"], found["replicated"], found["warnings"]) == (False, True, [])
    assert found["overlap"] == {"LIVER-X_AGONIST": ["b0"], "RET_AGONIST": ["b0"]}
    assert found["cells"]["DMSO"]["CTL04E|1"] == 4
    assert found["units_crossed"] is True


def test_a_chain_of_batches_is_identifiable_but_shares_none() -> None:
    obs = cells_of(SIX, batch=dict(zip(EXPOSURES, ("a", "a", "b"))))
    obs.loc[obs.index[obs["exposure"] == "LIVER-X_AGONIST"][:3], "batch"] = "b"
    found = audited(obs)
    assert found["confounded"] is False
    assert found["overlap"]["RET_AGONIST"] == []
    assert any("Compared with the control only through" in line for line in found["warnings"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_identifiable_means_a_path_in_the_graph(pairs: list[tuple[int, int]]) -> None:
    obs = pd.DataFrame(
        [
            {"exposure": "DMSO" if e == 0 else f"E{e}", "batch": f"b{b}"}
            for e, b in [(0, 0), *pairs]
        ]
    )
    found = audit(obs, exposure="exposure", units=[], batch="batch", control="DMSO")
    # oracle: powers of the adjacency matrix
    step = np.eye(10, dtype=int)
    for e, b in [(0, 0), *pairs]:
        step[e, 5 + b] = step[5 + b, e] = 1
    reach = np.linalg.matrix_power(step, 10) > 0
    for e in {e for e, _ in pairs} | {0}:
        assert found.identifiable["DMSO" if e == 0 else f"E{e}"] == reach[0, e]
    assert found.confounded == (not all(found.identifiable.values()))


def test_an_unknown_batch_is_said() -> None:
    found = audited(cells_of(SIX), batch=None)
    assert found["confounded"] is None
    assert found["warnings"] == ["batch unknown: confounding cannot be excluded."]


def test_replication_is_counted_in_units() -> None:
    once = tuple((unit, "RET_AGONIST") for unit in SIX[1:])
    found = audited(cells_of(SIX, without=once))
    assert found["replicated"] is False
    assert "RET_AGONIST (CTL04E|1)" in found["warnings"][0]
    assert any("RET_AGONIST lacks 5 of 6" in line for line in found["warnings"])
    obs = cells_of(SIX)
    obs["unit"] = ""
    found = audited(obs)
    assert found["replicated"] is False
    assert found["warnings"][0].startswith("replicated: false")


def test_the_audit_reads_raw_columns_and_finds_the_control() -> None:
    obs = cells_of(SIX).rename(columns={"exposure": "condition"})
    obs["replicate"] = [float(unit.split("|")[1]) for unit in obs["unit"]]
    found = audit(
        obs, exposure="condition", units=["line", "replicate"], batch="batch", line="line"
    )
    assert found.control == "DMSO"
    assert found.units == SIX
    assert found.lines_crossed is True
    with pytest.raises(Refusal, match="needs to know the control"):
        audit(obs[obs["condition"] != "DMSO"], exposure="condition", units=[], batch=None)
    with pytest.raises(Refusal, match="names columns"):
        audit(obs, exposure="drug", units=[], batch=None)
    with pytest.raises(Refusal, match="control is among"):
        audit(obs, exposure="condition", units=[], batch=None, control="vehicle")
    with pytest.raises(Refusal, match="needs cells"):
        audit(obs[:0], exposure="condition", units=[], batch=None)


# -- the split ----------------------------------------------------------------------------------
def test_line_by_replicate_holds_out_one_replicate_of_each_line() -> None:
    obs = cells_of(SIX)
    for seed in range(5):
        split = make_split(obs, DesignConfig(), seed)
        assert {unit.split("|")[0] for unit in split.test} == {"CTL04E", "CTL08A"}
        assert len(split.test) == 2
        assert split.n_folds == 4
        parts = split.parts(obs, None)
        assert names(obs, parts.held_out) == set(split.test)
        # index k of a line is held out in all conditions
        assert names(obs, parts.held_out, "exposure") == set(EXPOSURES)
        assert parts.is_calibration_unit_validated
    assert len({tuple(make_split(obs, DesignConfig(), seed).test) for seed in range(20)}) > 1


def test_folds_mix_the_lines() -> None:
    split = make_split(cells_of(SIX), DesignConfig(n_folds=2), 0)
    for fold in split.folds:
        assert {unit.split("|")[0] for unit in fold} == {"CTL04E", "CTL08A"}


@pytest.mark.parametrize(
    ("n", "n_test"), [(2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (9, 3), (12, 4)]
)
def test_the_size_of_the_test_part_follows_the_number_of_units(n: int, n_test: int) -> None:
    split = make_split(cells_of([f"d{i}" for i in range(n)]), DesignConfig(), 3)
    assert len(split.test) == n_test
    assert split.n_folds == min(n - n_test, 5)
    assert bool(n_test) != any("No test part" in note for note in split.notes)


def test_two_units_are_left_out_one_at_a_time() -> None:
    obs = cells_of(["101", "107"], n_cells=20)
    split = make_split(obs, DesignConfig(), 0)
    assert split.folds == [["101"], ["107"]]
    parts = split.parts(obs, 0)
    assert names(obs, parts.held_out) == {"101"}
    assert names(obs, np.concatenate([parts.train, parts.valid])) == {"107"}
    assert parts.flags == ["calibration not unit-validated"]
    assert len(parts.valid) == 9  # 15 % of 60
    assert names(obs, parts.valid, "exposure") == set(EXPOSURES)
    final = split.parts(obs, None)
    assert len(final.held_out) == 0
    assert len(final.train) + len(final.valid) == len(obs)


def test_an_exposure_in_few_units_is_kept_for_development() -> None:
    rare = tuple((unit, "RET_AGONIST") for unit in SIX[2:])
    for seed in range(10):
        split = make_split(cells_of(SIX, without=rare), DesignConfig(n_folds=2), seed)
        holding = [any(unit in SIX[:2] for unit in fold) for fold in split.folds]
        if not set(split.test) & set(SIX[:2]):
            assert holding == [True, True]  # one of the two in each fold
            assert any("Missing from the test part" in note for note in split.notes)
        else:
            assert any(holding)
            assert any("judged on it: RET_AGONIST" in note for note in split.notes)


def test_order_and_a_few_cells_more_change_nothing() -> None:
    obs = cells_of(SIX)
    split = make_split(obs, DesignConfig(), 7)
    shuffled = obs.sample(frac=1, random_state=0)
    more = obs.iloc[:5].rename(index=lambda cell: f"{cell}-new")
    for other in (shuffled, pd.concat([obs, more])):
        assert make_split(other, DesignConfig(), 7) == split
    before, after = split.parts(obs, 1), split.parts(shuffled, 1)
    for name in ("train", "valid", "held_out"):
        assert set(obs.index[getattr(before, name)]) == set(shuffled.index[getattr(after, name)])
    assert make_split(obs, DesignConfig(), 8).hash != split.hash


def test_a_split_survives_the_disk_and_knows_when_it_was_edited(tmp_path: Path) -> None:
    split = make_split(cells_of(SIX), DesignConfig(), 1)
    split.write(tmp_path / "split.json")
    assert Split.read(tmp_path / "split.json") == split
    said = json.loads((tmp_path / "split.json").read_text())
    assert said["hash"] == split.hash
    said["test"], said["folds"][0] = said["folds"][0], said["test"]
    (tmp_path / "split.json").write_text(json.dumps(said))
    with pytest.raises(Refusal, match="edited since"):
        Split.read(tmp_path / "split.json")
    with pytest.raises(Refusal, match="a split is the JSON"):
        Split.read(tmp_path / "absent.json")


def test_pooled_samples_take_part_in_leave_line_out_only() -> None:
    units = [*SIX, "CTL04E|?", "CTL08A|?"]
    elsewhere = tuple((unit, "RET_AGONIST") for unit in SIX)
    elsewhere += tuple((unit, e) for unit in units[6:] for e in EXPOSURES[:2])
    obs = cells_of(units, without=elsewhere)
    by_unit = make_split(obs, DesignConfig(), 0)
    assert by_unit.excluded == units[6:]
    assert any("Pooled samples" in note for note in by_unit.notes)
    for fold in (None, *range(by_unit.n_folds)):
        parts = by_unit.parts(obs, fold)
        for part in (parts.train, parts.valid, parts.held_out):
            assert "RET_AGONIST" not in names(obs, part, "exposure")
    by_line = make_split(obs, DesignConfig(scheme="line"), 0)
    assert by_line.folds == [["CTL04E"], ["CTL08A"]]
    parts = by_line.parts(obs, 0)
    assert names(obs, parts.held_out, "line") == {"CTL04E"}
    assert names(obs, parts.train, "exposure") == set(EXPOSURES)
    assert names(obs, parts.held_out, "exposure") == set(EXPOSURES)
    assert parts.is_calibration_unit_validated
    assert not names(obs, parts.train) & names(obs, parts.valid)
    assert any("may hold cells of the unit that calibrates" in note for note in by_line.notes)


def test_without_units_the_folds_are_technical() -> None:
    obs = cells_of(["a", "b", "c"])
    obs["technical_fold"], obs["unit"] = obs["unit"], ""
    split = make_split(obs, DesignConfig(), 0)
    assert (split.scheme, split.replicated, split.test) == ("technical_fold", False, [])
    assert split.is_technical
    assert split.notes[0].startswith("replicated: false")
    parts = split.parts(obs, 2)
    assert parts.flags[0].startswith("replicated: false")
    assert names(obs, parts.held_out, "technical_fold") == {"c"}
    with pytest.raises(Refusal, match="technical_fold"):
        make_split(obs.drop(columns="technical_fold"), DesignConfig(), 0)


def test_an_explicit_split_overrides_everything() -> None:
    obs = cells_of(SIX)
    obs["split"] = np.where(obs.index.isin(obs.groupby("unit").head(6).index), "493", "394")
    with pytest.raises(Refusal, match="map each value"):
        make_split(obs, DesignConfig(), 0)
    values = {"493": "train", "394": "test"}
    split = make_split(obs, DesignConfig(split_values=values), 0)
    assert any("stand both in development and in test" in note for note in split.notes)
    parts = split.parts(obs, None)
    assert names(obs, parts.held_out, "split") == {"394"}
    for fold in range(split.n_folds):
        parts = split.parts(obs, fold)
        assert names(obs, np.concatenate([parts.train, parts.valid]), "split") == {"493"}
        assert names(obs, parts.held_out) == set(split.folds[fold])
        assert not set(split.folds[fold]) & names(obs, parts.train)
    obs["split"] = [
        "test" if u == SIX[0] else "valid" if u == SIX[1] else "train" for u in obs.unit
    ]
    split = make_split(obs, DesignConfig(), 0)
    parts = split.parts(obs, None)
    assert names(obs, parts.held_out) == {SIX[0]}
    assert names(obs, parts.valid) == {SIX[1]}
    assert names(obs, parts.train) == set(SIX[2:])


def test_named_test_units_are_taken() -> None:
    obs = cells_of(SIX)
    assert make_split(obs, DesignConfig(test_units=["CTL08A|2"]), 0).test == ["CTL08A|2"]
    with pytest.raises(Refusal, match="test_units name units"):
        make_split(obs, DesignConfig(test_units=["CTL09"]), 0)


def test_what_can_not_be_split_is_refused() -> None:
    obs = cells_of(SIX)
    apart = cells_of(
        ["a", "b", "c"],
        without=tuple(
            (unit, e) for unit, own in zip("abc", EXPOSURES) for e in EXPOSURES if e != own
        ),
    )
    for broken, config, rule in (
        (obs.drop(columns="exposure"), DesignConfig(), "labelled cells"),
        (obs, DesignConfig(n_folds=9), "n_folds lies between"),
        (obs, DesignConfig(n_test_units=5), "stay for development"),
        (obs, DesignConfig(scheme="batch"), "crossed"),
        (obs.drop(columns="line"), DesignConfig(scheme="line"), "needs the column"),
        (obs, DesignConfig(split_values={"a": "test"}), "split column"),
        (obs[obs["unit"] == SIX[0]], DesignConfig(), "at least two units"),
        (apart[apart["unit"] != "c"], DesignConfig(), "two exposures or more to train on"),
        (obs.assign(line=obs["exposure"]), DesignConfig(scheme="line"), "belongs to one line"),
    ):
        with pytest.raises(Refusal, match=rule):
            make_split(broken, config, 0)
    split = make_split(obs, DesignConfig(), 0)
    with pytest.raises(Refusal, match="0 to 3"):
        split.parts(obs, 4)
    with pytest.raises(Refusal, match="knows every unit"):
        split.parts(obs.assign(unit="CTL99|1"), 0)


def test_crossed_batches_may_be_held_out() -> None:
    obs = pd.concat([cells_of(SIX), cells_of(SIX)])
    obs.index = [f"cell{i}" for i in range(len(obs))]
    obs["batch"] = np.repeat(["b0", "b1"], len(obs) // 2)
    split = make_split(obs, DesignConfig(scheme="batch"), 0)
    assert split.folds == [["b0"], ["b1"]]
    assert any("new batches of known units" in note for note in split.notes)


designs = st.lists(
    st.tuples(
        st.integers(0, 2),  # line
        st.sampled_from(["1", "2", "3", "4", "?"]),  # replicate
        st.sampled_from([*EXPOSURES, "BPA"]),
        st.integers(1, 3),  # cells
    ),
    min_size=4,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(
    design=designs,
    seed=st.integers(0, 99),
    scheme=st.sampled_from(["unit", "line"]),
    n_folds=st.sampled_from([None, 2, 3]),
)
def test_held_out_units_never_train_or_validate(
    design: list[tuple[int, str, str, int]], seed: int, scheme: str, n_folds: int | None
) -> None:
    rows = [
        {
            "unit": f"L{line}|{replicate}",
            "line": f"L{line}",
            "exposure": exposure,
            "is_pooled": replicate == "?",
        }
        for line, replicate, exposure, n in design
        for _ in range(n)
    ]
    obs = pd.DataFrame(rows, index=[f"c{i}" for i in range(len(rows))])
    try:
        split = make_split(obs, DesignConfig(scheme=scheme, n_folds=n_folds), seed)
    except Refusal:
        return
    judged: list[int] = []
    for fold in (None, *range(split.n_folds)):
        parts = split.parts(obs, fold)
        train, valid, held = (
            names(obs, part, scheme) for part in (parts.train, parts.valid, parts.held_out)
        )
        assert not held & (train | valid)
        assert not set(split.test) & (train | valid)
        together = np.concatenate([parts.train, parts.valid, parts.held_out])
        assert len(set(together)) == len(together)
        if parts.is_calibration_unit_validated:
            assert not names(obs, parts.train) & names(obs, parts.valid)
        assert len(parts.train)
        if fold is not None:
            judged += list(parts.held_out)
    # each development cell is judged once
    kept = ~obs["is_pooled"].to_numpy() if scheme == "unit" else np.ones(len(obs), dtype=bool)
    in_test = obs[scheme].isin(split.test).to_numpy()
    assert sorted(judged) == list(np.flatnonzero(kept & ~in_test))
    assert (
        split.hash
        == make_split(obs[::-1], DesignConfig(scheme=scheme, n_folds=n_folds), seed).hash
    )


def test_real_donors_are_left_out_whole(shared: Path) -> None:
    config = CellsConfig(
        exposure_key="group_id",
        control="ctrl",
        aliases={"stim": "stim"},
        unit_keys=["sample_id"],
        unit_pattern=r"(\d+)$",
        gene_id_key="ensembl_id",
    )
    cells, _ = curate(read(shared / "data/real/kang_ifnb_muscat_example.h5ad", config), config)
    split = make_split(cells.obs, DesignConfig(), 0)
    assert split.folds == [["101"], ["107"]]
    assert [len(split.parts(cells.obs, fold).held_out) for fold in (0, 1)] == [954, 602]
