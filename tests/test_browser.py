"""What a person finds in MLflow's UI: opened, clicked through and pictured in a real browser.

`ENDOPRINT_PICTURES=docs/ui` keeps the pictures of docs/operations.md; they show the tiny workspace
of these tests, 720 simulated cells.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from chromium import PROGRAM, Browser, chromium
from conftest import TINY, a_workspace
from endoprint import jobs, tracking
from endoprint.services.plan import runs_page
from endoprint.workspace import Workspace
from test_schedule import free_port

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(PROGRAM is None, reason="Debian's chromium is not installed"),
]
PARAMS = {
    **{key: value for key, value in TINY.items() if key != "pretrain"},
    "search": {"model": "logistic", "trials": 3},
    "models": {"logistic": {}, "signature": {}},
}
TRAINING = "workflowType=machine_learning"
NO_PATHS = """  // of the machine that the picture was taken on
[...document.querySelectorAll('div')].filter((e) => e.innerText.startsWith('Path: file')).pop()
  ?.style.setProperty('visibility', 'hidden')
"""
LARGEST_PICTURE = 100_000  # bytes


@dataclass
class Laboratory:
    """A workspace after its story, MLflow's UI on it, and what its store says."""

    space: Workspace
    url: str

    @property
    def start(self) -> str:
        """The address that `endoprint ui` and `endoprint up` print."""
        return runs_page(self.url, self.experiment)

    @property
    def experiment(self) -> str:
        return tracking.experiment(self.space, tracking.client(self.space))

    def runs(self, kind: str) -> dict[str, str]:
        """Run name -> id, of a kind."""
        store = tracking.client(self.space)
        found = store.search_runs([self.experiment], f"tags.kind = '{kind}'")
        return {each.info.run_name: each.info.run_id for each in found}

    def figure(self, run_id: str, name: str = "macro_f1") -> float:
        return float(tracking.client(self.space).get_run(run_id).data.metrics[name])

    def page(self, run_id: str, rest: str = "") -> str:
        return f"{self.url}/#/experiments/{self.experiment}/runs/{run_id}{rest}?{TRAINING}"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """MLflow's UI on a workspace with a tuned and an untuned model, one of them promoted."""
    folder = tmp_path_factory.mktemp("browser") / "space"
    root = str(a_workspace(folder, params=PARAMS))
    jobs.prepare(root)
    jobs.search(root, model="logistic", trials=3)
    for model in ("logistic", "signature"):
        jobs.train(root, model=model)
    jobs.leaderboard(root)
    jobs.promote(root, version=jobs.register(root))
    port = free_port()
    command = [sys.executable, "-c", "from endoprint.cli import main; main()", "ui"]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--workspace", root],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(address, timeout=2)
                break
            except OSError:
                assert time.monotonic() < deadline, "MLflow did not answer"
                time.sleep(0.5)
        yield Laboratory(Workspace.at(root), address)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="module")
