"""A disk that fills while tokens are written: one line, and the old tokens stay whole."""

from __future__ import annotations

import errno

import pyarrow.parquet as pq
import pytest

from conftest import planted_cells
from endoprint import curated, tokens
from endoprint.config import Refusal
from endoprint.tokens import Vocabulary


def test_a_disk_that_fills_while_tokens_are_cached_leaves_the_old_ones_whole(
    tmp_path, monkeypatch
):
    cells = planted_cells(n_units=2, n_cells=8)
    source, out = tmp_path / "cells.h5ad", tmp_path / "tokens" / "cells.parquet"
    curated.write(cells, source)
    vocabulary = Vocabulary.fit(cells)
    tokens.tokenize_file(source, out, vocabulary, minibatch=16)
    before = out.read_bytes()
    write_table, written = pq.ParquetWriter.write_table, []

    def fills(writer, table, *rest, **more):
        if len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(table))
        write_table(writer, table, *rest, **more)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fills)
    with pytest.raises(Refusal, match="whole or not at all; got .*No space left.*; make room"):
        tokens.tokenize_file(source, out, vocabulary, minibatch=16)
    assert written == [16], "it filled in the middle"
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    monkeypatch.undo()
    found = tokens.of(cells, vocabulary, out)
    assert found.values.tolist() == tokens.of(cells, vocabulary).values.tolist()
