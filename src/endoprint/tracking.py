"""What was fitted and how good it was: MLflow runs, opened by explicit id and closed for certain.

MLflow's notion of *the active run* belongs to a thread and its notion of *the store* to the
process; neither is used here. Every call goes through a client of the workspace's own store.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlflow
import mlflow.pyfunc
import pandas as pd
from filelock import FileLock
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
    ViewType,
)

from endoprint import alive
from endoprint.config import Away, Config
from endoprint.lineage import Lineage
from endoprint.model import Pruned
from endoprint.roles import acting, assume_reader, turned_away
from endoprint.spelled import flattened, safe, text_of, without_secrets
from endoprint.workspace import QUIET, Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal[
    "train", "pretrain", "search", "trial", "score", "control", "promote", "leaderboard"
]

MODEL_FOLDER = "model"  # name of the saved model's folder inside the artefact
LOADER = "endoprint.model"  # installed code; never code out of an artefact
SILENCE = {
    **{key: value for key, value in QUIET.items() if "MLFLOW" in key or key == "DO_NOT_TRACK"},
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
LOUD = ("mlflow", "alembic")  # INFO lines on every new store, warnings about every model
NOTE = "mlflow.note.content"  # Markdown that MLflow's UI shows above a run
# without it the UI takes a task's runs for those of a language application, and hides them
TASK_TAGS = {"mlflow.experimentKind": "custom_model_development"}
PARAMS_PER_CALL, METRICS_PER_CALL = 100, 1000  # the server's limits (MLflow REST API, log-batch)
SEARCHED_TAGS = (
    "seed", "split_hash", "exposures", "git_sha", "is_dirty", "base_model", "model_id",
    "model_sha256", "cells_md5", "tuned_trials",
)  # fmt: skip

_ambient_lock = threading.RLock()


# -- the store ----------------------------------------------------------------------------------
def client(workspace: Workspace) -> mlflow.MlflowClient:
    """Open the workspace's store, making it on first use; says nothing on any stream."""
    for key, value in SILENCE.items():
        os.environ.setdefault(key, value)
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    assume_reader()
    uri = workspace.tracking_uri
    if not uri.startswith("sqlite:"):
        return mlflow.MlflowClient(tracking_uri=uri)
    workspace.local.mkdir(parents=True, exist_ok=True)
    with FileLock(workspace.local / "mlflow.lock"):  # two first users would both make the tables
        return mlflow.MlflowClient(tracking_uri=uri)


@contextmanager
def ambient(workspace: Workspace) -> Iterator[None]:
    """Let MLflow's process-wide store be this workspace's while the block runs.

    A few of its own parts (model registration, `models:/` addresses) look nowhere else. What was
    set before, also in the environment, is put back.
    """
    with _ambient_lock:
        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(workspace.tracking_uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)
            if before is not None:
                os.environ["MLFLOW_TRACKING_URI"] = before


def experiment(workspace: Workspace, store: mlflow.MlflowClient) -> str:
    """Return the id of the workspace's experiment, made on first use."""
    try:
        found = store.get_experiment_by_name(workspace.experiment)
    except mlflow.MlflowException as error:
        if refused := turned_away(error):
            raise refused from None
        # its message may spell the address out, password included
        raise Away(
            "MLflow's store answers",
            f"none from {workspace.tracking_uri.rpartition('@')[2]}",
            "start it, or mend MLFLOW_TRACKING_URI",
        ) from None
    if found is None:
        # a server knows its own place for artefacts
        place = None if workspace.tracking_uri.startswith("http") else workspace.artifacts
        with suppress(mlflow.MlflowException):  # another process made it meanwhile
            store.create_experiment(
                workspace.experiment, artifact_location=place, tags=dict(TASK_TAGS)
            )
        found = store.get_experiment_by_name(workspace.experiment)
    if found.lifecycle_stage == "deleted":
        store.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


