"""A training run that survives being killed: one safetensors file per epoch, replaced whole.

Weights, optimiser and plain values go into the same file, so that no half of a pair is ever read.
Randomness needs no saving: every epoch draws from its own seed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save(
    path: Path,
    values: dict[str, Any],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor] | None = None,
) -> None:
    """Write everything a run needs to go on; `best` holds the weights of its best epoch."""
    held = {f"module.{key}": tensor for key, tensor in snapshot(module).items()}
    held |= {f"best.{key}": tensor for key, tensor in (best or {}).items()}
    for number, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            held[f"optimizer.{number}.{slot}"] = torch.as_tensor(value).detach().cpu().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    save_file(held, str(part), metadata={"values": json.dumps(values)})
    os.replace(part, path)


def resume(
    path: Path, fingerprint: str, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Take up a run where `save` left it; return its values and best weights.

    None where there is nothing to take up: no file, a damaged one, or one of another run
    (`values["fingerprint"]` differs).
    """
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as held:
            values: dict[str, Any] = json.loads((held.metadata() or {}).get("values", "{}"))
            if values.get("fingerprint") != fingerprint:
                return None
            tensors = {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError):
        return None
    module.load_state_dict(_under("module.", tensors), strict=True)
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _under("optimizer.", tensors).items():
        number, _, slot = key.partition(".")
        slots.setdefault(int(number), {})[slot] = tensor
    state = optimizer.state_dict()
    state["state"] = slots
    optimizer.load_state_dict(state)
    return values, _under("best.", tensors)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a module's weights and buffers, on the processor."""
    return {
        key: tensor.detach().cpu().clone().contiguous()
        for key, tensor in module.state_dict().items()
    }


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
