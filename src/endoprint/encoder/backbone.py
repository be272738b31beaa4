"""The backbone: Geneformer's BERT, read from a folder or made small from scratch.

A checkpoint is a folder with `config.json` and `model.safetensors`; nothing executable is read.
Where weights come from is always said (`Origin`): a small backbone pre-trained here is not the
published Geneformer.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from endoprint.config import Refusal
from endoprint.vocabulary import Vocabulary

WEIGHTS, SHAPE, LABEL = "model.safetensors", "config.json", "backbone.json"
VOCABULARY = "vocabulary.json"

# sha256 of the official weight files, from the hub's large-file pointers (facts of November 2026)
PUBLISHED = {
    "a5e33a757431643b3697de7ef6127950cdc49e06e58d4266b3a3ab191b683f14": "Geneformer V1-10M",
    "fff5cba29ddd8792991fa77b4872246fbe548a178cebda3775cdc72b67780e7f": "Geneformer V2-104M",
    "827738139bfed4bafa9d1f3df7c6146da2e3b85f7225076adc32c6eda0ba4357": (
        "Geneformer V2-104M_CLcancer"
    ),
    "965ceccea81953d362081ef3843560a0e4fef88d396c28017881f1e94b1246f3": "Geneformer V2-316M",
    # older shapes: from the pointers of a public copy, whose sizes are the published ones
    "4365ba23e393fcfa0e65a94ac64a0983cd788bd23a8d4914f4ab66f85cfe043c": "Geneformer gf-12L-95M",
    "2451adeed240c165634fea60ccba17063da8a2843ea9fcdcc0ce185720bf0dc2": (
        "Geneformer gf-12L-95M_CLcancer"
    ),
    "db85c081a6d392448955c7d0185e26aba74507518df991ca8c69ee9108ce8bbf": "Geneformer gf-20L-95M",
}

# What a checkpoint may hold beyond the encoder: other heads, and the decoder tied to the tokens
IGNORED = ("bert.pooler.", "classifier.", "cls.seq_relationship.", "cls.predictions.decoder.")
IGNORED_BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")


@dataclass(frozen=True)
class Origin:
    """Where a backbone's weights come from, and which units they have seen."""

    label: str  # a sentence for the reader of a result
    origin: Literal["published", "pretrained here", "supplied", "scratch"]
    sha256: str | None = None  # of model.safetensors
    vocabulary_sha256: str | None = None  # None where the folder does not say
    units: list[str] = field(default_factory=list)  # biological units of the pre-training cells

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for a model's provenance."""
        return asdict(self)


def shape_of(
    *, layers: int, hidden: int, heads: int, ffn: int, vocabulary_size: int, max_length: int
) -> BertConfig:
    """Return a small backbone's shape, Geneformer's otherwise: relu, post-norm, learned ranks."""
    if hidden % heads:
        raise Refusal(
            "a backbone's width must be a multiple of its heads",
            f"hidden {hidden}, heads {heads}",
            "change one of them",
        )
    return BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        hidden_act="relu",
        max_position_embeddings=max_length,
        layer_norm_eps=1e-12,
        initializer_range=0.02,
        pad_token_id=0,
    )


def build(
    shape: BertConfig, *, seed: int, dropout: float, attention_dropout: float = 0.0
) -> BertForMaskedLM:
    """Return a backbone with random weights, the same for the same seed.

    Attention dropout is off unless asked for: it keeps the fused attention path away and costs
    2.3 times the time on a processor.
    """
    shape.hidden_dropout_prob = dropout
    shape.attention_probs_dropout_prob = attention_dropout
    shape._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(shape)


def start_as_identity(backbone: BertForMaskedLM) -> None:
    """Let every layer begin as the identity, so that depth cannot hurt the layer-free start.

    The two output projections of each layer become zero (as in Zhang 2019, 1901.09321); only for
    weights that were drawn at random.
    """
    for layer in backbone.bert.encoder.layer:
        for projection in (layer.attention.output.dense, layer.output.dense):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)


