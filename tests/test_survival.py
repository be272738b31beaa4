"""A job that was killed ends, run again, as if nothing had happened; done, it leaves nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from children import MAIN, endoprint, environment
from conftest import TINY, a_workspace
from endoprint import jobs, runs, tracking
from endoprint.jobs.materials import work_folder
from endoprint.workspace import Workspace

COSTS = ("seconds", "memory", "gib")  # the only figures that may differ between two attempts
PARAMS = TINY | {
    "pretrain": TINY["pretrain"] | {"epochs": 12},
    "models": {"geneformer": TINY["models"]["geneformer"] | {"epochs": 12, "patience": 12}},
}


def figures(space: Workspace, run_id: str) -> dict[str, float]:
    found = runs.final_metrics(space, run_id)
    return {name: value for name, value in found.items() if not any(c in name for c in COSTS)}


def kill_while_it_learns(space: Workspace, *words: str, seed: int) -> None:
    """Start a command; kill it some time after a seeded number of its epochs were kept."""
    rng = np.random.default_rng(seed)
    epochs, kept = int(rng.integers(3, 12)), set()
    child = subprocess.Popen(
        [sys.executable, "-c", MAIN, *words], cwd=space.root, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while len(kept) < epochs and child.poll() is None and time.monotonic() < until:
        for path in (space.local / "work").rglob("*.safetensors"):
            try:
                kept.add((path, path.stat().st_mtime_ns))
            except FileNotFoundError:
                continue
        time.sleep(0.002)
    time.sleep(float(rng.uniform(0.0, 0.1)))
    child.send_signal(signal.SIGKILL)
    _, said = child.communicate()
    assert child.returncode == -signal.SIGKILL, f"it ended before it was killed: {said[-2000:]}"
    assert len(kept) >= epochs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = a_workspace(tmp_path_factory.mktemp("survival") / "space", params=PARAMS)
    jobs.prepare(str(folder))
    return Workspace.open(folder)


@pytest.mark.slow
def test_a_killed_pretrain_and_a_killed_train_end_as_uninterrupted_ones(
    prepared: Workspace,
) -> None:
    """Pre-training first, for the fit starts from what came of it."""
    space, commands = prepared, (("pretrain", "pretrain"), ("train", "train", "geneformer"))
    for seed, (kind, *words) in enumerate(commands):
        kill_while_it_learns(space, *words, seed=seed)
        left = list((space.local / "work").glob("[!.]*"))
        assert len(left) == 1, "what a killed job had is kept"
        ended: list[str] = []
        for _ in range(2):  # taken up again; then, with nothing left of it, from the start
            done = endoprint(*words, cwd=space.root)
            assert done.returncode == 0, done.stderr[-2000:]
            (newest,) = set(runs.finished(space, kind, {})) - set(ended)
            ended.append(newest)
            assert not list((space.local / "work").glob("[!.]*")), "done, it leaves nothing"
            if kind == "pretrain":  # else the run that stands already is given
                store = tracking.client(space)
                key = runs.tag(space, newest, "pretrain_key")
                store.set_tag(newest, "pretrain_key", f"{key} set aside")
        resumed, straight = (figures(space, run_id) for run_id in ended)
        assert resumed == straight
        assert len(resumed) > 3
        if kind == "pretrain":
            runs_of = tracking.client(space)
            runs_of.set_tag(newest, "pretrain_key", key)
        else:
            resumed, straight = (runs.tag(space, run_id, "model_sha256") for run_id in ended)
            assert resumed == straight, "the same model to the byte"


def test_the_same_job_twice_at_once_works_in_two_folders(lab: Workspace) -> None:
    job = {"train": "some model"}
    with work_folder(lab, job, "first") as one:
        with work_folder(lab, job, "second") as other:
            assert one != other
            assert other.name == "second"
        assert not other.exists()
        assert one.is_dir()
    assert not one.exists()


def test_a_job_that_failed_finds_its_folder_again_and_others_do_not(lab: Workspace) -> None:
    class Failed(Exception): ...

    def fail(job: dict[str, str]) -> Path:
        try:
            with work_folder(lab, job, "run") as folder:
                (folder / "half").touch()
                raise Failed
        except Failed:
            return folder

    left = fail({"train": "a"})
    assert (left / "half").exists()
    with work_folder(lab, {"train": "b"}, "run") as other:
        assert not (other / "half").exists()
    with work_folder(lab, {"train": "a"}, "another run") as again:
        assert (again / "half").exists()


def test_gc_spares_the_folder_of_a_job_at_work(lab: Workspace) -> None:
    with work_folder(lab, {"train": "a"}, "run") as folder:
        assert folder not in runs.scratch(lab)
    (lab.local / "work/left by a dead run").mkdir()
    assert [path.name for path in runs.scratch(lab)] == ["left by a dead run"]
