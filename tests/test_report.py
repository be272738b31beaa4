import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import _pylab_helpers
from matplotlib.figure import Figure
from matplotlib.text import Text

from endoprint import report
from endoprint.config import Refusal

PATHWAYS = ("ANDROGEN", "ARYL_HYD", "ESTROGEN", "GLUCOCORT", "LIVER-X", "RET", "THYROID")
FIFTEEN = sorted(
    ["DMSO", *(f"{path}_{way}" for path in PATHWAYS for way in ("AGONIST", "ANTAGONIST"))]
)
TWO = ["DMSO", "GLUCOCORT_AGONIST"]
EVIL = "<script>alert('x')</script>"
TEMPLATE = Path(__file__).parents[1] / "registry/cards/model.md"


def predictions(exposures=TWO, *, n_units=3, n_cells=12, strength=1.5, seed=0):
    """Synthetic: `strength` is how far the truth's evidence stands above the others'."""
    rng = np.random.default_rng(seed)
    rows = []
    for unit in range(n_units):
        for truth in exposures:
            for _ in range(n_cells):
                evidence = rng.normal(size=len(exposures))
                evidence[exposures.index(truth)] += strength
                share = np.exp(evidence) / np.exp(evidence).sum()
                said = {f"p_{name}": p for name, p in zip(exposures, share)}
                rows.append({"unit": f"u{unit}", "fold": unit, "truth": truth, **said})
    return pd.DataFrame(rows, index=pd.Index([f"c{i}" for i in range(len(rows))], name="cell_id"))


def board(
    scores=(("geneformer", (0.8, 0.7, 0.6)), ("logistic", (0.5, 0.5, 0.4))), **changes
) -> report.Board:
    by_unit = pd.DataFrame(
        {name: list(values) for name, values in scores},
        index=[f"u{i}" for i in range(len(scores[0][1]))],
    )
    table = pd.DataFrame(
        {
            "macro_f1": by_unit.mean(),
            "balanced_accuracy": by_unit.mean(),
            "ece": 0.04,
            "worst_unit_macro_f1": by_unit.min(),
            "fit_seconds": 10.0,
            "score_seconds_per_1000_cells": 0.5,
            "f1_DMSO": 0.9,
        }
    )
    audit = {"replicated": True, "confounded": False, "warnings": []}
    return report.Board(
        **{"task": "hormones", "table": table, "by_unit": by_unit, "audit": audit, **changes}
    )


