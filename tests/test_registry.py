"""Versions go live by a decision that is recorded, and nothing unchecked is ever loaded."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from conftest import planted_cells
from endoprint import artefact, curated, history, promotion, registry, tracking
from endoprint.config import Refusal
from endoprint.design import Split
from endoprint.fetched import fetch
from endoprint.models.logistic import Logistic, LogisticConfig
from endoprint.promotion import Promotion, promote
from endoprint.registry import (
    champion,
    find,
    load_version,
    register,
    resolve,
    retire,
    rollback,
)
from endoprint.workspace import Workspace
from lab import POLICY, bare_workspace, fit_and_track, furnish, misled, moved_copy

NEVER = "at_most: {score_seconds_per_1000_cells: 0.00001}\n"  # a rule that no model keeps


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a good and a weak fit in it, made once and copied for every test."""
    root = tmp_path_factory.mktemp("fitted") / "space"
    made = furnish(bare_workspace(root), planted_cells(n_units=6, n_cells=8))
    fit_and_track(made, cells=misled(curated.load(made.cells)))
    fit_and_track(made)
    return made


@pytest.fixture
def lab(fitted: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return moved_copy(fitted, tmp_path / "space")


def good_run(space: Workspace) -> str:
    return str(tracking.runs_table(space).index[0])


def weak_run(space: Workspace) -> str:
    return str(tracking.runs_table(space).index[-1])


def artefact_of(space: Workspace, run_id: str) -> Path:
    model_id = tracking.client(space).get_run(run_id).data.tags["model_id"]
    return space.local / "artifacts/models" / model_id / "artifacts"


# -- registering --------------------------------------------------------------------------------
def test_a_registered_run_is_the_candidate_and_carries_its_lineage(lab: Workspace) -> None:
    run_id = good_run(lab)
    version = register(lab, run_id)
    assert find(lab, "candidate") == version
    assert (version.name, version.version, version.run_id) == ("endoprint-toy", "1", run_id)
    assert version.exposures == ("DMSO", "LIVER-X_AGONIST", "RET_AGONIST")
    assert version.tags["split_hash"] == Split.read(lab.split).hash
    assert json.loads(version.tags["lineage"])["model"] == "logistic"
    assert version.sha256 == artefact.digest(artefact_of(lab, run_id) / artefact.MODEL)


def test_registering_a_run_again_gives_the_same_version(lab: Workspace) -> None:
    first, other = good_run(lab), weak_run(lab)
    version = register(lab, first)
    assert register(lab, other).version == "2"
    again = register(lab, first)
    assert again.version == version.version
    assert find(lab, "candidate").version == "1"
    assert len(registry.versions(lab)) == 2


def test_only_a_finished_run_with_a_model_is_registered(lab: Workspace) -> None:
    with tracking.run(lab, name="no model", kind="train") as run:
        pass
    with pytest.raises(Refusal, match="without model_id"):
        register(lab, run.run_id)
    with pytest.raises(Refusal, match="no run nonesuch"):
        register(lab, "nonesuch")


# -- loading ------------------------------------------------------------------------------------
def test_a_version_resolves_to_the_model_that_was_fitted(lab: Workspace) -> None:
    cells = curated.load(lab.cells)
    model = Logistic(LogisticConfig(penalty=0.1, latent_width=4))
    version = register(lab, fit_and_track(lab, model=model))
    for uri in ("candidate", "@candidate", "1", version.uri, "models:/endoprint-toy@candidate"):
        found, loaded = load_version(lab, uri)
        assert found.version == "1"
        pd.testing.assert_frame_equal(loaded.predict_proba(cells), model.predict_proba(cells))


def test_mlflow_alone_loads_and_predicts_with_pickle_switched_off(
    lab: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    model = Logistic(LogisticConfig(penalty=0.1, latent_width=4))
    register(lab, fit_and_track(lab, model=model))
    promote(lab)
    cells = curated.load(lab.cells)[:7].copy()
    frame = pd.DataFrame(cells.X.toarray(), index=cells.obs_names, columns=cells.var_names)
    with tracking.ambient(lab):
        loaded = mlflow.pyfunc.load_model("models:/endoprint-toy@champion")
    answer = loaded.predict(frame)
    assert list(answer.index) == list(cells.obs_names)
    pd.testing.assert_frame_equal(answer, model.predict_proba(cells), atol=1e-6)


@pytest.mark.parametrize(
    "uri",
    [
        "champion",
        "9",
        "models:/endoprint-other@champion",
        "runs:/abc/model",
        "../etc",
        "",
        "models:/a/b/c",
    ],
)
def test_an_address_that_leads_nowhere_is_one_line(lab: Workspace, uri: str) -> None:
    register(lab, good_run(lab))
    with pytest.raises(Refusal) as refusal:
        resolve(lab, uri)
    assert "\n" not in str(refusal.value)


def test_a_copy_changed_here_is_fetched_anew(lab: Workspace) -> None:
    version = register(lab, good_run(lab))
    _, folder = resolve(lab, "candidate")
    (folder / "model.json").write_text("{}")
    _, folder = resolve(lab, "candidate")
    assert artefact.digest(folder) == version.sha256


# -- tampering (more of it in test_artefact.py) -------------------------------------------------
def swap_weights(place: Path) -> None:
    weights = place / "data/model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def test_weights_swapped_in_the_store_are_refused_and_leave_nothing_here(lab: Workspace) -> None:
    run_id = good_run(lab)
    version = register(lab, run_id)
    swap_weights(artefact_of(lab, run_id))
    with pytest.raises(Refusal, match="those that were registered"):
        resolve(lab, "candidate")
    left = [each for each in (lab.local / "models").iterdir() if each.is_dir()]
    assert left == []
    with pytest.raises(Refusal, match="carries its sha256"):
        fetch(lab, version.uri, sha256="../../x")


# -- promoting ----------------------------------------------------------------------------------
def two_versions(space: Workspace) -> tuple[Promotion, Promotion]:
    """A weak champion, then a better candidate."""
    register(space, weak_run(space))
    first = promote(space)
    register(space, good_run(space))
    return first, promote(space)


def test_the_first_version_that_passes_is_champion_and_the_better_one_replaces_it(
    lab: Workspace,
) -> None:
    first, second = two_versions(lab)
    assert (first.verdict.decision, second.verdict.decision) == ("promote", "promote")
    assert champion(lab) is not None
    assert champion(lab).version == "2"
    assert find(lab, "previous").version == "1"
    tags = find(lab, "2").tags
    assert tags["verdict"] == "promote"
    assert "version 2 (logistic) against version 1 (logistic)" in tags["reasons"]
    assert tags["allow_few_units"] == "true"
    flips = [line for line in history.read(lab) if line["what"] == "done"]
    assert [(line["from"], line["to"]) for line in flips] == [(None, "1"), ("1", "2")]
    assert registry.verify(lab) == []


def test_a_worse_candidate_leaves_the_champion_and_says_why(lab: Workspace) -> None:
    register(lab, good_run(lab))
    promote(lab)
    register(lab, weak_run(lab))
    found = promote(lab)
    assert found.verdict.decision in ("hold", "reject")
    assert champion(lab).version == "1"
    assert find(lab, "2").tags["verdict"] == found.verdict.decision
    assert found.to_json()["champion"] == "1"


def test_figures_are_those_of_the_test_units_scored_anew(lab: Workspace) -> None:
    model = Logistic(LogisticConfig(penalty=0.1, latent_width=4))
    register(lab, fit_and_track(lab, model=model))
    found = promote(lab)
    cells, split = curated.load(lab.cells), Split.read(lab.split)
    figures = found.figures["version 1 (logistic)"]
    assert sorted(figures["by_unit"]) == sorted(split.test)
    for unit, figure in figures["by_unit"].items():
        mine = cells[(cells.obs["unit"] == unit).to_numpy()].copy()
        truth = mine.obs["exposure"].to_numpy(dtype=object)
        calls = model.predict_proba(mine).idxmax(axis=1).to_numpy(dtype=object)
        f1 = [
            2 * ((truth == e) & (calls == e)).sum() / ((truth == e).sum() + (calls == e).sum())
            for e in model.exposures
        ]
        assert figure == pytest.approx(np.mean(f1))


def test_each_opening_is_counted_and_a_decision_is_not_made_twice(lab: Workspace) -> None:
    register(lab, good_run(lab))
    lab.policy.write_text(POLICY + NEVER)
    split_hash = Split.read(lab.split).hash
    first = promote(lab)
    assert first.was_opened
    assert promotion.openings(lab, split_hash) == 1
    again = promote(lab)
    assert not again.was_opened
    assert again.verdict == first.verdict
    assert again.figures == first.figures
    assert promotion.openings(lab, split_hash) == 1
    lab.policy.write_text(POLICY + "budget: 1\n")  # other rules are another decision
    held = promote(lab)
    assert (held.verdict.decision, held.was_opened) == ("hold", False)
    assert "budget is spent" in held.verdict.reasons[0]


def test_promoting_the_champion_again_changes_nothing(lab: Workspace) -> None:
    register(lab, good_run(lab))
    promote(lab)
    before = history.read(lab)
    again = promote(lab)
    assert (again.verdict.decision, again.was_opened) == ("promote", False)
    assert history.read(lab) == before


def test_a_model_fitted_on_a_test_unit_is_rejected_unopened(lab: Workspace) -> None:
    n_cells = curated.load(lab.cells).n_obs
    register(lab, fit_and_track(lab, train=range(0, n_cells, 2), valid=range(1, n_cells, 2)))
    found = promote(lab)
    assert (found.verdict.decision, found.was_opened) == ("reject", False)
    assert "fitted on test units" in found.verdict.reasons[0]
    assert promotion.openings(lab, Split.read(lab.split).hash) == 0


@pytest.mark.parametrize("part", ["backbone", "vocabulary"])
def test_a_base_that_saw_a_test_unit_is_rejected_unopened(lab: Workspace, part: str) -> None:
    model = Logistic(LogisticConfig(penalty=0.1, latent_width=4))
    model.provenance[part] = {
        "label": "pre-trained here",
        "units": Split.read(lab.split).test,
    }
    register(lab, fit_and_track(lab, model=model))
    found = promote(lab)
    assert (found.verdict.decision, found.was_opened) == ("reject", False)


def test_an_unreplicated_workspace_holds_unopened(lab: Workspace) -> None:
    told = json.loads(lab.audit.read_text())
    lab.audit.write_text(json.dumps({**told, "replicated": False}))
    register(lab, good_run(lab))
    found = promote(lab)
    assert (found.verdict.decision, found.was_opened) == ("hold", False)
    assert found.verdict.reasons[0].startswith("replicated: false")


def test_two_test_units_hold_unless_the_policy_allows_so_few(lab: Workspace) -> None:
    lab.policy.write_text("budget: 5\n")
    register(lab, good_run(lab))
    found = promote(lab)
    assert (found.verdict.decision, found.was_opened) == ("hold", False)
    assert found.verdict.reasons == ["too few units: 2 of 5"]


def test_a_baseline_is_taken_from_its_newest_training_run(lab: Workspace) -> None:
    lab.policy.write_text(POLICY + "must_beat: logistic\n")
    cells = misled(curated.load(lab.cells))
    register(lab, fit_and_track(lab, model=Costly(), cells=cells))
    found = promote(lab)
    assert found.verdict.decision == "reject"
    assert "version 1 (costly) against logistic (baseline)" in found.verdict.reasons[0]
    assert set(found.figures) == {"version 1 (costly)", "logistic (baseline)"}


def test_a_candidate_is_weighed_alone_and_not_with_the_champion_it_would_replace(
    lab: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.policy.write_text(POLICY + "at_most: {peak_memory_gib: 64}\n")
    first, _ = two_versions(lab)
    alone = first.figures["version 1 (logistic)"]["metrics"]["peak_memory_gib"]
    rollback(lab)
    other = Logistic(LogisticConfig(penalty=0.2, latent_width=4))
    register(lab, fit_and_track(lab, model=other))
    ceiling = f"at_most: {{peak_memory_gib: {alone + 0.4}}}\ncost_tolerance: 0\n"
    lab.policy.write_text(POLICY + ceiling)
    whole = promotion._loaded

    def heavy(space: Workspace, version: registry.Version) -> Logistic:
        model = whole(space, version)
        model.ballast = np.ones(2**27)  # a GiB
        return model

    monkeypatch.setattr(promotion, "_loaded", heavy)
    found = promote(lab)
    assert found.verdict.decision == "promote"
    weighed = found.figures["version 3 (logistic)"]["metrics"]["peak_memory_gib"]
    assert weighed == pytest.approx(alone, rel=0.25)
    assert "peak_memory_gib" not in found.figures["version 1 (logistic)"]["metrics"]
    assert not list((lab.local / "models").glob(".footprint*"))


def test_a_candidate_that_cannot_be_weighed_is_one_line_and_may_be_asked_again(
    lab: Workspace,
) -> None:
    lab.policy.write_text(POLICY + "at_most: {peak_memory_gib: 64}\n")
    register(lab, fit_and_track(lab, model=Costly()))
    for _ in range(2):  # a fresh process does not know the stub
        with pytest.raises(Refusal, match="in a process of its own; got exit status 1") as refused:
            promote(lab)
        assert "\n" not in str(refused.value)
    assert promotion.openings(lab, Split.read(lab.split).hash) == 1


class Costly(Logistic):
    """The same model, larger and slower."""

    name = "costly"

    def evidence(self, cells: AnnData) -> np.ndarray:
        time.sleep(0.3)  # beyond what a busy machine adds to some milliseconds
        return super().evidence(cells)

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(LogisticConfig(penalty=0.1, latent_width=4))

    def n_parameters(self) -> int:
        return super().n_parameters() * 10


@pytest.fixture(autouse=True)
def costly_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from endoprint.table import TABLE, Row

    row = Row(f"{__name__}:Costly", "a stub", "seconds", "Apache-2.0", "none")
    monkeypatch.setitem(TABLE, "costly", row)


def test_a_champion_of_another_split_is_not_compared_until_retired(lab: Workspace) -> None:
    register(lab, weak_run(lab))
    promote(lab)
    cells = curated.load(lab.cells)
    from endoprint.design import DesignConfig, make_split

    old = Split.read(lab.split).test
    others = sorted(set(cells.obs["unit"]) - set(old))[:2]
    make_split(cells.obs, DesignConfig(test_units=others), seed=0).write(lab.split)
    register(lab, fit_and_track(lab))
    with pytest.raises(Refusal, match="equal split hash"):
        promote(lab)
    retire(lab, why="new split")
    assert champion(lab) is None
    assert promote(lab).verdict.decision == "promote"
    assert champion(lab).version == "2"


# -- moving aliases -----------------------------------------------------------------------------
def test_a_rollback_makes_the_previous_champion_live_again(lab: Workspace) -> None:
    two_versions(lab)
    assert rollback(lab).version == "1"
    assert champion(lab).version == "1"
    assert find(lab, "previous").version == "2"
    with pytest.raises(Refusal, match="live already"):
        rollback(lab, "1")
    other = Logistic(LogisticConfig(penalty=20.0, latent_width=4))
    register(lab, fit_and_track(lab, model=other))
    with pytest.raises(Refusal, match="never live"):
        rollback(lab, "3")


def test_a_rollback_to_a_tampered_version_is_refused(lab: Workspace) -> None:
    first, _ = two_versions(lab)
    swap_weights(artefact_of(lab, first.version.run_id))
    shutil.rmtree(lab.local / "models")
    with pytest.raises(Refusal, match="those that were registered"):
        rollback(lab)
    assert champion(lab).version == "2"


def test_a_decision_against_another_champion_does_not_move_the_alias(lab: Workspace) -> None:
    two_versions(lab)
    with pytest.raises(Refusal, match="against the champion it was made against"):
        registry.flip(lab, find(lab, "1"), expected=None, why="stale")
    assert champion(lab).version == "2"


@pytest.mark.parametrize(
    ("after", "call"),
    [
        ("set_registered_model_alias", 1),
        pytest.param("set_registered_model_alias", 2, marks=pytest.mark.slow),
        pytest.param("tell", 1, marks=pytest.mark.slow),
        pytest.param("tell", 2, marks=pytest.mark.slow),
    ],
)
def test_a_crash_inside_a_flip_is_closed_by_the_next_promotion(
    lab: Workspace, monkeypatch: pytest.MonkeyPatch, after: str, call: int
) -> None:
    """The process dies after its n-th write; the next command ends where the first would have."""
    register(lab, weak_run(lab))
    promote(lab)
    register(lab, good_run(lab))
    owner = mlflow.MlflowClient if after != "tell" else registry
    whole, seen = getattr(owner, after), []

    def dies(*arguments: object, **named: object) -> None:
        whole(*arguments, **named)
        is_flip = after != "tell" or arguments[1] in ("intent", "done")
        seen.append(is_flip)
        if sum(seen) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, after, dies)
    with pytest.raises(KeyboardInterrupt):
        promote(lab)
    monkeypatch.undo()
    found = promote(lab)
    assert found.verdict.decision == "promote"
    assert not found.was_opened
    assert champion(lab).version == "2"
    assert find(lab, "previous").version == "1"
    assert promotion.openings(lab, Split.read(lab.split).hash) == 2
    closed = [line["what"] for line in history.read(lab) if line["what"] in registry.CLOSES]
    opened = [line["what"] for line in history.read(lab) if line["what"] in registry.OPENS]
    assert len(closed) == len(opened)
    assert registry.verify(lab) == []


def test_two_promoters_at_once_make_one_decision(lab: Workspace) -> None:
    register(lab, good_run(lab))
    outcomes: list[Promotion] = []
    threads = [threading.Thread(target=lambda: outcomes.append(promote(lab))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.was_opened for each in outcomes) == [False, True]
    assert len([line for line in history.read(lab) if line["what"] == "done"]) == 1


# -- history ------------------------------------------------------------------------------------
def written(space: Workspace, n: int) -> Path:
    for number in range(n):
        history.append(space, "note", {"number": number})
    return history.path(space)


def test_an_untouched_history_verifies(space: Workspace) -> None:
    assert history.verify(space) == []
    written(space, 3)
    assert history.verify(space) == []
    assert [line["number"] for line in history.read(space)] == [0, 1, 2]


@pytest.mark.parametrize("change", ["edit", "remove", "swap", "insert"])
def test_a_history_edited_by_hand_is_found_out(space: Workspace, change: str) -> None:
    path = written(space, 4)
    lines = path.read_text().splitlines()
    if change == "edit":
        lines[1] = lines[1].replace('"number": 1', '"number": 7')
    elif change == "remove":
        del lines[1]
    elif change == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        lines.insert(2, lines[1])
    path.write_text("\n".join(lines) + "\n")
    assert history.verify(space)


def test_a_history_cut_off_at_its_end_is_found_out_by_the_registry(lab: Workspace) -> None:
    register(lab, good_run(lab))
    promote(lab)
    path = history.path(lab)
    assert registry.verify(lab) == []
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:-1]))
    assert history.verify(lab) == []
    assert "missing" in registry.verify(lab)[0]


