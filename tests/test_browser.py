"""What a person sees: MLflow's UI on a workspace's store, in a real browser on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import a_workspace
from endoprint import jobs
from test_schedule import free_port

BROWSER = shutil.which("chromium")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-sync", "--disable-background-networking", "--disable-component-update",
    "--virtual-time-budget=25000",
]  # fmt: skip
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="Debian's chromium is not installed"),
]


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of MLflow's UI on a workspace with one promoted logistic model."""
    space = a_workspace(tmp_path_factory.mktemp("browser") / "space")
    jobs.prepare(str(space))
    jobs.train(str(space), model="logistic")
    jobs.leaderboard(str(space))
    jobs.promote(str(space), version=jobs.register(str(space)))
    port = free_port()
    command = [sys.executable, "-c", "from endoprint.cli import main; main()", "ui"]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--workspace", str(space)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(address, timeout=2)
            break
        except OSError:
            assert time.monotonic() < deadline, "MLflow did not answer"
            time.sleep(0.5)
    yield address
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(30)


def page(address: str, profile: Path) -> str:
    done = subprocess.run(
        [str(BROWSER), *QUIET, f"--user-data-dir={profile}", "--dump-dom", address],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    return done.stdout


def test_the_runs_of_a_task_stand_in_the_ui_under_their_models_names(
    ui: str, tmp_path: Path
) -> None:
    seen = page(f"{ui}/#/experiments/1/runs", tmp_path)
    assert "logistic" in seen
    assert "leaderboard" in seen


def test_the_champion_can_be_found_in_the_registry(ui: str, tmp_path: Path) -> None:
    seen = page(f"{ui}/#/models/endoprint-tiny", tmp_path)
    assert "Version 1" in seen
    assert "champion" in seen
