"""What MLflow's UI shows first of a leaderboard's run is the figure that matters."""

from __future__ import annotations

import pandas as pd

from endoprint.report import Board, described

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