def test_a_line_whose_writer_died_in_it_does_not_stop_the_next(space: Workspace) -> None:
    path = written(space, 2)
    with path.open("a") as stream:
        stream.write('{"n": 3, "wh')
    assert len(history.read(space)) == 2
    history.append(space, "note", {"number": 9})
    assert [line["n"] for line in history.read(space)] == [1, 2, 3]
    assert history.verify(space) == []


def test_many_writers_keep_one_chain(space: Workspace) -> None:
    threads = [threading.Thread(target=written, args=(space, 5)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(history.read(space)) == 20
    assert history.verify(space) == []


# -- what a second look must not change -----------------------------------------------------------
def test_a_fit_made_again_that_came_out_the_same_is_no_new_version(lab: Workspace) -> None:
    first = register(lab, fit_and_track(lab))
    promote(lab)
    before = history.read(lab)
    again = register(lab, fit_and_track(lab))
    assert again.version == first.version
    assert promote(lab).verdict.decision == "promote"
    assert history.read(lab) == before


def test_the_champions_own_bytes_under_another_lineage_open_nothing(lab: Workspace) -> None:
    register(lab, fit_and_track(lab))
    promote(lab)
    (lab.root / "params.yaml").write_text("task: toy\nseed: 0\n")  # another lineage, equal bytes
    assert register(lab, fit_and_track(lab)).version == "2"
    held = promote(lab)
    assert (held.verdict.decision, held.was_opened) == ("hold", False)
    assert "version 2 (logistic) is version 1 (logistic) to the byte" in held.verdict.reasons[0]
    assert champion(lab).version == "1"


def test_other_folds_over_the_same_test_units_are_no_new_budget(lab: Workspace) -> None:
    from endoprint.design import DesignConfig, make_split

    register(lab, good_run(lab))
    lab.policy.write_text(POLICY + NEVER + "budget: 1\n")
    assert promote(lab).was_opened
    old, cells = Split.read(lab.split), curated.load(lab.cells)
    new = make_split(cells.obs, DesignConfig(test_units=old.test, n_folds=2), seed=0)
    assert new.hash != old.hash
    new.write(lab.split)
    register(lab, fit_and_track(lab))
    held = promote(lab)
    assert (held.verdict.decision, held.was_opened) == ("hold", False)
    assert "the budget is spent" in " ".join(held.verdict.reasons)


def test_a_decision_is_made_anew_for_other_counts_of_the_same_units(lab: Workspace) -> None:
    register(lab, good_run(lab))
    lab.policy.write_text(POLICY + NEVER)
    assert promote(lab).was_opened
    assert not promote(lab).was_opened
    curated.write(planted_cells(n_units=6, n_cells=8, seed=1), lab.cells)
    assert promote(lab).was_opened


@pytest.mark.parametrize("column", ["exposure", "unit"])
def test_a_decision_is_made_anew_for_corrected_labels_of_the_same_counts(
    lab: Workspace, column: str
) -> None:
    register(lab, good_run(lab))
    lab.policy.write_text(POLICY + NEVER)
    first = promote(lab)
    cells = curated.load(lab.cells)
    is_test = cells.obs["unit"].isin(Split.read(lab.split).test).to_numpy()
    told = cells.obs[column].to_numpy(dtype=object).copy()
    told[is_test] = np.roll(told[is_test], 1)
    cells.obs[column] = told
    curated.write(cells, lab.cells)
    again = promote(lab)
    assert again.was_opened
    assert again.figures != first.figures
    assert not promote(lab).was_opened


def test_whole_lines_held_out_are_counted_as_lines_not_as_their_units(lab: Workspace) -> None:
    from endoprint.design import DesignConfig, make_split

    cells = planted_cells(n_units=12, n_cells=4)
    cells.obs["line"] = (
        "L" + cells.obs["unit"].str[1:].astype(int).floordiv(4).astype(str)
    ).values
    curated.write(cells, lab.cells)
    split = make_split(cells.obs, DesignConfig(scheme="line", n_test_units=1), seed=0)
    split.write(lab.split)
    lab.policy.write_text("at_least: {macro_f1: 0.1}\n")
    register(lab, fit_and_track(lab))
    held = promote(lab)  # four units, of one line: one observation of how a new line behaves
    assert (held.verdict.decision, held.was_opened) == ("hold", False)
    assert "too few units: 1 of 5" in held.verdict.reasons[0]
    lab.policy.write_text(POLICY)
    assert set(promote(lab).figures["version 1 (logistic)"]["by_unit"]) == set(split.test)


def test_a_lost_history_holds_every_verdict_and_opens_nothing(lab: Workspace) -> None:
    register(lab, good_run(lab))
    history.path(lab).unlink()
    held = promote(lab)
    assert (held.verdict.decision, held.was_opened) == ("hold", False)
    assert "the count of openings is in doubt" in held.verdict.reasons[0]
    assert champion(lab) is None


def test_no_verdict_is_taken_from_a_history_edited_by_hand(lab: Workspace) -> None:
    register(lab, good_run(lab))
    lab.policy.write_text(POLICY + NEVER)
    assert promote(lab).verdict.decision == "reject"
    path = history.path(lab)
    path.write_text(path.read_text().replace('"decision": "reject"', '"decision": "promote"'))
    held = promote(lab)
    assert (held.verdict.decision, held.was_opened) == ("hold", False)
    assert champion(lab) is None


def test_a_history_cut_off_is_not_written_on_until_it_is_restored(lab: Workspace) -> None:
    two_versions(lab)
    path, split_hash = history.path(lab), Split.read(lab.split).hash
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:3]))
    other = fit_and_track(lab, model=Logistic(LogisticConfig(penalty=20.0, latent_width=4)))
    for write in (
        lambda: register(lab, other),
        lambda: rollback(lab, "1"),
        lambda: retire(lab, why="anything"),
    ):
        with pytest.raises(Refusal, match="restore it from a copy"):
            write()
    assert "missing" in registry.verify(lab)[0]
    assert registry.aliases(lab) == {"champion": "2", "previous": "1", "candidate": "2"}
    path.write_text(whole)
    assert register(lab, other).version == "3"
    assert registry.verify(lab) == []
    assert promotion.openings(lab, split_hash) == 2


def test_where_no_copy_is_left_whoever_deletes_the_registrys_memory_goes_on(
    lab: Workspace,
) -> None:
    version = register(lab, good_run(lab))
    history.path(lab).unlink()
    tracking.client(lab).delete_registered_model_tag(version.name, registry.HEAD)
    register(lab, weak_run(lab))
    assert registry.verify(lab) == []


def test_a_crash_before_the_registry_remembers_does_not_stop_the_next_write(
    lab: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_versions(lab)

    def dies(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_tag", dies)
    with pytest.raises(KeyboardInterrupt):
        rollback(lab)
    monkeypatch.undo()
    assert registry.verify(lab) == []
    assert rollback(lab).version == "1"
    assert registry.verify(lab) == []


def test_a_store_that_does_not_answer_is_one_line(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://name:secret@127.0.0.1:9")
    for asked in (lambda: find(space), lambda: tracking.runs_table(space)):
        with pytest.raises(Refusal, match="got none from 127.0.0.1:9") as refused:
            asked()
        assert "secret" not in str(refused.value)
