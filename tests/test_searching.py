"""The job of a search: what a trial may see, what its runs keep, by many, over the whole field."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from backends import postgres, postgres_folder
from children import MAIN, environment
from conftest import planted_cells
from endoprint import curated, jobs, runs, search, tracking
from endoprint.config import Refusal
from endoprint.design import Split
from endoprint.encoder.activations import Activations
from endoprint.jobs.searching import Tuning, journal_of, study_name
from endoprint.model import Pruned
from endoprint.models.signature import SignatureConfig
from endoprint.search import Limits
from endoprint.workspace import Workspace
from lab import moved_copy

FIELD = "task: toy\nmodels:\n  logistic: {}  # the bar\n  neighbours: {}\n"
TINY_GENEFORMER = """task: toy
models:
  geneformer: {layers: 2, hidden: 16, ffn: 16, epochs: 1, min_steps: 1, frozen_layers: 1}
"""


@pytest.fixture
def small(lab: Workspace) -> Workspace:
    """Six units, three exposures, of which four units are for development."""
    (lab.root / "params.yaml").write_text(FIELD)
    return Workspace.at(lab.root)


def study_of(space: Workspace, model: str, objective: Any = "quality") -> Any:
    found = search.find_study(journal_of(space, model), study_name(space, model, objective))
    assert found is not None
    return found


def runs_of(space: Workspace, kind: str) -> list[Any]:
    store = tracking.client(space)
    asked = [tracking.experiment(space, store)]
    return list(store.search_runs(asked, filter_string=f"tags.kind = '{kind}'"))


def artefacts(space: Workspace, run_id: str, folder: str = "") -> set[str]:
    found = tracking.client(space).list_artifacts(run_id, folder or None)
    return {Path(each.path).name for each in found}


# -- what a trial may see -------------------------------------------------------------------------
def with_test_units_of_noise(cells: AnnData, split: Split) -> AnnData:
    told = cells.copy()
    is_test = told.obs["unit"].astype(str).isin(split.test).to_numpy()
    counts = told.X.toarray()
    counts[is_test] = np.random.default_rng(0).poisson(50, counts[is_test].shape)
    told.X = sparse.csr_matrix(counts)
    told.obs["n_counts"], told.obs["n_genes"] = counts.sum(axis=1), (counts > 0).sum(axis=1)
    exposure = told.obs["exposure"].astype(str).to_numpy(copy=True)
    exposure[is_test] = np.roll(exposure[is_test], 1)
    told.obs["exposure"] = exposure
    return told


@pytest.mark.parametrize("objective", ["quality", "quality-cost"])
def test_test_units_could_be_anything_and_no_trial_would_differ(
    small: Workspace, tmp_path: Path, objective: str
) -> None:
    cells, split = planted_cells(n_units=6, n_cells=8, fold=2.0), Split.read(small.split)
    assert len(split.test) == 2
    heard = []
    for name, told in (("true", cells), ("noise", with_test_units_of_noise(cells, split))):
        space = moved_copy(small, tmp_path / name)
        curated.write(told, space.cells)
        jobs.search(str(space.root), model="neighbours", trials=3, objective=objective)
        study = study_of(space, "neighbours", objective)
        heard.append([(trial.params, trial.values[0]) for trial in study.trials])
    assert heard[0] == heard[1]
    assert len({figure for _, figure in heard[0]}) > 1


# -- what is kept ---------------------------------------------------------------------------------
def test_a_study_keeps_figures_table_and_proposal_and_its_trials_are_nested_in_it(
    small: Workspace,
) -> None:
    before = (small.root / "params.yaml").read_text()
    run_id = jobs.search(str(small.root), model="neighbours", trials=4, objective="quality-cost")
    assert artefacts(small, run_id, "figures") == {
        "history.png", "importance.png", "slice.png", "front.png",
    }  # fmt: skip
    assert {"proposal.diff", "winner.json", "tables"} <= artefacts(small, run_id)
    trials = runs_of(small, "trial")
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {run_id}
    assert len(trials) == 4
    table = runs.read_table(small, run_id, "trials")
    assert set(table["run_id"]) == {run.info.run_id for run in trials}
    note = tracking.client(small).get_run(run_id).data.tags[tracking.NOTE]
    result = jobs.search_result(str(small.root), model="neighbours", objective="quality-cost")
    assert note.startswith(f"**macro-F1 {result['best_macro_f1']:.3f}**")
    proposed = runs.read_text(small, run_id, "proposal.diff")
    assert proposed == f"{result['diff']}\n"  # as `patch` wants it
    assert "# the bar" in result["diff"]
    assert (small.root / "params.yaml").read_text() == before
    with pytest.raises(Refusal, match="none of neighbours"):  # by quality alone nobody searched
        jobs.search_result(str(small.root), model="neighbours", objective="quality")


def test_pruned_trials_are_marked_and_failed_ones_say_why(
    small: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from endoprint import judge

    real, n_fits = judge.cross_fit, []

    def eventful(*given: Any, **words: Any) -> Any:
        n_fits.append(1)
        if len(n_fits) == 2:
            raise Pruned("trial 1 at epoch 3")
        if len(n_fits) == 3:
            raise MemoryError("no room")
        return real(*given, **words)

    monkeypatch.setattr(judge, "cross_fit", eventful)
    run_id = jobs.search(str(small.root), model="neighbours", trials=3)
    ended = [
        (run.info.status, run.data.tags.get("pruned"), run.data.tags.get("error"))
        for run in sorted(runs_of(small, "trial"), key=lambda run: run.info.start_time)
    ]
    assert ended == [
        ("FINISHED", None, None),
        ("FINISHED", "true", None),  # what a crash leaves is KILLED, and `gc` deletes that
        ("FAILED", None, "MemoryError: no room"),
        ("FINISHED", None, None),
    ]
    states = runs.read_table(small, run_id, "trials")["state"]
    assert list(states) == ["complete", "pruned", "failed", "complete"]


def test_todays_values_that_win_are_no_news(small: Workspace) -> None:
    run_id = jobs.search(str(small.root), model="logistic", trials=1)
    result = jobs.search_result(str(small.root), model="logistic")
    assert result["diff"] == "" == runs.read_text(small, run_id, "proposal.diff")
    assert "params.yaml has them" in result["text"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"budget": "soon"}, "a budget is a time"),
        ({"objective": "cheap"}, "quality or quality-cost"),
        ({"trials": -1}, "at least one trial"),
        ({"workers": 0}, "at least one process"),
        ({"target": 90.0}, "a target is a macro-F1"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_tracked(
    small: Workspace, words: dict[str, Any], said: str
) -> None:
    with pytest.raises(Refusal, match=said):
        jobs.search(str(small.root), model="logistic", **words)
    assert runs_of(small, "search") == []


# -- shared ---------------------------------------------------------------------------------------
def test_a_second_trial_of_a_frozen_prefix_computes_no_activation(
    small: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small.root / "params.yaml").write_text(TINY_GENEFORMER)
    space = Workspace.at(small.root)
    computed: list[int] = []
    real = Activations.hold

    def hold(self: Any, kind: Any, keys: Any, n_rows: Any, width: Any, compute: Any,
             told: Any = lambda n: None) -> Any:  # fmt: skip
        def counted(cells: Any) -> Any:
            computed[-1] += len(cells)
            return compute(cells)

        return real(self, kind, keys, n_rows, width, counted, told)

    monkeypatch.setattr(Activations, "hold", hold)
    for total in (1, 2):
        computed.append(0)
        jobs.search(str(space.root), model="geneformer", trials=total)
    assert computed[0] > 0 == computed[1]
    assert len({json.dumps(t.params) for t in study_of(space, "geneformer").trials}) == 2


@pytest.mark.slow
def test_further_processes_run_exactly_what_is_asked_under_one_run(
    small: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from endoprint import judge

    real = judge.cross_fit

    def after_another(*given: Any, **words: Any) -> Any:
        """Let the lead's own trials wait for one of another process: those begin seconds later."""
        deadline = time.monotonic() + 300
        while {x.data.tags["pid"] for x in runs_of(small, "trial")} == {str(os.getpid())}:
            assert time.monotonic() < deadline, "no further process ran a trial"
            time.sleep(0.5)
        return real(*given, **words)

    monkeypatch.setattr(judge, "cross_fit", after_another)
    run_id = jobs.search(str(small.root), model="neighbours", trials=7, workers=3)
    assert search.n_finished(study_of(small, "neighbours")) == 7
    finished = [run for run in runs_of(small, "trial") if run.info.status == "FINISHED"]
    assert len(finished) == 7
    assert {run.data.tags["mlflow.parentRunId"] for run in finished} == {run_id}
    assert len({run.data.tags["pid"] for run in finished}) > 1
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.service
@pytest.mark.skipif(postgres_folder() is None, reason="Debian's postgresql is not installed")
def test_four_processes_on_postgresql_run_exactly_what_is_asked_and_say_no_password(
    small: Workspace,
) -> None:
    pytest.importorskip("psycopg", reason="the services extra is not installed")
    programs = postgres_folder()
    assert programs is not None
    with postgres(programs) as database:
        leading = {"OPTUNA_STORAGE": database.url("optuna", "psycopg")}
        words = [sys.executable, "-c", MAIN, "search", "neighbours", "--trials", "9", "--json"]
        started = [
            subprocess.Popen(
                words, cwd=small.root, env={**environment(), **leading}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for _ in range(4)
        ]  # fmt: skip
        said = [process.communicate(timeout=600) for process in started]
        assert [process.returncode for process in started] == [0] * 4, said
        states = database.psql("select state, count(*) from trials group by state", "optuna")
        assert dict(row.split("|") for row in states.splitlines())["COMPLETE"] == "9"
        assert {json.loads(out)["n_finished"] for out, _ in said} == {9}
        told = "".join(out + err for out, err in said)
        bad = {"OPTUNA_STORAGE": leading["OPTUNA_STORAGE"].replace("/optuna", "/nosuch")}
        refused = subprocess.run(
            words, cwd=small.root, env={**environment(), **bad}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
        assert database.password not in told + refused.stderr + refused.stdout
        for path in small.root.rglob("*"):
            assert not path.is_file() or database.password.encode() not in path.read_bytes(), path


# -- the whole field ------------------------------------------------------------------------------
def test_one_budget_tunes_the_field_and_a_second_run_of_it_adds_nothing(
    small: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small.root / "params.yaml").write_text(f"{FIELD}  signature: {{}}\n")
    clock = [0.0]
    watch = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("endoprint.search.tuning.time", watch)
    monkeypatch.setattr(Tuning, "run", in_ten_seconds_a_trial(clock))
    asked = "120s"  # two rungs: 20 s for each of three models, then 30 s more for two
    folder = str(small.root)
    first = jobs.search_all_result(folder, jobs.search_all(folder, budget=asked))
    told = [
        (row["model"], row["macro_f1"], row["rungs"], row["trials"]) for row in first["models"]
    ]
    assert told == [
        ("neighbours", 0.94, 2, 5),
        ("logistic", 0.64, 2, 5),
        ("signature", 0.31, 1, 2),
    ]
    assert first["diff"].count("--- params.yaml") == 1
    assert "+  signature:" in first["diff"]  # its best values are kept, though it was left behind
    again = jobs.search_all_result(folder, jobs.search_all(folder, budget=asked))
    assert again["models"] == first["models"]


def in_ten_seconds_a_trial(clock: list[float]) -> Any:
    """Tune in the real loop; a trial takes ten seconds and is a little better than the last."""
    found = {"logistic": 0.6, "neighbours": 0.9, "signature": 0.3}

    def run(self: Tuning, limits: Limits, parent: str, **words: Any) -> None:
        from endoprint.model import model_class

        def fit(trial: search.Trial) -> float:
            clock[0] += 10.0
            return round(found[self.model] + 0.01 * trial.number, 2)

        space = model_class(self.model).Config
        search.tune(self.study, space, self.chosen, fit, limits=limits)

    return run


def test_a_model_that_cannot_be_tuned_is_said_and_the_field_goes_on(
    small: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small.root / "params.yaml").write_text(f"{FIELD}  signature: {{}}\n")
    clock = [0.0]
    watch = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("endoprint.search.tuning.time", watch)
    tuned = in_ten_seconds_a_trial(clock)

    def run(self: Tuning, limits: Limits, parent: str, **words: Any) -> None:
        if self.model == "logistic":
            raise Refusal("a model starts", "nothing to start from", "give it something")
        if self.model == "signature":  # every trial fails, but never three before time is up
            search.tune(self.study, SignatureConfig, {}, failing(clock), limits=Limits(seconds=15))
            return
        tuned(self, limits, parent)

    monkeypatch.setattr(Tuning, "run", run)
    folder = str(small.root)
    found = jobs.search_all_result(folder, jobs.search_all(folder, budget="60s"))
    figures = {row["model"]: row["macro_f1"] for row in found["models"]}
    assert figures == {"neighbours": figures["neighbours"], "logistic": None, "signature": None}
    assert figures["neighbours"] > 0.9
    assert "nothing to start from" in found["text"]


def test_a_model_that_fails_in_a_later_rung_keeps_what_it_had_found(
    small: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small.root / "params.yaml").write_text(FIELD)
    clock = [0.0]
    watch = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("endoprint.search.tuning.time", watch)
    tuned = in_ten_seconds_a_trial(clock)
    asked: list[str] = []

    def run(self: Tuning, limits: Limits, parent: str, **words: Any) -> None:
        asked.append(self.model)
        if asked.count(self.model) == 2:
            raise Refusal("trials succeed", "three failures in a row", "mend that")
        tuned(self, limits, parent)

    monkeypatch.setattr(Tuning, "run", run)
    monkeypatch.setattr("endoprint.search.field.n_rungs", lambda n_models: 2)
    folder = str(small.root)
    run_id = jobs.search_all(folder, budget="60s")
    found = jobs.search_all_result(folder, run_id)
    broken = next(row for row in found["models"] if row["error"])
    assert broken["macro_f1"] is not None
    assert broken["values"]
    assert found["models"][0]["model"] == broken["model"]  # it went on since it was the best
    tagged = [run for run in runs_of(small, "search") if "error" in run.data.tags]
    assert [run.data.tags["model"] for run in tagged] == [broken["model"]]


def failing(clock: list[float]) -> Any:
    def fit(trial: search.Trial) -> float:
        clock[0] += 10.0
        raise MemoryError("no room")

    return fit


def test_a_search_of_all_asks_for_its_budget(small: Workspace) -> None:
    with pytest.raises(Refusal, match="has a budget"):
        jobs.search_all(str(small.root), budget="")


# -- offered, and in turn -------------------------------------------------------------------------
@pytest.mark.slow
def test_the_winner_is_refitted_judged_and_offered_and_params_stay(
    plain_story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    space = moved_copy(Workspace.at(plain_story), tmp_path / "space")
    before = (space.root / "params.yaml").read_text()
    words = ("search", "logistic", "--trials", "2", "--offer", "--json")
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *words], cwd=space.root, capture_output=True, text=True,
        env=environment(block="prefect"), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    from endoprint import registry

    assert registry.aliases(space)["candidate"] == told["version"]
    fit = tracking.client(space).get_run(told["fit_run_id"]).data
    assert fit.tags["tuned_trials"] == "2"
    assert {name: fit.params[name] for name in told["values"]} == {
        name: str(value) for name, value in told["values"].items()
    }
    assert (space.root / "params.yaml").read_text() == before


@pytest.mark.slow
@pytest.mark.service
def test_a_search_and_a_night_take_turns_where_the_gpu_has_one_slot_and_else_do_not(
    tmp_path: Path,
) -> None:
    pytest.importorskip("prefect", reason="the flows extra is not installed")
    script = tmp_path / "turns.py"
    script.write_text(TURNS)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**environment(), "PREFECT_HOME": str(tmp_path / "prefect")}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["2", "1"]


TURNS = """
import threading, time
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.testing.utilities import prefect_test_harness
from endoprint import jobs

lock, inside, most = threading.Lock(), [0], [0]

def fit(workspace, **words):
    with lock:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline and most[0] < 2:
        time.sleep(0.1)
    with lock:
        inside[0] -= 1
    return workspace

jobs.search = jobs.train = fit
jobs.model_names, jobs.leaderboard = lambda workspace: ["logistic"], lambda workspace: workspace

def at_most():
    most[0] = 0
    both = [threading.Thread(target=told, args=("a",)) for told in (search, train)]
    for each in both: each.start()
    for each in both: each.join()
    return most[0]

with prefect_test_harness(server_startup_timeout=300):
    from flows.search import search
    from flows.train import train
    wait = 120.0  # for the other, which a busy machine starts late
    print(at_most())
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="gpu", limit=1))
    wait = 15.0
    print(at_most())
"""
