"""Which genes answer to which exposure, and how strongly: the published figures, one small table.

`responses.csv` holds log2 fold changes against control for the genes that NOHA reports per
pathway. Source: "NOHA", bioRxiv 10.1101/2025.08.14.669814, repository GiuseppeTestaLab/noha (MIT),
edgeR on single cells, significant at FDR < .05; an empty cell means "not significant there".
Single figures from that source's bulk RNA of one line stand in their own columns. Ensembl ids are
GRCh38's.

Two kinds never mix:

- `measured`: seen to move in the atlas. Role `stress` marks genes that answer to many insults
  (hypoxia, heat shock, p53) and are poor proof of a pathway.
- `textbook`: targets every biologist expects (CYP1A1, GREB1, KLK3 ...) that the atlas did *not*
  show. They carry no effect size, because none was measured.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

import pandas as pd

Kind = Literal["measured", "textbook"]


def table(*, kind: Kind = "measured") -> pd.DataFrame:
    """Return the response genes of one kind, one row per gene and exposure.

    Columns: symbol, gene_id (Ensembl), exposure (canonical label), kind, role (response, stress),
    neurons_log2fc, progenitors_log2fc, bulk_log2fc (NaN: not significant or not reported),
    bulk_line. Sorted by exposure, then symbol.
    """
    with files("endoprint").joinpath("responses.csv").open("r", encoding="utf-8") as text:
        every = pd.read_csv(text, dtype={"bulk_line": str}, keep_default_na=True)
    return every[every["kind"] == kind].reset_index(drop=True)
