"""Real child processes: `endoprint` as a user types it, watched for what it reaches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUARD = Path(__file__).parent / "guard"
# a machine's own stores and settings are no part of a test
FOREIGN = ("MLFLOW_", "PREFECT_", "DVC_", "ENDOPRINT_", "TESTS_", "PYTEST_")
MAIN = "import sys; sys.argv[0] = 'endoprint'; from endoprint.cli import main; main()"


def environment(*, block: str = "", network: Path | None = None) -> dict[str, str]:
    """A child's environment: one thread, no foreign settings.

    `block`: a package that neither the child nor its children can import; `network`: the file in
    which attempts to leave this machine are written, before they are refused.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    own = {"COLUMNS": "100", "PYTHONPATH": os.pathsep.join([str(GUARD), str(ROOT)])}
    if block:
        own["TESTS_BLOCK"] = block
    if network is not None:
        own["TESTS_NETWORK"] = str(network)
    return {**kept, **threads, **own}


def cpu_seconds(run: Callable[[], object]) -> float:
    """What the children that `run` waits for cost: a busy machine's clock would not tell."""
    before = os.times()
    run()
    after = os.times()
    return sum(
        getattr(after, name) - getattr(before, name)
        for name in ("children_user", "children_system")
    )


def endoprint(
    *words: str, cwd: Path | None = None, block: str = "", network: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh process; see `environment`."""
    command = [sys.executable, "-c", MAIN, *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, check=False, timeout=600,
        env=environment(block=block, network=network),
    )  # fmt: skip


def python(
    *words: str, cwd: Path | None = None, network: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a fresh process; see `environment`."""
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=cwd, check=False,
        timeout=600, env=environment(network=network),
    )  # fmt: skip