class Tags(HTMLParser):
    """Every tag and attribute of a page; tags that are never closed are an error of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_stands_alone(html: str) -> None:
    seen = Tags(html)
    assert not seen.open
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert "http://" not in html
    assert "https://" not in html
    sources = [value for name, value in seen.attributes if name in ("src", "href")]
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


# -- figures ------------------------------------------------------------------------------------
@pytest.mark.parametrize("exposures", [TWO, FIFTEEN], ids=["two", "fifteen"])
@pytest.mark.parametrize("n_units", [1, 3])
@pytest.mark.parametrize(
    "draw", [report.confusion, report.roc, report.precision_recall, report.reliability]
)
def test_a_figure_of_predictions_is_drawn_without_global_state(draw, exposures, n_units):
    before = len(_pylab_helpers.Gcf.figs)
    table = predictions(exposures, n_units=n_units, n_cells=4)
    untouched = table.copy()
    figure = draw(table)
    assert report.png(figure, dpi=40).startswith(b"\x89PNG")
    assert len(_pylab_helpers.Gcf.figs) == before
    pd.testing.assert_frame_equal(table, untouched)


def test_the_same_figure_is_the_same_bytes():
    table = predictions()
    assert report.png(report.roc(table), dpi=50) == report.png(report.roc(table), dpi=50)


@pytest.mark.parametrize("exposures", [TWO, FIFTEEN], ids=["two", "fifteen"])
def test_no_label_of_a_confusion_matrix_is_cut_off_or_covers_another(exposures):
    figure = report.confusion(predictions(exposures, n_cells=4))
    report.png(figure, dpi=100)
    ax = figure.axes[0]
    for axis in (ax.xaxis, ax.yaxis):
        labels = axis.get_ticklabels()
        assert [label.get_text().split("  ")[0] for label in labels] == exposures
        boxes = [label.get_window_extent() for label in labels]
        page = figure.bbox
        assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
        assert all(page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    rows = [label.get_window_extent() for label in ax.yaxis.get_ticklabels()]
    assert not any(a.overlaps(b) for i, a in enumerate(rows) for b in rows[:i])


def test_a_confusion_matrix_names_its_commonest_mistake():
    table = predictions(strength=50)
    wrong = table["truth"].eq("DMSO") & table["unit"].eq("u0")
    table.loc[wrong, ["p_DMSO", "p_GLUCOCORT_AGONIST"]] = [0.1, 0.9]
    assert "DMSO called GLUCOCORT_AGONIST (33%" in words(report.confusion(table)).replace(
        "\n", " "
    )
    assert "Every cell is called" in words(report.confusion(predictions(strength=50)))


def test_an_exposure_the_model_cannot_say_keeps_its_row():
    table = predictions()
    table.loc[table["unit"] == "u2", "truth"] = "BPA"
    assert "BPA" in words(report.confusion(table))


def test_cells_of_unknown_truth_are_left_out():
    table = predictions()
    table.loc[table.index[:5], "truth"] = None
    assert f"{len(table) - 5:,} cells" in words(report.reliability(table))
    table["truth"] = None
    for draw in (report.confusion, report.roc, report.reliability):
        assert "No cell of known exposure" in words(draw(table))


def test_a_map_shows_every_call_and_crosses_the_wrong_ones():
    table = predictions(TWO, n_units=1, n_cells=10, strength=1.0)
    rng = np.random.default_rng(0)
    places = report.lay_out(pd.DataFrame(rng.normal(size=(20, 5)), index=table.index))
    assert places.shape == (20, 2)
    assert np.isfinite(places.to_numpy()).all()
    again = report.lay_out(pd.DataFrame(np.zeros((3, 5)), index=["a", "b", "c"]))
    assert (again == 0).all().all()  # too few to lay out
    alike = report.lay_out(pd.DataFrame(np.ones((30, 4))))
    assert (alike == 0).all().all()
    figure = report.map_of_calls(table, places)
    drawn = sum(len(points.get_offsets()) for points in figure.axes[0].collections)
    assert drawn == 20
    probabilities = table.filter(regex="^p_").rename(columns=lambda c: c.removeprefix("p_"))
    right = (probabilities.idxmax(axis=1) == table["truth"]).mean()
    assert f"{right:.0%}" in words(figure)
    assert "UMAP" in words(figure)


def test_the_page_tells_figures_by_pathway_and_direction_and_maps_the_leader():
    exposures = ["DMSO", "RET_AGONIST", "RET_ANTAGONIST"]
    table = predictions(exposures, n_units=2, n_cells=5)
    made = board()
    vectors = pd.DataFrame(
        np.random.default_rng(0).normal(size=(len(table), 4)), index=table.index
    )
    html = report.leaderboard_page(
        made, predictions={made.leader: table}, control="DMSO", vectors=vectors
    )
    assert_stands_alone(html)
    for word in ("pathway", "direction", "ANTAGONIST", "PR-AUC", "UMAP", "precision against"):
        assert word in html


def test_predictions_without_truth_are_refused():
    with pytest.raises(Refusal, match="`truth`"):
        report.confusion(predictions().drop(columns="truth"))


def test_roc_of_one_exposure_alone_says_so():
    table = predictions()
    assert "no curve" in words(report.roc(table[table["truth"] == "DMSO"]))


def test_the_reliability_diagram_tells_honest_from_too_sure():
    rng = np.random.default_rng(0)
    p_control = rng.uniform(0.0, 1.0, 4000)  # symmetric: evidence is judged prior-free
    table = pd.DataFrame({"unit": "u0", "p_DMSO": p_control, "p_RET_AGONIST": 1 - p_control})
    for shrunk, expected in ((1.0, "is honest"), (0.3, "too sure"), (3.0, "not sure enough")):
        chance = np.clip(0.5 + shrunk * (p_control - 0.5), 0, 1)
        table["truth"] = np.where(rng.random(4000) < chance, "DMSO", "RET_AGONIST")
        assert expected in words(report.reliability(table)).replace("\n", " ")


@pytest.mark.parametrize("n_units", [1, 4, 6])
def test_every_unit_is_labelled_and_means_have_intervals_only_from_five(n_units):
    values = np.linspace(0.5, 0.7, n_units)
    table = pd.DataFrame({"logistic": values}, index=[f"CTL04E|{i}" for i in range(n_units)])
    said = words(report.per_unit(table, chance=0.5))
    assert all(f"CTL04E|{i}" in said for i in range(n_units))
    assert ("95 % interval" in said) == (n_units >= 5)
    assert "95 % interval" not in words(report.per_unit(table, part="part"))


def test_units_nobody_judged_do_not_break_the_figure():
    table = pd.DataFrame({"a": [np.nan, np.nan], "b": [0.5, np.nan]}, index=["u0", "u1"])
    report.png(report.per_unit(table), dpi=40)
    report.png(report.per_unit(table[["a"]]), dpi=40)


def test_the_pareto_front_holds_exactly_what_nothing_beats_on_both():
    rng = np.random.default_rng(3)
    cost = pd.Series(rng.random(30), index=[f"m{i}" for i in range(30)])
    quality = pd.Series(rng.random(30), index=cost.index)
    beaten = [
        name for name in cost.index if ((cost < cost[name]) & (quality >= quality[name])).any()
    ]
    assert set(report.pareto(cost, quality)) == set(cost.index) - set(beaten)


def test_cost_against_quality_takes_nan_zero_and_a_single_model():
    table = pd.DataFrame(
        {"macro_f1": [0.8, np.nan, 0.6], "score_seconds_per_1000_cells": [1.0, 2.0, 0.0]},
        index=["a", "b", "c"],
    )
    assert "Worth their cost: a" in words(report.cost_quality(table))
    report.png(report.cost_quality(table), dpi=40)
    report.png(report.cost_quality(table.iloc[1:2]), dpi=40)


# -- leaderboard --------------------------------------------------------------------------------
def test_the_design_stands_above_every_figure():
    warnings = [
        "replicated: false. There are no independent units.",
        "confounded: true. Accuracy is an upper bound.",
    ]
    audit = {"replicated": False, "confounded": True, "warnings": warnings}
    drawn = board(audit={**audit, "units": []})
    for said in (report.to_text(report.leaderboard(drawn)), report.leaderboard_page(drawn)):
        body = said.split("<body>")[-1]
        order = [body.index(text) for text in ("replicated: false", "confounded: true", "leads")]
        assert order == sorted(order)
    assert drawn.to_json()["verdict"][0]["text"] == warnings[0]


def test_technical_parts_are_never_counted_as_units():
    many = (("geneformer", (0.9,) * 6), ("logistic", (0.5, 0.4) * 3))
    drawn = board(many, scheme="technical_fold", audit={"replicated": False, "warnings": []})
    said = report.to_text(report.leaderboard(drawn)) + report.leaderboard_page(drawn)
    assert said.index("replicated: false") < said.index("leads")
    assert "interval" not in said
    assert "better" not in said
    assert drawn.to_json()["models"][0]["compared"].keys() == {"difference", "verdict"}


def test_few_units_are_all_shown_and_nothing_is_inferred():
    said = report.to_text(report.leaderboard(board()))
    assert "n = 3 units: no interval" in said
    assert all(unit in said for unit in ("u0", "u1", "u2"))
    assert "too few units to tell" in " ".join(said.split())


def test_many_units_have_an_interval_and_a_test():
    many = (("geneformer", (0.9, 0.92, 0.88, 0.93, 0.9)), ("logistic", (0.5, 0.6, 0.4, 0.5, 0.5)))
    said = " ".join(report.to_text(report.leaderboard(board(many))).split())
    assert "≈95 % interval" in said
    assert "in 5 of 5 units ahead of the bar, logistic, by 0.406 on average: better." in said


def test_a_claim_over_the_bar_is_corrected_for_the_number_of_models():
    # five units: the smallest p is 1/32, which two models double to more than .05
    bar, best = ("logistic", (0.5,) * 5), ("a", (0.91, 0.9, 0.9, 0.92, 0.9))
    assert board((best, bar)).told_apart("a") == "better"
    assert board((best, ("b", (0.9, 0.4, 0.5, 0.6, 0.3)), bar)).told_apart("a") == "not told apart"


def test_lines_held_out_are_counted_as_lines():
    said = report.to_text(report.leaderboard(board(scheme="line")))
    assert "n = 3 lines: no interval; every line" in said
    assert "on 3 unseen lines" in said


def test_a_model_that_loses_is_said_to_lose():
    loses = (("geneformer", (0.3, 0.3, 0.3)), ("logistic", (0.5, 0.5, 0.4)))
    assert report.sentence(board(loses)).endswith("it is the bar: geneformer does no better.")


def test_a_leader_no_better_than_shuffled_labels_is_told():
    drawn = board()
    drawn.table["shuffled_macro_f1"] = [0.71, 0.1]
    assert "no better than after fitting on shuffled labels (0.71)" in report.sentence(drawn)


def test_a_leaderboard_read_back_from_json_is_the_same():
    drawn = board(labels={"geneformer": "own pre-training"}, flags=("calibration odd",))
    drawn.table.loc["logistic", "ece"] = np.nan
    drawn.table["started"] = pd.Timestamp("2026-01-01", tz="UTC")
    drawn.table["said"] = [None, "text"]
    text = json.dumps(drawn.to_json(), allow_nan=False)
    again = report.Board.of(json.loads(text))
    assert json.dumps(again.to_json(), allow_nan=False) == text
    assert report.to_text(report.leaderboard(again)) == report.to_text(report.leaderboard(drawn))
    assert report.leaderboard_page(again) == report.leaderboard_page(drawn)


def test_metrics_that_are_nan_are_dashes_and_null():
    drawn = board()
    drawn.table.loc[:, ["ece", "macro_f1", "fit_seconds"]] = np.nan
    drawn.by_unit.loc[:, :] = np.nan
    assert "nan" not in report.to_text(report.leaderboard(drawn)).lower()
    assert "No model could be judged" in report.sentence(drawn)
    assert_stands_alone(report.leaderboard_page(drawn))
    text = json.dumps(drawn.to_json(), allow_nan=False)
    assert json.loads(text)["models"][0]["macro_f1"] is None
    again = report.Board.of(json.loads(text))
    assert report.to_text(report.leaderboard(again)) == report.to_text(report.leaderboard(drawn))
    assert_stands_alone(report.leaderboard_page(again))


def test_an_empty_leaderboard_is_refused():
    with pytest.raises(Refusal, match="endoprint train"):
        report.Board(task="x", table=pd.DataFrame({"macro_f1": []}), by_unit=pd.DataFrame())


def test_one_model_alone_needs_no_bar():
    alone = (("signature", (0.5, 0.5)),)
    assert "the bar, logistic, was not judged" in report.sentence(board(alone))
    assert "nothing else was fitted" in report.sentence(board(alone, bar="signature"))


def test_a_leaderboard_page_stands_alone_with_names_escaped():
    evil = ((EVIL, (0.8, 0.7)), ("logistic", (0.5, 0.4)))
    drawn = board(evil, task=EVIL, labels={EVIL: EVIL}, flags=(EVIL,))
    page = report.leaderboard_page(
        drawn, predictions={EVIL: predictions()}, control="DMSO", provenance={EVIL: EVIL}
    )
    assert EVIL not in page
    assert_stands_alone(page)
    assert page.count("<img") == 6  # units, cost, confusion, ROC, reliability
    assert all(alt for name, alt in Tags(page).attributes if name == "alt")


def test_the_terminal_reads_names_as_text_not_markup():
    drawn = board((("[bold]m[/bold]", (0.8, 0.7)), ("logistic", (0.5, 0.4))), flags=("[red]",))
    said = report.to_text(report.leaderboard(drawn))
    assert "[bold]m[/bold]" in said
    assert "[red]" in said


# -- scores -------------------------------------------------------------------------------------
def scored(samples=("a", EVIL), n_cells=10):
    calls = {
        sample: {
            "unit": "u0", "n_cells": n_cells, "call": "RET_AGONIST", "confidence": 0.999,
            "second_call": "DMSO", "second_confidence": 0.001, "agreement": 0.7,
            "novel_share": np.nan, "is_calibration_unit_validated": False,
            "sentence": f"Sample {sample} looks exposed to RET_AGONIST: confidence > .99",
        }
        for sample in samples
    }  # fmt: skip
    shares = pd.DataFrame({"DMSO": 0.2, "RET_AGONIST": 0.7}, index=list(samples))
    return pd.DataFrame.from_dict(calls, orient="index"), shares


META = {
    "model": "logistic", "model_version": "3", "model_sha256": "ab" * 32, "control": "DMSO",
    "inputs": [{"file": EVIL, "md5": "cd" * 16, "n_cells": 20, "gene_share": 0.2}],
    "quarantined": {"no counts in the model's genes": 2}, "scored_at": "2026-01-01",
    "audit": {"confounded": True, "replicated": True, "warnings": ["confounded: true. Mind it."]},
    "n_cells": 20, "n_novel": 2, "n_unsure": 9,
}  # fmt: skip


def test_the_first_lines_of_a_scoring_report_are_one_sentence_per_sample():
    calls, shares = scored(samples=tuple(f"s{i}" for i in range(50)))
    page = report.scores_page(calls, shares, META)
    lines = re.findall(r"<li>(.*?)</li>", page)
    assert lines == [
        f"Sample s{i} looks exposed to RET_AGONIST: confidence &gt; .99." for i in range(50)
    ]
    body = page.split("</h1>")[1]
    assert body.index("Sample s0") < body.index("Training data: confounded: true")


def test_a_scoring_report_stands_alone_with_names_escaped():
    calls, shares = scored()
    page = report.scores_page(calls, shares, META)
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert_stands_alone(page)


def test_a_scoring_report_says_what_limits_it():
    calls, shares = scored()
    page = report.scores_page(calls, shares, META)
    for said in ("confounded: true", "not unit-validated", "2 cells without a call", "10.0%",
                 "45.0%", "20% of the model&#x27;s genes", "ab" * 32, "cd" * 16):  # fmt: skip
        assert said in page


def test_a_sample_nobody_could_call_is_drawn_and_reported():
    calls, shares = scored(samples=("a",))
    assert_stands_alone(report.scores_page(calls, shares * 0, {}))


def test_a_scoring_report_says_what_drifted_and_what_units_allow():
    calls, shares = scored(samples=("a",))
    calls = calls.assign(n_units=3, low=0.8, high=0.9, interval="range of 3 units, no interval")
    drift = pd.DataFrame({"ks": [0.5], "psi": [0.9]}, index=pd.Index(["n_genes"], name="quantity"))
    page = report.scores_page(calls, shares, META, drift=drift, drifted=["Genes differ"])
    for said in ("Genes differ.", "range of 3 units, no interval", "0.500", "calibrated on"):
        assert said in page
    assert_stands_alone(page)


def test_a_projection_stands_beside_the_calls_with_its_null():
    calls, shares = scored(samples=("a",))
    told = {
        "samples": {
            "a": {
                "sentence": "Sample a resembles RET", "residual_share": None,
                "weights": {"RET": {"weight": 0.5, "low": 0.4, "high": 0.6}},
            }
        },
        "null": {"RET": 0.1}, "left_out": {"b": "too few cells"},
    }  # fmt: skip
    page = report.scores_page(calls, shares, META, projection=told)
    for said in ("Sample a resembles RET", "RET 0.10", "b: too few cells"):
        assert said in page
    assert_stands_alone(page)


def test_a_table_without_sentences_is_refused():
    calls, shares = scored()
    with pytest.raises(Refusal, match="sentence"):
        report.scores_page(calls.drop(columns="sentence"), shares, META)


# -- card and last screen -----------------------------------------------------------------------
LINEAGE = {
    "task": "hormones", "model": "geneformer", "exposures": TWO, "git_sha": "abc", "seed": 0,
    "is_dirty": True, "split_hash": "ff00", "inputs": {"data/cells/cells.h5ad": "cd" * 16},
    "units": {"training": ["u0", "u1"], "test": []}, "changed_inputs": [],
    "base_model": {"label": "pre-trained here on 4,000 cells", "sha256": "ee" * 32},
    "hardware": {"cpu": "a processor", "cores": 2, "memory_gib": 8.0, "gpu": None},
}  # fmt: skip


def card(template: str, **changes) -> str:
    values = {
        "name": "endoprint-hormones, version 2", "lineage": LINEAGE, "by_unit": {"u2": 0.61},
        "metrics": {"macro_f1": 0.61, "ece": float("nan"), "f1_DMSO": 0.7}, "audit": META["audit"],
        "verdict": {"decision": "promote", "reasons": ["beats the bar"]},
        "scope": "Test units, opened once.",
    }  # fmt: skip
    return report.model_card(template, **{**values, **changes})


def test_a_model_card_says_what_what_for_and_how_good():
    said = card(TEMPLATE.read_text())
    for text in ("endoprint-hormones, version 2", "Promoted", "confounded: true", "0.610",
                 "pre-trained here on 4,000 cells", "u2 0.610", "DMSO 0.700", "beats the bar",
                 "abc with uncommitted changes", "cd" * 16, "not known", "no GPU"):  # fmt: skip
        assert text in said
    assert "$" not in said


def test_a_model_card_quotes_what_users_named():
    said = card(TEMPLATE.read_text(), verdict={"decision": "hold", "reasons": [EVIL, "a\n# b"]})
    assert EVIL not in said
    assert "\n# b" not in said


def test_a_template_that_asks_for_what_no_card_has_is_refused():
    with pytest.raises(Refusal, match=r"colour"):
        card("$colour")
    with pytest.raises(Refusal):
        card("costs 5 $")


@pytest.mark.parametrize("decision", ["promote", "hold", "reject"])
def test_the_last_screen_fits_a_hundred_columns_and_leaves_nothing_out(decision):
    outcome = report.Outcome(decision, "version 1 (geneformer)", ["reason " * 30], champion="")
    drawn = report.story_screen(
        board(), outcome, places={"scores": "/somewhere/" + "long/" * 30 + "scores.parquet"},
        next_commands=[("endoprint ui", "see runs"), ("a", "b"), ("c", "d")], n_scored=1200,
        samples=[f"Sample {i} looks exposed to RET_AGONIST" for i in range(9)], minutes=4.2,
    )  # fmt: skip
    said = report.to_text(drawn, width=200)
    assert max(len(line) for line in said.splitlines()) <= 100
    joined = "".join(said.split())
    for text in ("geneformerleads", "version1(geneformer)", "scores.parquet", "endoprintui",
                 "1,200newcells", "and3moreinthereport", "4.2minutes"):  # fmt: skip
        assert text in joined
    assert ("Nothingislive" in joined) == (decision != "promote")
