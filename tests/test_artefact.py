"""Nothing of a tampered artefact runs: planted payloads write a canary, which never appears."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import planted_cells
from endoprint import artefact, curated, registry, smoke, tracking
from endoprint.config import Refusal
from endoprint.model import ExposureModel
from endoprint.registry import load_version, register, rollback
from endoprint.workspace import Workspace
from lab import bare_workspace, fit_and_track, furnish, moved_copy

MODEL, WEIGHTS = "data/model/model.json", "data/model/model.safetensors"
GIB = 2**30


# -- what an attacker plants ----------------------------------------------------------------------
class Payload:
    """Unpickled, it writes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.system, (f"touch {self.canary}",)


def a_pickle(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def code(canary: Path) -> str:
    return f"import pathlib\npathlib.Path({str(canary)!r}).touch()\ndef _load_pyfunc(p): ...\n"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new))


def change(place: Path, **values: object) -> None:
    head = json.loads((place / MODEL).read_text())
    (place / MODEL).write_text(json.dumps({**head, **values}))


def reshape(place: Path) -> None:
    arrays = load_file(place / WEIGHTS)
    save_file({name: array.reshape(-1)[:-1].copy() for name, array in arrays.items()},
              place / WEIGHTS)  # fmt: skip


def drop(place: Path) -> None:
    arrays = load_file(place / WEIGHTS)
    arrays.pop(sorted(name for name in arrays if "novelty" not in name)[0])
    save_file(arrays, place / WEIGHTS)


def fill(place: Path, only: str = "") -> None:
    arrays = load_file(place / WEIGHTS)
    for name, array in arrays.items():
        arrays[name] = np.full_like(array, np.nan) if only in name else array
    save_file(arrays, place / WEIGHTS)


def narrow(place: Path) -> None:
    arrays = load_file(place / WEIGHTS)
    arrays["novelty.reference"] = arrays["novelty.reference"][:, 1:].copy()
    save_file(arrays, place / WEIGHTS)


def grow(path: Path, n_bytes: int) -> None:
    with path.open("ab") as stream:
        stream.truncate(n_bytes)  # sparse: takes no room here


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def described(place: Path, old: str, new: str) -> None:
    edit(place / "MLmodel", old, new)


def linked(place: Path, name: str, target: Path) -> None:
    (place / name).unlink(missing_ok=True)
    (place / name).symlink_to(target)


def unfolding(n_levels: int, key: str = "") -> str:
    """A description of ten times as many words with every line."""
    lines = [f"k0: &a0 [{'{x: y}, ' * 10}]"]
    for level in range(1, n_levels):
        lines.append(f"k{level}: &a{level} [{f'*a{level - 1}, ' * 10}]")
    lines.append(f"flavors: {{python_function: {{{key or 'code: '}*a{n_levels - 1}}}}}\n")
    return "\n".join(lines)


