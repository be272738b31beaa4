"""Where a fitted model comes from: code, data, design, seed, software, machine and cost.

One typed record, written beside every run and every version, so that a result can be traced
back to its bytes and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import psutil
import yaml
from pydantic import BaseModel, ConfigDict

from endoprint.curated import md5
from endoprint.workspace import Workspace

PACKAGES = (  # those whose version can change a number
    "endoprint", "anndata", "numpy", "scipy", "pandas", "scikit-learn", "torch", "transformers",
    "peft", "safetensors", "lightgbm", "POT", "optuna", "mlflow",
)  # fmt: skip
GIB = 2**30


class Record(BaseModel):
    """A part of the lineage: typed, frozen, nothing unexpected in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Cost(Record):
    """What a step took."""

    wall_seconds: float
    cpu_seconds: float  # of this process, all threads
    peak_memory_gib: float  # resident, of the whole process, while the step ran


class Meter:
    """Filled in when the metered block ends."""

    def __init__(self) -> None:
        self.cost = Cost(wall_seconds=0.0, cpu_seconds=0.0, peak_memory_gib=0.0)


class Hardware(Record):
    """The machine a model was fitted on."""

    cpu: str
    cores: int  # those this process may use
    memory_gib: float
    gpu: str | None  # as torch sees it; None where torch was not needed


class BaseModelUsed(Record):
    """The pre-trained encoder a model started from."""

    label: str  # says whose it is: published, or pre-trained here
    sha256: str | None


class Lineage(Record):
    """Everything a fitted model depends on.

    Hashes are hex digests; paths are as DVC spells them, relative to the workspace.
    """

    format: int = 1
    task: str
    model: str
    git_sha: str | None  # of the workspace's checkout; None outside git
    is_dirty: bool | None  # src, flows, params, dvc.yaml or policy differ from that commit
    dvc_lock: str | None  # sha256 of dvc.lock
    inputs: dict[str, str]  # path -> md5 of its bytes as they are now
    changed_inputs: list[str]  # those whose bytes are not what dvc.lock says
    split_hash: str | None
    units: dict[str, list[str]]  # training, validation, development, test
    exposures: list[str]
    params_hash: str | None  # sha256 of params.yaml
    seed: int
    base_model: BaseModelUsed | None
    versions: dict[str, str]
    hardware: Hardware
    cost: Cost | None

    @classmethod
    def of(
        cls,
        workspace: Workspace,
        *,
        model: str,
        seed: int,
        exposures: list[str],
        units: dict[str, list[str]],
        split_hash: str | None,
        base_model: BaseModelUsed | None = None,
        cost: Cost | None = None,
    ) -> Self:
        """Gather what can be read from the workspace and the machine; the rest is told."""
        sha, is_dirty = git_state(workspace.root)
        inputs, changed = input_hashes(workspace)
        return cls(
            task=workspace.params.task,
            model=model,
            git_sha=sha,
            is_dirty=is_dirty,
            dvc_lock=_sha256(workspace.root / "dvc.lock"),
            inputs=inputs,
            changed_inputs=changed,
            split_hash=split_hash,
            units={part: sorted(names) for part, names in units.items()},
            exposures=list(exposures),
            params_hash=_sha256(workspace.root / "params.yaml"),
            seed=seed,
            base_model=base_model,
            versions=software(),
            hardware=hardware(),
            cost=cost,
        )

    def tags(self) -> dict[str, str]:
        """Return the fields people search runs and versions by, as short strings."""
        said: dict[str, Any] = {
            "task": self.task,
            "model": self.model,
            "git_sha": self.git_sha,
            "is_dirty": self.is_dirty,
            "dvc_lock": self.dvc_lock,
            "data_hash": hash_of(self.inputs),
            "split_hash": self.split_hash,
            "exposures": json.dumps(self.exposures),
            "params_hash": self.params_hash,
            "seed": self.seed,
            "base_model": self.base_model.label if self.base_model else None,
            "base_model_sha256": self.base_model.sha256 if self.base_model else None,
        }
        return {name: _plain(value) for name, value in said.items() if value is not None}