# -- one run ------------------------------------------------------------------------------------
class Run:
    """One open run: what is logged through it lands there, from whichever thread."""

    def __init__(self, store: mlflow.MlflowClient, run_id: str, where: str, name: str) -> None:
        self.run_id = run_id
        self.model_id: str | None = None  # set by `model`; later metrics are tied to it
        self.experiment_id, self._store, self._name = where, store, name

    def params(self, values: Config | Mapping[str, Any], prefix: str = "") -> None:
        """Log the chosen values; nested ones as `outer.inner`."""
        plain = values.model_dump(mode="json") if isinstance(values, Config) else dict(values)
        flat = [Param(key, text_of(value)) for key, value in flattened(plain, prefix)]
        for start in range(0, len(flat), PARAMS_PER_CALL):
            self._store.log_batch(self.run_id, params=flat[start : start + PARAMS_PER_CALL])

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Log figures under the names given; None says unknown and is left out."""
        known = [
            Metric(safe(name), float(value), int(time.time() * 1000), step, model_id=self.model_id)
            for name, value in values.items()
            if value is not None
        ]
        for start in range(0, len(known), METRICS_PER_CALL):
            self._store.log_batch(self.run_id, metrics=known[start : start + METRICS_PER_CALL])

    def watch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Log one epoch: the `watch` of `ExposureModel.fit`."""
        self.metrics(metrics, step=epoch)

    def tags(self, values: Mapping[str, str | float | bool | None]) -> None:
        """Set tags; None is left out."""
        said = [RunTag(key, text_of(value)) for key, value in values.items() if value is not None]
        self._store.log_batch(self.run_id, tags=said)

    def description(self, text: str) -> None:
        """Show a text in Markdown above what the run logged; the figure that matters first."""
        self.tags({NOTE: text})

    def of_task(self, tags: Mapping[str, str]) -> None:
        """Set tags of the task itself: MLflow's UI shows them above all of its runs."""
        for key, value in tags.items():
            self._store.set_experiment_tag(self.experiment_id, key, value)

    def figure(self, name: str, figure: Figure | bytes | Path) -> None:
        """Keep a figure under `figures/`: a matplotlib figure, an image's bytes or its file."""
        place = f"figures/{name}" if Path(name).suffix else f"figures/{name}.png"
        if isinstance(figure, Path):
            figure = figure.read_bytes()
        if isinstance(figure, bytes):
            self._file(place, figure)
        else:
            self._store.log_figure(self.run_id, figure, place)

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Keep a table under `tables/` as CSV; a named index becomes a column."""
        text = table.to_csv(index=table.index.name is not None)
        self._file(f"tables/{name}.csv", text.encode())

    def record(self, name: str, values: object) -> None:
        """Keep plain values, as JSON knows them, as `<name>.json`."""
        text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        self._file(f"{name.removesuffix('.json')}.json", text.encode())

    def text(self, name: str, content: str) -> None:
        """Keep text as a file."""
        self._file(name, content.encode())

    def file(self, path: Path, folder: str = "") -> None:
        """Keep a file as it is."""
        self._store.log_artifact(self.run_id, str(path), folder or None)

    def dataset(self, name: str, obs: pd.DataFrame, *, path: Path, md5: str, used: str) -> None:
        """Say which cells were used: their file, its md5 (DVC's digest), the columns of `obs`."""
        # written out: `mlflow.data.from_pandas` describes no categorical column, and warns
        kinds = {"i": "long", "u": "long", "f": "double", "b": "boolean"}
        columns = [
            {"name": str(column), "type": kinds.get(getattr(kind, "kind", "O"), "string")}
            for column, kind in obs.dtypes.items()
        ]
        data = Dataset(
            name=name,
            digest=md5,
            source_type="local",
            source=json.dumps({"uri": str(path)}),
            schema=json.dumps({"mlflow_colspec": columns}),
            profile=json.dumps({"num_rows": len(obs), "num_elements": int(obs.size)}),
        )
        entity = DatasetInput(data, [InputTag("mlflow.data.context", used)])
        self._store.log_inputs(self.run_id, datasets=[entity])

    def lineage(self, lineage: Lineage) -> None:
        """Keep the whole lineage as `lineage.json` and what it is searched by as tags."""
        self.record("lineage", lineage.model_dump(mode="json"))
        self.tags(lineage.tags())

    def model(
        self,
        folder: Path,
        *,
        sha256: str,
        kind: str = "exposure",
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Log a folder written by `ExposureModel.save`; return the logged model's id.

        `kind` backbone: a folder written by `encoder.backbone.write`, which answers nothing.

        The artefact holds data only: `mlflow.pyfunc` loads it with this package's own code.
        `sha256` is the folder's digest (`endoprint.artefact.digest`).
        """
        logged = self._store.create_logged_model(
            self.experiment_id,
            name=self._name,
            source_run_id=self.run_id,
            tags={"model_sha256": sha256, **(tags or {})},
            model_type=kind,
        )
        described = mlflow.models.Model(
            artifact_path=logged.artifact_location,
            model_uuid=logged.model_id,
            run_id=self.run_id,
            model_id=logged.model_id,
        )
        with tempfile.TemporaryDirectory() as scratch:
            data = Path(scratch) / MODEL_FOLDER
            data.symlink_to(Path(folder).resolve())  # MLflow keeps the folder's own name
            place = Path(scratch) / "artefact"
            mlflow.pyfunc.save_model(
                path=str(place),
                loader_module=LOADER,
                data_path=str(data),
                mlflow_model=described,
                # told, not inferred: inference takes 6-12 s and loads the model
                pip_requirements=[f"endoprint=={version('endoprint')}"],
            )
            self._store.log_model_artifacts(logged.model_id, str(place))
        self._store.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        self._store.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, 0)])
        self.tags({"model_id": logged.model_id, "model_sha256": sha256})
        self.model_id = str(logged.model_id)
        return self.model_id

    def _file(self, place: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / Path(place).name
            path.write_bytes(content)
            parent = Path(place).parent.as_posix()
            self._store.log_artifact(self.run_id, str(path), None if parent == "." else parent)


@contextmanager
def run(
    workspace: Workspace,
    *,
    name: str,
    kind: Kind,
    model: str | None = None,
    parent: str | None = None,
    tags: Mapping[str, str | float | bool | None] | None = None,
) -> Iterator[Run]:
    """Track one piece of work; the run is FINISHED, or FAILED or KILLED when the block raises.

    `parent` is the id of the run it belongs to (the trials of a search). Runs that a dead process
    of this machine left RUNNING are marked KILLED first.
    """
    with acting("trainer"):
        store = client(workspace)
        experiment_id = experiment(workspace, store)
        sweep(workspace)
        said: dict[str, str | float | bool | None] = {
            "kind": kind, "model": model, "task": workspace.params.task,
            "seed": workspace.params.seed, **alive.named(), **(tags or {}),
            "mlflow.parentRunId": parent, "request": os.urandom(8).hex(),
        }  # fmt: skip
        known = {key: text_of(value) for key, value in said.items() if value is not None}
        try:
            opened = store.create_run(experiment_id, run_name=name, tags=known)
        except mlflow.MlflowException as error:
            raise turned_away(error) or error from None
        run_id = opened.info.run_id
        # a server that died before it answered was asked again: the run it had made is nobody's
        for twin in store.search_runs([experiment_id], f"tags.request = '{known['request']}'"):
            if twin.info.run_id != run_id:
                store.set_terminated(twin.info.run_id, "KILLED")
        try:
            yield Run(store, run_id, experiment_id, model or kind)
        except BaseException as error:  # closed whatever happened, then raised on
            line = without_secrets(f"{type(error).__name__}: {error}")
            store.set_tag(run_id, "error", line[:500])
            was_stopped = isinstance(error, Pruned) or not isinstance(error, Exception)
            store.set_terminated(run_id, "KILLED" if was_stopped else "FAILED")
            raise
        store.set_terminated(run_id, "FINISHED")


# -- runs that nobody will close ----------------------------------------------------------------
@acting("trainer")
def sweep(workspace: Workspace) -> list[str]:
    """Mark runs KILLED that a process of this machine left RUNNING when it died; return their ids.

    A run of another machine is left alone: only its own machine can tell.
    """
    store = client(workspace)
    mine = f"tags.host = '{platform.node()}' and attributes.status = 'RUNNING'"
    found = store.search_runs([experiment(workspace, store)], filter_string=mine)
    swept: list[str] = []
    for stale in found:
        if not alive.is_named(stale.data.tags):
            try:
                store.set_tag(stale.info.run_id, "error", "its process died")
            except mlflow.MlflowException as error:
                if turned_away(error):
                    return swept  # left to the next who may
                raise
            store.set_terminated(stale.info.run_id, "KILLED")
            swept.append(stale.info.run_id)
    return swept


# -- reading back -------------------------------------------------------------------------------
def runs_table(
    workspace: Workspace,
    *,
    kind: Kind = "train",
    model: str | None = None,
    split_hash: str | None = None,
) -> pd.DataFrame:
    """Return the finished runs of a kind, newest first: one row per run, a column per figure.

    Index run_id; columns model, name, started (UTC), the tags people search by (seed, split_hash,
    exposures, git_sha, is_dirty, base_model, model_id, model_sha256, cells_md5, tuned_trials),
    then every metric by its own name and every parameter as `param.<name>`.
    """
    store = client(workspace)
    asked = [f"tags.kind = '{kind}'", "attributes.status = 'FINISHED'"]
    asked += [f"tags.model = '{model}'"] if model else []
    asked += [f"tags.split_hash = '{split_hash}'"] if split_hash else []
    rows, page = [], None
    while True:
        found = store.search_runs(
            [experiment(workspace, store)],
            filter_string=" and ".join(asked),
            run_view_type=ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time DESC"],
            page_token=page,
        )
        rows += [_row(each) for each in found]
        page = found.token
        if not page:
            break
    first = ["run_id", "model", "name", "started", *SEARCHED_TAGS]
    return pd.DataFrame(rows, columns=None if rows else first).set_index("run_id")


def _row(found: Any) -> dict[str, Any]:  # mlflow.entities.Run, which carries no types
    tags = found.data.tags
    return {
        "run_id": found.info.run_id,
        "model": tags.get("model"),
        "name": found.info.run_name,
        "started": datetime.fromtimestamp(found.info.start_time / 1000, UTC),
        **{tag: tags.get(tag) for tag in SEARCHED_TAGS},
        **found.data.metrics,
        **{f"param.{name}": value for name, value in found.data.params.items()},
    }
