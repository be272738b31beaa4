"""Scoring spread over Dask's workers: each part once, and the single worker's bytes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from children import ROOT
from endoprint import registry, scoring
from endoprint.config import Refusal
from lab import moved_copy
from scoring_story import before_a_scoring, score_the_new_cells
from test_approval_flow import Server

SPREAD = """
import json, os, sys
from distributed import Client, LocalCluster
from endoprint import jobs
from flows import score
if __name__ == "__main__":
    settings = dict(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None)
    words = dict(file="new.h5ad", out="out", model=sys.argv[2])
    with LocalCluster(**settings) as cluster:
        os.environ[score.DASK] = cluster.scheduler_address
        plan = jobs.plan_scoring(sys.argv[1], **words)
        made = score.spread(score.score_parts)(sys.argv[1], plan=plan, workers=3)
        with Client(cluster) as client:
            who = client.run(lambda: "endoprint.scoring.desk" in sys.modules)
        score.score_with_workers(sys.argv[1], **words, workers=3)
    print(json.dumps({"made": made, "workers": list(who.values())}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("prefect", reason="the flows extra is not installed")
    pytest.importorskip("prefect_dask", reason="the dask extra is not installed")
    started = Server(tmp_path_factory.mktemp("prefect"), login="")
    yield started
    started.process.terminate()
    started.process.wait(30)


@pytest.mark.service
@pytest.mark.slow
def test_dasks_workers_make_each_part_once_and_the_single_workers_bytes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    begun = before_a_scoring(tmp_path / "alone")
    space = moved_copy(begun, tmp_path / "spread")
    score_the_new_cells(str(begun.root))
    alone = scoring.ScoreSummary.read(begun.root / "out" / scoring.SUMMARY)
    done = subprocess.run(
        [sys.executable, "-c", SPREAD, str(space.root), f"models:/{space.experiment}/1"],
        env=server.environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    together = scoring.ScoreSummary.read(space.root / "out" / scoring.SUMMARY)
    assert sum(told["made"]) == 6  # parts of the file, whoever made them
    assert any(told["workers"])  # and it was they who did
    assert together.scores_sha256 == alone.scores_sha256
    assert registry.verify(space) == []


def test_an_address_without_prefect_dask_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("prefect", reason="the flows extra is not installed")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    from flows import score

    assert score.spread(score.score_parts) is score.score_parts
    monkeypatch.setenv(score.DASK, "tcp://nobody:8786")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"endoprint\[dask\]"):
        score.spread(score.score_parts)


def test_a_refusal_comes_back_from_another_process_as_it_was() -> None:
    told = Refusal("cells are cells", "a stone", "give cells")
    back = pickle.loads(pickle.dumps(told))
    assert (str(back), back.rule, back.got, back.remedy) == (
        str(told), "cells are cells", "a stone", "give cells",
    )  # fmt: skip
