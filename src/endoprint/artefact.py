"""What may be inside a logged model: data and its description, nothing that runs.

Switching pickle off is not enough: an MLflow artefact may also name code to import or carry
Python of its own. A folder is checked here before any of it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import yaml

from endoprint.config import Refusal

LOADER = "endoprint.model"  # installed code; the only module an artefact may name
MODEL = "data/model"  # where the saved model stands inside the artefact
DESCRIPTION = "MLmodel"
DATA_ENDINGS = (".json", ".safetensors", ".txt", ".npz")  # what a model may write
BESIDE = (  # what MLflow writes around it
    DESCRIPTION, "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta",
)  # fmt: skip
LARGEST_DESCRIPTION = 1_000_000  # bytes; a description of megabytes describes something else


def digest(folder: Path) -> str:
    """Return the sha256 over a saved model's files: names, sizes and bytes, in one order."""
    manifest = {
        path.relative_to(folder).as_posix(): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    if not manifest:
        raise Refusal("a saved model has files", f"none in {folder.name}", "save it again")
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def check(artefact: Path, *, sha256: str) -> Path:
    """Return the folder of the saved model inside an artefact that is safe to load, or refuse.

    Safe: plain files of known kinds in known places, a description that names this package's
    loader and no code, and a model whose digest is `sha256`.
    """
    for path in sorted(artefact.rglob("*")):
        _check_entry(path, artefact)
    _check_description(artefact / DESCRIPTION)
    model = artefact / MODEL
    found = digest(model)
    if found != sha256:
        raise Refusal(
            "a model's bytes are those that were registered",
            f"sha256 {found[:12]} where {sha256[:12]} was registered",
            "register it again from its run; ask who changed the artefact",
        )
    return model


def _check_entry(path: Path, artefact: Path) -> None:
    name = path.relative_to(artefact).as_posix()
    mode = path.lstat().st_mode
    in_model = name.startswith(f"{MODEL}/")
    if stat.S_ISDIR(mode) and (name == "data" or name == MODEL or in_model):
        return
    is_known = name in BESIDE or (in_model and path.suffix in DATA_ENDINGS)
    if not stat.S_ISREG(mode) or not is_known:
        raise Refusal(
            "a model's artefact holds weights and JSON only",
            name,
            f"train it again; allowed are {', '.join(DATA_ENDINGS)} under {MODEL}",
        )
    if name in BESIDE and path.stat().st_size > LARGEST_DESCRIPTION:
        raise Refusal("a model's description is short", f"{name} of megabytes", "train it again")


def _check_description(path: Path) -> None:
    try:
        described = yaml.safe_load(path.read_text())
        flavours: dict[str, Any] = described["flavors"]
        pyfunc: dict[str, Any] = flavours["python_function"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        raise Refusal(
            "a model's artefact is described by MLmodel", "none that can be read", "train it again"
        ) from None
    wrong = [
        f"{what} {got!r}"
        for what, got, wanted in (
            ("flavours", sorted(flavours), ["python_function"]),
            ("loader_module", pyfunc.get("loader_module"), LOADER),
            ("code", pyfunc.get("code"), None),
            ("data", pyfunc.get("data"), MODEL),
            ("python_model", pyfunc.get("python_model"), None),
            ("model_code_path", pyfunc.get("model_code_path"), None),
        )
        if got != wanted
    ]
    if wrong:
        raise Refusal(
            f"a model is loaded by {LOADER} and carries no code",
            "; ".join(wrong),
            "train it again with this package",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
