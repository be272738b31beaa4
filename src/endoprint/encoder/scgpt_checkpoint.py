"""Checkpoints of scGPT, as released: a folder of `args.json`, `vocab.json` and weights.

Weights are safetensors, or the released `best_model.pt`: a pickle, read without executing any of
it and converted once. Flash attention's names and torch's are both known. Upstream loads what
fits and says nothing of the rest; here a missing tensor is refused and an unused one listed.
"""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from endoprint.config import Refusal
from endoprint.encoder.backbone import LABEL, WEIGHTS, Origin, digest
from endoprint.encoder.scgpt_backbone import Classifier, ScgptEncoder, Shape, build

ARGS, VOCABULARY, PICKLED = "args.json", "vocab.json", "best_model.pt"
SPECIALS = ("<pad>", "<cls>", "<eoc>")  # appended by upstream, in this order, where absent
# flash attention's names -> torch's; q, k and v are stacked alike in both
FLASH = (
    ("self_attn._impl.Wqkv.", "self_attn.in_proj_"),
    ("self_attn.Wqkv.", "self_attn.in_proj_"),
    ("self_attn._impl.out_proj.", "self_attn.out_proj."),
)
BATCH_NORM = ("bn.", "dsbn.")
HEAD = "cls_decoder."


@dataclass(frozen=True)
class Checkpoint:
    """What a folder of scGPT holds, and what of it went unused."""

    encoder: ScgptEncoder
    classifier: Classifier | None  # of a checkpoint fine-tuned upstream
    tokens: dict[str, int]  # gene symbol or special -> row of the embedding
    n_bins: int
    origin: Origin
    unloaded: list[str]  # keys of the weight file that nothing here reads


def is_checkpoint(folder: Path) -> bool:
    """Say whether a folder holds an scGPT, and not another encoder."""
    return (folder / ARGS).is_file() and (folder / VOCABULARY).is_file()


