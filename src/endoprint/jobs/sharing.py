"""Jobs that share a workspace's data with other machines: a DVC remote told by the environment."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path

from endoprint.config import Away, Refusal
from endoprint.workspace import Workspace

ADDRESS = "ENDOPRINT_DVC_REMOTE"  # for example s3://BUCKET/FOLDER; its keys are AWS_...
NAME = "shared"
ERROR = "ERROR: "  # so DVC begins a line that says what went wrong; others advertise


def push(workspace: str) -> str:
    """Send what DVC made to the shared remote, where there is one; return its address, or ""."""
    return _dvc(Workspace.at(workspace), "push") if os.environ.get(ADDRESS) else ""


def pull(workspace: str) -> str:
    """Bring what DVC made elsewhere from the shared remote; return its address."""
    if not os.environ.get(ADDRESS):
        raise Refusal(
            "data come from a shared remote",
            f"none in {ADDRESS}",
            f"for example export {ADDRESS}=s3://BUCKET/FOLDER",
        )
    return _dvc(Workspace.at(workspace), "pull")


def _dvc(space: Workspace, verb: str) -> str:
    address = os.environ[ADDRESS]
    done = subprocess.run(
        [sys.executable, "-m", "dvc", verb, "--remote", NAME],
        cwd=space.root, env={**space.environment(), "DVC_GLOBAL_CONFIG_DIR": str(_config(space))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)] or lines
        raise Away(
            f"dvc {verb} reaches {address}",
            " | ".join(said[:2])[:300] or "an error",
            "check the address and the AWS_... keys in the environment",
        )
    return address


def _config(space: Workspace) -> Path:
    """Write the remote's address where DVC looks for a user's own settings; never a key."""
    folder = space.local / "dvc"
    folder.mkdir(parents=True, exist_ok=True)
    config = configparser.ConfigParser(interpolation=None)
    config[f"'remote \"{NAME}\"'"] = {"url": os.environ[ADDRESS]}
    with (folder / "config").open("w") as stream:
        config.write(stream)
    return folder