# name -> what is done to the artefact in the store; `c` is the canary's path
TAMPERINGS: dict[str, Callable[[Path, Path], object]] = {
    "weights swapped for a pickle": lambda p, c: put(p / WEIGHTS, a_pickle(c)),
    "values swapped for a pickle": lambda p, c: put(p / MODEL, a_pickle(c)),
    "a pickle slipped in": lambda p, c: put(p / "data/model/model.pkl", a_pickle(c)),
    "a torch file slipped in": lambda p, c: put(p / "data/model/weights.pt", a_pickle(c)),
    "an array of objects slipped in": lambda p, c: np.savez(
        p / "data/model/extra.npz", np.array([Payload(c)], dtype=object)
    ),
    "a python model": lambda p, c: (
        put(p / "python_model.pkl", a_pickle(c)),
        described(p, "code: null", "code: null\n    python_model: python_model.pkl"),
    ),
    "a model code path": lambda p, c: (
        put(p / "canary.py", code(c)),
        described(p, "code: null", "code: null\n    model_code_path: canary.py"),
    ),
    "code_paths": lambda p, c: (
        put(p / "code/endoprint/__init__.py", code(c)),
        described(p, "code: null", "code: code"),
    ),
    "code_paths to a place elsewhere": lambda p, c: (
        put(p.parent / "elsewhere/endoprint/__init__.py", code(c)),
        described(p, "code: null", f"code: {p.parent / 'elsewhere'}"),
    ),
    "a loader of its own": lambda p, c: (
        put(p / "data/model/canary.py", code(c)),
        described(p, "loader_module: endoprint.model", "loader_module: canary"),
    ),
    "a loader that comes with Python": lambda p, c: described(
        p, "loader_module: endoprint.model", "loader_module: this"
    ),
    "a second flavour": lambda p, c: (
        put(p / "model.pkl", a_pickle(c)),
        described(p, "flavors:\n", "flavors:\n  sklearn: {pickled_model: model.pkl}\n"),
    ),
    "a description that builds objects": lambda p, c: put(
        p / "MLmodel", f"!!python/object/apply:os.system ['touch {c}']\n"
    ),
    "a description that is no map": lambda p, c: put(p / "MLmodel", "- flavors\n"),
    "a description cut short": lambda p, c: put(p / "MLmodel", (p / "MLmodel").read_text()[:40]),
    "no description": lambda p, c: (p / "MLmodel").unlink(),
    "a description whose flavour is a word": lambda p, c: put(
        p / "MLmodel", "flavors: {python_function: x}\n"
    ),
    "a description of mixed keys": lambda p, c: put(
        p / "MLmodel", "flavors: {python_function: {}, 1: 2}\n"
    ),
    "a description of an impossible date": lambda p, c: put(
        p / "MLmodel", "flavors: 2001-99-99\n"
    ),
    "a description of an impossible number": lambda p, c: put(
        p / "MLmodel", f"flavors: 1{':1' * 900}.0\n"
    ),
    "a description nested without end": lambda p, c: put(
        p / "MLmodel", "flavors: " + "[" * 90_000
    ),
    "a description that unfolds": lambda p, c: put(p / "MLmodel", unfolding(9)),
    "a description that merges": lambda p, c: put(p / "MLmodel", unfolding(9, "<<: ")),
    "a description that goes on": lambda p, c: put(
        p / "MLmodel", f"flavors: {{python_function: {{code: {'x' * 90_000}}}}}\n"
    ),
    "an absolute data path": lambda p, c: described(p, "data: data/model", "data: /etc"),
    "a data path that climbs": lambda p, c: described(p, "data: data/model", "data: ../../model"),
    "one weight changed": lambda p, c: put(p / WEIGHTS, (p / WEIGHTS).read_bytes()[:-1] + b"\1"),
    "weights cut short": lambda p, c: put(p / WEIGHTS, (p / WEIGHTS).read_bytes()[:-64]),
    "weights of another shape": lambda p, c: reshape(p),
    "weights without an array": lambda p, c: drop(p),
    "weights that are no numbers": lambda p, c: fill(p),
    "no weights": lambda p, c: (p / WEIGHTS).unlink(),
    "values of another kind": lambda p, c: change(p, model="neighbours"),
    "values that name a module": lambda p, c: change(p, model="canary:Model"),
    "values that name a path": lambda p, c: change(p, model="../../canary"),
    "values with a field more": lambda p, c: change(p, config={"penalty": 1, "__reduce__": "x"}),
    "values without exposures": lambda p, c: change(p, exposures=[]),
    "values without genes": lambda p, c: change(p, genes=[]),
    "values of an exposure less": lambda p, c: change(p, exposures=["DMSO"]),
    "values that say nothing of their past": lambda p, c: change(p, provenance={}),
    "a temperature of a word": lambda p, c: change(p, population_temperature="warm"),
    "a temperature below nought": lambda p, c: change(p, population_temperature=-1.0),
    "a threshold of a word": lambda p, c: change(p, abstention_threshold="high"),
    "novelty that is no number": lambda p, c: fill(p, "novelty"),
    "novelty of another width": lambda p, c: narrow(p),
    "values cut short": lambda p, c: put(p / MODEL, (p / MODEL).read_text()[:100]),
    "values nested without end": lambda p, c: put(p / MODEL, "[" * 200_000),
    "a file more": lambda p, c: put(p / "data/model/more.json", "{}"),
    "a folder more": lambda p, c: put(p / "data/model/more/a.json", "{}"),
    "a hundred files": lambda p, c: [put(p / f"data/model/{i}.json", "{}") for i in range(100)],
    "oversized values": lambda p, c: grow(p / MODEL, GIB),
    "oversized weights": lambda p, c: grow(p / WEIGHTS, 9 * GIB),
    "an oversized description": lambda p, c: grow(p / "MLmodel", 2 * 10**6),
    "a link to a file elsewhere": lambda p, c: linked(p, MODEL, Path("/etc/hostname")),
    "a link that climbs": lambda p, c: linked(p, WEIGHTS, Path("../../../../x.safetensors")),
    "a link to a device": lambda p, c: linked(p, WEIGHTS, Path("/dev/zero")),
    "a link to a folder": lambda p, c: linked(p, "data/model/more", Path("/etc")),
    "a pipe": lambda p, c: ((p / WEIGHTS).unlink(), os.mkfifo(p / WEIGHTS)),
}


# -- fixtures -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = furnish(
        bare_workspace(tmp_path_factory.mktemp("registered") / "space"),
        planted_cells(n_units=6, n_cells=8),
    )
    register(made, fit_and_track(made))
    return made


@pytest.fixture(scope="module")
def sound(registered: Workspace) -> tuple[Path, str]:
    """One logged artefact that passes every check, and its digest."""
    place = place_of(registered)
    return place, artefact.digest(place / artefact.MODEL)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "canary"