def read(
    folder: Path, *, dropout: float | None = None, attention_dropout: float = 0.0
) -> BertForMaskedLM:
    """Return the backbone of a checkpoint folder; every tensor of the encoder must be there.

    `dropout` None keeps the checkpoint's own. A checkpoint without the masked-learning head (one
    fine-tuned elsewhere) gets a fresh one, which fine-tuning never uses.
    """
    for name in (SHAPE, WEIGHTS):
        if not (folder / name).is_file():
            raise Refusal(
                f"a backbone's folder holds {SHAPE} and {WEIGHTS}",
                f"no {name} in {folder}",
                "convert a .bin with transformers' save_pretrained, or pre-train one",
            )
    try:
        shape = BertConfig.from_dict(json.loads((folder / SHAPE).read_text()))
        weights = load_file(str(folder / WEIGHTS))
    except (ValueError, TypeError, SafetensorError) as error:
        raise Refusal(
            "a backbone is JSON and safetensors", f"{folder}: {error}", "fetch it again"
        ) from None
    model = build(
        shape,
        seed=0,
        dropout=shape.hidden_dropout_prob if dropout is None else dropout,
        attention_dropout=attention_dropout,
    )
    put(model, weights, where=str(folder))
    return model


def put(model: BertForMaskedLM, weights: dict[str, Tensor], *, where: str) -> None:
    """Copy a checkpoint's tensors into a backbone, refusing any that are missing or misshapen."""
    own = {key for key, _ in model.named_parameters()}
    weights = {
        key: value
        for key, value in weights.items()
        if not key.startswith(IGNORED) and key not in IGNORED_BUFFERS
    }
    missing = sorted(key for key in own - set(weights) if key.startswith("bert."))
    head = sorted(key for key in own - set(weights) if not key.startswith("bert."))
    foreign = sorted(set(weights) - own)
    misshapen = sorted(
        key
        for key, parameter in model.named_parameters()
        if key in weights and weights[key].shape != parameter.shape
    )
    has_part_of_a_head = bool(head) and any(not key.startswith("bert.") for key in weights)
    if missing or foreign or misshapen or has_part_of_a_head:
        wrong = [f"missing {key}" for key in missing] + [f"foreign {key}" for key in foreign]
        wrong += [f"wrong shape {key}" for key in misshapen]
        wrong += [f"missing {key}" for key in head] if has_part_of_a_head else []
        raise Refusal(
            f"{WEIGHTS} must fit {SHAPE}",
            f"{', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''} in {where}",
            "use a BertForMaskedLM checkpoint with its own config",
        )
    model.load_state_dict(weights, strict=False)
    model.tie_weights()


def origin_of(folder: Path) -> Origin:
    """Say where a folder's weights come from: by their hash, else by the label beside them."""
    sha256 = digest(folder / WEIGHTS)
    beside: dict[str, Any] = {}
    if (folder / LABEL).is_file():
        beside = json.loads((folder / LABEL).read_text())
        if beside.get("sha256") not in (None, sha256):
            raise Refusal(
                f"{LABEL} must describe the weights beside it",
                f"sha256 {sha256[:12]}, labelled {str(beside['sha256'])[:12]}",
                "fetch or pre-train the backbone again",
            )
    if sha256 in PUBLISHED:
        return Origin(
            f"{PUBLISHED[sha256]}, published weights",
            "published",
            sha256,
            beside.get("vocabulary_sha256"),
        )
    if beside:
        return Origin(
            str(beside["label"]),
            "pretrained here",
            sha256,
            beside.get("vocabulary_sha256"),
            [str(unit) for unit in beside.get("units", [])],
        )
    return Origin(f"supplied checkpoint {folder.name}, origin unknown", "supplied", sha256)


def write(folder: Path, model: BertForMaskedLM) -> str:
    """Write config.json and model.safetensors as transformers does; return the weights' sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = model.config.to_dict() | {"architectures": ["BertForMaskedLM"]}
    replace_text(folder / SHAPE, json.dumps(shape, indent=1, sort_keys=True) + "\n")
    save_file(weights_of(model), str(folder / f"{WEIGHTS}.part"), metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS}.part", folder / WEIGHTS)
    return digest(folder / WEIGHTS)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter once, on the processor; tied ones under their first name."""
    return {key: p.detach().cpu().contiguous() for key, p in model.named_parameters()}


def replace_text(path: Path, text: str) -> None:
    """Write a file beside itself, then put it in place: never half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def digest(path: Path) -> str:
    """Return a file's sha256."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def refuse_mismatch(origin: Origin, model: BertForMaskedLM, vocabulary: Vocabulary) -> None:
    """Refuse a backbone that was made for other tokens: its genes would be read as other genes."""
    if origin.vocabulary_sha256 is not None:
        vocabulary.require(origin.vocabulary_sha256, "the backbone")
    for what, own, asked in (
        ("tokens", model.config.vocab_size, len(vocabulary)),
        ("ranks", model.config.max_position_embeddings, vocabulary.max_length),
    ):
        if own != asked:
            raise Refusal(
                f"a backbone must have as many {what} as its vocabulary",
                f"{own} against {asked}",
                "use the vocabulary the backbone was made with",
            )
