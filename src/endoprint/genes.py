"""Which gene a column is: Ensembl ids without version, symbols mapped where a map is given.

Shapes: G columns of the user's panel, K genes kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from endoprint.config import Refusal

Array = np.ndarray[Any, np.dtype[Any]]

HUMAN = re.compile(r"^(ENSG\d{11})(?:\.\d+)?(?:_PAR_Y)?$")  # GENCODE marks the Y copy so
ENSEMBL = re.compile(r"^ENS([A-Z]{0,6})[GTPE]\d{11}")
# Mouse symbols start with a capital and go on in small letters (Eya4, 1700024P16Rik, mt-Nd1);
# human ones do not, but for open reading frames (C1orf21).
MOUSE = re.compile(r"^(?!C(?:\d+|X|Y)orf\d)(?:[A-Z][a-z0-9]*[a-z][a-z0-9]*$|.*Rik\d*$|mt-[A-Z])")
# The 13 protein-coding genes of the human mitochondrion (Ensembl, GRCh38).
MITOCHONDRIAL = frozenset(
    f"ENSG00000{tail}"
    for tail in (
        *("198888", "198763", "198804", "198712", "228253", "198899", "198938"),
        *("198840", "212907", "198886", "198786", "198695", "198727"),
    )
)


@dataclass(frozen=True)
class Panel:
    """The genes of a file, once named: where each column goes, and why some go nowhere.

    `target` (G,) is the kept gene of each column or -1; `is_gene` (G,) is false for antibodies
    and tags; `genes` (K,) are the kept ids; `symbols` (K,) may be empty strings.
    """

    target: Array
    is_gene: Array
    genes: list[str]
    symbols: list[str]
    removed: dict[str, int]
    kind: str  # "ensembl" or "symbols"

    @property
    def coverage(self) -> float:
        """Share of the file's gene columns that were recognised."""
        return float((self.target[self.is_gene] >= 0).mean())

    @cached_property
    def index(self) -> pd.Index:
        """The kept genes' ids as an index, whose look-up table serves every block of cells."""
        return pd.Index(self.genes)

    @property
    def is_mitochondrial(self) -> Array:
        """Which kept genes stand on the mitochondrion's genome, (K,)."""
        return np.array(
            [
                gene in MITOCHONDRIAL or symbol.upper().startswith("MT-")
                for gene, symbol in zip(self.genes, self.symbols)
            ],
            dtype=bool,
        )

    def collect(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Return counts per kept gene, (n, K): columns of one gene summed, the rest left out."""
        if len(self.genes) == len(self.target) and np.array_equal(
            self.target, np.arange(len(self.target))
        ):
            return counts
        return remap(counts, self.target, len(self.genes))


def remap(counts: sparse.csr_matrix, target: Array, n_columns: int) -> sparse.csr_matrix:
    """Move column i to column `target[i]`, summing where several meet; -1 drops it."""
    column = target[counts.indices]
    kept = column >= 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[counts.indptr]
    moved = sparse.csr_matrix(
        (counts.data[kept], column[kept].astype(np.int32), indptr.astype(counts.indptr.dtype)),
        shape=(counts.shape[0], n_columns),
    )
    moved.sum_duplicates()  # sorts too
    return moved


def read_symbol_map(path: Path) -> dict[str, str]:
    """Read a JSON object of symbol -> Ensembl id, such as Geneformer's `gene_name_id_dict`."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refusal(
            "symbol_map names a JSON object of symbol: Ensembl id", str(error), "check the path"
        ) from None
    if not isinstance(found, dict) or not found:
        raise Refusal(
            "symbol_map names a JSON object of symbol: Ensembl id",
            f"{type(found).__name__} in {path.name}",
            "give a dictionary such as gene_name_id_dict",
        )
    ids = {}
    for symbol, gene in found.items():
        if match := HUMAN.match(str(gene)):
            ids[str(symbol)] = match.group(1)
    if not ids:
        raise Refusal(
            "symbol_map maps symbols to human Ensembl ids (ENSG...)",
            f"{next(iter(found.values()))!r} in {path.name}",
            "turn the dictionary round, or name another",
        )
    return ids