def place_of(space: Workspace) -> Path:
    run_id = registry.find(space, "1").run_id
    model_id = tracking.client(space).get_run(run_id).data.tags["model_id"]
    return space.local / "artifacts/models" / model_id / "artifacts"


# -- the claims -----------------------------------------------------------------------------------
def test_the_planted_payload_would_write_its_canary(canary: Path) -> None:
    """Without this, a canary that stays away would show nothing."""
    pickle.loads(a_pickle(canary))
    assert canary.exists()


def test_an_artefact_as_logged_is_sound(sound: tuple[Path, str]) -> None:
    place, sha256 = sound
    assert artefact.check(place, sha256=sha256) == place / "data/model"


def refused(name: str, place: Path, canary: Path, open_it: Callable[[Path], object]) -> None:
    """Tamper with the artefact in a place; opening it is one line, and runs nothing of it."""
    TAMPERINGS[name](place, canary)
    with pytest.raises(Refusal) as refusal:
        open_it(place)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000
    assert not canary.exists()


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_artefact_is_refused_before_anything_of_it_runs(
    sound: tuple[Path, str], tmp_path: Path, canary: Path, name: str
) -> None:
    copy = shutil.copytree(sound[0], tmp_path / "artefact")
    refused(name, copy, canary, lambda place: artefact.check(place, sha256=sound[1]))


def opened_as_if_registered(place: Path) -> ExposureModel:
    artefact.check_entries(place)
    forged = artefact.digest(place / artefact.MODEL)
    return smoke.opened(artefact.check(place, sha256=forged), "version 1")


FORGED = [
    name
    for name in TAMPERINGS
    if name not in ("one weight changed", "a file more")  # another whole model: the tag's to know
]


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_digest_lets_no_broken_or_foreign_artefact_through(
    sound: tuple[Path, str], tmp_path: Path, canary: Path, name: str
) -> None:
    """Whoever can edit the version's tag as well still brings nothing that runs."""
    copy = shutil.copytree(sound[0], tmp_path / "artefact")
    refused(name, copy, canary, opened_as_if_registered)


@pytest.mark.parametrize("error", [ConnectionError("line"), OSError("disk")])
def test_a_disk_that_is_away_is_no_fault_of_a_model(
    sound: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def load(folder: Path) -> ExposureModel:
        raise error

    monkeypatch.setattr(smoke, "load", load)
    with pytest.raises(type(error)):
        smoke.opened(sound[0] / artefact.MODEL, "version 1")


@pytest.mark.parametrize(
    "name",
    [
        "weights swapped for a pickle",
        "code_paths",
        "a python model",
        "one weight changed",
        "oversized weights",
        "a link to a device",
    ],
)
def test_what_was_tampered_with_in_the_store_never_comes_here(
    registered: Workspace, tmp_path: Path, canary: Path, name: str
) -> None:
    space = moved_copy(registered, tmp_path / "space")
    refused(name, place_of(space), canary, lambda place: load_version(space, "1"))
    kept = [path for path in (space.local / "models").glob("*") if path.is_dir()]
    assert kept == []


def test_a_version_without_a_digest_is_not_loaded(
    registered: Workspace, tmp_path: Path, canary: Path
) -> None:
    space = moved_copy(registered, tmp_path / "space")
    store = tracking.client(space)
    store.set_model_version_tag("endoprint-toy", "1", "model_sha256", "../../etc")
    with pytest.raises(Refusal, match="carries its sha256"):
        load_version(space, "1")
    store.delete_model_version_tag("endoprint-toy", "1", "model_sha256")
    with pytest.raises(Refusal, match="without model_sha256"):
        load_version(space, "1")


def test_a_version_whose_source_is_another_place_is_not_loaded(
    registered: Workspace, tmp_path: Path, canary: Path
) -> None:
    space = moved_copy(registered, tmp_path / "space")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(place_of(space), elsewhere)
    (elsewhere / WEIGHTS).write_bytes(a_pickle(canary))
    made = tracking.client(space).create_model_version(
        "endoprint-toy",
        source=elsewhere.as_uri(),
        run_id=registry.find(space, "1").run_id,
        tags=dict(registry.find(space, "1").tags),
    )
    with pytest.raises(Refusal):
        load_version(space, str(made.version))
    with pytest.raises(Refusal):
        rollback(space, str(made.version))
    assert not canary.exists()


def test_a_model_that_gives_no_probabilities_is_refused(
    registered: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from endoprint.models.logistic import Logistic

    monkeypatch.setattr(
        Logistic, "evidence", lambda self, cells: np.full((cells.n_obs, 3), np.nan)
    )
    with pytest.raises(Refusal, match="answers with probabilities"):
        load_version(registered, "1")


def test_curated_cells_are_scored_by_what_passed_every_check(registered: Workspace) -> None:
    _, model = load_version(registered, "1")
    answer = model.predict_proba(curated.load(registered.cells))
    assert np.allclose(answer.sum(axis=1), 1.0)
