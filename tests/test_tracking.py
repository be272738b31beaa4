"""Runs are tracked whole, closed for certain, and say where they come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from endoprint import alive, runs, tracking
from endoprint.config import Config
from endoprint.curated import md5
from endoprint.lineage import Lineage, metered
from endoprint.model import Pruned
from endoprint.workspace import Workspace
from lab import fit_and_track


class Inner(Config):
    depth: int = 2


class Outer(Config):
    rate: float = 0.5
    is_on: bool = True
    inner: Inner = Inner()


def run_of(space: Workspace, run_id: str) -> mlflow.entities.Run:
    return tracking.client(space).get_run(run_id)


def test_a_run_keeps_values_epochs_and_final_figures(space: Workspace) -> None:
    with tracking.run(space, name="a", kind="train", model="toy") as run:
        run.params(Outer())
        for epoch in range(3):
            run.watch(epoch, {"train_loss": 1.0 / (epoch + 1)})
        run.metrics({"macro_f1": 0.7, "f1_LIVER-X_AGONIST": 0.6, "unknown": None})
    kept = run_of(space, run.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"rate": "0.5", "is_on": "true", "inner.depth": "2"}
    assert kept.data.metrics["macro_f1"] == 0.7
    assert kept.data.metrics["f1_LIVER-X_AGONIST"] == 0.6
    assert "unknown" not in kept.data.metrics
    steps = tracking.client(space).get_metric_history(run.run_id, "train_loss")
    assert [(each.step, each.value) for each in steps] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert kept.data.tags["model"] == "toy"
    assert kept.data.tags["kind"] == "train"
    assert kept.data.tags["task"] == "toy"


def test_more_parameters_than_one_call_takes_are_all_kept(space: Workspace) -> None:
    with tracking.run(space, name="a", kind="train") as run:
        run.params({f"p{i}": i for i in range(250)})
    assert len(run_of(space, run.run_id).data.params) == 250


def test_figures_tables_records_and_files_are_kept(space: Workspace, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    picture = Figure()
    picture.subplots().plot([0, 1])
    image = tmp_path / "seen.png"
    picture.savefig(image)
    table = pd.DataFrame({"n": [1]}, index=pd.Index(["u0"], name="unit"))
    with tracking.run(space, name="a", kind="train") as run:
        run.figure("drawn", picture)
        run.figure("bytes.svg", b"<svg/>")
        run.figure("seen", image)
        run.table("by_unit", table)
        run.record("audit", {"confounded": False})
        run.file(image, "extra")
    client = tracking.client(space)
    names = {f"{d}/{Path(f.path).name}" for d in ("figures", "tables", "extra")
             for f in client.list_artifacts(run.run_id, d)}  # fmt: skip
    assert names == {"figures/drawn.png", "figures/bytes.svg", "figures/seen.png",
                     "tables/by_unit.csv", "extra/seen.png"}  # fmt: skip
    read = client.download_artifacts(run.run_id, "tables/by_unit.csv", str(tmp_path))
    pd.testing.assert_frame_equal(pd.read_csv(read, index_col="unit"), table)
    read = client.download_artifacts(run.run_id, "audit.json", str(tmp_path))
    assert json.loads(Path(read).read_text()) == {"confounded": False}


def test_the_data_set_carries_the_md5_dvc_knows_it_by(lab: Workspace) -> None:
    obs = pd.DataFrame({"exposure": pd.Categorical(["a", "b"]), "unit": ["u0", "u1"]})
    with tracking.run(lab, name="a", kind="train") as run:
        run.dataset("cells", obs, path=lab.cells, md5=md5(lab.cells), used="development")
    (used,) = run_of(lab, run.run_id).inputs.dataset_inputs
    assert used.dataset.digest == md5(lab.cells)
    assert used.tags[0].value == "development"
    read = mlflow.data.get_source(used.dataset)
    assert Path(read.load()).read_bytes() == lab.cells.read_bytes()


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (Pruned("early"), "KILLED")],
)
def test_a_run_that_raises_is_closed_and_raises_on(
    space: Workspace, error: BaseException, status: str
) -> None:
    with (
        pytest.raises(type(error)),
        tracking.run(space, name="a", kind="train") as run,
    ):
        raise error
    kept = run_of(space, run.run_id)
    assert kept.info.status == status
    assert kept.data.tags["error"].startswith(type(error).__name__)


def test_runs_of_several_threads_do_not_mix(space: Workspace) -> None:
    runs: dict[int, str] = {}

    def work(number: int) -> None:
        with tracking.run(space, name=str(number), kind="trial", parent=parent.run_id) as run:
            run.metrics({"number": number})
            runs[number] = run.run_id

    with tracking.run(space, name="search", kind="search") as parent:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, run_id in runs.items():
        kept = run_of(space, run_id)
        assert kept.data.metrics == {"number": float(number)}
        assert kept.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run_of(space, parent.run_id).data.metrics == {}


def test_a_run_whose_process_died_is_marked_killed_by_the_next(space: Workspace) -> None:
    script = (
        "import os, sys\n"
        "from endoprint import tracking\n"
        "from endoprint.workspace import Workspace\n"
        "with tracking.run(Workspace.at(sys.argv[1]), name='doomed', kind='train') as run:\n"
        "    print(run.run_id, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    (space.local / "mlflow.db").unlink()  # so that it also makes the tables
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    told = subprocess.run(
        [sys.executable, "-c", script, str(space.root)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    doomed = told.stdout.strip()
    assert told.stderr == ""  # quiet, also on the first use of a store in a process
    assert run_of(space, doomed).info.status == "RUNNING"
    with tracking.run(space, name="next", kind="train") as alive:
        assert run_of(space, doomed).info.status == "KILLED"
        assert tracking.sweep(space) == []  # one's own open run is left alone
        assert run_of(space, alive.run_id).info.status == "RUNNING"


def test_a_reused_process_number_is_not_taken_for_the_dead_process(space: Workspace) -> None:
    store = tracking.client(space)
    tags = {**alive.named(), "process_started": "1.0"}
    stale = store.create_run(tracking.experiment(space, store), tags=tags)
    other = store.create_run(
        tracking.experiment(space, store), tags={**tags, "host": "another machine"}
    )
    assert tracking.sweep(space) == [stale.info.run_id]
    assert run_of(space, other.info.run_id).info.status == "RUNNING"


def test_the_environment_is_as_it_was_after_ambient(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = mlflow.get_tracking_uri()
    with tracking.ambient(space):
        assert mlflow.get_tracking_uri() == space.tracking_uri
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert mlflow.get_tracking_uri() == before
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    with tracking.ambient(space):
        pass
    assert os.environ["MLFLOW_TRACKING_URI"] == "sqlite:///elsewhere.db"


def test_a_run_whose_answer_was_lost_is_made_once_more_and_only_one_stays_open(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mlflow.MlflowClient.create_run

    def asked_twice(store: Any, *given: Any, **words: Any) -> Any:  # as MLflow's client does
        made(store, *given, **words)
        return made(store, *given, **words)

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", asked_twice)
    with tracking.run(space, name="a", kind="train") as run:
        pass
    store = tracking.client(space)
    found = store.search_runs([tracking.experiment(space, store)])
    assert {each.info.status for each in found if each.info.run_id != run.run_id} == {"KILLED"}
    assert run_of(space, run.run_id).info.status == "FINISHED"
    assert len(found) == 2


def test_a_deleted_experiment_comes_back_when_it_is_used(space: Workspace) -> None:
    store = tracking.client(space)
    store.delete_experiment(tracking.experiment(space, store))
    with tracking.run(space, name="a", kind="train") as run:
        pass
    assert run_of(space, run.run_id).info.status == "FINISHED"


def test_the_table_of_runs_holds_finished_ones_of_its_kind_newest_first(space: Workspace) -> None:
    assert tracking.runs_table(space).empty
    for name, kind, figure in (
        ("old", "train", 0.1),
        ("trial", "trial", 0.9),
        ("new", "train", 0.2),
    ):
        with tracking.run(space, name=name, kind=kind, model="toy") as run:
            run.metrics({"macro_f1": figure})
            run.params({"rate": 3})
    with (
        pytest.raises(ValueError, match="no"),
        tracking.run(space, name="failed", kind="train", model="toy"),
    ):
        raise ValueError("no")
    table = tracking.runs_table(space, model="toy")
    assert list(table["name"]) == ["new", "old"]
    assert list(table["macro_f1"]) == [0.2, 0.1]
    assert list(table["param.rate"]) == ["3", "3"]
    assert tracking.runs_table(space, model="other").empty
    assert list(tracking.runs_table(space, kind="trial")["macro_f1"]) == [0.9]


# -- lineage ------------------------------------------------------------------------------------
def lineage_of(space: Workspace) -> Lineage:
    return Lineage.of(
        space, model="toy", seed=3, exposures=["a", "b"], units={"test": ["u1", "u0"]},
        split_hash="s",
    )  # fmt: skip


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_outside_git_neither_a_commit_nor_dirt_is_claimed(space: Workspace) -> None:
    found = lineage_of(space)
    assert (found.git_sha, found.is_dirty) == (None, None)


def test_dirty_means_code_or_chosen_values_differ_from_the_commit(space: Workspace) -> None:
    root = space.root
    (root / ".gitignore").write_text(".endoprint/\nsrc/__pycache__/\n")
    (root / "src").mkdir()
    (root / "src/a.py").write_text("a = 1\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    assert lineage_of(space).is_dirty is False
    (root / "notes.md").write_text("not part of any result\n")
    (root / "src/__pycache__").mkdir()
    (root / "src/__pycache__/a.pyc").write_text("")
    assert lineage_of(space).is_dirty is False
    for changed in ("src/a.py", "params.yaml"):
        before = (root / changed).read_text()
        (root / changed).write_text(before + "# changed\n")
        assert lineage_of(space).is_dirty is True, changed
        (root / changed).write_text(before)
    space.policy.parent.mkdir()
    space.policy.write_text("budget: 3\n")  # untracked counts: the commit does not hold it
    found = lineage_of(space)
    assert found.is_dirty is True
    assert found.git_sha is not None
    assert len(found.git_sha) == 40


def test_inputs_carry_the_md5_of_their_bytes_even_where_dvc_lock_is_stale(
    lab: Workspace,
) -> None:
    right = md5(lab.cells)
    lock = lab.root / "dvc.lock"
    entry = "stages: {curate: {deps: [{path: src/endoprint, md5: x.dir}], outs: [%s]}}\n"
    told = f"{{path: data/cells/cells.h5ad, md5: {right}, size: {lab.cells.stat().st_size}}}"
    lock.write_text(entry % told)
    found = lineage_of(lab)
    assert found.inputs["data/cells/cells.h5ad"] == right
    assert found.inputs["data/design/split.json"] == md5(lab.split)
    assert "src/endoprint" not in found.inputs
    assert found.changed_inputs == []
    lab.cells.write_bytes(lab.cells.read_bytes()[:-1] + b"!")  # same size, later than the lock
    os.utime(lab.cells, ns=(lock.stat().st_mtime_ns + 10**9,) * 2)
    found = lineage_of(lab)
    assert found.inputs["data/cells/cells.h5ad"] == md5(lab.cells) != right
    assert found.changed_inputs == ["data/cells/cells.h5ad"]


def test_lineage_is_read_back_as_it_was_logged(lab: Workspace) -> None:
    run_id = fit_and_track(lab)
    found = Lineage.model_validate(runs.read_record(lab, run_id, "lineage"))
    assert found.model == "logistic"
    assert found.versions["numpy"]
    assert found.hardware.cores >= 1
    tags = run_of(lab, run_id).data.tags
    for name in ("split_hash", "exposures", "params_hash", "data_hash", "model_sha256", "seed"):
        assert tags[name], name


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel's peak cannot be reset"
)
def test_a_metered_block_knows_its_own_peak_memory() -> None:
    with metered() as small:
        pass
    with metered() as large:
        block = bytearray(400 * 2**20)
    del block
    with metered() as after:
        pass
    assert large.cost.peak_memory_gib > small.cost.peak_memory_gib + 0.3
    assert after.cost.peak_memory_gib < large.cost.peak_memory_gib - 0.3
    assert large.cost.wall_seconds > 0
