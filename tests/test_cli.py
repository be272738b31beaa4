"""The command line: quick to answer, polite about mistakes, whole without Prefect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMANDS = (
    "demo init run simulate check audit curate split tokenize pretrain search train models "
    "leaderboard promote score ui gc"
).split()


def endoprint(
    *words: str, cwd: Path | None = None, block: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh process; `block` names a package that cannot be imported there."""
    code = "import sys\n"
    if block:
        code += f"sys.modules[{block!r}] = None\n"
    code += "sys.argv[0] = 'endoprint'\nfrom endoprint.cli import main\nmain()"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300,
        env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from endoprint.cli import main; sys.argv = ['endoprint', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'mlflow', 'pandas', 'anndata', 'optuna') if m in sys.modules])"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    print(f"endoprint --help took {time.perf_counter() - began:.2f} s")
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_stands_in_the_help() -> None:
    text = endoprint("--help").stdout
    assert [name for name in COMMANDS if f" {name} " not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_without_prefect(command: str) -> None:
    done = endoprint(command, "--help", block="prefect")
    assert done.returncode == 0
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("train", "logistic"),
        ("leaderboard",),
        ("promote",),
        ("score", "none.h5ad", "out"),
        ("check",),
        ("split",),
        ("run",),
        ("gc",),
    ],
)
def test_outside_a_workspace_every_command_says_so_in_one_line(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    done = endoprint(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("endoprint: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    done = endoprint("init", "absent.h5ad", "space", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "absent.h5ad" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_table_of_models_is_readable_by_machines() -> None:
    rows = json.loads(endoprint("models", "--json").stdout)
    assert {"logistic", "signature", "geneformer"} <= set(rows)
    assert all({"line", "cost", "licence", "citation", "needs"} <= set(r) for r in rows.values())