def name_genes(
    var: pd.DataFrame,
    *,
    gene_id_key: str | None,
    symbol_map: dict[str, str] | None,
    allow_symbols: bool,
    min_coverage: float,
) -> Panel:
    """Say which gene each column of a file is, or refuse in one line.

    Ensembl ids are taken from `gene_id_key` or `var_names`; where there are none, symbols are
    mapped case-sensitively, or kept as they are if `allow_symbols`.
    """
    names = _names(var, gene_id_key)
    is_gene = _is_gene_expression(var)
    is_human = np.array([HUMAN.match(name) is not None for name in names], dtype=bool)
    _refuse_strangers(names[is_gene], is_human[is_gene], gene_id_key)
    has_ids = bool(is_human[is_gene].any())
    if has_ids and not is_human[is_gene].all() and symbol_map is None:
        stranger = names[is_gene & ~is_human][0]
        raise Refusal(
            "gene ids are all Ensembl or all symbols",
            f"{int((is_gene & ~is_human).sum())} of {int(is_gene.sum())} are not ENSG ids "
            f"(first: {stranger!r})",
            "remove those columns, or name a symbol_map (unmapped genes are then counted out)",
        )
    if not has_ids and symbol_map is None and not allow_symbols:
        raise Refusal(
            "genes are named by human Ensembl ids (ENSG...)",
            f"names such as {', '.join(names[:3])}",
            "set gene_id_key to the var column of ids, symbol_map to a JSON of symbol: id, "
            "or allow_symbols: true",
        )
    removed: dict[str, int] = {}
    ids: list[str | None] = []
    for name, gene_here in zip(names, is_gene):
        gene, reason = _one(name, symbol_map, keep_symbol=not has_ids and symbol_map is None)
        if not gene_here:
            gene, reason = None, "not a gene-expression feature"
        if gene is None:
            removed[reason] = removed.get(reason, 0) + 1
        ids.append(gene)
    symbols = var["symbol"].astype(str) if "symbol" in var else pd.Series(var.index.astype(str))
    kind = "ensembl" if has_ids or symbol_map else "symbols"
    panel = _fold(ids, [str(symbol) for symbol in symbols], is_gene, removed, kind)
    _refuse_thin(panel, names, min_coverage)
    return panel


def _names(var: pd.DataFrame, gene_id_key: str | None) -> Array:
    if gene_id_key is None:
        names = pd.Series(var.index)
    elif gene_id_key in var:
        names = pd.Series(var[gene_id_key].to_numpy())
    else:
        raise Refusal(
            "gene_id_key names a column of var",
            f"no {gene_id_key!r} among {', '.join(map(str, var.columns)) or 'no columns'}",
            "set gene_id_key to one of them, or null for var_names",
        )
    missing = names.isna() | names.astype(str).str.strip().isin(["", "nan", "None", "NA"])
    if missing.any():
        raise Refusal(
            "every gene has an id",
            f"{int(missing.sum())} of {len(names)} missing",
            "fill them in, or drop those columns",
        )
    return names.astype(str).str.strip().to_numpy(dtype=object)


def _is_gene_expression(var: pd.DataFrame) -> Array:
    """CellRanger lists antibodies and multiplexing tags among the genes."""
    if "feature_types" not in var:
        return np.ones(len(var), dtype=bool)
    kept: Array = (var["feature_types"].astype(str) == "Gene Expression").to_numpy()
    if not kept.any():
        raise Refusal(
            'genes have feature type "Gene Expression"',
            f"only {', '.join(sorted(set(var['feature_types'].astype(str))))}",
            "give the gene-expression matrix, or drop the column feature_types",
        )
    return kept


def _refuse_strangers(names: Array, is_human: Array, gene_id_key: str | None) -> None:
    foreign = [
        name for name, human in zip(names, is_human) if not human and ENSEMBL.match(str(name))
    ]
    if foreign:
        raise Refusal(
            "gene ids are human Ensembl gene ids (ENSG...)",
            f"{len(foreign)} of {len(names)} such as {foreign[0]}",
            "map them to human genes first",
        )
    mouse = sum(MOUSE.match(str(name)) is not None for name in names)
    if mouse > len(names) / 2:
        raise Refusal(
            "genes are human",
            f"{mouse} of {len(names)} names are spelled as mouse symbols, such as {names[0]}",
            "map them to human genes first"
            + ("" if gene_id_key is None else f" (read from var column {gene_id_key!r})"),
        )


def _one(
    name: str, symbol_map: dict[str, str] | None, *, keep_symbol: bool
) -> tuple[str | None, str]:
    """Return the gene of one name, or None and why."""
    if match := HUMAN.match(name):
        return match.group(1), ""
    if symbol_map is not None and name in symbol_map:
        return symbol_map[name], ""
    if MOUSE.match(name):
        # upper-casing would merge it with the human gene of that name, another species' reads
        return None, "mouse-style symbol"
    return (name, "") if keep_symbol else (None, "symbol not in symbol_map")


def _fold(
    ids: Sequence[str | None],
    symbols: Sequence[str],
    is_gene: Array,
    removed: dict[str, int],
    kind: str,
) -> Panel:
    place: dict[str, int] = {}
    kept_symbols: list[str] = []
    target = np.full(len(ids), -1, dtype=np.int64)
    n_merged = 0
    for column, gene in enumerate(ids):
        if gene is None:
            continue
        if gene in place:
            n_merged += 1
        else:
            place[gene] = len(place)
            symbol = symbols[column]
            kept_symbols.append("" if HUMAN.match(symbol) else symbol)
        target[column] = place[gene]
    if n_merged:
        removed = {**removed, "summed into another column of the same gene": n_merged}
    return Panel(target, is_gene, list(place), kept_symbols, removed, kind)


def _refuse_thin(panel: Panel, names: Array, min_coverage: float) -> None:
    share = panel.coverage
    if share < min_coverage:
        unmapped = names[panel.is_gene & (panel.target < 0)][0]
        raise Refusal(
            f"at least {min_coverage:.0%} of the genes are recognised (min_gene_coverage)",
            f"{share:.1%} of {int(panel.is_gene.sum())} (first unknown: {unmapped!r})",
            "check symbol_map and gene_id_key",
        )
