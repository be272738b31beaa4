"""Geneformer's official dictionaries: where they are, what their sha256 is, how to read them.

They are published as pickles. No pickle is ever loaded here: `read_pickled_dictionary` walks the
opcodes itself and knows only dictionaries, strings, numbers and numpy scalars.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickletools
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np

from endoprint.config import Refusal

MAX_DICTIONARY_BYTES = 64 * 2**20  # the largest published one has 6 MB


@dataclass(frozen=True)
class Series:
    """One published vocabulary: where its dictionaries are, and the sha256 of each.

    `files`: role -> (file name without ending, sha256 of the pickle, sha256 of the JSON). The JSON
    is `json.dumps` of the same entries in the same order, so either form can be checked.
    """

    tag: str
    folder: str  # inside the hub's repository
    specials: tuple[str, ...]
    max_length: int  # specials included
    files: dict[str, tuple[str, str, str]]


# Hub revision and path as third parties pin them; sha256 of the pickles from the official
# large-file pointers, of the JSON computed from the same entries.
HUB = "https://huggingface.co"
REPOSITORY = "ctheodoris/Geneformer"
REVISION = "04c2b2e84da7c0f385c3f9ad8f3ec24bab6650e5"
SERIES: dict[str, Series] = {
    "v1": Series(
        "gc30M",
        "geneformer/gene_dictionaries_30m",
        ("<pad>", "<mask>"),
        2048,
        {
            "tokens": (
                "token_dictionary_gc30M",
                "ab9dc40973fa5224d77b793e2fd114cacf3d08423ed9c4c49caf0ba9c7f218f1",
                "a24af6551494d0b21d1e3d8977d218efad7238284e89b588c6dd02fe980923c2",
            ),
            "medians": (
                "gene_median_dictionary_gc30M",
                "b3b589bb5ec75040d05fc44dd6bf0184cf87f3c362cf158d196a6ed3b7fe5f39",
                "507ba58dafa0ac1f7f6ff97ed321026de1922a5e4cfba22b8b92526e12766fa9",
            ),
            # its mapping dictionary is the identity and knows no symbol; the names do
            "aliases": (
                "gene_name_id_dict_gc30M",
                "55e67962e79c0039a6c32d43c5c99f38e51964bbcfa32f736150ee1e285c438c",
                "7a9aaf0682834fd3c19e4941c2db569cccb4838a88a624eb662fe28613190f3c",
            ),
        },
    ),
    "v2": Series(
        "gc104M",
        "geneformer",
        ("<pad>", "<mask>", "<cls>", "<eos>"),
        4096,
        {
            "tokens": (
                "token_dictionary_gc104M",
                "67c445f4385127adfc48dcc072320cd65d6822829bf27dd38070e6e787bc597f",
                "15332ed638aea556a4cd23f9f02d2ff2a102dd5be8774a49bcf14b24a5c72ab1",
            ),
            "medians": (
                "gene_median_dictionary_gc104M",
                "a51c53f6a771d64508dfaf61529df70e394c53bd20856926117ae5d641a24bf5",
                "e2ec227f16cc00171cd1c1a78b2c9311f9f70596c59f3c661d1220779bdc03f3",
            ),
            "aliases": (
                "ensembl_mapping_dict_gc104M",
                "0819bcbd869cfa14279449b037eb9ed1d09a91310e77bd1a19d927465030e95c",
                "7aa36bf6a8f3781e5c82569ff7f5e556c459039de36269530041369a9529449c",
            ),
        },
    ),
}


def fetch(name: str, folder: str | Path, *, base: str | None = None) -> Path:
    """Download a published vocabulary's dictionaries into a folder, as JSON; return the folder.

    What is there with the right sha256 stays. The hub's pickles are checked against their sha256,
    read by the restricted reader and never kept. `base`: the hub's address; else the environment
    variable HF_ENDPOINT, else the public hub.
    """
    if name not in SERIES:
        raise Refusal("a published vocabulary is v1 or v2", name, "name one of them")
    series, folder = SERIES[name], Path(folder)
    hub = address(base)
    for stem, sha256_pickle, sha256_json in series.files.values():
        target = folder / f"{stem}.json"
        if target.is_file() and _sha256(target.read_bytes()) == sha256_json:
            continue
        url = f"{hub}/{series.folder}/{stem}.pkl"
        with asked(url, f"vocabulary {name}", "give a folder of the dictionaries") as answer:
            raw = answer.read(MAX_DICTIONARY_BYTES)
        _must_be(sha256_pickle, raw, url)
        converted = json.dumps(read_pickled_dictionary(raw, url)).encode()
        _must_be(sha256_json, converted, f"{url} as JSON")
        put(target, converted)
    return folder


def address(base: str | None = None) -> str:
    """Return where the pinned revision's files are: `base`, else HF_ENDPOINT, else the hub."""
    base = (base or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    if not base.startswith(("https://", "http://")):
        raise Refusal("the hub's address begins with https:// or http://", base, "mend it")
    return f"{base}/{REPOSITORY}/resolve/{REVISION}"


@contextmanager
def asked(url: str, what: str, instead: str, *, start: int = 0) -> Iterator[HTTPResponse]:
    """Give the hub's answer, from byte `start` on if it can; what goes wrong is one line.

    `what` is fetched, `instead` is what else can be done.
    """
    wanted = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(wanted, timeout=60) as answer:
            yield answer
    except Refusal:
        raise
    except (OSError, ValueError, HTTPException) as error:
        raise Refusal(
            f"{what} is fetched from the hub", f"{error} at {url}", f"try again, or {instead}"
        ) from error


def find(folder: Path, series: Series, role: str) -> Path | None:
    """Return where a folder holds one dictionary of a series, JSON before pickle, or None."""
    stem = series.files[role][0]
    # the hub's own tree keeps V1's dictionaries one folder down
    for place in (folder, folder / Path(series.folder).name):
        for ending in (".json", ".pkl"):
            if (place / f"{stem}{ending}").is_file():
                return place / f"{stem}{ending}"
    return None


def read_official(folder: Path, series: Series, role: str) -> dict[str, Any]:
    """Read one dictionary of a series from a folder, refusing any but the published one."""
    stem, sha256_pickle, sha256_json = series.files[role]
    path = find(folder, series, role)
    if path is None:
        raise Refusal(
            f"vocabulary {series.tag} needs {stem}.json or .pkl",
            f"neither in {folder}",
            "name the folder that holds Geneformer's dictionaries, or fetch them",
        )
    raw = path.read_bytes()
    _must_be(sha256_json if path.suffix == ".json" else sha256_pickle, raw, path.name)
    return dict(json.loads(raw) if path.suffix == ".json" else read_pickled_dictionary(raw, stem))


def _must_be(sha256: str, raw: bytes, name: str) -> None:
    if _sha256(raw) != sha256:
        raise Refusal(
            f"{name} must have the published sha256 {sha256[:12]}",
            f"{_sha256(raw)[:12]} ({len(raw)} bytes)",
            "fetch it again; for dictionaries of your own, fit a vocabulary instead",
        )


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def put(path: Path, raw: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(raw)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# -- the restricted reader ----------------------------------------------------------------------
@dataclass
class _Dtype:
    code: str
    is_big_endian: bool = False


# The only names a pickle may mention. They are recognised, never imported or called.
_NAMES = {
    ("numpy", "dtype"): "dtype",
    ("numpy.core.multiarray", "scalar"): "scalar",
    ("numpy._core.multiarray", "scalar"): "scalar",
    ("_codecs", "encode"): "encode",  # how protocol 2 spells bytes
}
_NUMBER = re.compile(r"[iuf][1248]")
_PUSHES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STORES = {"PUT", "BINPUT", "LONG_BINPUT"}
_FETCHES = {"GET", "BINGET", "LONG_BINGET"}


class _Forbidden(ValueError):
    """The pickle holds something else than a dictionary of numbers and strings."""


@dataclass
class _Machine:
    """A pickle machine that can build dictionaries, strings and numbers, and nothing else."""

    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def step(self, opcode: str, value: Any) -> None:
        stack = self.stack
        if opcode in _PUSHES:
            stack.append(value)
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif opcode in _STORES:
            self.memo[value] = stack[-1]
        elif opcode in _FETCHES:
            stack.append(self.memo[value])
        elif opcode == "MARK":
            self.marks.append(len(stack))
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if opcode == "SETITEM" else self._pop_to_mark()
            _dictionary(stack[-1]).update(zip(items[::2], items[1::2], strict=True))
        elif opcode == "EMPTY_DICT":
            stack.append({})
        elif opcode == "DICT":
            items = self._pop_to_mark()
            stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif opcode in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[opcode])))
        elif opcode == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode == "GLOBAL":
            stack.append(_name(*value.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            stack.append(_name(*self._pop(2)))
        elif opcode == "REDUCE":
            name, arguments = self._pop(2)
            stack.append(_made(name, arguments))
        elif opcode == "BUILD":
            (state,) = self._pop(1)
            if not isinstance(stack[-1], _Dtype):
                raise _Forbidden("an object with state")
            stack[-1].is_big_endian = state[1] == ">"
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise _Forbidden(opcode)

    def _pop(self, n: int) -> list[Any]:
        if len(self.stack) < n:
            raise _Forbidden("an empty stack")
        start = len(self.stack) - n
        popped = self.stack[start:]
        del self.stack[start:]
        return popped

    def _pop_to_mark(self) -> list[Any]:
        return self._pop(len(self.stack) - self.marks.pop())


def _dictionary(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _Forbidden(f"items of a {type(value).__name__}")
    return value


def _name(module: str, name: str) -> tuple[str]:
    if (module, name) not in _NAMES:
        raise _Forbidden(f"{module}.{name}")
    return (_NAMES[module, name],)


def _made(name: Any, arguments: Any) -> Any:
    match name, arguments:
        case ("dtype",), (str(code), *_) if _NUMBER.fullmatch(code):
            return _Dtype(code)
        case ("scalar",), (_Dtype() as kind, bytes(raw)):
            dtype = np.dtype((">" if kind.is_big_endian else "<") + kind.code)
            return np.frombuffer(raw, dtype=dtype)[0].item()
        case ("encode",), (str(text), "latin1"):
            return text.encode("latin1")
    raise _Forbidden(f"a call of {name!r}")


def read_pickled_dictionary(raw: bytes, name: str) -> dict[str, int | float | str]:
    """Read a pickled dictionary of strings and numbers without running anything it says.

    Refuses, at the first opcode that asks for more, whatever else the pickle holds.
    """
    machine = _Machine()
    try:
        for opcode, value, _ in pickletools.genops(raw):
            machine.step(opcode.name, value)
        found = _dictionary(machine.stack[-1])
        if not all(type(k) is str and type(v) in (int, float, str) for k, v in found.items()):
            raise _Forbidden("entries that are neither strings nor numbers")
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise Refusal(
            f"{name} must be a pickled dictionary of strings and numbers",
            f"{type(error).__name__.strip('_')}: {error}",
            "take the published dictionary",
        ) from None
    return found
