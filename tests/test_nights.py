"""A night's work is skipped when nothing it depends on changed, and only then."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from children import ROOT, endoprint
from conftest import planted_cells
from endoprint import jobs, tracking
from endoprint.config import Away, Refusal
from endoprint.jobs import data, nights
from endoprint.roles import NAME, PASSWORD, acting, assume_reader
from endoprint.search import study
from endoprint.spelled import without_secrets
from lab import bare_workspace, furnish

needs_prefect = pytest.mark.skipif(
    importlib.util.find_spec("prefect") is None, reason="the flows extra is not installed"
)


@pytest.fixture
def space(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text("task: toy\ncells: {source: raw.h5ad}\n")
    (tmp_path / "raw.h5ad").write_bytes(b"cells")
    return tmp_path


def worked(space: Path) -> dict[str, object]:
    night = jobs.night(str(space))
    jobs.end_night(str(space), night=night)
    return night


def test_the_first_night_has_everything_to_do_and_the_next_nothing(space: Path) -> None:
    assert worked(space)["changed"] == "data, code, values"
    again = jobs.night(str(space))
    assert again["changed"] == ""
    assert again["last"]


def test_other_bytes_of_the_same_size_are_other_data(space: Path) -> None:
    worked(space)
    (space / "raw.h5ad").write_bytes(b"CELLS")
    assert jobs.night(str(space))["changed"] == "data"


def test_the_same_bytes_written_again_are_the_same_data(space: Path) -> None:
    worked(space)
    (space / "raw.h5ad").write_bytes(b"cells")
    os.utime(space / "raw.h5ad", (1, 1))
    assert jobs.night(str(space))["changed"] == ""


def test_a_file_more_in_a_folder_of_cells_is_other_data(space: Path) -> None:
    (space / "raw.h5ad").unlink()
    (space / "raw.h5ad").mkdir()
    (space / "raw.h5ad/one").write_text("1")
    worked(space)
    (space / "raw.h5ad/two").write_text("2")
    assert jobs.night(str(space))["changed"] == "data"


def test_another_value_or_rule_is_another_night(space: Path) -> None:
    worked(space)
    with (space / "params.yaml").open("a") as stream:
        stream.write("seed: 1\n")
    assert jobs.night(str(space))["changed"] == "values"
    worked(space)
    (space / "registry").mkdir()
    (space / "registry/policy.yaml").write_text("must_beat: logistic\n")
    assert jobs.night(str(space))["changed"] == "values"


def test_other_code_is_another_night(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worked(space)
    monkeypatch.setattr(nights, "SOFTWARE", ("numpy",))
    assert jobs.night(str(space))["changed"] == "code"


def test_a_night_that_was_cut_short_keeps_its_name_and_a_finished_one_gives_it_up(
    space: Path,
) -> None:
    cut_short = jobs.night(str(space))
    assert jobs.night(str(space))["key"] == cut_short["key"]
    jobs.end_night(str(space), night=cut_short)
    assert jobs.night(str(space))["key"] != cut_short["key"]


def test_a_torn_record_of_the_last_night_means_that_all_is_new(space: Path) -> None:
    worked(space)
    (space / ".endoprint/night.json").write_text('{"parts"')
    assert jobs.night(str(space))["changed"] == "data, code, values"


def test_a_night_without_cells_is_refused(space: Path) -> None:
    (space / "raw.h5ad").unlink()
    with pytest.raises(Refusal, match="begins with cells"):
        jobs.night(str(space))


def test_a_fit_that_a_night_has_finished_is_not_made_again_in_that_night(tmp_path: Path) -> None:
    cells = planted_cells(n_units=6, n_cells=8)
    cells.uns["endoprint"] = {"control": "DMSO"}
    made = furnish(bare_workspace(tmp_path / "made"), cells)
    root = str(made.root)
    first = jobs.train(root, model="signature", night="one")
    assert jobs.train(root, model="signature", night="one") == first
    assert len(tracking.runs_table(made)) == 1
    others = [jobs.train(root, model="signature", night=night) for night in ("two", "", "")]
    assert len({first, *others}) == 4  # another night's, and asked for by hand: made anew
    with pytest.raises(RuntimeError), tracking.run(
        made, name="logistic", kind="train", model="logistic", tags={"night": "one"}
    ):  # fmt: skip
        raise RuntimeError("killed on its way")
    assert jobs.train(root, model="logistic", night="one") != first  # a failed one counts nothing


def test_where_no_up_runs_status_says_so_and_asks_nobody(space: Path) -> None:
    (space / ".endoprint").mkdir(exist_ok=True)
    stale = {"pid": 2**22 - 1, "born": 1.0, "services": [], "prefect_api": "http://127.0.0.1:1"}
    (space / ".endoprint/up.json").write_text(json.dumps(stale))
    assert jobs.status(str(space))["is_running"] is False


def test_without_prefect_up_is_refused_in_a_line_and_the_other_commands_work(space: Path) -> None:
    done = endoprint("up", cwd=space, block="prefect")
    assert done.returncode == 2
    assert done.stderr.startswith("endoprint: schedules are Prefect's")
    assert "nothing is running" in endoprint("status", cwd=space, block="prefect").stdout
    assert endoprint("pull", cwd=space, block="prefect").returncode == 2  # no remote is named


def test_servers_that_others_can_reach_are_refused_without_passwords(space: Path) -> None:
    done = endoprint("up", "--host", "0.0.0.0", cwd=space)
    assert done.returncode == 2
    assert "ask for a password" in done.stderr


def test_two_that_prepare_one_workspace_do_so_one_after_the_other(
    space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, most = 0, 0

    def repro(*command: Any, **settings: Any) -> SimpleNamespace:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        time.sleep(0.3)
        at_work -= 1
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(data.subprocess, "run", repro)
    monkeypatch.delenv("ENDOPRINT_DVC_REMOTE", raising=False)
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(jobs.prepare, [str(space)] * 3))
    assert made == [str(space / "dvc.lock")] * 3
    assert most == 1


# -- who asks -----------------------------------------------------------------------------------
def test_a_role_is_taken_for_a_job_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "me")
    monkeypatch.delenv(PASSWORD, raising=False)
    monkeypatch.setenv("ENDOPRINT_TRAINER_PASSWORD", "secret")
    with acting("trainer"), acting("promoter"):  # no promoter is known: still the trainer
        assert (os.environ[NAME], os.environ[PASSWORD]) == ("trainer", "secret")
    assert os.environ[NAME] == "me"
    assert PASSWORD not in os.environ


def test_nobody_becomes_a_reader_who_is_somebody_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDOPRINT_READER_PASSWORD", "secret")
    monkeypatch.setenv(NAME, "me")
    assume_reader()
    assert os.environ[NAME] == "me"


def test_an_address_in_a_message_loses_its_password() -> None:
    said = without_secrets("cannot reach\npostgresql://lab:s3cret@host/mlflow: refused")
    assert said == "cannot reach postgresql://***@host/mlflow: refused"


# -- what is tried again ------------------------------------------------------------------------
@needs_prefect
def test_only_what_may_pass_by_itself_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    from requests import ConnectionError as Unreachable
    from sqlalchemy.exc import OperationalError

    from endoprint.passing import is_passing

    passing = [
        OSError("disk"),
        Unreachable("line"),
        OperationalError("", {}, ValueError("locked")),
        Away("a store answers", "nothing", "start it"),
    ]
    lasting = [
        Refusal("a rule", "that", "this"), FileNotFoundError("cells"), ValueError("shape"),
        MemoryError(), TimeoutError("twelve hours"),
        MlflowException("no", error_code=1000),  # INVALID_PARAMETER_VALUE
    ]  # fmt: skip
    assert [is_passing(error) for error in passing] == [True] * 4
    assert [is_passing(error) for error in lasting] == [False] * 6


@pytest.mark.parametrize("what", ["mlflow", "optuna", "dvc"])
def test_a_store_that_is_away_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    space = bare_workspace(tmp_path)
    if what == "mlflow":
        store = SimpleNamespace(get_experiment_by_name=_fails)
        asked = partial(tracking.experiment, space, store)
    elif what == "optuna":
        monkeypatch.setenv("OPTUNA_STORAGE", "postgresql+psycopg://lab:hush@127.0.0.1:9/optuna")
        asked = partial(study.storage, tmp_path / "journal")
    else:
        (tmp_path / ".dvc").mkdir()
        (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = True\n    analytics = false\n")
        (tmp_path / "cells.dvc").write_text(f"outs:\n- md5: {'a' * 32}\n  path: cells\n")
        monkeypatch.setenv("ENDOPRINT_DVC_REMOTE", str(tmp_path / "gone"))
        asked = partial(jobs.pull, str(space.root))
    with pytest.raises(Away) as told:
        asked()
    assert told.value.got != "an error"
    assert "hush" not in str(told.value)


def _fails(_: str) -> None:
    raise MlflowException("no answer")


def every_flow() -> dict[str, Any]:
    """Each flow of ours by its name."""
    from prefect import Flow

    names = [path.stem for path in (ROOT / "flows").glob("*.py") if path.stem != "__init__"]
    modules = [importlib.import_module(f"flows.{name}") for name in names]
    found = [each for module in modules for each in vars(module).values()]
    return {each.name: each for each in found if isinstance(each, Flow)}


@needs_prefect
def test_every_flow_that_fails_or_crashes_leaves_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    from flows.care import leave_a_note

    found = every_flow()
    assert found.keys() >= {"nightly", "prepare", "train", "promote", "search", "story"}
    for flow in found.values():
        assert leave_a_note in flow.on_failure_hooks, flow.name
        assert leave_a_note in flow.on_crashed_hooks, flow.name


@needs_prefect
def test_a_note_says_what_why_and_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    from flows import care
    from prefect.states import Crashed, exception_to_failed_state

    noted: list[dict[str, Any]] = []

    class Artifact:
        def __init__(self, **said: Any) -> None:
            noted.append(said)

        def create(self) -> None: ...

    monkeypatch.setattr(care, "TableArtifact", Artifact)
    run = SimpleNamespace(parent_task_run_id=None, id="1")

    def note(state: Any) -> dict[str, str]:
        care.leave_a_note(every_flow()["nightly"], run, state)
        assert noted[-1]["key"] == "failure"
        (row,) = noted[-1]["table"]
        assert row["what"] == "nightly"
        return dict(row)

    def failed(error: Exception) -> Any:
        return asyncio.run(exception_to_failed_state(error))

    refused = note(failed(Refusal("cells are counts", "logarithms", "pass the raw layer")))
    assert refused["reason"] == "cells are counts; got logarithms"
    assert refused["next step"] == "pass the raw layer"
    broken = note(failed(ValueError("no such shape")))
    assert broken["reason"] == "ValueError: no such shape"
    assert "logs" in broken["next step"]
    assert "goes on by itself" in note(Crashed(message="killed"))["next step"]
    care.leave_a_note(every_flow()["train"], SimpleNamespace(parent_task_run_id="0"), Crashed())
    assert len(noted) == 3  # a flow within a flow leaves the word to the outer one


@needs_prefect
def test_every_long_step_ends_in_time_and_is_tried_again_but_a_persons_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    (tmp_path / "params.yaml").write_text(
        "task: toy\ncells: {source: a}\npretrain: {epochs: 1}\nmodels: {a: {}}\n"
    )
    settings: dict[str, dict[str, Any]] = {}

    def task(job: Any, *, name: str, **said: Any) -> Any:
        settings[name] = said
        first = {"changed": "data", "last": "", "key": "k"}
        return lambda *given, **words: first if name == "what changed" else "1"

    found = every_flow()
    for flow in found.values():
        monkeypatch.setattr(importlib.import_module(flow.fn.__module__), "task", task)
    nightly, promote = (
        importlib.import_module(f"flows.{name}") for name in ("nightly", "promote")
    )
    monkeypatch.setattr(nightly, "create_markdown_artifact", lambda *a, **b: None)
    for name in ("prepare", "pretrain", "train", "promote"):
        monkeypatch.setattr(nightly, name, found[name].fn)
    monkeypatch.setattr(jobs, "waits_for_approval", lambda *a, **b: True)
    monkeypatch.setattr(jobs, "has_files", lambda *a, **b: True)
    monkeypatch.setattr(promote, "whom_the_server_knows", lambda: "ann")
    word = SimpleNamespace(approve=True, why="read")
    monkeypatch.setattr(promote, "pause_flow_run", lambda **said: word)
    for name in ("nightly", "search", "score", "score-inbox"):
        found[name].fn(str(tmp_path))
    found["promote"].fn(str(tmp_path), wait=True)
    quick = {"what changed", "remember the night"}  # they read and write one small file
    assert settings.keys() >= quick | {"prepare", "train a", "promote", "approve", "score inbox"}
    for name in settings.keys() - quick:
        assert 0 < settings[name]["timeout_seconds"] <= 24 * 3600, name
        assert settings[name].get("retries", 0) == (0 if name == "approve" else 3), name


@needs_prefect
def test_a_forced_night_keeps_its_name_when_it_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # killed after it was remembered and before Prefect heard of its end: nothing is fitted again
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    nightly = importlib.import_module("flows.nightly")
    named: list[str] = []
    keys = iter("abcdef")
    found = {"changed": "", "last": "then"}

    def task(job: Any, *, name: str) -> Any:
        return lambda *given, **words: {**found, "key": next(keys)}

    monkeypatch.setattr(nightly, "task", task)
    monkeypatch.setattr(jobs, "wants_pretraining", lambda workspace: False)
    monkeypatch.setattr(nightly, "create_markdown_artifact", lambda *a, **b: None)
    monkeypatch.setattr(nightly, "prepare", lambda workspace: None)
    monkeypatch.setattr(nightly, "promote", lambda workspace: "verdict")
    monkeypatch.setattr(nightly, "train", lambda workspace, night: named.append(night))
    for run_id in ("1", "1", "2"):
        monkeypatch.setenv("PREFECT__FLOW_RUN_ID", run_id)
        nightly.nightly.fn(str(tmp_path), force=True)
    assert named[0] == named[1] != named[2]


@needs_prefect
def test_hooks_name_their_arguments_as_prefects_worker_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a worker tells a flow's hooks by keyword that its process died
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    from flows import care

    told = list(inspect.signature(care.leave_a_note).parameters)
    assert told == ["flow", "flow_run", "state"]
    asked = list(inspect.signature(care.worth_trying_again).parameters)
    assert asked == ["task", "task_run", "state"]
