"""Real services for tests: Debian's PostgreSQL and moto's S3, as processes on loopback."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from test_schedule import free_port

PATIENCE_SECONDS = 120


def postgres_folder() -> Path | None:
    """Where Debian puts PostgreSQL's programs; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


class Postgres:
    """One cluster with a password, thrown away afterwards."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs, self.port = folder, programs, free_port()
        self.password = secrets.token_urlsafe(16)

    def _as_postgres(self, *words: str) -> None:
        # it refuses to run as root
        user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        subprocess.run(
            [*user, *words], check=True, cwd=self.folder, timeout=PATIENCE_SECONDS,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def make(self) -> None:
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres")
        secret = self.folder / "password"
        secret.write_text(self.password)
        if os.getuid() == 0:
            shutil.chown(secret, "postgres")
        self._as_postgres(
            str(self.programs / "initdb"), "-D", str(self.folder / "data"), "-U", "lab",
            "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync",
        )  # fmt: skip
        secret.unlink()
        self.start()
        for name in ("mlflow", "prefect", "optuna"):
            self.psql(f"create database {name}")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off"
        self._pg_ctl("start", "-o", options)

    def stop(self, *, at_once: bool = False) -> None:
        self._pg_ctl("stop", "-m", "immediate" if at_once else "fast")

    def _pg_ctl(self, *words: str) -> None:
        self._as_postgres(
            str(self.programs / "pg_ctl"), "-D", str(self.folder / "data"), "-w",
            "-l", str(self.folder / "log.txt"), *words,
        )  # fmt: skip

    def psql(self, statement: str, database: str = "postgres") -> str:
        done = subprocess.run(
            ["psql", self.url(database), "-qAtc", statement],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.strip()

    def url(self, database: str, driver: str = "") -> str:
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://lab:{self.password}@127.0.0.1:{self.port}/{database}"


@contextmanager
def postgres(programs: Path) -> Iterator[Postgres]:
    """Hold a cluster up with the databases mlflow, prefect and optuna."""
    folder = Path(tempfile.mkdtemp(prefix="endoprint-postgres-"))
    cluster = Postgres(folder, programs)
    try:
        cluster.make()
        yield cluster
    finally:
        if (folder / "data/postmaster.pid").exists():
            cluster.stop(at_once=True)
        shutil.rmtree(folder)


@contextmanager
def s3(*buckets: str) -> Iterator[dict[str, str]]:
    """Hold an S3-compatible server up; yields the environment that leads to it."""
    import boto3

    port = free_port()
    found = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "lab",
        "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(16),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                urllib.request.urlopen(found["AWS_ENDPOINT_URL"], timeout=5)
                break
            except OSError:
                assert time.monotonic() < deadline, "moto's server did not answer"
                time.sleep(0.3)
        store = boto3.client(
            "s3",
            endpoint_url=found["AWS_ENDPOINT_URL"],
            aws_access_key_id=found["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=found["AWS_SECRET_ACCESS_KEY"],
            region_name=found["AWS_DEFAULT_REGION"],
        )
        for bucket in buckets:
            store.create_bucket(Bucket=bucket)
        yield found
    finally:
        server.terminate()
        server.wait(30)
