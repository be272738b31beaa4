"""What MLflow's UI shows first of a leaderboard's run is the figure that matters."""

from __future__ import annotations

import json
import re
from urllib.parse import parse_qs, urlsplit

import pandas as pd

from endoprint.report import Board, described, fitted, headline

TABLE = pd.DataFrame(
    {"macro_f1": [0.5, 0.75], "ece": [0.1, float("nan")], "fit_seconds": [3.0, 1200.0]},
    index=["logistic", "signature"],
)
UNITS = pd.DataFrame({"logistic": [0.4, 0.6], "signature": [0.7, 0.8]}, index=["u1", "u2"])


def test_the_figure_that_matters_stands_first_and_models_best_first() -> None:
    lines = described(Board(task="toy", table=TABLE, by_unit=UNITS)).splitlines()
    assert lines[0].startswith("**macro-F1 0.750**, signature,")
    assert "`toy`" in lines[0]
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| model", "| signature", "| logistic"]
    assert {row.count("|") for row in rows} == {6}
    assert "1200" in rows[1]
    assert "nan" not in rows[1]


def test_what_forbids_a_claim_stands_before_the_table() -> None:
    audit = {"warnings": ["confounded: true. A cannot be told from its run."]}
    said = described(Board(task="toy", table=TABLE, by_unit=UNITS, audit=audit))
    assert said.index("**Stop.** confounded: true") < said.index("| model |")


def test_above_a_tasks_runs_stands_its_best_figure_and_the_way_to_what_is_looked_for() -> None:
    board = Board(task="toy", table=TABLE, by_unit=UNITS)
    tags = headline(board, experiment="7", run_id="abc", versions="endoprint-toy")
    said = tags["mlflow.note.content"]
    assert "\n" not in said  # MLflow shows one line of it unless asked
    assert said.startswith("**macro-F1 0.750**, signature,")
    ways = dict(re.findall(r"\[([^]]+)\]\(#(\S+)\)", said))
    assert ways["leaderboard"].startswith("/experiments/7/runs/abc/artifacts/leaderboard.html")
    (view,) = parse_qs(urlsplit(ways["models, best first"]).query)["viewStateShareKey"]
    assert (
        "metrics.`macro_f1`"
        in json.loads(tags[f"mlflow.sharedViewState.{view}"])["selectedColumns"]
    )
    assert ways["versions"].startswith("/models/endoprint-toy")


def test_a_models_run_says_its_figure_then_every_unit() -> None:
    metrics = {"macro_f1": 0.5, "ece": float("nan"), "fit_seconds": 12.0, "f1_DMSO": 1.0}
    said = fitted(metrics, {"L|1": 0.4, "L|2": 0.6}).splitlines()
    assert said[0].startswith("**macro-F1 0.500** on 2 held-out development units,")
    assert said[0].endswith(", 12 s a fit.")
    assert said[-2:] == [r"| L\|1 | 0.400 |", r"| L\|2 | 0.600 |"]
    assert "nan" not in "".join(said)
    assert fitted({}, {"p": 0.1}, part="part").startswith("**no macro-F1** on 1 held-out")
