"""The flows that score call jobs that exist, and many workers end in one finishing job."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

import pytest

from children import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("prefect") is None, reason="the flows extra is not installed"
)


class FakeTask:
    """A task that only checks that its job could be called so."""

    called: list[tuple[str, dict[str, Any]]] = []

    def __init__(self, job: Any, *, name: str, **settings: Any) -> None:
        self.job, self.name = job, name

    def __call__(self, *given: Any, **words: Any) -> str:
        inspect.signature(self.job).bind(*given, **words)
        FakeTask.called.append((self.name, words))
        return "plan.json" if self.name == "plan scoring" else "done"

    def submit(self, *given: Any, **words: Any) -> FakeTask:
        self(*given, **words)
        return self

    def result(self) -> None:
        FakeTask.called.append(("waited", {}))


@pytest.fixture
def flows(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    module = importlib.import_module("flows.score")
    monkeypatch.setattr(module, "task", FakeTask)
    monkeypatch.setattr(FakeTask, "called", [])
    return module


def test_the_inbox_is_one_job(flows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.jobs, "has_files", lambda workspace, inbox: True)
    flows.score_inbox.fn("w", inbox="inbox", out="scores/inbox")
    words = {"inbox": "inbox", "out": "scores/inbox", "model": ""}
    assert FakeTask.called == [("score inbox", words)]


def test_workers_share_one_plan_begin_apart_and_one_command_finishes(
    flows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(flows.DASK, raising=False)
    monkeypatch.setattr(flows, "score", flows.score.fn)
    monkeypatch.setattr(flows, "score_parts", flows.score_parts.fn)
    flows.score_with_workers.fn("w", file="new.h5ad", out="out", workers=3)
    names = [name for name, _ in FakeTask.called]
    assert names == ["plan scoring", *["score part"] * 3, *["waited"] * 3, "score"]
    parts = [words for name, words in FakeTask.called if name == "score part"]
    assert {words["plan"] for words in parts} == {"plan.json"}
    assert len({words["begin"] for words in parts}) == 3
