"""Flows are thin: the same jobs in the same order as without Prefect, under names that exist."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from children import ROOT, python
from conftest import a_workspace
from endoprint import jobs
from endoprint.cli import story as command

HAS_PREFECT = importlib.util.find_spec("prefect") is not None
needs_prefect = pytest.mark.skipif(not HAS_PREFECT, reason="the flows extra is not installed")
FLOWS = sorted(path.stem for path in (ROOT / "flows").glob("*.py") if path.stem != "__init__")
PLAN = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = {row["name"]: row for row in PLAN["deployments"]}
COSTS = {
    "fit_seconds", "cpu_seconds", "score_seconds_per_1000_cells", "peak_memory_gib",
    "run_id", "model_id", "started",
}  # fmt: skip


@pytest.fixture
def prefect(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Prefect be imported with a home of its own: it reads its settings only then."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))


# -- the two pins that must hold ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("package", "below", "otherwise"),
    [
        ("sqlalchemy", "2.1", "prefect 3.8 silently never creates a scheduled run"),
        ("fastapi", "0.151", "every flow of prefect 3.8 dies when its server is imported"),
    ],
)
def test_the_pin_that_prefect_needs_holds(package: str, below: str, otherwise: str) -> None:
    assert Version(version(package)) < Version(below), otherwise


# -- the job list -------------------------------------------------------------------------------
@needs_prefect
@pytest.mark.usefixtures("prefect")
def test_command_and_flow_walk_the_same_jobs_with_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.story

    space = a_workspace(tmp_path / "space", is_simulated=False)
    monkeypatch.chdir(space)
    walked: list[list[Any]] = []

    def recorded(step: jobs.Step) -> jobs.Step:
        def job(workspace: str, **words: str | int) -> str:
            walked[-1].append((step.name, step.job, Path(workspace).resolve(), words))
            return f"told {step.name}"

        return jobs.Step(step.name, job, step.arguments)

    def tell(
        workspace: str, *, told: dict[str, str], flow_run_id: str = "", began: float = 0.0
    ) -> str:
        walked[-1].append(("tell", Path(workspace).resolve(), dict(told), began > 0))
        return ""

    steps = [recorded(step) for step in jobs.story_steps(str(space))]
    monkeypatch.setattr(jobs, "story_steps", lambda workspace: steps)
    monkeypatch.setattr(jobs, "tell", tell)
    monkeypatch.setattr(command, "show_story", lambda path, as_json: None)
    named: list[str] = []

    def task(job: Any, *, name: str, **settings: Any) -> Any:
        named.append(name)
        return job

    monkeypatch.setattr(flows.story, "task", task)
    walked.append([])
    command.demo(workspace=space)
    walked.append([])
    flows.story.story.fn(str(space))

    assert walked[0] == walked[1]
    assert len(walked[0]) == len(steps) + 1
    assert named == [*(step.name for step in steps), "tell"]  # each a task of its own


# -- deployments --------------------------------------------------------------------------------
@needs_prefect
@pytest.mark.usefixtures("prefect")
@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_names_a_flow_that_accepts_its_parameters(name: str) -> None:
    from prefect import Flow
    from prefect.client.schemas.schedules import CronSchedule

    row = DEPLOYMENTS[name]
    path, _, attribute = row["entrypoint"].partition(":")
    assert (ROOT / path).is_file()
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), attribute)
    assert isinstance(flow, Flow)
    parameters = row.get("parameters", {})
    inspect.signature(flow.fn).bind(**parameters)  # no unknown name, none missing
    flow.validate_parameters(parameters)
    for schedule in row.get("schedules", []):
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    assert row["work_pool"] == {"name": "endoprint"}


def test_the_flows_that_write_are_never_run_twice_at_once() -> None:
    scheduled = [row for row in DEPLOYMENTS.values() if row.get("schedules")]
    assert scheduled
    assert all(row["concurrency_limit"]["limit"] == 1 for row in scheduled)


def test_the_promised_flows_exist_and_no_schedule_is_lost() -> None:
    assert set(FLOWS) >= {"prepare", "pretrain", "search", "train", "promote", "score", "story"}
    assert {row["entrypoint"].split(":")[0] for row in DEPLOYMENTS.values()} <= {
        f"flows/{name}.py" for name in FLOWS
    }


@needs_prefect
def test_flows_import_prefect_and_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "mlflow", "pandas", "anndata", "sklearn", "optuna", "transformers")
    code = (
        f"import importlib, os, sys\nos.environ['PREFECT_HOME'] = {str(tmp_path)!r}\n"
        f"for name in {FLOWS}: importlib.import_module('flows.' + name)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@needs_prefect
@pytest.mark.usefixtures("prefect")
@pytest.mark.parametrize("name", ["nightly", "train", "promote", "pretrain", "search", "score"])
def test_every_flow_calls_jobs_that_exist_with_words_they_know(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a flow's body is run; each task only checks that its job could be called so
    called: list[str] = []

    def task(job: Any, *, name: str, **settings: Any) -> Any:
        def checked(*given: Any, **words: Any) -> object:
            inspect.signature(job).bind(*given, **words)
            called.append(name)
            is_first = name == "what changed"
            return {"changed": "data", "last": "", "key": "k"} if is_first else "1"

        return checked

    space = a_workspace(tmp_path / "space", is_simulated=False)
    modules = {each: importlib.import_module(f"flows.{each}") for each in FLOWS}
    for each in ("nightly", "train", "promote", "pretrain", "search", "score"):
        monkeypatch.setattr(modules[each], "task", task)
    monkeypatch.setattr(modules["nightly"], "create_markdown_artifact", lambda *a, **b: None)
    monkeypatch.setattr(modules["nightly"], "prepare", lambda workspace: called.append("prepare"))
    for each in ("pretrain", "train", "promote"):
        monkeypatch.setattr(modules["nightly"], each, getattr(modules[each], each).fn)
    getattr(modules[name], name).fn(str(space))
    promoted = ["register", "promote"]
    train = ["train logistic", "train signature", "train geneformer", "leaderboard"]
    assert (
        called
        == {
            "nightly": [
                "what changed", "prepare", "pretrain", *train, *promoted, "remember the night",
            ],
            "train": train,
            "promote": promoted,
            "pretrain": ["pretrain"],
            "search": ["search geneformer"],
            "score": ["score"],
        }[name]
    )  # fmt: skip


# -- the real thing -----------------------------------------------------------------------------
def told(space: Path) -> dict[str, Any]:
    return json.loads((space / ".endoprint/story.json").read_text())


@pytest.mark.slow
@pytest.mark.service
def test_flow_and_command_come_to_the_same(plain_story: Path, flow_story: Path) -> None:
    plain, flow = told(plain_story), told(flow_story)
    assert list(plain["steps"]) == list(flow["steps"])
    for same in ("champion", "decision", "n_scored", "replicated", "confounded"):
        assert plain[same] == flow[same]
    assert len(plain["leaderboard"]) == len(flow["leaderboard"]) == 3
    for one, other in zip(plain["leaderboard"], flow["leaderboard"], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - COSTS:
            if isinstance(one[name], float):
                assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9), name
            elif isinstance(one[name], dict) and name == "by_unit":
                assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9)
            else:
                assert one[name] == other[name], name


@pytest.mark.slow
@pytest.mark.service
def test_flow_and_command_score_every_cell_alike(plain_story: Path, flow_story: Path) -> None:
    import pandas as pd

    plain, flow = (
        pd.read_parquet(space / "scores/scores.parquet") for space in (plain_story, flow_story)
    )
    pd.testing.assert_frame_equal(plain, flow, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.service
def test_the_flow_is_known_by_its_run_and_left_this_machine_as_little(flow_story: Path) -> None:
    from uuid import UUID

    assert UUID(told(flow_story)["flow_run_id"])
    assert told(flow_story)["flow_run_id"] in (flow_story.parent / "flow_screen.txt").read_text()
    lines = (flow_story.parent / "flow_network.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("refused")] == []
    assert sum(line.startswith("watched") for line in lines) >= 9  # and Prefect's server