def browser(lab: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as made:
        made.open(lab.start, "macro-F1")
        made.click(inside='button[aria-label="Close"]')  # an assistant's panel, once a browser
        yield made


@pytest.fixture(scope="module")
def keep(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """Picture what is to be seen, for who reads the docs."""
    asked = os.environ.get("ENDOPRINT_PICTURES")
    folder = Path(asked) if asked else tmp_path_factory.mktemp("pictures")

    def picture(name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        browser.js(NO_PATHS)
        assert browser.picture(folder / f"{name}.png").stat().st_size < LARGEST_PICTURE

    return picture


def test_the_best_figure_of_a_task_stands_above_its_runs(
    lab: Laboratory, browser: Browser, keep: Callable[[str], None]
) -> None:
    seen = browser.open(lab.start, "signature", "leaderboard")
    best = max(lab.figure(run_id) for run_id in lab.runs("train").values())
    assert f"macro-F1 {best:.3f}" in seen
    assert "tiny" in seen
    for name in ("promote version 1", "search logistic"):
        assert name in seen
    keep("runs")


def test_models_stand_best_first_with_their_figures(
    lab: Laboratory, browser: Browser, keep: Callable[[str], None]
) -> None:
    browser.open(lab.start, "models, best first")
    seen = browser.open(browser.link("models, best first"), "macro_f1", "worst_unit_macro_f1")
    figures = {name: lab.figure(run_id) for name, run_id in lab.runs("train").items()}
    order = [name for name in browser.lines() if name in figures]
    assert order == sorted(figures, key=lambda name: -figures[name])
    for figure in figures.values():
        assert f"{figure:.9f}"[:7] in seen
    assert "leaderboard" not in order
    keep("models")


def test_two_runs_are_ticked_and_compared_figure_by_figure(
    lab: Laboratory, browser: Browser, keep: Callable[[str], None]
) -> None:
    browser.open(lab.start, "models, best first")
    browser.open(browser.link("models, best first"), "signature")
    for run_id in lab.runs("train").values():
        browser.click(inside=f'[row-id="{run_id}"] .ag-checkbox-input')
    browser.click("Compare")
    ends = [f"{lab.figure(run_id):.5f}" for run_id in lab.runs("train").values()]  # of an axis
    seen = browser.until("Comparing 2 Runs", "Parallel Coordinates", "auroc_macro", *ends)
    for run_id in lab.runs("train").values():
        assert run_id in seen
        for name in ("auroc_macro", "balanced_accuracy", "ece"):  # further ones are below
            assert name in seen  # the same name for the same figure, whatever the model
            assert f"{round(lab.figure(run_id, name), 3):g}" in seen
    browser.show("balanced_accuracy")
    keep("compare")


def test_the_trials_of_a_study_hang_under_it_and_are_compared_by_what_was_searched(
    lab: Laboratory, browser: Browser, keep: Callable[[str], None]
) -> None:
    (study,), trials = lab.runs("search").values(), lab.runs("trial")
    assert len(trials) == 3
    browser.open(lab.page(study), "Child runs", *trials)
    asked = {"runs": [*trials.values()], "experiments": [lab.experiment]}
    query = "&".join(f"{key}={quote(json.dumps(value))}" for key, value in asked.items())
    browser.open(f"{lab.url}/#/compare-runs?{query}", "Comparing 3 Runs", "Parallel Coordinates")
    browser.choose("macro_f1", inside="#dubois-select-2")  # Metrics; the first one logged is there
    axes = browser.until("macro_f1").partition("Run details")[0]
    searched = tracking.client(lab.space).get_run(study).data.params
    assert searched
    for name in searched:
        assert name in axes  # what was the same in all trials is no axis
    assert "macro_f1" in axes
    keep("trials")


def test_a_run_says_its_figure_first_and_its_confusion_matrix_opens(
    lab: Laboratory, browser: Browser, keep: Callable[[str], None]
) -> None:
    run_id = lab.runs("train")["logistic"]
    seen = browser.open(lab.page(run_id), "held-out development", "cells (")
    assert f"macro-F1 {lab.figure(run_id):.3f}" in seen
    for tag in ("split_hash", "data_hash", "params_hash"):
        assert tag in seen
    keep("run")
    browser.open(lab.page(run_id, "/artifacts/figures/confusion.png"), "figures/confusion.png")
    browser.until_js("[...document.images].some((i) => i.naturalWidth > 600)")
    keep("confusion")


def test_the_leaderboards_page_opens_within_the_ui(
    lab: Laboratory, browser: Browser, keep: Callable[[str], None]
) -> None:
    browser.open(lab.start, "leaderboard")
    browser.open(browser.link("leaderboard"), "leaderboard.html")
    browser.until_js("document.querySelector('iframe')?.clientHeight > 200")
    keep("leaderboard")


def test_the_pages_ask_nobody_but_this_machine(lab: Laboratory, browser: Browser) -> None:
    run_id = lab.runs("train")["logistic"]
    for address in (lab.start, lab.page(run_id), f"{lab.url}/#/models", f"{lab.url}/#/settings"):
        browser.open(address, "MLflow" if "settings" in address else "Model training")
        asked = browser.js("performance.getEntriesByType('resource').map((e) => e.name)")
        assert len(asked) > 5
        assert [each for each in asked if not each.startswith((lab.url, "data:", "blob:"))] == []


def test_the_champion_is_found_in_the_registry_with_its_card(
    lab: Laboratory, browser: Browser, keep: Callable[[str], None]
) -> None:
    browser.open(lab.start, "versions")
    seen = browser.open(browser.link("versions"), "Version 1", "champion", "candidate")
    assert "is live" in seen
    keep("versions")
    browser.click("Version 1")
    browser.until("Promoted: it went live", "macro-F1", "champion")
    keep("card")
