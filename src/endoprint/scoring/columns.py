"""What every published column of scores means: the one place that says it.

The parquet carries the same words as metadata of its fields. E exposures.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

FORMAT = 3  # of the rows; a change of their columns or meaning makes every job a new one

NO_GENES = "no counts in the model's genes"
NO_ANSWER = "the model gave no finite answer"


@dataclass(frozen=True)
class Column:
    """One column of scores: its name, type and meaning."""

    name: str
    kind: str  # text | number | whole | truth
    meaning: str


P = "p_<exposure>"  # stands for one column per exposure of the model

COLUMNS = (
    Column("file", "text", "name of the file the cell came in"),
    Column("cell_id", "text", "the cell's id in that file; rows keep the file's order"),
    Column("sample", "text", "the tube it came from (cells.sample_key, else unit and batch)"),
    Column("unit", "text", "its independent biological unit; empty where the file tells none"),
    Column(P, "number", "calibrated probability of each exposure; empty for a quarantined cell"),
    Column("call", "text", "the most probable exposure; empty for a quarantined cell"),
    Column("confidence", "number", "the call's probability"),
    Column("second_call", "text", "the second most probable exposure"),
    Column("second_confidence", "number", "its probability"),
    Column("novelty", "number", "distance to the nearest training cells in the model's embedding"),
    Column("is_novel", "truth", "farther than 95 % of every validation unit's cells were"),
    Column("is_unsure", "truth", "confidence where calls on validation units were mostly wrong"),
    Column("abstain", "truth", "the call is withheld: novel, unsure or quarantined"),
    Column("quarantine", "text", "why the cell could not be trusted or judged; empty: it could"),
    Column("n_counts", "number", "library size: all counts of the cell"),
    Column("n_genes", "whole", "genes detected"),
    Column("known_share", "number", "share of its counts that lie in the model's genes"),
    Column("model_version", "text", "version of the registered model"),
    Column("model_sha256", "text", "digest of the model's files"),
    Column("input_md5", "text", "digest of the file's bytes"),
    Column("job_key", "text", "what the job is known by: the same key, the same rows"),
)

TYPES = {"text": pa.string(), "number": pa.float64(), "whole": pa.int64(), "truth": pa.bool_()}


def few_words(of: pa.Schema) -> list[str]:
    """Return the columns of few different words: a dictionary is built for no other."""
    return [each.name for each in of if pa.types.is_string(each.type) and each.name != "cell_id"]


def schema(exposures: list[str]) -> pa.Schema:
    """Return the schema of scores that tell these exposures apart."""
    fields = []
    for column in COLUMNS:
        names = [f"p_{each}" for each in exposures] if column.name == P else [column.name]
        about = {"meaning": column.meaning}
        fields += [pa.field(name, TYPES[column.kind], metadata=about) for name in names]
    return pa.schema(fields)
