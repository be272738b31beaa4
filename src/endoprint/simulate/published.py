"""Real effects for those who have them: a table of measured fold changes instead of drawn ones.

The table is NOHA's edgeR summary in one CSV (gene, celltype, condition, log2FC, logCPM; only
significant rows; repository GiuseppeTestaLab/noha, MIT). It carries that atlas's run confounding
with it: each exposure was one run, control one other, so what they share is partly the runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from endoprint.config import Refusal

COLUMNS = ["gene", "celltype", "condition", "log2FC", "logCPM"]


def read_effects(
    path: Path,
    names: Path | None,
    *,
    n_genes: int,
    exposures: tuple[str, ...],
    cell_types: tuple[str, ...],
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return the best expressed genes of a table of effects, their effects and control's level.

    path: CSV as above, optionally with a column gene_id; names: JSON of symbol: Ensembl id where
    it has none. Genes without an id are left out; a gene not listed for an exposure does not move.
    Returns genes (gene_id, symbol), log2 fold changes (E, T, G), control's log2 CPM (T, G).
    """
    table = _with_ids(_read(path), names, path)
    for column, known in (("condition", exposures), ("celltype", cell_types)):
        strange = sorted(set(table[column].astype(str)) - set(known))
        if strange:
            raise Refusal(
                f"{path.name}: {column} is one of {', '.join(known)}",
                ", ".join(strange[:5]),
                "spell it so, or leave those rows out",
            )
    by_gene = table.groupby("gene_id").agg(symbol=("gene", "min"), level=("logCPM", "mean"))
    if len(by_gene) < n_genes:
        raise Refusal(
            f"{path.name} holds as many genes as the panel",
            f"{len(by_gene)} with an id for genes: {n_genes}",
            "ask for fewer genes or give a fuller name map",
        )
    chosen = by_gene.sort_values(["level", "symbol"], ascending=[False, True]).index[:n_genes]
    genes = by_gene.loc[chosen, ["symbol"]].sort_index().reset_index()
    rows = table[table["gene_id"].isin(chosen)]
    e, t, g = (
        pd.Index(known).get_indexer(pd.Index(rows[column]))
        for column, known in (
            ("condition", exposures),
            ("celltype", cell_types),
            ("gene_id", genes["gene_id"]),
        )
    )
    effect = np.zeros((len(exposures), len(cell_types), n_genes))
    effect[e, t, g] = rows["log2FC"]
    level = rows.pivot_table(index="celltype", columns="gene_id", values="logCPM")
    level = level.reindex(index=list(cell_types), columns=genes["gene_id"])
    mean_level = level.fillna(level.mean()).to_numpy()
    # logCPM averages over all samples, exposed ones included: take that share out again
    return genes, effect, mean_level - np.log2(np.exp2(effect).mean(axis=0))


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise Refusal(
            "a table of effects is a CSV", f"{path.name}: {error}", "give its path in effects"
        ) from None
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise Refusal(
            f"a table of effects has the columns {', '.join(COLUMNS)}",
            f"{path.name} without {', '.join(missing)}",
            "rename or add them",
        )
    numbers = table[["log2FC", "logCPM"]].apply(pd.to_numeric, errors="coerce")
    if not np.isfinite(numbers.to_numpy()).all():
        raise Refusal(
            "log2FC and logCPM are finite numbers",
            f"{path.name} with other values",
            "leave those rows out",
        )
    return table.assign(log2FC=numbers["log2FC"], logCPM=numbers["logCPM"])


def _with_ids(table: pd.DataFrame, names: Path | None, path: Path) -> pd.DataFrame:
    if "gene_id" not in table:
        if names is None:
            raise Refusal(
                "every gene of a table of effects has an Ensembl id",
                f"{path.name} without a column gene_id",
                "add it, or give effects_names: a JSON of symbol: Ensembl id",
            )
        try:
            ids = json.loads(names.read_text())
        except (OSError, ValueError) as error:
            raise Refusal(
                "effects_names is a JSON of symbol: Ensembl id", str(error), "give another file"
            ) from None
        if not isinstance(ids, dict):
            raise Refusal(
                "effects_names is a JSON of symbol: Ensembl id",
                type(ids).__name__,
                "give another file",
            )
        table = table.assign(gene_id=table["gene"].map(ids))
    table = table.dropna(subset=["gene_id", "gene"])
    # two symbols of one id: the first by name stays, so that no effect counts twice
    first = table.groupby("gene_id")["gene"].transform("min")
    return table[table["gene"] == first].drop_duplicates(["gene_id", "celltype", "condition"])
