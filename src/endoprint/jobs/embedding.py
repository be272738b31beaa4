"""The job that embeds cells with a backbone, published or one's own, that is only read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from endoprint import progress
from endoprint.config import Refusal
from endoprint.jobs.data import load_vocabulary
from endoprint.jobs.materials import backbone_folder
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    from endoprint.encoder.embedding import Layer, Mode


def embed(
    file: str,
    *,
    out: str,
    model: str,
    mode: str = "cell",
    layer: str = "second-to-last",
    vocabulary: str = "",
    dictionaries: str = "",
    counts: str = "",
    key: str = "",
    workspace: str = ".",
) -> dict[str, Any]:
    """Write one vector per cell of a file, in its order; return what was made.

    `model`: a folder, or a published name, fetched once into the workspace's `.endoprint/`.
    `vocabulary`: none: the one beside the model, else the published one its shape speaks of.
    """
    modes: dict[str, Mode] = {"cell": "cell", "cls": "cls"}
    layers: dict[str, Layer] = {"second-to-last": "second-to-last", "last": "last"}
    for what, chosen, known in (("mode", mode, list(modes)), ("layer", layer, list(layers))):
        if chosen not in known:
            raise Refusal(f"--{what} is {' or '.join(known)}", chosen, "name one of them")
    if not Path(file).exists():
        raise Refusal("cells to embed are a file", f"none at {file}", "check the path")
    space = Workspace.at(workspace)
    from endoprint.encoder import backbone, embedding
    from endoprint.vocabulary import Vocabulary

    folder = backbone_folder(space, model, dictionaries=dictionaries)
    if vocabulary:
        spoken = load_vocabulary(vocabulary, dictionaries, space)
    elif (folder / backbone.VOCABULARY).is_file():
        spoken = Vocabulary.read(folder / backbone.VOCABULARY)
    else:
        series = embedding.series_of(folder)
        if series is None:
            raise Refusal(
                "a backbone is read with the vocabulary it was made with",
                f"none beside {folder.name}, and its shape is no published one",
                "name it with --vocabulary",
            )
        spoken = load_vocabulary(series, dictionaries, space)
    embedder = embedding.Embedder(folder, spoken, mode=modes[mode], layer=layers[layer])
    with progress.task("embed") as step:
        made = embedding.embed_file(
            Path(file),
            Path(out),
            embedder,
            counts=counts or None,
            key=key or embedding.KEY,
            watch=step.reach,
        )
    return made.to_json()