def _plain(value: str | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def hash_of(values: object) -> str:
    """Return the sha256 of plain values, whatever order their keys come in."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def pretraining_units(provenance: Mapping[str, Any]) -> set[str]:
    """Return the units that a model's backbone and vocabulary had seen before it was fitted."""
    parts = [provenance.get(part) or {} for part in ("backbone", "vocabulary")]
    return {str(unit) for part in parts for unit in part.get("units", [])} - {""}


# -- code ---------------------------------------------------------------------------------------
def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return (commit, whether what decides a result differs from it); (None, None) outside git."""
    top, sha = _git(root, "rev-parse", "--show-toplevel"), _git(root, "rev-parse", "HEAD")
    if top is None or sha is None:
        return None, None
    code = [str(Path(top.strip()) / name) for name in ("src", "flows")]
    values = [str(root / name) for name in ("params.yaml", "dvc.yaml", "registry/policy.yaml")]
    # values that git ignores are not in the commit either; ignored files in src are caches
    changed = (
        _git(root, "status", "--porcelain", "--", *code),
        _git(root, "status", "--porcelain", "--ignored", "--", *values),
    )
    return sha.strip(), any(lines is None or bool(lines.strip()) for lines in changed)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# -- data ---------------------------------------------------------------------------------------
def input_hashes(workspace: Workspace) -> tuple[dict[str, str], list[str]]:
    """Return (path -> md5 of every data file as it is now, those that dvc.lock says otherwise of).

    dvc.lock is believed for a file of the size it says and no younger than the lock itself;
    anything else is read again, since a record of the wrong bytes is worse than a slow one.
    """
    lock = workspace.root / "dvc.lock"
    locked = _locked_files(lock)
    for path in (workspace.cells, workspace.pool, workspace.split, workspace.vocabulary,
                 workspace.tokens):  # fmt: skip
        locked.setdefault(os.path.relpath(path, workspace.root), {})
    hashes: dict[str, str] = {}
    changed = []
    for name, entry in sorted(locked.items()):
        path = workspace.root / name
        if not path.is_file():  # never made here, or a folder, which DVC hashes its own way
            if path.is_dir() and "md5" in entry:
                hashes[name] = str(entry["md5"])
            continue
        state = path.stat()
        is_as_locked = (
            entry.get("size") == state.st_size and state.st_mtime_ns <= lock.stat().st_mtime_ns
        )
        hashes[name] = str(entry["md5"]) if is_as_locked else md5(path)
        if entry and hashes[name] != entry["md5"]:
            changed.append(name)
    return hashes, changed


def _locked_files(lock: Path) -> dict[str, dict[str, Any]]:
    """Return what dvc.lock says of every data file: dependencies and outputs, code excepted."""
    if not lock.is_file():
        return {}
    stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {})
    entries = (
        entry
        for stage in stages.values()
        for entry in (*stage.get("deps", []), *stage.get("outs", []))
    )
    code = (".py", ".yaml", ".toml", ".txt", ".lock")
    return {
        entry["path"]: entry
        for entry in entries
        if "md5" in entry
        and not entry["path"].endswith(code)
        # a dependency on a package folder is code as well; git holds it
        and Path(entry["path"]).parts[0] not in ("src", "flows")
    }


# -- software and machine -----------------------------------------------------------------------
def software() -> dict[str, str]:
    """Return package -> version, for every package that can change a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> Hardware:
    """Describe this machine."""
    torch = sys.modules.get("torch")  # never loaded only to be asked
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return Hardware(
        cpu=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / GIB, 1),
        gpu=gpu,
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


@contextmanager
def metered() -> Iterator[Meter]:
    """Measure a block: wall and processor time, and the process's peak memory while it ran."""
    meter = Meter()
    _forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield meter
    finally:
        meter.cost = Cost(
            wall_seconds=time.perf_counter() - wall,
            cpu_seconds=time.process_time() - cpu,
            peak_memory_gib=_peak_bytes() / GIB,
        )


def _forget_peak() -> None:
    """Let the kernel count the peak anew (proc(5), clear_refs), where it may."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
