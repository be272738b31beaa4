"""Leaving one machine: the story on a real PostgreSQL and an S3-compatible store, by environment.

Debian's PostgreSQL holds MLflow's, Prefect's and Optuna's tables; moto's server holds artefacts
and DVC's remote. Both are processes on loopback, made for these tests and thrown away.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path
from typing import Any

import pytest

from backends import Postgres, postgres, postgres_folder, s3
from children import MAIN, environment
from conftest import TINY, a_workspace
from standing import Standing
from test_schedule import free_port
from torture_services import KINDS, Site, torture

PROGRAMS = postgres_folder()
pytestmark = [
    pytest.mark.service,
    pytest.mark.slow,
    pytest.mark.xdist_group("services"),
    pytest.mark.skipif(PROGRAMS is None, reason="Debian's postgresql is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("prefect") is None, reason="the flows extra is not installed"
    ),
]
PARAMS = {
    **{key: value for key, value in TINY.items() if key != "pretrain"},
    "search": {"model": "logistic", "trials": 2},
    "models": {"logistic": {}, "signature": {}},
}


@dataclass
class Shared:
    """The services, the environment that leads to them, and a workspace after its story."""

    database: Postgres
    environment: dict[str, str]
    space: Path

    def endoprint(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", MAIN, *words], cwd=cwd, capture_output=True, text=True,
            env={**environment(), **self.environment}, check=False, timeout=600,
        )  # fmt: skip

    @property
    def store(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
        )

    def kept(self, bucket: str) -> list[str]:
        found = self.store.list_objects_v2(Bucket=bucket)
        return [row["Key"] for row in found.get("Contents", [])]


@pytest.fixture(scope="module")
def shared_services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    for package in ("moto", "boto3", "dvc_s3", "psycopg"):
        pytest.importorskip(package, reason="the services extra is not installed")
    assert PROGRAMS is not None
    folder = tmp_path_factory.mktemp("services")
    with postgres(PROGRAMS) as database, s3("lab") as store:
        leading = {
            **store,
            "MLFLOW_TRACKING_URI": database.url("mlflow", "psycopg"),
            "MLFLOW_DEFAULT_ARTIFACT_ROOT": "s3://lab/artefacts",
            "PREFECT_API_DATABASE_CONNECTION_URL": database.url("prefect", "asyncpg"),
            "OPTUNA_STORAGE": database.url("optuna", "psycopg"),
            "ENDOPRINT_DVC_REMOTE": "s3://lab/dvc",
        }
        space = a_workspace(folder / "space", params=PARAMS)
        done = subprocess.run(
            [sys.executable, "-m", "flows.story"], cwd=space, capture_output=True, text=True,
            env={**environment(network=folder / "network.txt"), **leading},
            check=False, timeout=600,
        )  # fmt: skip
        (folder / "screen.txt").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stderr[-3000:]
        yield Shared(database, leading, space)


def test_the_story_leaves_everything_in_the_shared_services_and_nothing_here(
    shared_services: Shared,
) -> None:
    told = json.loads((shared_services.space / ".endoprint/story.json").read_text())
    assert told["champion"]["version"] == "1"
    ask = shared_services.database.psql
    assert int(ask("select count(*) from runs where status = 'FINISHED'", "mlflow")) >= 5
    assert ask("select count(*) from model_versions", "mlflow") == "1"
    assert ask("select state_type from flow_run where name is not null", "prefect") == "COMPLETED"
    assert ask("select count(*) from trials", "optuna") == "2"
    kept = shared_services.kept("lab")
    assert any(key.startswith("artefacts/") and key.endswith("MLmodel") for key in kept)
    assert any(key.startswith("dvc/files/md5") for key in kept)
    here = {path.name for path in (shared_services.space / ".endoprint").iterdir()}
    assert not here & {"mlflow.db", "artifacts", "studies"}


def test_another_machine_pulls_the_same_bytes_and_scores_with_the_same_champion(
    shared_services: Shared, tmp_path: Path
) -> None:
    here, there = shared_services.space, tmp_path / "there"
    for name in ("params.yaml", "dvc.yaml", "dvc.lock", "registry", ".dvc/config", ".dvcignore"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (here / name).is_dir() else shutil.copy
        copy(here / name, there / name)
    done = shared_services.endoprint("pull", cwd=there)
    assert done.returncode == 0, done.stderr
    cells = "data/cells/cells.h5ad"
    assert md5((there / cells).read_bytes()).digest() == md5((here / cells).read_bytes()).digest()
    done = shared_services.endoprint("score", str(here / "data/raw/new.h5ad"), "scores", cwd=there)
    assert done.returncode == 0, done.stderr
    assert (there / "scores/scores.parquet").is_file()


def test_a_kill_of_each_kind_at_a_random_moment_is_recovered_without_a_hand(
    shared_services: Shared,
) -> None:
    ports = ("--mlflow-port", str(free_port()), "--prefect-port", str(free_port()))
    up = Standing(shared_services.space, *ports, extra=shared_services.environment)
    try:
        site = Site(up, shared_services.database, n_trials=PARAMS["search"]["trials"])
        assert torture(site, len(KINDS), seed=1, say=print) == [], up.log()
    finally:
        up.stop()
    assert up.family == []
    lines = (shared_services.space.parent / "network.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("refused")] == []


def test_no_password_is_in_any_file_run_or_table(shared_services: Shared) -> None:
    secrets = [
        shared_services.database.password.encode(),
        shared_services.environment["AWS_SECRET_ACCESS_KEY"].encode(),
    ]
    files = [path for path in shared_services.space.parent.rglob("*") if path.is_file()]
    files += [path for path in shared_services.database.folder.rglob("*") if path.is_file()]
    assert len(files) > 100
    for path in files:
        content = path.read_bytes()
        assert not [each for each in secrets if each in content], path
    stored = shared_services.store
    for key in shared_services.kept("lab"):
        content = stored.get_object(Bucket="lab", Key=key)["Body"].read()
        assert not [each for each in secrets if each in content], key