def read(
    folder: Path, *, dropout: float | None = None, attention_dropout: float = 0.0
) -> Checkpoint:
    """Return the encoder of a checkpoint folder; every tensor of it must be there.

    The folder holds `args.json`, `vocab.json` and the weights: `model.safetensors`, or the
    released `best_model.pt`, which is read without executing anything and converted once.
    `dropout` None keeps the checkpoint's own.
    """
    args, tokens = _json(folder / ARGS), _json(folder / VOCABULARY)
    style = args.get("input_emb_style", "continuous")
    if style != "continuous" or args.get("pre_norm"):
        raise Refusal(
            "an scGPT is read with continuous levels and post-norm layers, as the released are",
            f"input_emb_style {style}, pre_norm {args.get('pre_norm', False)} in {folder}",
            "use another checkpoint",
        )
    weights, sha256 = _weights(folder)
    for special in SPECIALS:
        tokens.setdefault(special, len(tokens))
    try:
        shape = Shape(
            n_tokens=len(tokens),
            width=int(args["embsize"]),
            layers=int(args["nlayers"]),
            heads=int(args["nheads"]),
            ffn=int(args["d_hid"]),
        )
        n_bins = int(args.get("n_bins", 51))
        p = float(args.get("dropout", 0.2)) if dropout is None else dropout
        if sorted(tokens.values()) != [*range(len(tokens))]:
            raise ValueError(f"the rows in {VOCABULARY} do not count up from 0")
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(
            f"{ARGS} and {VOCABULARY} tell an scGPT's shape",
            f"{type(error).__name__} {error} in {folder}",
            "fetch the checkpoint again",
        ) from None
    encoder = build(shape, seed=0, dropout=p, attention_dropout=attention_dropout)
    _put(encoder, weights, where=str(folder))
    classifier = _classifier(weights, shape.width)
    used = set(encoder.state_dict())
    if classifier is not None:
        used |= {f"{HEAD}{key}" for key in classifier.state_dict()}
    return Checkpoint(
        encoder,
        classifier,
        tokens,
        n_bins,
        _origin(folder, sha256),
        sorted(set(weights) - used),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refusal(
            f"an scGPT's folder holds {ARGS} and {VOCABULARY}", str(error), "fetch it again"
        ) from None
    if not isinstance(held, dict):
        raise Refusal(f"{path.name} is a JSON object", type(held).__name__, "fetch it again")
    return held


def _weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    """Return the weights under torch's names, and the sha256 of the file they came in."""
    ours, theirs = folder / WEIGHTS, folder / PICKLED
    try:
        origin = _converted_from(ours) if ours.is_file() else None
        if theirs.is_file() and (origin is not None or not ours.is_file()):
            sha256 = digest(theirs)
            if origin == sha256:
                held = load_file(str(ours))
            else:
                held = torch.load(theirs, map_location="cpu", weights_only=True)
                _convert(held, ours, sha256)
        elif ours.is_file():
            held, sha256 = load_file(str(ours)), origin or digest(ours)
        else:
            raise Refusal(
                f"an scGPT's folder holds {WEIGHTS} or {PICKLED}",
                f"neither in {folder}",
                "fetch the checkpoint again",
            )
        named = {_torch_name(key): tensor.float() for key, tensor in held.items()}
    except (
        *(OSError, ValueError, TypeError, AttributeError, RuntimeError, EOFError),
        *(SafetensorError, pickle.UnpicklingError),
    ) as error:
        raise Refusal(
            "an scGPT's weights are plain tensors, in safetensors or a state dict",
            f"{folder.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "fetch the checkpoint again",
        ) from None
    return named, sha256


def _converted_from(path: Path) -> str | None:
    """Return the sha256 of the pickle a weight file was made from, if it was."""
    with safe_open(str(path), framework="pt") as held:
        metadata: dict[str, str] = held.metadata() or {}
    return metadata.get("converted_from")


def _convert(weights: dict[str, Tensor], path: Path, sha256: str) -> None:
    """Write plain tensors beside the pickle, so that it is read once."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    plain = {key: tensor.clone().contiguous() for key, tensor in weights.items()}
    try:
        save_file(plain, str(part), metadata={"format": "pt", "converted_from": sha256})
        os.replace(part, path)
    except (OSError, SafetensorError):
        part.unlink(missing_ok=True)  # a folder that may not be written to: read again next time


def _torch_name(key: str) -> str:
    for flash, plain in FLASH:
        key = key.replace(flash, plain)
    return key


def _put(encoder: ScgptEncoder, weights: dict[str, Tensor], *, where: str) -> None:
    own = encoder.state_dict()
    wrong = [f"missing {key}" for key in own if key not in weights]
    wrong += [
        f"wrong shape {key}"
        for key, tensor in own.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    # left out in silence they would change every number
    wrong += [f"batch normalisation {key}" for key in weights if key.startswith(BATCH_NORM)]
    if wrong:
        raise Refusal(
            f"an scGPT's weights must fit its {ARGS} and {VOCABULARY}",
            f"{', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''} in {where}",
            "use a checkpoint with its own files, made without batch normalisation",
        )
    encoder.load_state_dict({key: weights[key] for key in own})


def _classifier(weights: dict[str, Tensor], width: int) -> Classifier | None:
    held = {key[len(HEAD) :]: tensor for key, tensor in weights.items() if key.startswith(HEAD)}
    if "out_layer.weight" not in held:
        return None
    n_layers = 1 + sum(key.endswith(".weight") for key in held if key != "out_layer.weight") // 2
    made = Classifier(width, len(held["out_layer.weight"]), n_layers)
    own = made.state_dict()
    if set(own) != set(held) or any(own[key].shape != held[key].shape for key in own):
        return None  # another kind of head: its keys are listed as unloaded
    made.load_state_dict(held)
    return made


def _origin(folder: Path, sha256: str) -> Origin:
    beside = _json(folder / LABEL) if (folder / LABEL).is_file() else {}
    if beside.get("sha256", sha256) != sha256:
        raise Refusal(
            f"{LABEL} must describe the weights beside it",
            f"sha256 {sha256[:12]}, labelled {str(beside['sha256'])[:12]}",
            "fetch the checkpoint again",
        )
    label = str(beside.get("label", f"supplied scGPT checkpoint {folder.name}, origin unknown"))
    units = [str(unit) for unit in beside.get("units", [])]
    return Origin(label, "supplied", sha256, units=units)
