"""h5ad in, a promoted model and scored cells out: the demo's own job list on a tiny atlas.

The story ran as `endoprint demo` in a process without Prefect and without a network.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import anndata
import pandas as pd
import pytest

from children import python

pytestmark = pytest.mark.slow

LEFT_BEHIND = [
    "data/raw/atlas.h5ad",
    "data/raw/pool.h5ad",
    "data/raw/new.h5ad",
    "dvc.lock",
    "data/cells/check.json",
    "data/cells/cells.h5ad",
    "data/cells/pool.h5ad",
    "data/cells/curation.json",
    "data/design/audit.json",
    "data/design/split.json",
    "data/tokens/vocabulary.json",
    "data/tokens/cells.parquet",
    ".endoprint/mlflow.db",
    ".endoprint/studies/geneformer.log",
    ".endoprint/leaderboard.json",
    ".endoprint/leaderboard.html",
    ".endoprint/verdict.json",
    ".endoprint/story.json",
    "scores/scores.parquet",
    "scores/summary.json",
    "scores/samples.json",
    "scores/report.html",
]


@pytest.fixture
def told(plain_story: Path) -> dict[str, Any]:
    return json.loads((plain_story / ".endoprint/story.json").read_text())


@pytest.fixture
def scores(plain_story: Path) -> pd.DataFrame:
    return pd.read_parquet(plain_story / "scores/scores.parquet")


def test_every_file_that_the_story_promises_is_there(plain_story: Path) -> None:
    assert [name for name in LEFT_BEHIND if not (plain_story / name).is_file()] == []


def test_nothing_half_written_stays_behind(plain_story: Path) -> None:
    assert [str(path) for path in plain_story.rglob("*.part")] == []
    # of a job's folder only its lock stays: taken away, it would let two in
    left = [path.name for path in (plain_story / ".endoprint/work").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == []


def test_the_story_says_who_is_live_and_where_things_are(
    plain_story: Path, told: dict[str, Any]
) -> None:
    assert told["champion"]["model"] in ("logistic", "signature", "geneformer")
    assert told["champion"]["version"] == "1"
    assert told["decision"] == "promote"
    assert told["reasons"]
    assert told["flow_run_id"] == ""  # no Prefect, no flow
    assert Path(told["scores"]) == plain_story / "scores"
    assert told["n_scored"] == 60
    assert told["minutes"] > 0
    assert (told["replicated"], told["confounded"]) == (True, False)


def test_the_leaderboard_ranks_the_whole_field_by_macro_f1(told: dict[str, Any]) -> None:
    board = told["leaderboard"]
    assert {row["model"] for row in board} == {"logistic", "signature", "geneformer"}
    figures = [row["macro_f1"] for row in board]
    assert figures == sorted(figures, reverse=True)
    assert told["champion"]["model"] == board[0]["model"]
    small = next(row for row in board if row["model"] == "geneformer")
    assert "not the published Geneformer" in small["label"]


def test_every_new_cell_is_scored_once_in_input_order(
    plain_story: Path, scores: pd.DataFrame
) -> None:
    cells = anndata.read_h5ad(plain_story / "data/raw/new.h5ad")
    assert list(scores["cell_id"]) == list(cells.obs_names)
    columns = [name for name in scores.columns if name.startswith("p_")]
    assert len(columns) == 15
    assert (scores[columns].sum(axis=1) - 1).abs().max() < 1e-5
    called = scores.dropna(subset="call")
    assert len(called) > 0
    assert [f"p_{call}" for call in called["call"]] == list(called[columns].idxmax(axis=1))


def test_scores_say_which_model_and_which_cells_they_come_from(
    plain_story: Path, scores: pd.DataFrame, told: dict[str, Any]
) -> None:
    from endoprint.cells import md5

    assert set(scores["model_version"].astype(str)) == {told["champion"]["version"]}
    assert set(scores["model_sha256"]) == {told["leaderboard"][0]["model_sha256"]}
    assert set(scores["input_md5"]) == {md5(plain_story / "data/raw/new.h5ad")}


def test_calls_of_the_champion_are_better_than_guessing(
    plain_story: Path, scores: pd.DataFrame
) -> None:
    # the truth of the new samples stands beside them; mixtures name no single exposure
    truth = pd.read_csv(plain_story / "data/raw/new.truth.csv", index_col="sample_id")["exposure"]
    exposure = scores["sample"].map(truth)
    known = scores[("p_" + exposure).isin(scores.columns)]
    assert len(known) >= 20
    believed = [row[f"p_{exposure[cell]}"] for cell, row in known.iterrows()]
    assert sum(believed) / len(believed) > 2 / 15  # guessing would come to 1 / 15


def test_the_reports_first_lines_are_one_sentence_per_sample(plain_story: Path) -> None:
    page = (plain_story / "scores/report.html").read_text()
    samples = json.loads((plain_story / "scores/samples.json").read_text())
    sentences = [sample["sentence"] + "." for sample in samples.values()]
    assert len(sentences) == 48
    said = [html.unescape(each) for each in re.findall(r"<li>(.*?)</li>", page, flags=re.DOTALL)]
    assert said[: len(sentences)] == sentences
    body = page[page.index("<body>") :]
    before = re.sub(r"<[^>]+>", " ", body[: body.index("<li>")]).split()
    assert len(before) < 30  # a title stands before them, and nothing else


def test_the_last_screen_names_leader_champion_reasons_places_and_next_commands(
    plain_story: Path, told: dict[str, Any]
) -> None:
    screen = (plain_story.parent / "plain_screen.txt").read_text()
    assert max(len(line) for line in screen.splitlines()) <= 100
    for row in told["leaderboard"]:
        assert row["model"] in screen
    for word in ("went live", "scores/report.html", "scores/scores.parquet", "60"):
        assert word in screen
    commands = [line for line in screen.splitlines() if re.search(r"\bendoprint \w+", line)]
    assert len(commands) >= 3


def test_nothing_left_this_machine_and_every_process_was_watched(plain_story: Path) -> None:
    lines = (plain_story.parent / "plain_network.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("refused")] == []
    watched = [line for line in lines if line.startswith("watched")]
    # the story, DVC, and the five stages that DVC started
    assert len(watched) >= 7
    assert [line for line in watched if "repro" in line]
    stages = ["check", "curate", "audit", "split", "tokenize"]
    assert [x.split()[-1] for x in watched if "bin/endoprint" in x] == stages


def test_the_watch_would_have_seen_it(tmp_path: Path) -> None:
    log = tmp_path / "network.txt"
    code = "import urllib.request; urllib.request.urlopen('http://192.0.2.1/', timeout=1)"
    assert python("-c", code, network=log).returncode != 0
    code = "import socket; socket.getaddrinfo('example.org', 80)"
    assert python("-c", code, network=log).returncode != 0
    refused = [x.split(" | ")[0] for x in log.read_text().splitlines() if "refused" in x]
    assert refused == [
        "refused socket.getaddrinfo 192.0.2.1",
        "refused socket.getaddrinfo example.org",
    ]
