"""What pays on this machine, bf16 or compiled code: asked of it by a few steps, once.

Neither is known beforehand. On one processor without bf16 instructions bf16 took ten times as
long; on one with them (AMX) a step of 2 x 64 takes 1.6 times as long and one of 6 x 256 over
1,024 tokens 0.6 times. Compiling takes half a minute, and on a processor the step was slower then.

The answer is remembered, so that every fit of a workspace, and one taken up again, computes alike.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock

Clock = Callable[[], float]  # seconds
Step = Callable[[], None]

GAIN = 1.25  # how much faster a way must be: timings of one way differ by some 10 % (a guess)
REPEATS = 3  # after one to warm up; the fastest counts
PLAIN, BF16, COMPILED = "fp32", "bf16", "compiled"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """How training steps are computed."""

    has_bf16: bool = False
    is_compiled: bool = False


def has_bf16(device: torch.device) -> bool:
    """Say whether a device has instructions for bf16; without, it is emulated, and slow."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def clock_of(device: torch.device) -> Clock:
    """Return the clock for steps on a device.

    A processor's own seconds, which other processes do not lengthen; for a GPU, those on the wall.
    """
    if device.type != "cuda":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall


def seconds(step: Step, clock: Clock) -> tuple[float, float]:
    """Return what the first step and the fastest of those after it took."""
    took = []
    for _ in range(1 + REPEATS):
        began = clock()
        step()
        took.append(clock() - began)
    return took[0], min(took[1:])


def choose(
    ways: Mapping[str, Step], clock: Clock, *, n_steps: int, start: str = PLAIN
) -> dict[str, float | str]:
    """Time ways of taking a step; return `way`, the one that pays, and every way's seconds.

    A way pays if it is faster than those before it by `GAIN` and its first step, which may
    compile, is earned back within the `n_steps` to come. One that fails is left out, and said.
    """
    said: dict[str, float | str] = {}
    best, best_seconds = start, float("inf")
    for name, step in ways.items():
        try:
            first, took = seconds(step, clock)
        except RuntimeError as error:  # no compiler here, a kernel that is missing
            log.warning("%s does not run here: %s", name, str(error).partition("\n")[0])
            continue
        said[name] = took
        is_first = best_seconds == float("inf")
        pays = took * GAIN < best_seconds and first < (best_seconds - took) * n_steps
        if is_first or pays:
            best, best_seconds = name, took
    return {"way": best, **said}


def remembered(
    path: Path | None, key: Mapping[str, object], find: Callable[[], dict[str, float | str]]
) -> dict[str, float | str]:
    """Return what was found out before under a key, else find it out and keep it.

    `path`: JSON, made when needed; None, or a damaged one: within this process only.
    """
    name = json.dumps(key, sort_keys=True)
    if name in _FOUND:
        return _FOUND[name]
    if path is None:
        _FOUND[name] = find()
        return _FOUND[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        if name not in known:
            known[name] = find()
            part = path.with_name(f"{path.name}.part")
            part.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
            os.replace(part, path)
    found: dict[str, float | str] = known[name]
    _FOUND[name] = found
    return found


_FOUND: dict[str, dict[str, float | str]] = {}  # of this process; filled by `remembered` alone


def key_of(device: torch.device) -> dict[str, object]:
    """Return what timings depend on besides the network: device, threads, torch."""
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    model = torch.cpu.get_capabilities().get("cpu_name")
    return {
        "device": named or f"{model}, bf16 {has_bf16(device)}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def candidates(
    precision: Literal["auto", "fp32", "bf16"],
    compiling: Literal["auto", "off", "on"],
    device: torch.device,
) -> list[Way]:
    """Return the ways worth timing on a device, plainest first; one way needs no timing."""
    if precision == "auto":
        choices = [False, True] if has_bf16(device) else [False]
    else:
        choices = [precision == "bf16"]
    ways = [Way(each, compiling == "on") for each in choices]
    if compiling == "auto" and device.type == "cuda":
        ways += [Way(choices[-1], is_compiled=True)]
    return ways


def named(way: Way) -> str:
    """Return what a way is called where it is kept."""
    return " ".join([BF16 if way.has_bf16 else PLAIN, *([COMPILED] if way.is_compiled else [])])
