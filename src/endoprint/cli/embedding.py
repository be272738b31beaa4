"""The command that embeds cells: embed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from endoprint import jobs
from endoprint.cli import Folder, Json, app, say


@app.command()
def embed(
    file: Annotated[Path, typer.Argument(help="cells: h5ad, 10x .h5 or zarr")],
    out: Annotated[Path, typer.Argument(help=".h5ad: a copy with obsm; else parquet")],
    model: Annotated[
        str, typer.Option(help="a folder, or V1-10M | V2-104M | V2-104M_CLcancer | V2-316M")
    ],
    mode: Annotated[str, typer.Option(help="cell: mean over genes | cls")] = "cell",
    layer: Annotated[str, typer.Option(help="second-to-last | last")] = "second-to-last",
    vocabulary: Annotated[
        str, typer.Option(help="v1 | v2 | a folder or JSON; none: the model's own")
    ] = "",
    dictionaries: Annotated[
        Path | None, typer.Option(help="folder of the official dictionaries; none: fetched")
    ] = None,
    counts: Annotated[str, typer.Option(help="where raw counts are: a layer, raw; none: X")] = "",
    key: Annotated[str, typer.Option(help="of obsm; default: X_geneformer")] = "",
    workspace: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Write one Geneformer vector per cell, in input order."""
    made = jobs.embed(
        str(file),
        out=str(out),
        model=str(Path(model).resolve()) if Path(model).is_dir() else model,
        mode=mode,
        layer=layer,
        vocabulary=vocabulary,
        dictionaries=str(dictionaries or ""),
        counts=counts,
        key=key,
        workspace=str(workspace),
    )
    about = made["about"]
    lines = [
        f"{made['n_cells']} cells, {made['width']} numbers each ({mode}, {layer}): {made['path']}",
        f"backbone: {about['backbone']}; vocabulary: {about['vocabulary']}",
    ]
    if made["n_empty"]:
        lines.append(f"{made['n_empty']} cells without a gene of the vocabulary have NaN")
    say(made, "\n".join(lines), as_json)
