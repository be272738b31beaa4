"""What may be inside a logged model: data and its description, nothing that runs.

Switching pickle off is not enough: an MLflow artefact may also name code to import or carry
Python of its own. A folder is checked here before any of it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from endoprint.config import Refusal

LOADER = "endoprint.model"  # installed code; the only module an artefact may name
MODEL = "data/model"  # where the saved model stands inside the artefact
DESCRIPTION = "MLmodel"
FOLDERS = ("data", MODEL)
MEGABYTE = 10**6
LARGEST = {  # bytes, by the endings of what a model may write; encoders of 0.3 billion weights fit
    ".json": 200 * MEGABYTE,
    ".safetensors": 8000 * MEGABYTE,
}
MOST_FILES = 32
BESIDE = (  # what MLflow writes around it
    DESCRIPTION, "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta",
)  # fmt: skip
LARGEST_DESCRIPTION = 100_000  # bytes; MLflow writes less than a thousand
DEEPEST = 20  # of lists and maps in each other; MLflow's go three deep
MOST_QUOTED = 100  # letters of what an artefact says, in a refusal
UNREADABLE = (  # what YAML and a walk through it raise: dates and numbers may be impossible
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
    yaml.YAMLError,
)  # fmt: skip


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

    Safe: plain files of known kinds and sizes in known places, a description that names this
    package's loader and no code, and a model whose digest is `sha256`.
    """
    check_entries(artefact)
    _check_description(artefact / DESCRIPTION)
    model = artefact / MODEL
    found = digest(model)
    if found != sha256:
        raise Refusal(
            "a model's bytes are those that were registered",
            f"sha256 {found[:12]} where {sha256[:12]} was registered",
            "register it again from its run; ask who changed the artefact",
        )
    for path in sorted(model.iterdir()):
        _check_content(path)
    return model


def check_entries(artefact: Path) -> None:
    """Refuse an artefact on this machine that holds anything but plain files in their places."""
    for n_seen, path in enumerate(artefact.rglob("*"), start=1):
        name, state = path.relative_to(artefact).as_posix(), path.lstat()
        is_folder = stat.S_ISDIR(state.st_mode)
        if not is_folder and not stat.S_ISREG(state.st_mode):
            raise _foreign(f"{name}, which is a link or no plain file")
        check_entry(name, is_folder=is_folder, size=state.st_size, n_seen=n_seen)


def check_entry(name: str, *, is_folder: bool, size: int, n_seen: int) -> None:
    """Refuse one entry of an artefact, by its path inside, its bytes and how many came so far."""
    if n_seen > MOST_FILES:
        raise _foreign(f"more than {MOST_FILES} files")
    if is_folder and name in FOLDERS:
        return
    ending = PurePosixPath(name).suffix
    in_model = PurePosixPath(name).parent == PurePosixPath(MODEL) and ending in LARGEST
    if is_folder or not (in_model or name in BESIDE):
        raise _foreign(name)
    if size > (LARGEST[ending] if in_model else LARGEST_DESCRIPTION):
        raise _foreign(f"{name} of {size} bytes")


def _foreign(got: str) -> Refusal:
    return Refusal(
        "a model's artefact holds weights and JSON only, of a model's size",
        got,
        f"train it again; allowed are {', '.join(LARGEST)} in {MODEL}",
    )


def _check_content(path: Path) -> None:
    """Refuse a file that is not what its ending says, before a model reads it."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            with safe_open(path, framework="numpy") as weights:
                weights.keys()
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise Refusal(
            "a model's files are whole", f"{path.name}: {error}"[:200], "train it again"
        ) from None


def _check_description(path: Path) -> None:
    try:
        wrong = _misdescribed(path)
    except UNREADABLE as error:
        raise Refusal(
            "a model's artefact is described by MLmodel",
            f"none that can be read ({type(error).__name__})",
            "train it again",
        ) from None
    if wrong:
        raise Refusal(
            f"a model is loaded by {LOADER} and carries no code",
            "; ".join(wrong),
            "train it again with this package",
        )


def _misdescribed(path: Path) -> list[str]:
    """Return what a description says otherwise than this package's own."""
    with path.open("rb") as file:
        text = file.read(LARGEST_DESCRIPTION).decode()
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            return ["aliases or nesting"]  # a few lines of either take gigabytes or minutes
    flavours: dict[str, Any] = yaml.safe_load(text)["flavors"]
    pyfunc: dict[str, Any] = flavours["python_function"]
    return [
        f"{what} {got!r}"[:MOST_QUOTED]
        for what, got, wanted in (
            ("flavours", list(flavours), ["python_function"]),
            ("loader_module", pyfunc.get("loader_module"), LOADER),
            ("code", pyfunc.get("code"), None),
            ("data", pyfunc.get("data"), MODEL),
            ("python_model", pyfunc.get("python_model"), None),
            ("model_code_path", pyfunc.get("model_code_path"), None),
        )
        if got != wanted
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
