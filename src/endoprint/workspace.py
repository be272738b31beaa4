"""Where things are: the paths, stores and environment of one workspace.

A workspace is a folder with `params.yaml`, `dvc.yaml`, `data/` and `registry/`. What is local to
a machine (MLflow's store, Prefect's home, study journals, caches) is under `.endoprint/`, unless
the usual environment variables point elsewhere.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from endoprint.config import Params, read_params

QUIET = {
    # No telemetry, no update checks, no pickle: the defaults of these tools differ.
    "DO_NOT_TRACK": "true",  # MLflow honours only "true"
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # 14-19 s seen; default is 20
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "DVC_NO_ANALYTICS": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}


def settings() -> dict[str, str]:
    """Return the environment our processes start from: quiet, and not too many threads.

    Half the cores compute in one process. With all of them, two threads on two cores that others
    used as well took three times the CPU seconds of one (the demo, 610 s against 203 s, November
    2026): they wait for each other by spinning.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    return {**QUIET, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}


@dataclass(frozen=True)
class Workspace:
    """One folder that holds a task: its values, data, rules and local state."""

    root: Path

    @classmethod
    def at(cls, folder: str | Path) -> Workspace:
        """Open the workspace in a folder; nothing is created or read yet."""
        return cls(Path(folder).resolve())

    @classmethod
    def open(cls, folder: str | Path) -> Workspace:
        """Open a workspace whose values are read now: mistakes are said before a slow import."""
        space = cls.at(folder)
        _ = space.params
        return space

    @cached_property
    def params(self) -> Params:
        """The values this workspace chose."""
        return read_params(self.root / "params.yaml")

    # -- bytes, DVC's ---------------------------------------------------------------------------
    @property
    def cells(self) -> Path:
        """Curated, labelled cells (h5ad)."""
        return self.root / "data/cells/cells.h5ad"

    @property
    def pool(self) -> Path:
        """Curated, unlabelled cells of separate units, for vocabulary and pre-training."""
        return self.root / "data/cells/pool.h5ad"

    @property
    def curation(self) -> Path:
        """What curation removed, by reason (JSON)."""
        return self.root / "data/cells/curation.json"

    @property
    def audit(self) -> Path:
        """The confounding audit (JSON)."""
        return self.root / "data/design/audit.json"

    @property
    def split(self) -> Path:
        """The frozen split by unit (JSON)."""
        return self.root / "data/design/split.json"

    @property
    def vocabulary(self) -> Path:
        """The vocabulary the tokens were made with (JSON)."""
        return self.root / "data/tokens/vocabulary.json"

    @property
    def tokens(self) -> Path:
        """Tokens of the curated cells (parquet)."""
        return self.root / "data/tokens/cells.parquet"

    # -- rules ----------------------------------------------------------------------------------
    @property
    def policy(self) -> Path:
        """What is good enough to go live (YAML)."""
        return self.root / "registry/policy.yaml"

    # -- local state ----------------------------------------------------------------------------
    @property
    def local(self) -> Path:
        """State of this machine, ignored by git."""
        return self.root / ".endoprint"

    @property
    def journals(self) -> Path:
        """Optuna's journals, one per study."""
        return self.local / "studies"

    @property
    def history(self) -> Path:
        """The audit history of promotions."""
        return self.local / "history"

    @property
    def tracking_uri(self) -> str:
        """MLflow's store: the environment's, else SQLite in `.endoprint/`."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.local / 'mlflow.db'}"

    @property
    def artifacts(self) -> str:
        """Where MLflow keeps what runs log: the environment's place, else here.

        A server at MLFLOW_TRACKING_URI knows its own.
        """
        given = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT")
        return given or (self.local / "artifacts").as_uri()

    @property
    def experiment(self) -> str:
        """MLflow experiment and registered model share this name."""
        return f"endoprint-{self.params.task}"

    def environment(self) -> dict[str, str]:
        """Return the environment of a child process: the caller's own choices win."""
        own = {
            **settings(),
            "PREFECT_HOME": str(self.local / "prefect"),
            "DVC_SITE_CACHE_DIR": str(self.local / "dvc-site"),
        }
        merged = {**own, **os.environ}
        # `dvc repro` calls `endoprint`: the one beside the interpreter that runs now
        merged["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), merged["PATH"]])
        return merged
